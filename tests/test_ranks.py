"""Several ranks under torchrun give the bytes of one; a rank that dies leaves what was published untouched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from safepatch_core import merge
from safepatch_core.version import __version__
from tests.test_cli import write_safetensors

pytest.importorskip("torch", reason="ranks talk through torch.distributed")


def model(root: Path, entries: int) -> None:
    """A base of five tensors in one file and two patches whose deltas tie heavily."""
    rng = np.random.default_rng(5)
    names = ["b.weight", "a.weight", "model.norm", "c.10.weight", "c.9.weight"]
    base = {n: rng.standard_normal((entries, 8), dtype=np.float32) for n in names}
    base["model.norm"] = np.ones(13, dtype=np.float32)
    write_safetensors(root / "base" / "model.safetensors", base)
    for patch in ("safety", "over-safety"):
        step = np.float32(2.0**-10)
        changed = {
            n: t + step * rng.integers(-3, 4, t.shape).astype(np.float32) if t.ndim == 2 else t
            for n, t in base.items()
        }
        write_safetensors(root / patch / "model.safetensors", changed)


def recipe(root: Path, scope: str, extra: str = "") -> Path:
    path = root / f"{scope}.yaml"
    path.write_text(
        f"base: base\nscope: {scope}\n{extra}patches:\n"
        "  - {name: safety, source: safety, top: 0.2, retain: 0.5}\n"
        "  - {name: over-safety, source: over-safety, top: 0.1}\n"
    )
    return path


ROOT = Path(__file__).parents[1]
VERSION = f"safepatch, version {__version__}\n"


def torchrun(ranks: int, chunk: int, *args: str | Path) -> list[str | Path]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, "-m", "tests.chunked", str(chunk), "merge", *args, "--quiet"]


def files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


LOOKING = "agreement: {patch: over-safety, signs: opposite}, gate: {patch: over-safety, below: 0.0}"


# Without the patch that looks at another one, what a rank counts of a whole model is listed.
CASES = [("model", 2, "", LOOKING), ("model", 2, "", ""), ("tensor", 3, "max_shard_size: 9KB\n", LOOKING)]


@pytest.mark.parametrize(("scope", "ranks", "extra", "looking"), CASES)
def test_any_number_of_ranks_gives_the_same_bytes(
    tmp_path: Path, scope: str, ranks: int, extra: str, looking: str
) -> None:
    model(tmp_path, 50)
    path = recipe(tmp_path, scope, extra)
    with open(path, "a") as file:
        file.write(f"  - {{name: looking, source: safety, top: 0.3, {looking}}}\n" if looking else "")
    merge(path, tmp_path / "one", backend="reference")
    command = torchrun(ranks, 64, path, "-o", tmp_path / "many", "--backend", "cpu")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert files(tmp_path / "many") == files(tmp_path / "one")
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(("ranks", "told"), [("1", f"{VERSION}at exit\n"), ("2", VERSION)])
def test_a_rank_ends_without_its_interpreter(ranks: str, told: str) -> None:
    """What it printed is out, and nothing that outlasts its group can abort what is done."""
    program = "import atexit; atexit.register(print, 'at exit'); from safepatch_core.commands.cli import main; main()"
    env = {**os.environ, "WORLD_SIZE": ranks}
    result = subprocess.run(
        [sys.executable, "-c", program, "--version"], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, told, "")


def test_a_rank_that_dies_leaves_the_published_output(tmp_path: Path) -> None:
    model(tmp_path, 4000)
    path = recipe(tmp_path, "model")
    out = tmp_path / "out"
    out.mkdir()
    (out / "older").write_text("published before")
    # Thousands of units: time enough to be killed.
    command = torchrun(2, 16, path, "-o", out, "--backend", "cpu", "--force")
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stage = tmp_path / ".out.safepatch"
    end = time.monotonic() + 60
    while not stage.exists():
        assert run.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    assert run.wait(timeout=60) != 0
    assert files(out) == {"older": b"published before"}
    merge(path, out, backend="cpu", resume=True, force=True)
    merge(path, tmp_path / "undisturbed", backend="cpu")
    assert files(out) == files(tmp_path / "undisturbed")
