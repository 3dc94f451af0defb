"""What the machine could do in place: reads files and writes parts of them back. Standard library only.

`python -I -S plain_in_place.py THREADS PLAN` goes through the files of PLAN, JSON of {path: [[first byte, length,
whether to write it back], …]}, with so many threads. All of it is on the disk when it ends.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import threading


def main() -> None:
    threads, failures = int(sys.argv[1]), list[OSError]()
    with open(sys.argv[2], encoding="utf-8") as file:
        plan: dict[str, list[tuple[int, int, bool]]] = json.load(file)

    def share(fd: int, pieces: list[tuple[int, int, bool]]) -> None:
        buffer = memoryview(mmap.mmap(-1, max((length for _, length, _ in pieces), default=1)))
        try:
            for at, length, back in pieces:
                if os.preadv(fd, [buffer[:length]], at) != length:
                    raise OSError("a file has become shorter")
                if back and os.pwrite(fd, buffer[:length], at) != length:
                    raise OSError("a write was cut short")
        except OSError as error:
            failures.append(error)

    for path, pieces in plan.items():
        # Readahead follows each descriptor: one for each thread.
        fds = [os.open(path, os.O_RDWR) for _ in range(threads)]
        borders = [i * len(pieces) // threads for i in range(threads + 1)]
        workers = [
            threading.Thread(target=share, args=(fd, pieces[lo:hi]))
            for fd, lo, hi in zip(fds, borders, borders[1:], strict=False)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if failures:
            sys.exit(str(failures[0]))
        os.fsync(fds[0])
        for fd in fds:
            os.close(fd)


if __name__ == "__main__":
    main()
