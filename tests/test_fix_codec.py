"""The C++ codec of fix files beside the one in numpy, on good runs and on broken ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from safepatch_core.fixes import codec, reference
from safepatch_core.fixes.reference import Broken, Run
from tests.fix_cases import BLOCK

GOALS = (codec.KEEP, codec.OLD, codec.NEW)


def pair(rng: np.random.Generator, width: int, n: int, density: float) -> tuple[Any, Any]:
    old = rng.integers(0, 1 << (8 * width), n, dtype=np.dtype(f"u{width}"))
    x = rng.integers(1, 1 << (8 * width if rng.random() < 0.5 else 6), n, dtype=old.dtype)
    return old, np.where(rng.random(n) < density, old ^ x, old)


def run_of(rng: np.random.Generator, old: Any, new: Any, most: int) -> Run:
    found = reference.find(old, new, 0)
    codes, lengths = reference.gaps(found.at, found.counts, most)
    rows = np.zeros((len(lengths) + 1, 2), np.uint64)
    rows[1:, 0], rows[1:, 1] = np.cumsum(lengths), np.cumsum(found.counts)
    rows += rng.integers(0, 1 << 40, 2, dtype=np.uint64)
    shift = int(rows[0, 1]) % 8
    side = np.packbits(np.concatenate([rng.integers(0, 2, shift, dtype=np.uint8), found.side]), bitorder="little")
    planes = tuple(plane if plane.any() else None for plane in found.planes)
    return Run(len(old), rows, codes, side, planes)


def outcome(settle: Any, run: Run, entries: Any, goal: int) -> Any:
    entries = entries.copy()
    old, new = np.zeros(run.changes, entries.dtype), np.zeros(run.changes, entries.dtype)
    try:
        tally = settle(run, entries, goal, old, new)
    except Broken:
        return entries.tolist()
    return tally, entries.tolist(), old.tolist(), new.tolist()


@pytest.mark.parametrize("width", [1, 2, 4])
def test_find_is_the_same(width: int) -> None:
    rng = np.random.default_rng(width)
    for n in (1, 2, 31, 32, 33, 1000, 70000):
        for density in (0.0, 0.01, 0.4, 1.0):
            old, new = pair(rng, width, n, density)
            start = int(rng.integers(0, 1 << 33))
            one, other = reference.find(old, new, start), codec.find(old, new, start)
            for a, b in zip(one, other, strict=True):
                assert np.array_equal(np.array(a), np.array(b))


@pytest.mark.parametrize("most", [255, 65535])
def test_gaps_are_the_same(most: int) -> None:
    rng = np.random.default_rng(most)
    for density in (0.0, 0.00002, 0.003, 0.5, 1.0):
        at = [np.flatnonzero(rng.random(BLOCK) < density) for _ in range(3)]
        at[1] = np.array([[], [0], [65535], [254, 511, 65535]][int(rng.integers(4))], int)
        places, counts = np.concatenate(at).astype(np.uint16), np.array([len(a) for a in at])
        for a, b in zip(reference.gaps(places, counts, most), codec.gaps(places, counts, most), strict=True):
            assert np.array_equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("seed", range(12))
def test_settle_is_the_same(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.choice([1, 100, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 77]))
    old, new = pair(rng, int(rng.choice([1, 2, 4])), n, float(rng.choice([0.0001, 0.01, 0.3, 1.0])))
    run = run_of(rng, old, new, int(rng.choice([255, 65535])))
    mixed = np.where(rng.random(n) < rng.random(), old, new)
    for goal in GOALS:
        found = outcome(codec.settle, run, mixed, goal)
        assert found == outcome(reference.settle, run, mixed, goal)
        assert found[1] == {codec.KEEP: mixed, codec.OLD: old, codec.NEW: new}[goal].tolist()


def spoiled(rng: np.random.Generator, run: Run) -> Run:
    """One array of a run changed. Rows stay ordered and fit the lengths: `Fix.rows` sees to that."""
    which = rng.integers(4)
    if which == 0:
        gap = run.gap.copy()
        gap[rng.integers(len(gap), size=rng.integers(1, 4))] = rng.integers(0, np.iinfo(gap.dtype).max, endpoint=True)
        return run._replace(gap=gap)
    if which == 1:
        planes = tuple(None if p is None else np.where(rng.random(len(p)) < 0.01, 0, p) for p in run.planes)
        return run._replace(planes=tuple(None if p is None else p.astype(np.uint8) for p in planes))
    if which == 2:
        rows = run.rows.copy()
        for column in (0, 1):
            rows[1:-1, column] = np.sort(
                rng.integers(rows[0, column], rows[-1, column], len(rows) - 2, endpoint=True)
            )
        return run._replace(rows=rows)
    return run._replace(gap=np.full_like(run.gap, rng.choice([0, 254, np.iinfo(run.gap.dtype).max])))


@pytest.mark.parametrize("seed", range(150))
def test_broken_runs_are_seen_by_both(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.choice([50, BLOCK - 1, 2 * BLOCK + 77]))
    old, new = pair(rng, int(rng.choice([1, 2, 4])), n, float(rng.choice([0.0005, 0.02, 0.3])))
    new[0] = old[0] ^ 1  # at least one change
    run = spoiled(rng, run_of(rng, old, new, int(rng.choice([255, 65535]))))
    for goal in GOALS:
        assert outcome(codec.settle, run, old, goal) == outcome(reference.settle, run, old, goal)


def test_the_codec_that_is_tested_is_the_one_in_cpp() -> None:
    assert codec._engine is not None


def test_wrong_arguments_are_refused() -> None:
    rng = np.random.default_rng(0)
    old, new = pair(rng, 2, 100, 0.5)
    run = run_of(rng, old, new, 255)
    a, b = np.zeros(run.changes, "u2"), np.zeros(run.changes, "u2")
    for bad in ((old[:-1], a, b), (old, a[:-1], b), (old, a, b[:-1]), (old.astype("u4"), a, b)):
        with pytest.raises(ValueError):
            codec.settle(run, bad[0], codec.KEEP, bad[1], bad[2])
    with pytest.raises(ValueError):
        codec.find(old, new[:-1], 0)
    with pytest.raises(ValueError):
        codec.find(old.astype("u8"), new.astype("u8"), 0)
    short = run._replace(side=run.side[:2]), run._replace(gap=run.gap[:-1])
    for spoilt in (*short, run._replace(rows=run.rows[[0, 0, 1]])):
        with pytest.raises((ValueError, RuntimeError)):
            codec.settle(spoilt, old, codec.KEEP, a, b)
