"""What the fault tests share: a tiny model in three shards, places to write to, and the server that runs merges."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.oracle import Tensor, from_f32, save_file

HERE = Path(__file__).parent
# The whole proof takes minutes; an ordinary test run does a part of it.
LONG = os.environ.get("SAFEPATCH_LONG") == "1"
KILL, TORN, TERM, INTERRUPT = -1, -2, -3, -4  # as in shim.c
ERRNOS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
STEM = "model-0000{}-of-00003.safetensors"
# Bytes after which the beginning of a file is made durable: a shard of `write_model` has a mark in its middle.
MARK_BYTES = 3000


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int  # exit status, or minus the number of the signal that killed it
    hung: bool
    text: str  # stdout and stderr
    calls: list[str]  # counted calls: name and path
    peak: int  # resident bytes

    def said(self) -> str:
        """The one line of a failure."""
        lines = [line for line in self.text.splitlines() if line.startswith("safepatch:")]
        assert len(lines) == 1 and "Traceback" not in self.text, self.text
        return lines[0]


class Server:
    """An interpreter with the shim loaded that runs `safepatch` in forked children."""

    def __init__(self, shim: Path) -> None:
        env = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), env.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, HERE / "server.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
        )

    def __call__(
        self,
        *args: object,
        fault: dict[str, Any] | None = None,
        signal: tuple[int, float] | None = None,
        limits: dict[str, int] | None = None,
        cwd: Path | None = None,
        timeout: float = 60,
        chunk: int | None = None,
        mark_bytes: int | None = None,
        past_cache: bool = False,
    ) -> Ended:
        """Run a command; `fault` are the arguments of the shim, `signal` a number and after how many seconds.

        chunk: entries per unit of its merges. mark_bytes: after how many a file's beginning is marked.
        past_cache: files are read and written past the page cache, as large ones are.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {
            "args": [str(a) for a in args],
            "fault": fault,
            "signal": signal,
            "limits": limits or {},
            "cwd": str(cwd or Path.cwd()),
            "timeout": timeout,
            "chunk": chunk,
            "mark_bytes": mark_bytes,
            "past_cache": past_cache,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


def fault(place: Path, at: int, how: int, stays: bool = False) -> dict[str, Any]:
    return {"dir": str(place), "at": at, "how": how, "stays": stays}


def build_shim(folder: Path) -> Path:
    shim = folder / "shim.so"
    source = HERE / "shim.c"
    command = ["cc", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", str(shim), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return shim


@contextmanager
def memory_directory() -> Iterator[Path]:
    """A scratch directory in memory where there is one: thousands of fsyncs are to take seconds."""
    shm = Path("/dev/shm")
    place = shm if shm.is_dir() and os.access(shm, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="safepatch-", dir=place) as folder:
        yield Path(folder).resolve()


def bf16(rng: np.random.Generator, *shape: int) -> Tensor:
    return Tensor("BF16", shape, from_f32(rng.standard_normal(shape).astype(np.float32).ravel(), "BF16"))


def write_model(root: Path, seed: int, rows: int = 48, cols: int = 40, layers: int = 2) -> None:
    """A checkpoint of three shards with an index, a config and a tokenizer; `seed` 0 is the base."""
    base, rng = np.random.default_rng(0), np.random.default_rng(seed)
    root.mkdir(parents=True)
    weight_map = {}
    for shard in (1, 2, 3):
        tensors = {f"layers.{shard}.norm.weight": bf16(base, cols)}
        for layer in range(layers):
            name, weights = f"layers.{shard}.{layer}.weight", bf16(base, rows, cols)
            if seed:
                kept = np.frombuffer(weights.data, "<u2").copy()
                kept[rng.random(kept.size) < 0.2] ^= 0x21
                weights = Tensor("BF16", (rows, cols), kept.tobytes())
            tensors[name] = weights
        if shard == 1:
            tensors["embed.weight"] = bf16(base, rows, cols)
        file = STEM.format(shard)
        save_file(root / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "config.json").write_text('{"model_type": "llama"}\n')
    (root / "tokenizer.json").write_text('{"version": "1.0"}\n')


def write_recipe(root: Path, name: str = "recipe.yaml", **changes: Any) -> Path:
    recipe: dict[str, Any] = {
        "base": "base",
        "patches": [
            {"name": "safety", "source": "safety", "top": 0.3, "retain": 0.5},
            {"name": "over-safety", "source": "over-safety", "top": 0.2, "retain": 0.5},
        ],
    }
    path = root / name
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if not p.is_dir()}


def restore(place: Path, out: dict[str, bytes] | None) -> Path:
    """Empty `place` but for the output `out` in it; the output's path."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    target = place / "out"
    for name, data in (out or {}).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
    return target


@dataclass
class Bench:
    """A tiny merge, an older complete output of it and the new one that a merge without faults gives."""

    run: Server
    root: Path
    recipe: Path
    old: dict[str, bytes]
    new: dict[str, bytes]
    past_cache: bool = False

    def merge(self, place: Path, *options: str, **how: Any) -> Ended:
        args = ("merge", self.recipe, "-o", place / "out", "--backend", "cpu", "--threads", 1, *options)
        return self.run(*args, mark_bytes=MARK_BYTES, past_cache=self.past_cache, **how)

    def calls(self, place: Path, old: bool) -> list[str]:
        """The counted calls of an undisturbed merge, in order."""
        restore(place, self.old if old else None)
        ended = self.merge(place, "--force", fault=fault(place, 0, KILL))
        assert ended.status == 0, ended.text
        return ended.calls

    def check_output(self, place: Path, old: bool) -> str:
        """What stands at the output now: `old`, `new` or `none`; anything else is the failure of these tests."""
        out = place / "out"
        if not out.exists() and not old:
            return "none"
        found = contents(out)
        assert found in (self.old, self.new), f"a mix: {sorted(found)}"
        return "new" if found == self.new else "old"

    def check_finished(self, place: Path, ended: Ended) -> None:
        assert ended.status == 0, ended.text
        assert contents(place / "out") == self.new
        assert os.listdir(place) == ["out"], "something temporary remains"


def make_bench(folder: Path, run: Server) -> Bench:
    for seed, name in enumerate(("base", "safety", "over-safety")):
        write_model(folder / name, seed)
    outputs: list[dict[str, bytes]] = []
    for seed in (1, 0):
        recipe = write_recipe(folder, seed=seed)
        place = folder / f"clean-{len(outputs)}"
        ended = run("merge", recipe, "-o", place, "--backend", "reference")
        assert ended.status == 0, ended.text
        subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=place, check=True)
        outputs.append(contents(place))
    # An older output may hold more than a merge writes, and folders.
    outputs[0]["original/consolidated.pth"] = b"not ours"
    old, new = outputs
    return Bench(run, folder, recipe, old, new)


def real_command(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`safepatch` in an interpreter of its own."""
    command = [sys.executable, "-m", "safepatch_core", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
