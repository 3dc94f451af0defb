"""What a disk may do: durable writing, locking, replacing in one step, hashing; failures that name the file."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from safepatch_core.errors import Busy, IOFailure, OutputError, SafepatchError
from safepatch_core.files.direct import DirectWriter
from safepatch_core.threads import room_for_a_thread

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_SYNC_WAIT_BEFORE, _SYNC_WRITE, _SYNC_WAIT_AFTER = 1, 2, 4
# Written pages stay this long (bytes) before their writing is waited for, so that the disk is never idle.
_DROP_LAG = 256 << 20
# Zeros are left out of sparse files in steps of this many bytes.
_HOLE = 64 << 10
_READ = 1 << 20  # bytes read at once where a file is hashed
_AHEAD = 8 << 20  # bytes that the kernel is told of meanwhile
# Files from so many bytes on are written past the page cache.
DIRECT_BYTES = 64 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Extent(NamedTuple):
    """Where bytes that are copied lie: an open file and the offset in it."""

    fd: int
    offset: int


@contextmanager
def failures_named(
    path: Path,
    needed: int | None = None,
    what: str = "writing failed",
    kind: type[SafepatchError] = IOFailure,
    go_on: str = "go on with --resume",
) -> Iterator[None]:
    """Turn an OSError into one line that names the file and says what to do, in the end to `go_on`, if anything."""
    try:
        yield
    except OSError as error:
        hints = []
        if error.errno == errno.EFBIG:
            hints.append("raise the limit on file sizes (ulimit -f)")
        elif error.errno in _OUT_OF_ROOM:
            hints.append(f"{f'{needed} bytes are needed; ' if needed else ''}free some")
        if go_on:
            hints.append(go_on)
        hint = f"; {' and '.join(hints)}" if hints else ""
        raise kind(f"{what}: {error.strerror or error}{hint}", file=path) from None


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def hold(folder: Path, what: str) -> int:
    """Creates a directory, if need be, and locks it for this process: a descriptor, whose closing frees it.

    Raises OutputError, which calls it `what`, if it can't be created; Busy if another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise OutputError(f"cannot create the {what}: {error.strerror}", file=folder) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise Busy("another run is writing this directory", file=folder) from None
        raise
    return lock


@contextlib.contextmanager
def replacing(target: Path, mode: Literal["w", "wb"] = "w", go_on: str = "go on with --resume") -> Iterator[Any]:
    """A file that takes its place as `target`, by one rename once it is on the disk, when the block ends well."""
    staging = staged_name(target)
    with failures_named(target, go_on=go_on), removed_on_failure(staging):
        with open(staging, mode, encoding=None if mode == "wb" else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, target)
        sync_directory(target.parent)


def staged_name(target: Path) -> Path:
    """Where what will be `target` is made."""
    return target.with_name(f".safepatch-{target.name}")


@contextlib.contextmanager
def removed_on_failure(staging: Path) -> Iterator[None]:
    """Nothing half-written stays."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            remove(staging)
        raise


def _sync_file_range(fd: int, at: int, nbytes: int, flags: int) -> None:
    """Start or wait for writing. An error that it reports is not reported again by the final fsync."""
    if _libc.sync_file_range(fd, ctypes.c_int64(at), ctypes.c_int64(nbytes), flags):
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.ESPIPE):  # not to be had here: fsync does it all
            raise OSError(code, os.strerror(code))


def start_writeback(fd: int, at: int, nbytes: int) -> None:
    """Hand pages to the disk now: the kernel alone starts late, and the final fsync would wait for all."""
    _sync_file_range(fd, at, nbytes, _SYNC_WRITE)


def _runs_of_data(data: memoryview) -> list[tuple[int, int]]:
    """The runs [lo, hi) of steps that are not all zero."""
    flat = np.frombuffer(data, dtype=np.uint8)
    steps = len(flat) // _HOLE
    full = np.bitwise_or.reduce(flat[: steps * _HOLE].view(np.uint64).reshape(steps, _HOLE // 8), axis=1) != 0
    edges = np.flatnonzero(np.diff(np.concatenate(([False], full, [False])).astype(np.int8))) * _HOLE
    runs = [(int(lo), int(hi)) for lo, hi in edges.reshape(-1, 2)]
    if flat[steps * _HOLE :].any():
        runs.append((steps * _HOLE, len(flat)))
    return runs


def exchange(a: Path, b: Path) -> None:
    """Swap two directory entries in one step."""
    if _libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def remove(path: Path) -> None:
    """A file or a whole directory; nothing where there is nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_file_of(path: Path, size: int, sha256: str) -> bool:
    """Whether there is a file of that size and hash."""
    return path.is_file() and path.stat().st_size == size and hash_file(path) == sha256


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Told what comes next, a cold gigabyte took 0.4 to 0.8 s of the kernel's time, and 2.2 s with read-ahead alone.
    Not past the cache: who asks for a hash often reads the file again.
    """
    digest, room = hashlib.sha256(), memoryview(bytearray(_READ))
    with open(path, "rb", buffering=0) as file:
        at = told = 0
        while True:
            if told < at + _AHEAD:
                os.posix_fadvise(file.fileno(), told, _AHEAD, os.POSIX_FADV_WILLNEED)
                told += _AHEAD
            got = file.readinto(room)
            if not got:
                return digest.hexdigest()
            digest.update(room[:got])
            at += got


class HashedFile:
    """Bytes [lo, hi) of a file, written from front to back and hashed on a second thread meanwhile.

    `at` is where the next bytes go. It starts behind `lo` if the file has what `marks` say: an end, and the SHA-256
    of all before it. A `sparse` file keeps long runs of zeros as holes; other files have their space reserved first,
    and large ones are written past the page cache where that can be done. With `drop` the pages of what was written
    are given back, for files that outgrow memory.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        lo: int,
        hi: int,
        shown: Path,
        needed: int,
        *,
        sparse: bool,
        drop: bool,
        marks: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.path, self.size, self.shown, self._needed = path, size, shown, needed
        self.at, self._end, self._sparse, self._drop = lo, hi, sparse, drop
        self.whole = lo == 0 and hi == size
        self._hash = hashlib.sha256()
        # Ranks that share a file each reserve it; the stage held nothing under this name before.
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="safepatch-hash")
        self._direct: DirectWriter | None = None
        try:
            if self.whole:
                room_for_a_thread()
                self._hasher.submit(int).result()  # starts it
                self._believe(marks)
                os.ftruncate(self._fd, self.at)
            self._settled = self.at  # everything before has been waited for and dropped
            if sparse:
                os.ftruncate(self._fd, size)
            elif size:
                os.posix_fallocate(self._fd, 0, size)
                if hi - lo >= DIRECT_BYTES:
                    with contextlib.suppress(OSError, MemoryError, RuntimeError):  # not to be had here, nor threads
                        self._direct = DirectWriter(path, self._fd)
        except BaseException:
            self.close()
            raise

    def _believe(self, marks: Sequence[Mapping[str, Any]]) -> None:
        """Go on behind the last mark up to which the file has the bytes that were written once."""
        for mark in marks:
            hashed, at, end = self._hash.copy(), self.at, mark["end"]
            while at < end and (data := os.pread(self._fd, min(_READ, end - at), at)):
                hashed.update(data)
                at += len(data)
            if at < end or hashed.hexdigest() != mark["sha256"]:
                break
            self._hash, self.at = hashed, end

    def write(self, data: memoryview, source: Extent | None = None) -> Future[None] | None:
        """The next bytes, which also lie at `source`, if given. They are read until the future is done, if any."""
        data = data.cast("B")
        hashed = self._hasher.submit(self._hash.update, data) if self.whole else None
        with failures_named(self.shown, self._needed):
            if self._direct is not None:
                self._direct.write(data, self.at)
            else:
                for lo, hi in _runs_of_data(data) if self._sparse else [(0, len(data))]:
                    self._put(data[lo:hi], self.at + lo, source and Extent(source.fd, source.offset + lo))
                self._start_writeback(self.at, len(data))
            self.at += len(data)
        return hashed

    def _put(self, data: memoryview, at: int, source: Extent | None) -> None:
        written = 0
        if source is not None:
            # The kernel copies, or shares the blocks where the filesystem can; what it leaves is written below.
            with contextlib.suppress(OSError):
                while written < len(data):
                    n = os.copy_file_range(
                        source.fd, self._fd, len(data) - written, source.offset + written, at + written
                    )
                    if n == 0:
                        break
                    written += n
        while written < len(data):
            written += os.pwrite(self._fd, data[written:], at + written)

    def _start_writeback(self, at: int, nbytes: int) -> None:
        start_writeback(self._fd, at, nbytes)
        behind = at - _DROP_LAG
        if self._drop and behind > self._settled:
            _sync_file_range(
                self._fd, self._settled, behind - self._settled, _SYNC_WAIT_BEFORE | _SYNC_WRITE | _SYNC_WAIT_AFTER
            )
            os.posix_fadvise(self._fd, self._settled, behind - self._settled, os.POSIX_FADV_DONTNEED)
            self._settled = behind

    def sync(self) -> None:
        """All bytes are on the disk. A failed fsync may have lost pages: it is never retried and trusted."""
        if self.at != self._end:
            raise RuntimeError(f"{self.path}: {self.at} of {self._end} bytes written")
        with failures_named(self.shown, self._needed):
            if self._direct is not None:
                self._direct.flush()
            os.fsync(self._fd)

    def sync_beginning(self) -> str:
        """All bytes so far are on the disk; their SHA-256, in hexadecimal."""
        hashed = self._hasher.submit(self._hash.copy)
        with failures_named(self.shown, self._needed):
            if self._direct is not None:
                self._direct.flush()
            os.fdatasync(self._fd)
        return hashed.result().hexdigest()

    def hexdigest(self) -> str:
        self._hasher.shutdown()
        return self._hash.hexdigest()

    def close(self) -> None:
        if self._fd >= 0:
            self._hasher.shutdown()
            if self._direct is not None:
                self._direct.close()
            os.close(self._fd)
            self._fd = -1
