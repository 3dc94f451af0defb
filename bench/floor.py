"""What the machine can do by itself: memory copies, and plain reads and writes of a merge's size."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from .measure import Cache, alternate, prepared
from .merges import CACHES, SIZES, copy_subject, inputs, output_bytes
from .models import SHAPES
from .registry import Bench, Case, Measured

COPY_BYTES = 64 << 20


def memcpy_subject() -> Callable[[], dict[str, float]]:
    """One thread copying between two buffers larger than the caches; bytes are counted once, as copied."""
    source, target = np.zeros(COPY_BYTES, np.uint8), np.zeros(COPY_BYTES, np.uint8)
    source[::4096] = 1
    np.copyto(target, source)

    def subject() -> dict[str, float]:
        repeats, begin = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < 0.2:
            np.copyto(target, source)
            repeats += 1
        return {"bytes_per_s": repeats * COPY_BYTES / elapsed}

    return subject


def _measure(size: str, cache: Cache, bench: Bench) -> Measured:
    folder = bench.models(SHAPES[size])
    files, written = inputs(folder, "checkpoint"), output_bytes(folder)
    with bench.scratch() as scratch, prepared(files, cache, 2 * written) as before:
        out = scratch / "copy"
        subjects = {
            "memcpy": memcpy_subject(),
            "read": copy_subject(bench, files, out, 0, False, cache),
            "write": copy_subject(bench, [], out, written, False),
            "write-synced": copy_subject(bench, [], out, written, True),
            "both": copy_subject(bench, files, out, written, False, cache),
            "both-synced": copy_subject(bench, files, out, written, True, cache),
        }
        return Measured(alternate(subjects, bench.rounds, before), [], {"entries": SHAPES[size].entries})


def _no_gate(bench: Bench) -> None:
    """Nothing of safepatch is measured here."""


def cases() -> list[Case]:
    """Cases of the group `floor`."""
    return [
        Case(
            f"floor/{size}/{cache}",
            f"plain reads and writes of as many bytes as a merge of {size} parameters moves, {cache} inputs",
            {"size": size, "entries": SHAPES[size].entries, "cache": cache},
            _no_gate,
            partial(_measure, size, cache),
            short=(size, cache) == ("0.3B", "warm"),
        )
        for size in SIZES
        for cache in CACHES
    ]
