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


class Slow:
    """Something begun that is never done by itself; it tells how many there were when it was waited for."""

    def __init__(self, unit: int, begun: list[int], waited: list[tuple[int, int]]) -> None:
        self._unit, self._begun, self._waited = unit, begun, waited
        begun.append(unit)

    def done(self) -> bool:
        return False

    def result(self) -> None:
        self._waited.append((self._unit, len(self._begun)))


def test_units_are_begun_ahead_and_leave_in_order_when_the_ring_is_full() -> None:
    begun: list[int] = []
    waited: list[tuple[int, int]] = []
    written: list[int] = []

    def work(unit: int) -> Slow | None:
        return None if unit % 7 == 3 else Slow(unit, begun, waited)

    run(range(60), lambda unit: 10, lambda unit, region: unit, work, written.append, ring(40))
    assert written == list(range(60))
    assert [unit for unit, _ in waited] == begun == [unit for unit in range(60) if unit % 7 != 3]


def test_what_was_begun_is_waited_for_before_a_failure_is_told() -> None:
    begun: list[int] = []
    waited: list[tuple[int, int]] = []
    gate = threading.Event()

    def read(unit: int, region: Region) -> int:
        if unit == 3:
            gate.set()
        return unit

    def work(unit: int) -> Slow:
        gate.wait()
        if unit == 2:
            raise ZeroDivisionError
        return Slow(unit, begun, waited)

    with pytest.raises(ZeroDivisionError):
        run(range(9), lambda unit: 10, read, work, None, ring(40))
    assert waited == [(0, 2), (1, 2)]
