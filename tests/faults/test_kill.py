"""Kill a merge at every call that changes a file: the output is the old one or the new one, and resuming finishes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.harness import INTERRUPT, KILL, LONG, STEM, TERM, TORN, Bench, contents, fault, restore


@pytest.mark.parametrize("old", [True, False], ids=["over an older output", "into nothing"])
@pytest.mark.parametrize("how", [KILL, TORN], ids=["before the call", "in the middle of a write"])
@pytest.mark.parametrize("past_cache", [False, True], ids=["through the cache", "past it"])
def test_killed_at_every_call(bench: Bench, place: Path, old: bool, how: int, past_cache: bool) -> None:
    bench = replace(bench, past_cache=past_cache)
    calls = bench.calls(place, old)
    at = [n for n, call in enumerate(calls, 1) if how == KILL or "write " in call]
    assert len(at) > (60 if how == KILL else 15)
    options = ["--force"] if old else []
    seen = set()
    for n in at:
        restore(place, bench.old if old else None)
        killed = bench.merge(place, *options, fault=fault(place, n, how))
        assert killed.status == -9, (n, calls[n - 1], killed.text)
        seen.add(bench.check_output(place, old))
        if LONG:
            left = place.with_name("left")
            shutil.rmtree(left, ignore_errors=True)
            shutil.copytree(place, left)
            bench.check_finished(left, bench.merge(left, "--force"))
        bench.check_finished(place, bench.merge(place, *options, "--resume"))
    assert seen == {"old" if old else "none", "new"}


def test_killed_with_all_shards_under_way(bench: Bench, place: Path) -> None:
    """The order of calls is another one every time; what may be seen is not."""
    together, seen = ("--force", "--streams", "3"), set()
    for n in range(1, len(bench.calls(place, True)) + 1, 1 if LONG else 4):
        restore(place, bench.old)
        killed = bench.merge(place, *together, fault=fault(place, n, KILL))
        if killed.status == 0:  # it took fewer calls
            bench.check_finished(place, killed)
            continue
        assert killed.status == -9, (n, killed.text)
        seen.add(bench.check_output(place, True))
        bench.check_finished(place, bench.merge(place, *together, "--resume"))
    assert seen == {"old", "new"}


@pytest.mark.parametrize("how", [KILL, TORN], ids=["before the call", "in the middle of a write"])
def test_killed_again_while_resuming(bench: Bench, place: Path, how: int) -> None:
    """A resumed run is killed too, at each of its calls; no finished shard is lost, nor the beginning of the last."""
    parts = [f"{STEM.format(i)}.part" for i in (1, 2, 3)]

    def written(calls: list[str]) -> list[int]:
        """How often each shard was written to."""
        kinds = ("pwrite ", "copy_file_range ")
        return [sum(call.endswith(part) and call.startswith(kinds) for call in calls) for part in parts]

    calls = bench.calls(place, True)
    whole = written(calls)
    renamed = next(
        n for n, call in enumerate(calls, 1) if call.startswith("rename ") and call.endswith(STEM.format(3))
    )
    restore(place, bench.old)
    assert bench.merge(place, "--force", fault=fault(place, renamed, KILL)).status == -9
    left = {name: data for name, data in contents(place).items() if not name.startswith("out/")}

    def again(at: int) -> list[str]:
        restore(place, bench.old)
        for name, data in left.items():
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(data)
        return bench.merge(place, "--force", "--resume", fault=fault(place, at, how)).calls

    calls = again(0)
    bench.check_output(place, True)
    rest = written(calls)
    assert rest[:2] == [0, 0] and 0 < rest[2] < whole[2], (rest, whole)
    for n in [n for n, call in enumerate(calls, 1) if how == KILL or "write " in call]:
        again(n)
        before = bench.check_output(place, True)
        resumed = bench.merge(place, "--force", "--resume", fault=fault(place, 0, KILL))
        expected = rest[2] if before == "old" else 0
        assert all(now <= then for now, then in zip(written(resumed.calls), (0, 0, expected), strict=True)), calls[
            n - 1
        ]
        bench.check_finished(place, resumed)


@pytest.mark.parametrize("old", [True, False], ids=["over an older output", "into nothing"])
@pytest.mark.parametrize("how", [TERM, INTERRUPT], ids=["SIGTERM", "SIGINT"])
def test_stopped_at_every_call(bench: Bench, place: Path, old: bool, how: int) -> None:
    calls = bench.calls(place, old)
    options = ["--force"] if old else []
    for n in range(1, len(calls) + 1, 1 if LONG else 6):
        restore(place, bench.old if old else None)
        stopped = bench.merge(place, *options, fault=fault(place, n, how))
        if stopped.status == 0:  # it came when there was nothing left to stop
            bench.check_finished(place, stopped)
            continue
        assert stopped.status == 75, (n, calls[n - 1], stopped.text)
        assert "--resume" in stopped.said()
        bench.check_output(place, old)
        bench.check_finished(place, bench.merge(place, *options, "--resume"))
