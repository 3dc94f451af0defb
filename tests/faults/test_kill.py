"""Kill a merge at every call that changes a file: the output is the old one or the new one, and resuming finishes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.harness import INTERRUPT, KILL, LONG, TERM, TORN, Bench, Ended, contents, fault, restore


def resume(bench: Bench, place: Path, options: list[str], *, after_last: bool) -> Ended:
    ended = bench.merge(place, *options, "--resume")
    if after_last and not options and ended.status == 65:
        # The journal was gone, and all that was left to do was to unlink the lock: nothing tells of that run.
        assert "exists and is not empty" in ended.said() and bench.check_output(place, False) == "new"
        ended = bench.merge(place, "--force", "--resume")
    return ended


@pytest.mark.parametrize("old", [True, False], ids=["over an older output", "into nothing"])
@pytest.mark.parametrize("how", [KILL, TORN], ids=["before the call", "in the middle of a write"])
def test_killed_at_every_call(bench: Bench, place: Path, old: bool, how: int) -> None:
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
        bench.check_finished(place, resume(bench, place, options, after_last=n == len(calls)))
    assert seen == ({"old" if old else "none", "new"} if how == KILL else {"old" if old else "none"})


@pytest.mark.parametrize("how", [KILL, TORN], ids=["before the call", "in the middle of a write"])
def test_killed_again_while_resuming(bench: Bench, place: Path, how: int) -> None:
    """A resumed run is killed too, at each of its calls; nothing that was finished is lost."""
    restore(place, bench.old)
    half = len(bench.calls(place, True)) // 2
    restore(place, bench.old)
    assert bench.merge(place, "--force", fault=fault(place, half, KILL)).status == -9
    left = {name: data for name, data in contents(place).items() if not name.startswith("out/")}
    assert sum(name.endswith(".safetensors") for name in left) == 3

    def again(at: int) -> list[str]:
        restore(place, bench.old)
        for name, data in left.items():
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(data)
        return bench.merge(place, "--force", "--resume", fault=fault(place, at, how)).calls

    calls = again(0)
    bench.check_output(place, True)
    for n in [n for n, call in enumerate(calls, 1) if how == KILL or "write " in call]:
        again(n)
        if bench.check_output(place, True) == "old":
            shards = list(place.glob(".out.safepatch/*.safetensors"))
            assert len(shards) == 3, f"finished shards were lost at {calls[n - 1]}"
            resumed = bench.merge(place, "--force", "--resume", fault=fault(place, 0, KILL))
            assert not any(call.endswith(".safetensors.part") for call in resumed.calls), calls[n - 1]
        else:
            resumed = bench.merge(place, "--force", "--resume")
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
        bench.check_finished(place, resume(bench, place, options, after_last=n >= len(calls) - 1))
