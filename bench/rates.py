"""Measures the rates that `safepatch plan` predicts times with."""

from __future__ import annotations

import hashlib
import mmap
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safepatch_core.backends import open_backend
from safepatch_core.merging import rates as names
from safepatch_core.merging.api import describe, plan
from safepatch_core.merging.gates import measure

from . import models
from .kernels import COLS, Source, make_block, make_pass, quotas
from .measure import Skipped, prepared, remove, run
from .merges import inputs, merge_command, merge_subject
from .models import SHAPES
from .registry import Bench

SIZE = "0.3B"
PIECE = 4 << 20
ENTRIES = 1024 * COLS
SECONDS = 0.3


def measure_rates(bench: Bench, log: Callable[[str], None]) -> dict[str, float]:
    """All of `merging.rates.NAMES`, medians of `bench.rounds` runs. Raises Skipped where files don't fit."""
    folder = bench.models(SHAPES[SIZE])
    files = inputs(folder, "checkpoint")
    nbytes = sum(path.stat().st_size for path in files)
    found = {names.CORES: float(len(os.sched_getaffinity(0)))}
    with bench.scratch() as scratch:
        log(f"reading {nbytes / 1e9:.1f} GB from the page cache and from the disk")
        with prepared(files, "warm", nbytes) as before:
            found[names.READ] = nbytes / _median(bench.rounds, lambda: _read(files), before)
        try:
            with prepared(files, "cold", nbytes) as before:
                found[names.DISK_READ] = nbytes / _median(bench.rounds, lambda: _read(files), before)
        except Skipped:
            log("the page cache can't be emptied here: the disk is taken to read as fast as it")
            found[names.DISK_READ] = found[names.READ]
        log(f"writing {nbytes / 1e9:.1f} GB")
        out = scratch / "out"
        seconds = [_write(out, nbytes) for _ in range(bench.rounds)]
        found[names.WRITE] = nbytes / statistics.median(buffered for buffered, _ in seconds)
        found[names.DISK_WRITE] = nbytes / statistics.median(synced for _, synced in seconds)
        log("hashing")
        found[names.HASH] = nbytes / _median(bench.rounds, lambda: _hash(nbytes))
        log("starting")
        found[names.STARTUP] = _median(bench.rounds, lambda: _startup(bench, scratch))
    log("the engine")
    for kind in names.FORMS:
        found |= _engine(bench.rounds, kind)
    log("gates")
    found[names.GATE] = _gate(bench.rounds, folder)
    log(f"a merge of {SIZE} parameters")
    found[names.STALLS] = _stalls(bench, folder, found)
    return found


def _stalls(bench: Bench, folder: Path, rates: Mapping[str, float]) -> float:
    """How many times longer than its slowest part a merge takes."""
    recipe = models.recipe_path(folder)
    made = plan(recipe, backend="cpu", threads=bench.threads, memory_limit=bench.memory_limit)
    ideal = names.predict(describe(made), {**rates, names.STALLS: 1.0}, cached=1.0) - rates[names.STARTUP]
    with bench.scratch() as scratch, prepared(inputs(folder, "checkpoint"), "warm", made.bytes_to_write) as before:
        merge = merge_subject(bench, recipe, scratch / "out", {})
        wall = _median(bench.rounds, lambda: merge()["wall_s"], before)
    return max((wall - rates[names.STARTUP]) / ideal, 1.0)


def _gate(rounds: int, folder: Path) -> float:
    """Entries of two patches per second on one thread."""
    made = plan(models.recipe_path(folder), backend="cpu", threads=1)
    targets = dict([*made.targets.items()][: names.GATE_THREADS])
    threads = min(len(os.sched_getaffinity(0)), len(targets))

    def timed() -> float:
        begin = time.perf_counter()
        measure(targets, [(0, 1)], made.inputs, made.recipe.nonfinite)
        return time.perf_counter() - begin

    timed()  # into the page cache
    return sum(target.entry.entries for target in targets.values()) / threads / _median(rounds, timed)


def _median(rounds: int, subject: Callable[[], float], before: Callable[[], None] = lambda: None) -> float:
    seconds = []
    for _ in range(rounds):
        before()
        seconds.append(subject())
    return statistics.median(seconds)


def _read(files: Sequence[Path]) -> float:
    """Seconds of one thread that reads all files side by side, a piece of each in turn, as a merge does."""
    buffer = memoryview(mmap.mmap(-1, PIECE))
    buffer[::4096] = bytes(len(buffer[::4096]))
    fds = [os.open(path, os.O_RDONLY) for path in files]
    for fd in fds:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    begin, at = time.perf_counter(), 0
    while any([os.preadv(fd, [buffer], at) for fd in fds]):
        at += PIECE
    seconds = time.perf_counter() - begin
    for fd in fds:
        os.close(fd)
    return seconds


def _write(path: Path, nbytes: int) -> tuple[float, float]:
    """Seconds until a new file is written, and until it is on the disk."""
    buffer = memoryview(mmap.mmap(-1, PIECE))
    buffer[::4096] = bytes(len(buffer[::4096]))
    begin = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.posix_fallocate(fd, 0, nbytes)
    for at in range(0, nbytes, PIECE):
        os.pwrite(fd, buffer[: min(PIECE, nbytes - at)], at)
    written = time.perf_counter() - begin
    os.fsync(fd)
    synced = time.perf_counter() - begin
    os.close(fd)
    remove(path)
    return written, synced


def _hash(nbytes: int) -> float:
    buffer, digest, begin = bytes(PIECE), hashlib.sha256(), time.perf_counter()
    for _ in range(0, nbytes, PIECE):
        digest.update(buffer)
    return time.perf_counter() - begin


def _startup(bench: Bench, scratch: Path) -> float:
    """Seconds of a merge of next to nothing."""
    folder = bench.models(SHAPES["tiny"])
    cost, _ = run(merge_command(bench, models.recipe_path(folder), scratch / "tiny"))
    remove(scratch / "tiny")
    return cost.wall_s


def _engine(rounds: int, kind: Source) -> dict[str, float]:
    """Entries of one patch per second on one thread, in each pass."""
    engine = open_backend("cpu", threads=1)
    block = make_block(kind, ENTRIES)
    cuts, _ = engine.merge(block, quotas(block), block.base.data.copy())
    found = {}
    for pass_ in names.PASSES:
        call = make_pass(engine, pass_, block, cuts)
        call()

        def timed(call: Callable[[], object] = call) -> float:
            repeats, begin = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - begin) < SECONDS:
                call()
                repeats += 1
            return elapsed / repeats

        found[names.engine_rate(pass_, kind)] = len(block.patches) * ENTRIES / _median(rounds, timed)
    return found
