"""Writing past the page cache: what is written once and never read again needs no copy in memory.

Through the cache a gigabyte took 2.1 s of kernel time on a 2-core machine whose memory was in use, and 0.17 s past
it; the disk was busy all the time either way. So large files are written like this, whatever else a machine does.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event

from safepatch_core.threads import room_for_a_thread

PAGE = 4096  # disks take whole blocks at multiples of it, from memory at multiples of it
STEP = 1 << 20  # bytes of a request
DEPTH = 4  # requests at once; more or larger ones were no faster (1 to 4 MiB, 1 to 8 of them, a virtual disk)


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
        self._threads = ThreadPoolExecutor(DEPTH, thread_name_prefix="safepatch-write")
        started = Event()
        try:
            for _ in range(DEPTH):
                room_for_a_thread()
                self._threads.submit(started.wait)
        except BaseException:
            started.set()
            self.close()
            raise
        started.set()

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


def _write(fd: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], at + done)
