"""What the machine could do: reads files and writes one, and nothing else. Standard library only.

`python -I -S plain_io.py OUT SIZE SYNC COLD THREADS FILE…` reads every file once, in large pieces into one reused
buffer per thread, and meanwhile writes SIZE bytes to OUT; with SYNC 1 they are on the disk when it ends. What is
written so, and with COLD 1 what is read, goes past the page cache where that can be done: a copy less. SIZE 0 writes
none.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from contextlib import suppress

PIECE = 4 << 20


def opened_past_cache(path: str, how: int) -> int:
    """-1 where the filesystem has no such way."""
    with suppress(OSError):
        return os.open(path, how | os.O_DIRECT)
    return -1


def main() -> None:
    out, size, sync, cold, threads = sys.argv[1], *map(int, sys.argv[2:6])
    files = [(path, os.stat(path).st_size) for path in sys.argv[6:]]
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666) if size else -1
    past_cache = -1
    if size:
        os.posix_fallocate(target, 0, size)
        if sync:
            past_cache = opened_past_cache(out, os.O_WRONLY)
    pieces = -(-max([size, *(length for _, length in files)]) // PIECE)
    failures: list[OSError] = []

    def opened(path: str) -> int:
        fd = opened_past_cache(path, os.O_RDONLY) if cold else -1
        return os.open(path, os.O_RDONLY) if fd < 0 else fd

    def share(first: int, last: int) -> None:
        """Pieces [first, last) of everything, through descriptors of its own: readahead follows each thread."""
        buffer = memoryview(mmap.mmap(-1, PIECE))
        inputs = [(opened(path), length) for path, length in files]
        try:
            for fd, _ in inputs:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            for at in range(first * PIECE, last * PIECE, PIECE):
                for fd, length in inputs:
                    if at < length and not os.preadv(fd, [buffer], at):
                        raise OSError("an input has become shorter")
                if at < size:
                    piece = buffer[: min(PIECE, size - at)]
                    os.pwrite(target if past_cache < 0 or len(piece) < PIECE else past_cache, piece, at)
        except OSError as error:
            failures.append(error)

    borders = [i * pieces // threads for i in range(threads + 1)]
    workers = [threading.Thread(target=share, args=borders[i : i + 2]) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        sys.exit(str(failures[0]))
    if sync:
        os.fsync(target)


if __name__ == "__main__":
    main()
