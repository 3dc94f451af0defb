"""Files are read and written past the page cache; what is in them, and what a stopped run finds, is the same."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from safepatch_core import merge
from safepatch_core.errors import IOFailure
from safepatch_core.files import direct, disk
from safepatch_core.files.direct import DirectWriter, Placed
from safepatch_core.files.disk import HashedFile
from safepatch_core.files.reading import TensorEntry, identify
from safepatch_core.memory import PAGE
from safepatch_core.merging.inputs import Inputs
from tests.faults.harness import contents, write_model, write_recipe

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


def tensor_of(path: Path, start: int, nbytes: int) -> TensorEntry:
    return TensorEntry("weight", "U8", (nbytes,), path, path.name, start, nbytes)


class Reading:
    """A file of random bytes that `Inputs` reads, which is never found in the cache, and what was read of it how."""

    def __init__(self, path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data, self.path = os.urandom(size), path
        path.write_bytes(self.data)
        self.patch, self._read = monkeypatch, os.preadv
        self.past, self.plain = 0, 0  # bytes
        monkeypatch.setattr(os, "preadv", self._count)
        self.inputs = Inputs([])
        self.inputs._identity[path] = identify(path.stat())

    def _count(self, fd: int, views: Any, at: int) -> int:
        got = self._read(fd, views, at)
        if self.is_past(fd):
            self.past += got
        else:
            self.plain += got
        return got

    @staticmethod
    def is_past(fd: int) -> bool:
        return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)

    def load(self, at: int, nbytes: int, skip: int = 0, spare: int = 2 * PAGE) -> NDArray[np.uint8]:
        """A range, into memory that begins `skip` bytes after a page does; what lies around it stays."""
        room = -(-nbytes // PAGE) * PAGE + spare
        whole = np.frombuffer(mmap.mmap(-1, room + 4 * PAGE), np.uint8)
        whole[:] = 7
        begin = PAGE + skip
        found = self.inputs.load(tensor_of(self.path, at, nbytes), 0, nbytes, whole[begin : begin + room])
        assert (whole[:begin] == 7).all() and (whole[begin + room :] == 7).all()
        return found

    def check(self, at: int, nbytes: int, **where: int) -> None:
        assert self.load(at, nbytes, **where).tobytes() == self.data[at : at + nbytes]


@pytest.fixture
def reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_past_cache: None) -> Iterator[Reading]:
    found = Reading(tmp_path / "input", 5 * direct.STEP + 1234, monkeypatch)
    yield found
    found.inputs.close()


SIZE = 5 * direct.STEP + 1234


@pytest.mark.parametrize("skip", [0, 64, 4095])
@pytest.mark.parametrize(
    ("at", "nbytes"),
    [
        (0, 1),
        (0, 4096),
        (8, 4088),
        (4088, 16),
        (4096, 2 * direct.STEP),
        (72, direct.STEP),
        (1_000_000, 3_000_001),
        (0, SIZE),
        (SIZE - 1234, 1234),
        (SIZE - 2, 2),
    ],
)
def test_a_range_is_read_to_where_it_is_wanted(reading: Reading, at: int, nbytes: int, skip: int) -> None:
    reading.check(at, nbytes, skip=skip)
    if at % 8 == 0:
        assert reading.plain == 0 and reading.past >= nbytes
        found = reading.load(at, nbytes, skip=skip)
        assert found.ctypes.data % PAGE == at % PAGE
    else:  # numbers would lie where engines don't take them
        assert reading.past == 0


def test_without_room_for_whole_pages_it_is_read_the_plain_way(reading: Reading) -> None:
    reading.check(4000, 8192, spare=0)
    assert (reading.past, reading.plain) == (0, 8192)


def test_what_is_read_past_the_cache_is_not_in_it(tmp_path: Path) -> None:
    """Nor is anything read past it that is."""
    path = tmp_path / "input"
    path.write_bytes(os.urandom(4 * direct.STEP))
    fd, reader = os.open(path, os.O_RDONLY), direct.DirectReader()
    room = np.frombuffer(mmap.mmap(-1, 5 * direct.STEP), np.uint8)
    try:
        if direct.cached(fd, 0, 4 * direct.STEP) != 4 * direct.STEP:
            pytest.skip("what was just written is not in the cache")
        assert not reader.takes(fd, 0, 4 * direct.STEP)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if direct.cached(fd, 0, 4 * direct.STEP):
            pytest.skip("the kernel can't tell, or keeps it")
        assert reader.takes(fd, 0, 4 * direct.STEP) and not reader.takes(fd, 0, direct.DIRECT_READ - 1)
        placed = reader.read(fd, 0, 4 * direct.STEP, room)
        assert placed is not None and not placed.missing
        assert direct.cached(fd, 0, 4 * direct.STEP) == 0
        assert placed.data.tobytes() == path.read_bytes()
        # A file of which the greater part is there is read there.
        os.posix_fadvise(fd, 0, direct.STEP, os.POSIX_FADV_DONTNEED)
        assert direct.cached(fd, 0, 4 * direct.STEP) == 3 * direct.STEP
        assert not reader.takes(fd, 0, 4 * direct.STEP) and reader.takes(fd, 0, direct.STEP)
    finally:
        reader.close()
        os.close(fd)


def test_what_is_read_again_goes_through_the_cache(reading: Reading) -> None:
    reading.inputs.again = True
    reading.check(0, direct.STEP)
    assert reading.past == 0
    reading.inputs._drop_behind = True  # it can't be kept so long
    reading.check(0, direct.STEP)
    assert reading.past == direct.STEP


def test_bytes_that_are_not_on_the_disk_yet_are_read(reading: Reading) -> None:
    changed = os.urandom(2 * direct.STEP)
    with open(reading.path, "r+b") as file:
        file.write(changed)
        file.flush()
        reading.inputs._identity[reading.path] = identify(reading.path.stat())
        assert reading.load(0, len(changed)).tobytes() == changed
    assert reading.past == len(changed)


@pytest.mark.parametrize("hole", [(0, 100_000), (direct.STEP - 5, direct.STEP + 70_000), (300_000, 301_000)])
def test_holes_are_zeros(reading: Reading, hole: tuple[int, int]) -> None:
    lo, hi = hole
    path = reading.path
    with open(path, "wb") as file:
        file.write(reading.data[:lo])
        file.seek(hi)
        file.write(reading.data[hi:])
    reading.inputs._identity[path] = identify(path.stat())
    found = reading.load(0, SIZE).tobytes()
    assert found == reading.data[:lo] + bytes(hi - lo) + reading.data[hi:]
    assert reading.past == SIZE


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
@pytest.mark.parametrize("after", [0, 3])
def test_refused_requests_are_read_the_plain_way(reading: Reading, code: int, after: int) -> None:
    """By filesystems that say so late, in the middle of a file; requests may also bring less than they should."""
    count, turns = os.preadv, itertools.count()

    def refusing(fd: int, views: Any, at: int) -> int:
        if not reading.is_past(fd):
            return count(fd, views, at)
        if next(turns) >= after:
            raise OSError(code, os.strerror(code))
        return count(fd, [views[0][: len(views[0]) // 2 // PAGE * PAGE or PAGE]], at)

    reading.patch.setattr(os, "preadv", refusing)
    reading.check(8, 4 * direct.STEP)
    assert reading.plain > 0 and (reading.past > 0) == (after > 0)
    past = reading.past
    reading.check(direct.STEP, direct.STEP)
    assert reading.past == past, "it is not asked again"


def test_where_files_can_not_be_opened_so_they_are_read_the_plain_way(reading: Reading) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *mode: int, **how: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *mode, **how)

    reading.patch.setattr(os, "open", refusing)
    reading.check(8, 4 * direct.STEP)
    assert (reading.past, reading.plain) == (0, 4 * direct.STEP)


def test_where_there_is_no_room_for_threads_files_are_read_the_plain_way(reading: Reading) -> None:
    def refuse() -> None:
        raise MemoryError

    reading.patch.setattr(direct, "room_for_a_thread", refuse)
    reading.check(8, 4 * direct.STEP)
    assert (reading.past, reading.plain) == (0, 4 * direct.STEP)


def test_a_disk_that_fails_is_told_with_file_and_tensor(reading: Reading) -> None:
    count = os.preadv

    def failing(fd: int, views: Any, at: int) -> int:
        if at <= 2 * direct.STEP < at + len(views[0]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return count(fd, views, at)

    reading.patch.setattr(os, "preadv", failing)
    with pytest.raises(IOFailure, match="can't read: Input/output error") as caught:
        reading.load(8, 4 * direct.STEP)
    assert (caught.value.file, caught.value.tensor) == (reading.path, "weight")


@pytest.mark.parametrize("left", [0, 4096, 2 * direct.STEP + 5])
def test_a_file_that_shrinks_is_told_with_file_and_tensor(reading: Reading, left: int) -> None:
    reading.check(0, 4096)
    os.truncate(reading.path, left)
    with pytest.raises(IOFailure, match="the file ended while being read") as caught:
        reading.load(8, 4 * direct.STEP)
    assert (caught.value.file, caught.value.tensor) == (reading.path, "weight")


def test_a_file_that_was_replaced_is_read_to_its_end(reading: Reading) -> None:
    """What was opened is read, not what has its name by now; that it changed is told at the end."""
    reading.check(0, 4096)
    reading.path.with_name("other").write_bytes(bytes(SIZE))
    os.replace(reading.path.with_name("other"), reading.path)
    reading.check(0, direct.STEP)
    with pytest.raises(IOFailure, match="changed"):
        reading.inputs.check_unchanged()


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("chunk", [None, 999])
def test_merges_write_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    backend: str,
    scope: str,
    chunk: int | None,
) -> None:
    for seed, name in enumerate(("base", "safety", "over-safety")):
        write_model(tmp_path / name, seed, rows=96, cols=64)
    recipe = write_recipe(tmp_path, scope=scope)
    merge(recipe, tmp_path / "plain", backend="reference")
    request.getfixturevalue("read_past_cache")
    read, real = [0], direct.DirectReader.read

    def counted(*args: Any) -> Placed | None:
        placed = real(*args)
        read[0] += 0 if placed is None else len(placed.data)
        return placed

    monkeypatch.setattr(direct.DirectReader, "read", counted)
    merge(recipe, tmp_path / "past", backend=backend, threads=1, chunk_entries=chunk)
    assert contents(tmp_path / "past") == contents(tmp_path / "plain")
    assert read[0] >= sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors")) // 2
