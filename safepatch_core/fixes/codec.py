"""The fix file's codec: the C++ one where it is built, else the one in numpy. Both give the same."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safepatch_core.fixes import reference
from safepatch_core.fixes.format import BLOCK
from safepatch_core.fixes.reference import KEEP, NEW, OLD, Broken, Entries, Found, Run, Tally

__all__ = ["KEEP", "NEW", "OLD", "Broken", "Found", "Run", "Tally", "find", "gap_lengths", "gaps", "settle"]


def _native() -> ModuleType | None:
    try:
        from safepatch_core import _engine
    except ImportError:
        return None
    return _engine


_engine: Any = _native()
_ENTRIES = tuple(np.dtype(name) for name in ("u1", "u2", "u4"))


def find(old: Entries, new: Entries, start: int) -> Found:
    """Where two runs of entries, from position `start` of their tensor on, differ."""
    old, new = np.ascontiguousarray(old), np.ascontiguousarray(new)
    if old.shape != new.shape or old.dtype != new.dtype or old.dtype not in _ENTRIES or not len(old):
        raise ValueError(f"found {old.dtype} {old.shape} and {new.dtype} {new.shape}, expected entries of one type")
    if _engine is None:
        return reference.find(old, new, start)
    room = len(old)
    counts = np.zeros((start + room - 1) // BLOCK - start // BLOCK + 1, np.int64)
    at, side = np.empty(room, np.uint16), np.empty(room, np.uint8)
    planes = np.empty((old.itemsize, room), np.uint8)
    olds, news = np.empty_like(old), np.empty_like(old)
    n = _engine.fix_find(old, new, start, counts, at, side, planes, olds, news)
    return Found(counts, at[:n], side[:n], [plane[:n] for plane in planes], olds[:n], news[:n])


def gaps(at: NDArray[np.uint16], counts: NDArray[np.int64], most: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The gap codes of type maximum `most` for whole blocks, and how many of them each block has."""
    if _engine is None:
        return reference.gaps(at, counts, most)
    at, counts = _whole(at, counts)
    lengths, width = np.empty_like(counts), _gap_width(most)
    codes = np.empty(len(at) + len(counts) * (BLOCK // most), np.dtype(f"u{width}"))  # none takes more
    _engine.fix_gaps(at, counts, width, codes, lengths)
    return codes[: lengths.sum()], lengths


def gap_lengths(at: NDArray[np.uint16], counts: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """How many gap codes of type maximum `most` each of some whole blocks has."""
    if _engine is None:
        return reference.gaps(at, counts, most)[1]
    at, counts = _whole(at, counts)
    lengths = np.empty_like(counts)
    _engine.fix_gaps(at, counts, _gap_width(most), None, lengths)
    return lengths


def _whole(at: NDArray[np.uint16], counts: NDArray[np.int64]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    at, counts = np.ascontiguousarray(at, np.uint16), np.ascontiguousarray(counts, np.int64)
    if counts.sum() != len(at):
        raise ValueError(f"found {len(at)} positions, expected {counts.sum()}")
    return at, counts


def _gap_width(most: int) -> int:
    return 1 if most == 255 else 2


def settle(run: Run, entries: Entries, goal: int, old: Entries, new: Entries) -> Tally:
    """Tell the side of every touched entry and leave `goal` there: KEEP what it is, OLD or NEW.

    `old` and `new` get the touched entries of either side, in order. Raises Broken before anything is written.
    """
    arrays = [entries, old, new]
    if not all(
        a.dtype in _ENTRIES and a.itemsize == run.width and a.flags.c_contiguous and a.flags.aligned for a in arrays
    ):
        raise ValueError("entries of another type than the run's")
    lengths = [len(array) for array in (*arrays, *(p for p in run.planes if p is not None))]
    if lengths != [run.entries] + [run.changes] * (len(lengths) - 1) or len(run.rows) != -(-run.entries // BLOCK) + 1:
        raise ValueError(f"arrays of lengths {lengths} for {run.entries} entries, {run.changes} of them changed")
    if _engine is None:
        return reference.settle(run, entries, goal, old, new)
    try:
        args = (run.rows, run.gap, run.side, run.planes, run.changes, entries, goal, old, new)
        return Tally(*_engine.fix_settle(*args))
    except _engine.BadData as error:
        raise Broken(str(error)) from None
