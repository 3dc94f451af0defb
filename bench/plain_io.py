"""What the machine could do: reads files and writes one, and nothing else. Standard library only.

`python -I -S plain_io.py OUT SIZE SYNC THREADS FILE…` reads every file once, in large pieces into one reused buffer
per thread, and meanwhile writes SIZE bytes to OUT; with SYNC 1 they are on the disk when it ends, and go there past
the page cache where that can be done: a copy less. SIZE 0 writes none.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from contextlib import suppress

PIECE = 4 << 20


def main() -> None:
    out, size, sync, threads = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1", int(sys.argv[4])
    files = [(path, os.stat(path).st_size) for path in sys.argv[5:]]
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666) if size else -1
    past_cache = -1
    if size:
        os.posix_fallocate(target, 0, size)
        if sync:
            with suppress(OSError):
                past_cache = os.open(out, os.O_WRONLY | os.O_DIRECT)
    pieces = -(-max([size, *(length for _, length in files)]) // PIECE)
    failures: list[OSError] = []

    def share(first: int, last: int) -> None:
        """Pieces [first, last) of everything, through descriptors of its own: readahead follows each thread."""
        buffer = memoryview(mmap.mmap(-1, PIECE))
        inputs = [(os.open(path, os.O_RDONLY), length) for path, length in files]
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
