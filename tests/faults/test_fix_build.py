"""A fix that is being built, killed, failing or stopped at every call: the file is the old one, the new or none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from safepatch_core.files.disk import remove
from tests.faults.harness import KILL, LONG, TERM, TORN, Bench, Ended, contents, fault


class Build:
    """A build of the bench's recipe over an older file, or into nothing."""

    def __init__(self, bench: Bench, place: Path, old: bytes | None) -> None:
        self.bench, self.place, self.old = bench, place, old
        self.out = place / "fix.safetensors"

    def __call__(self, at: int = 0, how: int = KILL, stays: bool = False, lay: bool = True) -> Ended:
        if lay:
            for path in self.place.iterdir():  # tests of merges leave directories
                remove(path)
            if self.old is not None:
                self.out.write_bytes(self.old)
        args = ("build", self.bench.recipe, "-o", self.out, "--backend", "cpu", "--threads", 1, "--force")
        return self.bench.run(*args, fault=fault(self.place, at, how, stays))

    def found(self) -> bytes | None:
        return self.out.read_bytes() if self.out.exists() else None

    def check_finished(self, new: bytes) -> None:
        ended = self(lay=False)
        assert ended.status == 0, ended.text
        assert contents(self.place) == {"fix.safetensors": new}


@pytest.mark.parametrize("old", [None, b"an older file"], ids=["into nothing", "over an older file"])
@pytest.mark.parametrize("how", [KILL, TORN, TERM, errno.ENOSPC, errno.EIO])
def test_stopped_at_every_call(bench: Bench, place: Path, how: int, old: bytes | None) -> None:
    build = Build(bench, place, old)
    whole = build()
    assert whole.status == 0, whole.text
    new = build.found()
    assert new is not None and os.listdir(place) == ["fix.safetensors"]
    seen = set()
    for n in range(1, len(whole.calls) + 1, 1 if LONG or how == KILL else 3):
        call = whole.calls[n - 1]
        if how == TORN and not call.startswith("write"):
            continue
        ended = build(n, how)
        assert build.found() in (old, new), (n, call)
        seen.add(build.found() == new)
        if how in (KILL, TORN):
            assert ended.status == -9
        elif ended.status == 0:
            assert build.found() == new
        else:
            assert ended.status in ((75,) if how == TERM else (73, 74)), (n, call, ended.text)
            assert "run it again" in ended.said() or ended.status == 73, (call, ended.said())
            # A signal may come between making the lock and knowing it.
            left = {".safepatch-fix.safetensors"} if how == TERM and call.startswith("open") else set()
            assert set(os.listdir(place)) <= {"fix.safetensors", *left}, (n, call)
        build.check_finished(new)
    assert seen
