"""The ring never hands out overlapping regions, and a failing stage stops the others and is reported."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from safepatch_core.merging.pipeline import Cancelled, Region, Ring, run


def ring(nbytes: int) -> Ring:
    return Ring(np.zeros(nbytes, dtype=np.uint8))


def test_regions_never_overlap_and_all_bytes_return() -> None:
    rng = np.random.default_rng(0)
    arena, live = ring(1000), []  # type: Ring, list[Region]
    for _ in range(3000):
        wanted = int(rng.integers(1, 400))
        while arena._place(wanted) is None:
            arena.give(live.pop(int(rng.integers(len(live)))))
        region = arena.take(wanted)
        assert len(region.memory) == wanted and region.end <= 1000
        assert all(region.end <= other.start or other.end <= region.start for other in live)
        live.append(region)
    for region in live:
        arena.give(region)
    assert len(arena.take(1000).memory) == 1000


@pytest.mark.parametrize("nbytes", [0, 101])
def test_impossible_regions_are_refused(nbytes: int) -> None:
    with pytest.raises(ValueError, match="region"):
        ring(100).take(nbytes)


def test_cancel_wakes_a_waiting_stage() -> None:
    arena = ring(10)
    arena.take(10)
    threading.Timer(0.05, arena.cancel).start()
    with pytest.raises(Cancelled):
        arena.take(1)


def test_units_pass_in_order_and_the_ring_bounds_what_is_in_flight() -> None:
    arena, written, in_flight, most = ring(30), [], set(), 0  # type: Ring, list[int], set[int], int

    def read(unit: int, region: Region) -> int:
        nonlocal most
        in_flight.add(unit)
        most = max(most, len(in_flight))
        return unit

    def write(unit: int) -> None:
        in_flight.discard(unit)
        written.append(unit)

    run(range(100), lambda unit: 10, read, lambda unit: None, write, arena)
    assert written == list(range(100))
    assert most <= 4  # three regions, and one given back before its unit was discarded here


@pytest.mark.parametrize("stage", ["read", "work", "write"])
def test_a_failing_stage_is_raised_and_nothing_hangs(stage: str) -> None:
    arena = ring(20)

    def fail(name: str, unit: int) -> None:
        if name == stage and unit == 5:
            raise OSError(f"{name} failed")

    def read(unit: int, region: Region) -> int:
        fail("read", unit)
        return unit

    def work(unit: int) -> None:
        fail("work", unit)

    def write(unit: int) -> None:
        fail("write", unit)

    before = threading.active_count()
    with pytest.raises(OSError, match=f"{stage} failed"):
        run(range(1000), lambda unit: 10, read, work, write, arena)
    assert threading.active_count() == before
