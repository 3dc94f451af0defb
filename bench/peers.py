"""What else one would use, on the same files, alternating with safepatch in one run."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.spec import Kind

from . import models
from .measure import Failed, Red, Skipped, alternate, prepared, remove, run
from .merges import SIZES, equals_reference, inputs, merge_command, merge_subject, output_bytes
from .models import SHAPES
from .registry import Bench, Case, Measured

HERE = Path(__file__).resolve().parent
# Each method with the parameters that keep about what the suite's recipe keeps.
MERGEKIT: dict[str, dict[str, float]] = {
    "task_arithmetic": {},
    "dare_linear": {"density": 0.3},
    "dare_ties": {"density": 0.3},
    "ties": {"density": 0.03},
    "della": {"density": 0.3, "epsilon": 0.1},
}
# Methods whose YAML both programs take, computed in float32 as safepatch computes.
YAML: dict[str, dict[str, float]] = {
    "task_arithmetic": {},
    "ties": {"density": 0.3},
    "dare_ties": {"density": 0.3},
    "breadcrumbs": {"density": 0.3, "gamma": 0.01},
}
FLOAT32 = {"dtype": "float32", "out_dtype": "bfloat16"}
PEFT = ("linear", "dare_linear", "ties")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

# -P: the suite's modules are not to be imported by scripts that lie beside them.
PYTHON = [sys.executable, "-P"]

Command = Callable[[Bench, Path, Path], list[str]]  # run, set of models, output → words


def _config(method: str, parameters: dict[str, float], dtypes: dict[str, str], folder: Path, path: Path) -> Path:
    """Write a mergekit configuration of a set's two patches."""
    of = [
        {"model": str((folder / name).resolve()), "parameters": {"weight": 1.0, **parameters}}
        for name in models.PATCHES
    ]
    base = str((folder / "base").resolve())
    path.write_text(json.dumps({"merge_method": method, "base_model": base, **dtypes, "models": of}))
    return path


def _mergekit(config: Path, bench: Bench, out: Path) -> list[str]:
    program = bench.mergekit or shutil.which("mergekit-yaml")
    if program is None:
        raise Skipped("mergekit-yaml is not on the PATH (--mergekit names it)")
    return [program, str(config), str(out), "--quiet", "--no-copy-tokenizer", "--random-seed", "0"]


def mergekit(method: str, bench: Bench, folder: Path, out: Path) -> list[str]:
    config = _config(method, MERGEKIT[method], {"dtype": "bfloat16"}, folder, out.with_suffix(".yaml"))
    return _mergekit(config, bench, out)


def same_yaml(method: str, bench: Bench, folder: Path, out: Path) -> list[str]:
    """mergekit on the configuration that safepatch is given."""
    return _mergekit(_config(method, YAML[method], FLOAT32, folder, out.with_suffix(".yaml")), bench, out)


def needs(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"{', '.join(missing)} is not installed")


def plain_torch(scope: str, bench: Bench, folder: Path, out: Path) -> list[str]:
    needs("torch", "safetensors")
    return [*PYTHON, str(HERE / "plain_torch.py"), str(models.recipe_path(folder, scope=scope)), str(out)]


def _peft(method: str, bench: Bench, folder: Path, out: Path) -> list[str]:
    needs("torch", "transformers", "peft")
    adapters = [str(folder / models.source_name(name, "lora")) for name in models.PATCHES]
    return [*PYTHON, str(HERE / "peft_merge.py"), method, str(folder / "base"), *adapters, str(out)]


def check_output(base: Path, out: Path) -> None:
    """Raises Red unless a peer's output is a whole model that differs from its base."""
    try:
        before, after = open_checkpoint(base), open_checkpoint(out)
    except InputError as error:
        raise Red(f"the peer's output can't be opened: {error}") from None
    for name, entry in before.tensors.items():
        found = after.tensors.get(name)
        if found is None or (found.dtype, found.shape) != (entry.dtype, entry.shape):
            raise Red(f"the peer's output lacks '{name}' as it is in the base")


def _gate(command: Command, kind: Kind, scope: str, bench: Bench) -> None:
    """safepatch equals the reference, and the peer makes a whole model of a small set."""
    equals_reference(bench, [(kind, scope)])
    folder = bench.models(SHAPES["tiny"], (kind,))
    with bench.scratch() as scratch:
        words = command(bench, folder, scratch / "peer")
        try:
            run(words, timeout=bench.timeout, env=OFFLINE)
        except Failed as error:
            if words[0] == sys.executable:  # a script of the suite itself
                raise
            raise Skipped(str(error)) from None
        check_output(folder / "base", scratch / "peer")


def _values(folder: Path) -> dict[str, bytes]:
    """The tensors' bytes, zeros without a sign: mergekit loses it."""
    found = {}
    for name, entry in open_checkpoint(folder).tensors.items():
        bits = np.fromfile(entry.path, np.uint16, entry.entries, offset=entry.start)
        found[name] = np.where(bits == 0x8000, 0, bits).tobytes()
    return found


def _gate_yaml(method: str, bench: Bench) -> None:
    """Of a small set both make a whole model; of task_arithmetic, which promises it, the same one."""
    folder = bench.models(SHAPES["tiny"])
    with bench.scratch() as scratch:
        words = same_yaml(method, bench, folder, scratch / "peer")
        run(merge_command(bench, scratch / "peer.yaml", scratch / "ours"), timeout=bench.timeout)
        try:
            run(words, timeout=bench.timeout, env=OFFLINE)
        except Failed as error:
            raise Skipped(str(error)) from None
        for out in (scratch / "peer", scratch / "ours"):
            check_output(folder / "base", out)
        if method == "task_arithmetic" and _values(scratch / "peer") != _values(scratch / "ours"):
            raise Red("mergekit and safepatch make other models of one task_arithmetic")


def _measure(
    size: str, peer: str, command: Command, kind: Kind, scope: str, bench: Bench, *, shared: bool = False
) -> Measured:
    """Both on the same files; `shared`: and on the configuration that the peer's command has written."""
    folder = bench.models(SHAPES[size], (kind,))
    files, written = inputs(folder, kind), output_bytes(folder)
    moved = written + sum(path.stat().st_size for path in files)
    facts: dict[str, Any] = {"entries": SHAPES[size].entries}
    with bench.scratch() as scratch, prepared(files, "warm", 2 * written) as before:
        out = scratch / "peer"
        words = command(bench, folder, out)

        def subject() -> dict[str, float]:
            try:
                cost, _ = run(words, timeout=bench.timeout, env=OFFLINE)
            except Failed as error:
                raise Skipped(f"at {size}: {error}") from None
            remove(out)
            return {**cost._asdict(), "moved_bytes_per_s": moved / cost.wall_s}

        recipe = out.with_suffix(".yaml") if shared else models.recipe_path(folder, kind, scope)
        ours = merge_subject(bench, recipe, scratch / "out", facts)
        series = alternate({"safepatch": ours, peer: subject}, bench.rounds, before)
    return Measured(series, [(peer, "safepatch")], facts)


def cases() -> list[Case]:
    """Cases of the group `peers`."""
    peers: dict[str, tuple[Command, Kind, str]] = {
        f"mergekit-{method}": (partial(mergekit, method), "checkpoint", "tensor") for method in MERGEKIT
    }
    for scope in ("tensor", "model"):
        peers[f"plain-torch-{scope}"] = (partial(plain_torch, scope), "checkpoint", scope)
    for method in PEFT:
        peers[f"peft-{method}"] = (partial(_peft, method), "lora", "tensor")
    return [*_shared_cases(), *_cases(peers)]


def _shared_cases() -> list[Case]:
    return [
        Case(
            f"peers/{size}/yaml-{method}",
            f"one mergekit YAML of {method} in float32, by mergekit and safepatch merge, {size}, warm, alternating",
            {"size": size, "entries": SHAPES[size].entries, "peer": f"mergekit-{method}"},
            partial(_gate_yaml, method),
            partial(
                _measure, size, f"mergekit-{method}", partial(same_yaml, method), "checkpoint", "tensor", shared=True
            ),
        )
        for size in SIZES
        for method in YAML
    ]


def _cases(peers: dict[str, tuple[Command, Kind, str]]) -> list[Case]:
    return [
        Case(
            f"peers/{size}/{peer}",
            f"{peer} and safepatch merge on the same {size} files, warm, alternating",
            {"size": size, "entries": SHAPES[size].entries, "peer": peer},
            partial(_gate, command, kind, scope),
            partial(_measure, size, peer, command, kind, scope),
            short=size == "0.1B" and peer in ("mergekit-dare_ties", "plain-torch-tensor"),
        )
        for size in SIZES
        for peer, (command, kind, scope) in peers.items()
    ]
