"""Every call that changes a file fails, once or from then on: the old output stays, and resuming finishes."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.harness import ERRNOS, LONG, Bench, fault, restore

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@pytest.mark.parametrize("old", [True, False], ids=["over an older output", "into nothing"])
@pytest.mark.parametrize("stays", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("code", ERRNOS, ids=[errno.errorcode[code] for code in ERRNOS])
@pytest.mark.parametrize("past_cache", [False, True], ids=["through the cache", "past it"])
def test_an_error_at_every_call(
    bench: Bench, place: Path, code: int, stays: bool, old: bool, past_cache: bool
) -> None:
    bench = replace(bench, past_cache=past_cache)
    calls = bench.calls(place, old)
    options = ["--force"] if old else []
    refused = 0
    # A short run spreads the calls over the cases of this test.
    first, step = (1, 1) if LONG else (1 + ERRNOS.index(code) + 3 * stays, 6)
    for n in range(first, len(calls) + 1, step):
        call = calls[n - 1]
        restore(place, bench.old if old else None)
        ended = bench.merge(place, *options, fault=fault(place, n, code, stays))
        kept = bench.check_output(place, old)
        if ended.status == 0:
            # The directory is there, the kernel's copy is only a short cut, a lock file that stays is no lock.
            assert n in (1, len(calls)) or call.startswith("copy_file_range"), (n, call)
            assert kept == "new"
            continue
        refused += 1
        assert ended.status in (73, 74), (n, call, ended.text)
        said = ended.said()
        assert os.strerror(code) in said and str(place) in said, (call, said)
        if code in NO_ROOM and ended.status == 74 and kept != "new":
            assert "free some" in said and "--resume" in said, (call, said)
            assert "bytes are needed" in said or call.startswith("rename"), (call, said)
        if kept == "new":
            assert "complete" in said, (call, said)
        bench.check_finished(place, bench.merge(place, *options, "--resume"))
    assert refused > len(calls) // (2 if LONG else 12)
