"""Merges on machines that are not here: the time that the rates of one thread come to on more cores and faster disks.

The rule is `merging.rates`, which `safepatch plan` predicts with: the slowest part counts, times the stalls that a
merge here had. Memory's bandwidth is no part of it. A case checks it against this machine, on one core and on two.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safepatch_core.merging import rates as names
from safepatch_core.merging.api import describe, plan
from safepatch_core.sizes import parse_size

from . import models
from .measure import Cache, Cost, Red, Skipped, alternate, prepared, remove, run
from .merges import CACHES, equals_reference, inputs, merge_command, output_bytes
from .models import SHAPES, ModelShape
from .rates import measure_rates
from .registry import Bench, Case, Measured

CORES = (4, 8, 16, 32, 64)
DISKS = ("3GB", "7GB", "14GB")  # per second
STREAMS = (1, 4)
SIZES = ("0.3B", "1.1B")
THIN = 4096  # bytes of real values per tensor: a plan reads headers alone


class Prediction(NamedTuple):
    """Of one machine: seconds, and which part bounds them."""

    cores: int
    disk: float  # bytes per second, both ways; None where it is the measured one
    streams: int
    seconds: float
    bound: str


def described(bench: Bench, shape: ModelShape) -> dict[str, Any]:
    """What a merge of a model of that shape has to do."""
    return _described(bench, models.recipe_path(bench.models(shape, sparse=THIN)))


def _described(bench: Bench, recipe: Path) -> dict[str, Any]:
    """With all the threads that each machine has, and not those of this one."""
    return describe(plan(recipe, backend="cpu", threads=1, memory_limit=bench.memory_limit)) | {"threads": None}


def predictions(
    description: Mapping[str, Any],
    rates: Mapping[str, float],
    cores: Sequence[int],
    disks: Sequence[float],
    streams: Sequence[int] = (1,),
    cached: float = 0.0,
) -> Iterator[Prediction]:
    """A merge on every combination of cores, disks and shards under way at once."""
    for disk in disks:
        for count in streams:
            for n in cores:
                of = {**rates, names.CORES: float(n), names.DISK_READ: disk, names.DISK_WRITE: disk}
                parts = names.lanes(description, of, cached=cached, streams=count)
                seconds = names.predict(description, of, cached=cached, streams=count)
                yield Prediction(n, disk, count, seconds, max(parts, key=lambda part: parts[part]))


def table(found: Sequence[Prediction]) -> list[str]:
    """Lines for people: a row per disk and shards under way, a column per number of cores."""
    cores = sorted({of.cores for of in found})
    lines = [f"{'disk':>10} {'shards':>6}" + "".join(f"{f'{n} cores':>20}" for n in cores)]
    for disk, streams in dict.fromkeys((of.disk, of.streams) for of in found):
        row = {of.cores: of for of in found if (of.disk, of.streams) == (disk, streams)}
        cells = (f"{row[n].seconds:.2f} s, {row[n].bound}" for n in cores)
        lines.append(f"{disk / 1e9:>5.3g} GB/s {streams:>6}" + "".join(f"{cell:>20}" for cell in cells))
    return lines


def given(changes: Sequence[str], rates: Mapping[str, float] | None) -> dict[str, float]:
    """The saved rates, some of them replaced by NAME=VALUE. Raises ValueError for other words."""
    found = dict(rates or {})
    for change in changes:
        name, _, value = change.partition("=")
        if name not in names.NAMES:
            raise ValueError(f"unknown rate {name!r}, expected one of {', '.join(names.NAMES)}")
        found[name] = float(parse_size(value)) if value[-1:] == "B" else float(value)
    return found


def _pinned(bench: Bench, recipe: Path, out: Path, cores: Sequence[int], digests: set[bytes]) -> dict[str, float]:
    """One merge that may use these cores alone, an engine thread for each."""
    alone = Bench(bench.workdir, len(cores), memory_limit=bench.memory_limit, backend="cpu")
    command = ["taskset", "-c", ",".join(map(str, cores)), *merge_command(alone, recipe, out)]
    cost: Cost = run(command, timeout=bench.timeout)[0]
    digests.add((out / "SHA256SUMS").read_bytes())
    remove(out)
    if len(digests) > 1:
        raise Red("merges on more cores wrote other bytes")
    return cost._asdict()


def _check(size: str, cache: Cache, bench: Bench) -> Measured:
    if shutil.which("taskset") is None:
        raise Skipped("taskset is not installed")
    rates = measure_rates(bench, lambda text: None)
    folder, here = bench.models(SHAPES[size]), sorted(os.sched_getaffinity(0))
    recipe, files = models.recipe_path(folder), inputs(folder, "checkpoint")
    description = _described(bench, recipe)
    digests: set[bytes] = set()
    with bench.scratch() as scratch, prepared(files, cache, 2 * output_bytes(folder)) as before:
        subjects = {
            f"{n} cores": partial(_pinned, bench, recipe, scratch / "out", here[:n], digests)
            for n in (1, 2)
            if n <= len(here)
        }
        series = alternate(subjects, bench.rounds, before)
    predicted = {
        name: names.predict(description, {**rates, names.CORES: float(n)}, cached=1.0 if cache == "warm" else 0.0)
        for n, name in enumerate(subjects, 1)
    }
    return Measured(series, [], {"entries": SHAPES[size].entries, "predicted_s": predicted, "rates": rates})


def cases() -> list[Case]:
    """Cases of the group `simulate`."""
    return [
        Case(
            f"simulate/{size}/{cache}",
            f"merges of {size} parameters on one core and on two beside what the rates predict, {cache} inputs",
            {"size": size, "entries": SHAPES[size].entries, "cache": cache},
            partial(equals_reference, jobs=[("checkpoint", "tensor")]),
            partial(_check, size, cache),
            short=(size, cache) == (SIZES[0], "warm"),
        )
        for size in SIZES
        for cache in CACHES
    ]
