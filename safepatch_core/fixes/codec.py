"""The fix file's codec: the C++ one where it is built, else the one in numpy. Both give the same."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from safepatch_core.fixes import reference
from safepatch_core.fixes.reference import KEEP, NEW, OLD, Broken, Entries, Found, Run, Tally

__all__ = ["KEEP", "NEW", "OLD", "Broken", "Found", "Run", "Tally", "find", "gaps", "settle"]


def find(old: Entries, new: Entries, start: int) -> Found:
    """Where two runs of entries, from position `start` of their tensor on, differ."""
    return reference.find(old, new, start)


def gaps(at: NDArray[np.uint16], counts: NDArray[np.int64], most: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The gap codes of type maximum `most` for whole blocks, and how many of them each block has."""
    return reference.gaps(at, counts, most)


def settle(run: Run, entries: Entries, goal: int, old: Entries, new: Entries) -> Tally:
    """Tell the side of every touched entry and leave `goal` there: KEEP what it is, OLD or NEW.

    `old` and `new` get the touched entries of either side, in order. Raises Broken before anything is written.
    """
    return reference.settle(run, entries, goal, old, new)
