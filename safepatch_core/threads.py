"""What starting a thread needs."""

from __future__ import annotations

import mmap

# A thread's stack (8 MiB by default), and more than it needs to start with.
_THREAD_ROOM = 16 << 20


def room_for_a_thread() -> None:
    """Raises MemoryError where a thread could get no memory as it starts: its starter would wait for it for ever."""
    try:
        mmap.mmap(-1, _THREAD_ROOM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        raise MemoryError from None
