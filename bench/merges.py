"""Merges end to end, as the user runs them, beside what the machine could do; and their memory over sizes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safepatch_core.sizes import parse_size
from safepatch_core.spec import Kind

from . import models
from .measure import ISOLATED, Cache, Red, alternate, prepared, remove, run, safepatch
from .models import SHAPES
from .registry import Bench, Case, Measured

SIZES = ("0.1B", "0.3B", "1.1B", "3B")
KINDS: tuple[Kind, ...] = ("checkpoint", "delta", "lora")
SCOPES = ("tensor", "model")
CACHES: tuple[Cache, ...] = ("warm", "cold")
LIMITS = ("128MiB", "256MiB", "1GiB")
SPARSE = 2 << 20  # bytes of real values per tensor of a sparse model
COPY = Path(__file__).resolve().parent / "plain_io.py"

MergeCase = tuple[Kind, str]  # source and scope


def inputs(folder: Path, kind: Kind) -> list[Path]:
    """The weight files that a recipe of a set reads."""
    parts = ["base", *(models.source_name(name, kind) for name in models.PATCHES)]
    return [path for part in parts for path in sorted((folder / part).glob("*.safetensors"))]


def output_bytes(folder: Path) -> int:
    """Bytes of the weight files that a merge of a set writes."""
    return sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))


def same_bytes(a: Path, b: Path) -> None:
    """Raises Red unless two directories hold the same files, README and all."""
    names = sorted(path.name for path in a.iterdir())
    if names != sorted(path.name for path in b.iterdir()):
        raise Red(f"{b.name}: other files than {a.name}")
    for name in names:
        if (a / name).read_bytes() != (b / name).read_bytes():
            raise Red(f"{name} of {b.name} differs from {a.name}'s")


def equals_reference(bench: Bench, jobs: Sequence[MergeCase]) -> None:
    """The gate of everything that merges: on a small model the engine and the reference write the same bytes."""
    from safepatch_core.merging.api import merge

    folder = bench.models(SHAPES["tiny"], KINDS)
    for kind, scope in jobs:
        recipe = models.recipe_path(folder, kind, scope)
        with bench.scratch() as scratch:
            merge(recipe, scratch / "reference", backend="reference")
            merge(recipe, scratch / "engine", backend=bench.backend, threads=bench.threads)
            same_bytes(scratch / "reference", scratch / "engine")


def merge_command(bench: Bench, recipe: Path, out: Path, memory_limit: str | None = None) -> list[str]:
    """`safepatch merge` with the options of the run."""
    command = safepatch("merge", recipe, "-o", out, "--json", "--threads", str(bench.threads))
    command += ["--backend", bench.backend]
    for option, value in (
        ("--device", bench.device),
        ("--vram-limit", bench.vram_limit),
        ("--memory-limit", memory_limit or bench.memory_limit),
    ):
        command += [option, value] if value else []
    return command


def merge_subject(
    bench: Bench,
    recipe: Path,
    out: Path,
    facts: dict[str, Any],
    memory_limit: str | None = None,
    check: Callable[[], None] = lambda: None,
) -> Callable[[], dict[str, float]]:
    """What runs one merge and removes its output; `facts` learns the bytes moved and a hash of the output.

    The first output is given to `check`. Raises Red if a later one differs from it.
    """

    def subject() -> dict[str, float]:
        cost, text = run(merge_command(bench, recipe, out, memory_limit), timeout=bench.timeout)
        result = json.loads(text)
        digest = hashlib.sha256((out / "SHA256SUMS").read_bytes()).hexdigest()
        if "output" not in facts:
            check()
        remove(out)
        if facts.setdefault("output", digest) != digest:
            raise Red(f"{recipe.name}: two runs wrote different bytes")
        moved = result["bytes_read"] + result["bytes_written"]
        facts.update(bytes_read=result["bytes_read"], bytes_written=result["bytes_written"])
        return {**cost._asdict(), "moved_bytes_per_s": moved / cost.wall_s}

    return subject


def copy_subject(
    bench: Bench, files: Sequence[Path], out: Path, size: int, sync: bool, cache: Cache = "warm"
) -> Callable[[], dict[str, float]]:
    """What reads the files and writes `size` bytes, and nothing else."""
    moved = size + sum(path.stat().st_size for path in files)
    how = (size, int(sync), int(cache == "cold"), bench.threads)
    command: list[str | Path] = [*ISOLATED, COPY, out, *map(str, how), *files]

    def subject() -> dict[str, float]:
        cost, _ = run(command, timeout=bench.timeout)
        remove(out)
        return {**cost._asdict(), "moved_bytes_per_s": moved / cost.wall_s}

    return subject


def predicted(bench: Bench, recipe: Path, cache: Cache) -> float | None:
    """The seconds that the saved rates predict; None where no rates are saved."""
    from safepatch_core.merging.api import describe, plan
    from safepatch_core.merging.rates import load_rates, predict

    rates = load_rates()
    if rates is None:
        return None
    made = plan(recipe, backend=bench.backend, threads=bench.threads, memory_limit=bench.memory_limit)
    return predict(describe(made), rates, cached=1.0 if cache == "warm" else 0.0)


def _measure(size: str, jobs: Sequence[MergeCase], cache: Cache, bench: Bench) -> Measured:
    shape = SHAPES[size]
    kinds = list(dict.fromkeys(kind for kind, _ in jobs))
    folder = bench.models(shape, kinds)
    files = list(dict.fromkeys(path for kind in kinds for path in inputs(folder, kind)))
    written = output_bytes(folder)
    predictions: dict[str, float | None] = {}
    facts: dict[str, Any] = {"entries": shape.entries, "predicted_s": predictions}
    with bench.scratch() as scratch, prepared(files, cache, 2 * written) as before:
        subjects: dict[str, Callable[[], dict[str, float]]] = {}
        for kind, scope in jobs:
            recipe = models.recipe_path(folder, kind, scope)
            of = facts[f"{kind}-{scope}"] = {}
            predictions[f"{kind}-{scope}"] = predicted(bench, recipe, cache)
            subjects[f"{kind}-{scope}"] = merge_subject(bench, recipe, scratch / "out", of)
        names = list(subjects)
        first = inputs(folder, kinds[0])
        subjects["floor"] = copy_subject(bench, first, scratch / "copy", written, True, cache)
        subjects["floor-unsynced"] = copy_subject(bench, first, scratch / "copy", written, False, cache)
        series = alternate(subjects, bench.rounds, before)
    ratios = [(name, floor) for name in names[:1] for floor in ("floor", "floor-unsynced")]
    return Measured(series, ratios + [(name, names[0]) for name in names[1:]], facts)


def _measure_memory(size: str, limit: str, bench: Bench) -> Measured:
    shape = SHAPES[size]
    # Large models as sparse files: what lies in the holes changes nothing about memory.
    folder = bench.models(shape, sparse=SPARSE if shape.nbytes > 4_000_000_000 else None)
    facts: dict[str, Any] = {"entries": shape.entries, "limit_bytes": parse_size(limit)}
    with bench.scratch() as scratch:
        recipe = models.recipe_path(folder)
        series = alternate({"merge": merge_subject(bench, recipe, scratch / "out", facts, limit)}, bench.rounds)
    over = max(series["merge"]["peak_bytes"]) - parse_size(limit)
    facts["peak_over_limit_bytes"] = over
    return Measured(series, [], facts)


def cases() -> list[Case]:
    """Cases of the groups `merge` and `memory`."""
    found = []
    for size in SIZES:
        variants: dict[str, list[MergeCase]] = {f"{k}-{s}": [(k, s)] for k in KINDS for s in SCOPES}
        variants["scopes"] = [("checkpoint", "tensor"), ("checkpoint", "model")]
        variants["sources"] = [("checkpoint", "tensor"), ("delta", "tensor"), ("lora", "tensor")]
        for variant, jobs in variants.items():
            for cache in CACHES:
                found.append(
                    Case(
                        f"merge/{size}/{variant}/{cache}",
                        f"safepatch merge of {size} parameters, {variant}, {cache} inputs, beside the floor",
                        {"size": size, "entries": SHAPES[size].entries, "variant": variant, "cache": cache},
                        partial(equals_reference, jobs=jobs),
                        partial(_measure, size, jobs, cache),
                        short=(size, variant, cache)
                        in (("0.1B", "sources", "warm"), ("0.3B", "scopes", "warm"), ("0.3B", "scopes", "cold")),
                    )
                )
    for size in (*SIZES, "6B"):
        for limit in LIMITS:
            found.append(
                Case(
                    f"memory/{size}/{limit}",
                    f"peak memory of a merge of {size} parameters under --memory-limit {limit}",
                    {"size": size, "entries": SHAPES[size].entries, "limit_bytes": parse_size(limit)},
                    partial(equals_reference, jobs=[("checkpoint", "tensor")]),
                    partial(_measure_memory, size, limit),
                    short=size in ("0.1B", "0.3B") and limit != "1GiB",
                )
            )
    return found
