"""Keeps files in memory until its standard input ends: `python -I -S pin.py FILE…`, standard library only.

Prints "pinned" where the pages are locked, "read" where they were only read. Virtual machines give back page cache
that lies unused for a minute or so, and a merge of "warm" inputs would then measure the disk.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

MCL_FUTURE = 2


def main() -> None:
    # Mappings made after this call are read and locked at once, or refused.
    locks = ctypes.CDLL(None).mlockall(MCL_FUTURE) == 0
    held = []
    for path in sys.argv[1:]:
        with open(path, "rb", buffering=0) as file:
            try:
                if not locks:
                    raise OSError
                held.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except OSError:
                locks = False
                while file.read(1 << 22):
                    pass
    print("pinned" if locks else "read", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
