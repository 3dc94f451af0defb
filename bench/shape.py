"""Any model's shapes on any disk: sparse files with real values scattered in every tensor."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.files.header import make_header
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.api import merge
from safepatch_core.sizes import parse_size

from . import models
from .fixes import always, applies, shards
from .measure import Red, alternate, remove, run, safepatch
from .merges import SPARSE, equals_reference, merge_subject
from .models import SHAPES, ModelShape, is_target
from .registry import Bench, Case, Measured

NAMES = ("SmolLM2-135M", "6B", "Llama-3-8B", "Mixtral-8x7B", "Llama-3-70B", "Llama-3.1-405B")
FIXED = ("SmolLM2-135M", "Llama-3-8B", "Llama-3-70B")
LIMIT = "1GiB"
SAMPLE_ENTRIES = 200_000_000  # at most so many, in all, are recomputed by the reference engine
PIECE = 16 << 20


def sample(shape: ModelShape) -> list[str]:
    """Tensors to recompute with the reference engine: one of each kind of target, from different layers, the
    smallest first as long as they are not too many entries."""
    kinds: dict[str, list[str]] = {}
    sizes = {name: math.prod(dims) for name, dims in shape.tensors() if is_target(name, dims)}
    for name in sizes:
        kinds.setdefault(name.split(".", 3)[-1], []).append(name)
    chosen, left = [], SAMPLE_ENTRIES
    for i, names in enumerate(sorted(kinds.values(), key=lambda names: sizes[names[0]])):
        if sizes[names[0]] <= left:
            chosen.append(names[i * len(names) // len(kinds)])
            left -= sizes[names[0]]
    return chosen


def _pieces(entry: TensorEntry) -> Iterator[bytes]:
    """The bytes of a tensor, a piece at a time."""
    with open(entry.path, "rb") as file:
        file.seek(entry.start)
        for lo in range(0, entry.nbytes, PIECE):
            yield file.read(min(PIECE, entry.nbytes - lo))


def extract(entries: Sequence[TensorEntry], folder: Path, file: str = "model.safetensors") -> None:
    """A checkpoint of a few tensors of another, byte for byte."""
    folder.mkdir()
    header, ranges = make_header((entry.name, entry.dtype, entry.shape) for entry in entries)
    by_name = {entry.name: entry for entry in entries}
    with open(folder / file, "wb") as to:
        to.write(header)
        for name in ranges:
            to.writelines(_pieces(by_name[name]))


def check_sample(folder: Path, out: Path, names: Sequence[str], scratch: Path) -> None:
    """Raises Red unless `out` holds, for these tensors, the bytes that the reference engine computes."""
    merged = open_checkpoint(out)
    for name in names:
        part = scratch / "sample"
        remove(part)
        part.mkdir()
        for source in ("base", *models.PATCHES):
            extract([open_checkpoint(folder / source).tensors[name]], part / source)
        recipe = models.write_recipe(part / "recipe.yaml", targets="all")
        merge(recipe, part / "out", backend="reference", memory_limit="2GiB")
        expected = open_checkpoint(part / "out").tensors[name]
        if any(a != b for a, b in zip(_pieces(expected), _pieces(merged.tensors[name]), strict=True)):
            raise Red(f"'{name}' differs from what the reference engine computes")
        remove(part)


def disk_bytes(folder: Path) -> int:
    """Bytes that the weight files of a directory take on the disk, holes not counted."""
    return sum(512 * os.stat(path).st_blocks for path in folder.glob("*.safetensors"))


def _measure(name: str, bench: Bench) -> Measured:
    shape = SHAPES[name]
    folder = bench.models(shape, sparse=SPARSE)
    limit = bench.memory_limit or LIMIT
    recipe = models.recipe_path(folder)
    facts: dict[str, Any] = {"entries": shape.entries, "limit_bytes": parse_size(limit), "sample": sample(shape)}
    with bench.scratch() as scratch:
        out = scratch / "out"

        def plan() -> dict[str, float]:
            words = ("--json", "--threads", str(bench.threads), "--memory-limit", limit)
            cost, text = run(safepatch("plan", recipe, *words))
            planned = json.loads(text)
            facts["planned_bytes"] = planned["bytes_read"] + planned["bytes_written"]
            facts["planned_memory_bytes"] = planned["memory"]
            return cost._asdict()

        def check() -> None:
            facts["input_disk_bytes"] = sum(disk_bytes(folder / part) for part in ("base", *models.PATCHES))
            facts["output_disk_bytes"] = disk_bytes(out)
            check_sample(folder, out, facts["sample"], scratch)

        subject = merge_subject(bench, recipe, out, facts, limit, check)
        series = alternate({"plan": plan, "merge": subject}, bench.rounds)
    facts["beyond_plan_bytes"] = facts["bytes_read"] + facts["bytes_written"] - facts["planned_bytes"]
    return Measured(series, [], facts)


def data_ranges(path: Path) -> list[tuple[int, int]]:
    """The stretches of a file that are no holes."""
    found, at, size = [], 0, path.stat().st_size
    with open(path, "rb") as file:
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing but a hole is left
                break
            found.append((at, os.lseek(file.fileno(), at, os.SEEK_HOLE)))
            at = found[-1][1]
    return found


def same_sparse(expected: Path, found: Path) -> None:
    """Raises Red unless two checkpoints have the same weight files; what is a hole in both is not read."""
    for name, path in shards(expected).items():
        other = found / name
        with open(path, "rb") as a, open(other, "rb") as b:
            for lo, hi in data_ranges(path) + data_ranges(other):
                for at in range(lo, hi, PIECE):
                    n = min(PIECE, hi - at)
                    if os.pread(a.fileno(), n, at) != os.pread(b.fileno(), n, at):
                        raise Red(f"{name} of {found.name} differs from {expected.name}'s near byte {at}")


def _measure_fix(name: str, bench: Bench) -> Measured:
    """A fix is built, applied to a copy, applied in place to another, where only blocks with changes are written, and
    taken out there; all within one memory limit.
    """
    shape = SHAPES[name]
    folder = bench.models(shape, sparse=SPARSE)
    base, limit = folder / "base", bench.memory_limit or LIMIT
    facts: dict[str, Any] = {"entries": shape.entries, "limit_bytes": parse_size(limit), "sample": sample(shape)}
    with bench.scratch() as scratch:
        fix, out, model = (scratch / name for name in ("fix.safetensors", "out", "model"))

        def step(*words: str | Path, check: Callable[[], None]) -> Callable[[], dict[str, float]]:
            def subject() -> dict[str, float]:
                cost, text = run(safepatch(*words, "--memory-limit", limit, "--json"), timeout=bench.timeout)
                told = json.loads(text)
                always(facts, {key: told[key] for key in ("id", "changes", "size", "tensors") if key in told})
                check()
                return cost._asdict()

            return subject

        def applied() -> None:
            check_sample(folder, out, facts["sample"], scratch)
            always(facts, {"base_disk_bytes": disk_bytes(base), "output_disk_bytes": disk_bytes(out)})

        def prepare() -> None:
            run(["cp", "-r", base, model])
            always(
                facts, {"planned": json.loads(run(safepatch("plan", fix, "--to", model, "--in-place", "--json"))[1])}
            )
            facts["planned"].pop("free")

        def in_place() -> None:
            same_sparse(out, model)
            always(facts, {"in_place_disk_bytes": disk_bytes(model)})

        def finished() -> None:
            same_sparse(base, model)
            for path in (fix, out, model):
                remove(path)

        options = ("--threads", str(bench.threads))
        series = alternate(
            {
                "build": step("build", models.recipe_path(folder), "-o", fix, *options, check=prepare),
                "copy": step("apply", fix, "--to", base, "-o", out, check=applied),
                "in-place": step("apply", fix, "--to", model, "--in-place", check=in_place),
                "revert": step("revert", fix, "--from", model, "--in-place", check=finished),
            },
            bench.rounds,
        )
    facts["bytes_per_change"] = facts["size"] / facts["changes"]
    return Measured(series, [], facts)


def cases() -> list[Case]:
    """Cases of the group `shape`."""
    return [
        Case(
            f"shape/{name}/fix",
            f"a fix of {SHAPES[name].entries / 1e9:.1f} B parameters: built, applied, applied in place, taken out",
            {"size": name, "entries": SHAPES[name].entries},
            applies,
            partial(_measure_fix, name),
        )
        for name in FIXED
    ] + [
        Case(
            f"shape/{name}",
            f"a merge of {SHAPES[name].entries / 1e9:.1f} B parameters in {name}'s shapes, sparse files",
            {"size": name, "entries": SHAPES[name].entries},
            partial(equals_reference, jobs=[("checkpoint", "tensor")]),
            partial(_measure, name),
            short=name == "SmolLM2-135M",
        )
        for name in NAMES
    ]
