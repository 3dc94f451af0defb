"""Large files are written past the page cache; what is in them, and what a stopped run finds, is the same."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safepatch_core.errors import IOFailure
from safepatch_core.files import direct, disk
from safepatch_core.files.direct import DirectWriter
from safepatch_core.files.disk import HashedFile

SIZES = (0, 1, 4095, 4096, 4097, 65_536, direct.STEP - 1, direct.STEP, 3 * direct.STEP + 5000, 9 * direct.STEP)


@pytest.fixture(autouse=True)
def every_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disk, "DIRECT_BYTES", 0)
    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"no direct writing here: {error}")


def opened(path: Path, size: int, lo: int = 0, hi: int | None = None, **how: Any) -> HashedFile:
    return HashedFile(path, size, lo, size if hi is None else hi, path, 0, sparse=False, drop=False, **how)


def pieces(data: bytes, seed: int) -> list[memoryview]:
    """The data in pieces of random length, some of them longer than a request, some empty."""
    rng, found, at = np.random.default_rng(seed), [], 0
    while at < len(data):
        n = int(rng.choice([0, 1, 511, 4096, 100_000, direct.STEP, 3 * direct.STEP + 1]))
        found.append(memoryview(data)[at : at + n])
        at += n
    return found


def written(file: HashedFile, data: bytes, seed: int = 0) -> str:
    assert file._direct is not None
    for piece in pieces(data, seed):
        file.write(piece)
    file.sync()
    digest = file.hexdigest()
    file.close()
    return digest


@pytest.mark.parametrize("size", SIZES)
def test_a_file_is_what_was_written(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    path = tmp_path / "file"
    if size == 0:  # nothing to be reserved, nothing to be written
        file = opened(path, 0)
        file.sync()
        file.close()
        assert path.read_bytes() == b""
        return
    assert written(opened(path, size), data, size) == hashlib.sha256(data).hexdigest()
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("lo", "hi"), [(0, 5), (5, 4100), (4100, 4_000_000), (4_000_000, 4_000_001), (4_000_001, 5_000_000)]
)
def test_ranks_write_their_parts_of_a_page(tmp_path: Path, lo: int, hi: int) -> None:
    """What another rank wrote around a part stays, in the pages that both write to."""
    before, path = os.urandom(5_000_000), tmp_path / "file"
    path.write_bytes(before)
    data = os.urandom(hi - lo)
    written(opened(path, len(before), lo, hi), data)
    assert path.read_bytes() == before[:lo] + data + before[hi:]


@pytest.mark.parametrize("end", [4096, 5000, direct.STEP, 2 * direct.STEP + 77])
def test_a_marked_beginning_is_on_the_disk_and_gone_on_with(tmp_path: Path, end: int) -> None:
    data, path = os.urandom(5 * direct.STEP + 10), tmp_path / "file"
    file = opened(path, len(data))
    file.write(memoryview(data)[:end])
    mark = {"end": end, "sha256": file.sync_beginning()}
    assert mark["sha256"] == hashlib.sha256(data[:end]).hexdigest()
    with open(path, "rb") as beside:
        assert beside.read(end) == data[:end]
    file.write(memoryview(data)[end : end + 9000])  # goes on in the page that the mark ended in
    mark2 = file.sync_beginning()
    assert mark2 == hashlib.sha256(data[: end + 9000]).hexdigest()
    file.close()
    resumed = opened(path, len(data), marks=[mark])
    assert resumed.at == end
    assert written(resumed, data[end:]) == hashlib.sha256(data).hexdigest()
    assert path.read_bytes() == data


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_request_fails_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """It is told at the next write, or at the latest when the file is to be on the disk."""
    data, real, calls = os.urandom(8 * direct.STEP), os.pwrite, []

    def failing(fd: int, given: Any, at: int) -> int:
        calls.append(at)
        if at == 5 * direct.STEP:
            raise OSError(code, os.strerror(code))
        return real(fd, given, at)

    file = opened(tmp_path / "file", len(data))
    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(IOFailure, match=os.strerror(code)):
        file.write(memoryview(data))
        file.sync()
    file.close()
    assert 5 * direct.STEP in calls


def test_where_requests_are_refused_the_cache_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some filesystems open a file so, and then refuse; or take a part of what they are given."""
    data, real = os.urandom(3 * direct.STEP + 17), os.pwrite
    turns: list[int] = []

    def refusing(fd: int, given: Any, at: int) -> int:
        turns.append(at)
        if os.readlink(f"/proc/self/fd/{fd}") and fd == plain:
            return real(fd, given, at)
        if len(turns) % 2:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, given[: len(given) // 2 // 4096 * 4096 or len(given)], at)

    file = opened(tmp_path / "file", len(data))
    plain = file._fd
    monkeypatch.setattr(os, "pwrite", refusing)
    assert written(file, data) == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "file").read_bytes() == data


def test_where_there_is_no_such_way_the_cache_takes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> DirectWriter:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(disk, "DirectWriter", refuse)
    data = os.urandom(100_000)
    file = opened(tmp_path / "file", len(data))
    assert file._direct is None
    file.write(memoryview(data))
    file.sync()
    file.close()
    assert (tmp_path / "file").read_bytes() == data
