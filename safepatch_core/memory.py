"""Memory that begins with a page, as disks and graphics cards that reach it directly want it."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

PAGE = 4096  # bytes


def page_aligned(nbytes: int) -> NDArray[np.uint8]:
    """So many bytes, which are zeros until they are written."""
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype=np.uint8, count=nbytes)
