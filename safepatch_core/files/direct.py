"""Writing and reading past the page cache: what is used once needs no copy in memory.

Through the cache a gigabyte that was written took 2.1 s of kernel time on a 2-core machine whose memory was in use,
and 0.17 s past it; the disk was busy all the time either way. So large files are written like this, whatever else a
machine does. A gigabyte that was read took 0.3 s where `WILLNEED` told of it before, 2.5 s where nothing did, and
0.1 s past the cache.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from safepatch_core.memory import PAGE
from safepatch_core.threads import room_for_a_thread

STEP = 1 << 20  # bytes of a request
DEPTH = 4  # requests at once; more or larger ones were no faster (1 to 4 MiB, 1 to 8 of them, a virtual disk)
DIRECT_READ = 256 << 10  # ranges from so many bytes on are read past the cache
_CACHESTAT = 451  # its number on all processors; C libraries know no name for it
_libc = ctypes.CDLL(None, use_errno=True)


class DirectWriter:
    """Writes from front to back: whole pages past the cache, the parts of pages at both ends through `plain`.

    Raises OSError where the filesystem has no such way, MemoryError where there is no room for it.
    """

    def __init__(self, path: Path, plain: int) -> None:
        self._plain = plain
        self._rooms = [memoryview(mmap.mmap(-1, STEP)) for _ in range(DEPTH + 1)]
        self._room, self._filled, self._begin = self._rooms.pop(), 0, 0
        self._flying: deque[tuple[Future[None], memoryview]] = deque()
        self._fd = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._threads = _started("safepatch-write")
        except BaseException:
            os.close(self._fd)
            raise

    def write(self, data: memoryview, at: int) -> None:
        """The next bytes, which are copied. Raises OSError, also of what was written before."""
        while data:
            if not self._filled and at % PAGE:
                n = min(len(data), PAGE - at % PAGE)
                _write(self._plain, data[:n], at)
            else:
                if not self._filled:
                    self._begin = at
                n = min(len(data), STEP - self._filled)
                self._room[self._filled : self._filled + n] = data[:n]
                self._filled += n
                if self._filled == STEP:
                    self._send(STEP)
            data, at = data[n:], at + n

    def flush(self) -> None:
        """All bytes so far are the file's; an fsync makes them durable. Raises OSError."""
        whole = self._filled // PAGE * PAGE
        rest = bytes(self._room[whole : self._filled])
        self._send(whole)
        while self._flying:
            self._land()
        # The part of a page stays in the room too: once completed, the page goes past the cache as a whole.
        self._room[: len(rest)] = rest
        self._begin, self._filled = self._begin + whole, len(rest)
        _write(self._plain, memoryview(rest), self._begin)

    def _send(self, nbytes: int) -> None:
        if nbytes:
            request = self._threads.submit(self._put, self._room[:nbytes], self._begin)
            self._flying.append((request, self._room))
            if not self._rooms:
                self._land()
            self._room, self._filled = self._rooms.pop(), 0

    def _land(self) -> None:
        """Wait for the oldest request; its room is free."""
        request, room = self._flying.popleft()
        self._rooms.append(room)
        request.result()

    def _put(self, data: memoryview, at: int) -> None:
        try:
            _write(self._fd, data, at)
        except OSError as error:
            # Some filesystems say only now that they can't, or take less than a page at a time.
            if error.errno != errno.EINVAL:
                raise
            _write(self._plain, data, at)

    def close(self) -> None:
        self._threads.shutdown()
        os.close(self._fd)


class Placed(NamedTuple):
    """A range that was read, and what of the file is missing from it."""

    data: NDArray[np.uint8]
    missing: list[tuple[int, int]]


class DirectReader:
    """Reads to where bytes are wanted, past the cache, what lies not in it; nothing of it is there afterwards either.

    A descriptor is opened for each range: a second one for every file would soon be too many. No error is told: what
    can't be read like this is left to those who read the plain way.
    """

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._refused: set[int] = set()  # files that have no such way

    def takes(self, fd: int, at: int, nbytes: int) -> bool:
        """Whether a range is better read past the cache: a long one, most of which is not there."""
        # Engines need numbers where numbers may lie, and bytes come to lie as in the file.
        if nbytes < DIRECT_READ or at % 8 or fd in self._refused:
            return False
        return 2 * cached(fd, at, nbytes) < nbytes

    def read(self, fd: int, at: int, nbytes: int, memory: NDArray[np.uint8]) -> Placed | None:
        """The range, somewhere in `memory`, as the pages that it lies in; None where that can't be done."""
        first, last = at // PAGE * PAGE, -(-(at + nbytes) // PAGE) * PAGE
        begin = -memory.ctypes.data % PAGE
        pages = memory[begin : begin + last - first]
        if len(pages) < last - first:
            return None
        try:
            if self._threads is None:
                self._threads = _started("safepatch-read")
            # By its descriptor: the name may be another file's by now.
            past_cache = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except (OSError, MemoryError, RuntimeError):  # not to be had here, nor threads
            self._refused.add(fd)
            return None
        # A short range has to keep the disk busy too.
        step = min(STEP, -(-len(pages) // DEPTH // PAGE) * PAGE)
        starts, requests = range(0, len(pages), step), list[Future[int]]()
        try:
            for lo in starts:
                part = pages[lo : lo + step].data
                requests.append(self._threads.submit(self._fill, fd, past_cache, part, first + lo))
        finally:
            wait(requests)  # nothing may come in later
            os.close(past_cache)
        gaps = [
            (max(first + lo + request.result(), at), min(first + lo + step, at + nbytes))
            for lo, request in zip(starts, requests, strict=True)
        ]
        return Placed(pages[at - first :][:nbytes], [(lo, hi) for lo, hi in gaps if lo < hi])

    def _fill(self, fd: int, past_cache: int, pages: memoryview, at: int) -> int:
        """How many bytes there were: less at the end of the file, and where reading fails."""
        done = 0
        try:
            while done < len(pages):
                done += (got := os.preadv(past_cache, [pages[done:]], at + done))
                if not got or got % PAGE:
                    break
        except OSError:
            self._refused.add(fd)
        return done

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()


def cached(fd: int, at: int, nbytes: int) -> int:
    """How many bytes of a file's range the page cache holds; all of them where the kernel (before 6.5) can't tell.

    `mincore` would tell older ones' too, in 12 ms for a gigabyte in memory, and this in 1.
    """
    asked, told = (ctypes.c_uint64 * 2)(at, nbytes), (ctypes.c_uint64 * 5)()
    if _libc.syscall(_CACHESTAT, fd, ctypes.byref(asked), ctypes.byref(told), 0):
        return nbytes
    return min(told[0] * mmap.PAGESIZE, nbytes)


def _started(name: str) -> ThreadPoolExecutor:
    """Threads for all requests. Raises MemoryError or RuntimeError where there is no room for them."""
    threads, started = ThreadPoolExecutor(DEPTH, thread_name_prefix=name), Event()
    try:
        for _ in range(DEPTH):
            room_for_a_thread()
            threads.submit(started.wait)
    except BaseException:
        started.set()
        threads.shutdown()
        raise
    started.set()
    return threads


def _write(fd: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], at + done)
