"""Nothing in a checkpoint is executed, and nothing goes over the network."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.harness import Bench, real_command, restore

EVIL = "import pathlib; pathlib.Path({!r}).write_text('executed')\n"
# Any attempt to open a connection, to look up a name, to unpickle or to start a program ends the process.
WATCHED = """
import os, sys
FORBIDDEN = ("socket.", "pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
def watch(event, args):
    if event.startswith(FORBIDDEN):
        sys.stderr.write(f"forbidden: {event} {args}")
        os._exit(99)
sys.addaudithook(watch)
from safepatch_core.commands.cli import main
sys.argv = ["safepatch", *sys.argv[1:]]
main()
"""


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (EVIL.format(str(self.marker)),)


@pytest.fixture
def booby_trapped(bench: Bench, tmp_path: Path) -> tuple[Path, Path]:
    """Models that ask to have their code run in every way that loaders know, and the file that tells it was."""
    marker = tmp_path / "executed"
    for name in ("base", "safety", "over-safety"):
        root = tmp_path / name
        shutil.copytree(bench.root / name, root)
        auto_map = {key: "modeling_evil.Evil" for key in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
        config = {"model_type": "evil", "architectures": ["Evil"], "auto_map": auto_map, "trust_remote_code": True}
        (root / "config.json").write_text(json.dumps(config))
        (root / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
        for code in (
            "modeling_evil.py",
            "configuration_evil.py",
            "evil.py",
            "__init__.py",
            "conftest.py",
            "numpy.py",
        ):
            (root / code).write_text(EVIL.format(str(marker)))
        for pickled in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
            (root / pickled).write_bytes(pickle.dumps(Evil(marker)))
    shutil.copyfile(bench.recipe, tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml", marker


def commands(recipe: Path, out: Path) -> list[list[object]]:
    return [
        ["plan", recipe, "--backend", "cpu"],
        ["merge", recipe, "-o", out, "--backend", "cpu", "--quiet"],
        ["verify", out],
        ["verify", out, "--recipe", recipe, "--backend", "cpu"],
    ]


def test_nothing_of_a_checkpoint_is_executed(booby_trapped: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, marker = booby_trapped
    for args in commands(recipe, tmp_path / "out"):
        ended = real_command(*args, cwd=recipe.parent / "base", env={**os.environ, "PYTHONSAFEPATH": "1"})
        assert ended.returncode == 0, ended.stderr
        assert not marker.exists(), args
    names = os.listdir(tmp_path / "out")
    assert not [name for name in names if name.endswith((".py", ".bin", ".pt"))]


def test_pickles_are_refused_unread(booby_trapped: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, marker = booby_trapped
    for path in (recipe.parent / "base").glob("*.safetensors*"):
        path.unlink()
    ended = real_command("merge", recipe, "-o", tmp_path / "out")
    assert ended.returncode == 65 and "pickle" in ended.stderr and not marker.exists()


@pytest.mark.parametrize("load", ["derive", "eval"])
def test_auto_map_is_never_executed_by_training_or_eval(
    booby_trapped: tuple[Path, Path], tmp_path: Path, load: str
) -> None:
    recipe, marker = booby_trapped
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "q", "answer": "a"}\n' * 4)
    args: dict[str, list[object]] = {
        "derive": ["derive", "--model", recipe.parent / "base", "--data", data, "-o", tmp_path / "run"],
        "eval": ["eval", recipe.parent / "base", "-o", tmp_path / "report"],
    }
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1"}
    ended = real_command(*args[load], env=env)
    assert ended.returncode == 65 and "custom code" in ended.stderr, ended.stderr
    assert not marker.exists()


def test_no_network_is_used(bench: Bench, place: Path) -> None:
    """Every command runs where there is no network at all."""
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("a network namespace can't be made here")
    out = restore(place, None)
    for args in commands(bench.recipe, out):
        command = ["unshare", "-n", sys.executable, "-m", "safepatch_core", *map(str, args)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr


def test_no_connection_pickle_or_program_is_even_tried(bench: Bench, place: Path) -> None:
    """The same under an audit hook that ends the process at the first attempt."""
    out = restore(place, None)
    for args in commands(bench.recipe, out):
        command = [sys.executable, "-c", WATCHED, *map(str, args)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
