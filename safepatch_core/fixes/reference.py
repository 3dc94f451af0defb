"""The fix file's codec in numpy: slow, and what the C++ one (csrc/fix.cpp) is tested against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safepatch_core.fixes.format import BLOCK

Entries = NDArray[np.unsignedinteger[Any]]
Bytes = NDArray[np.uint8]
KEEP, OLD, NEW = 0, 1, 2  # what `settle` leaves in the entries


class Broken(ValueError):
    """A run of a fix breaks a rule of its encoding."""


class Found(NamedTuple):
    """The entries of a run that differ, in order."""

    counts: NDArray[np.int64]  # per block that the run touches
    at: NDArray[np.uint16]  # position in its block
    side: Bytes  # 0 or 1
    planes: Sequence[Bytes]  # byte k of old XOR new
    old: Entries
    new: Entries


class Run(NamedTuple):
    """What a fix says about consecutive blocks of a tensor. Lengths fit each other; contents may break rules."""

    entries: int  # in these blocks
    rows: NDArray[np.uint64]  # [blocks + 1, 2], as in the file
    gap: NDArray[np.unsignedinteger[Any]]
    side: Bytes  # bit i of the run is bit (i + rows[0, 1] mod 8) from the first byte on
    planes: tuple[Bytes | None, ...]  # one per byte of an entry; None is all zero

    @property
    def width(self) -> int:
        return len(self.planes)

    @property
    def changes(self) -> int:
        return int(self.rows[-1, 1] - self.rows[0, 1])


class Changes(NamedTuple):
    """A run decoded: position in the run, XOR of old and new, side bit."""

    at: NDArray[np.int64]
    xor: Entries
    side: Bytes


class Tally(NamedTuple):
    """What `settle` met."""

    old: int  # touched entries that were old
    new: int
    codes: int  # codes that the other type of gap would take


def find(old: Entries, new: Entries, start: int) -> Found:
    """Where two runs of entries, from position `start` of their tensor on, differ."""
    differ = old ^ new
    at = np.flatnonzero(differ)
    x = differ[at]
    lowest = x & (~x + x.dtype.type(1))
    places = at + start
    first, last = start // BLOCK, (start + len(old) - 1) // BLOCK
    counts = np.bincount(places // BLOCK - first, minlength=last - first + 1)
    planes = np.ascontiguousarray(x.view(np.uint8).reshape(len(x), x.itemsize).T)
    side = ((old[at] & lowest) != 0).astype(np.uint8)
    return Found(counts, (places % BLOCK).astype(np.uint16), side, list(planes), old[at], new[at])


def gaps(at: NDArray[np.uint16], counts: NDArray[np.int64], most: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The gap codes of type maximum `most` for whole blocks, and how many of them each block has."""
    places = at.astype(np.int64)
    first = np.cumsum(counts) - counts
    before = np.concatenate(([-1], places[:-1]))
    before[first[counts > 0]] = -1
    skips, code = np.divmod(places - before - 1, most)
    codes = np.full(len(places) + int(skips.sum()), most, np.uint8 if most == 255 else np.uint16)
    ends = np.cumsum(skips + 1)
    codes[ends - 1] = code
    total = np.concatenate(([0], ends))
    return codes, total[first + counts] - total[first]


def decode(run: Run) -> Changes:
    """Raises Broken."""
    rows = (run.rows - run.rows[0]).astype(np.int64)
    most = 255 if run.gap.dtype == np.uint8 else 65535
    codes = run.gap.astype(np.int64)
    lengths = np.diff(rows[:, 0])
    block = np.repeat(np.arange(len(lengths)), lengths)
    moved = np.concatenate(([0], np.cumsum(np.where(codes == most, most, codes + 1))))
    place = moved[1:] - moved[rows[:-1, 0]][block] - 1
    real = codes != most
    ends = rows[1:, 0][lengths > 0] - 1
    if not real[ends].all():
        raise Broken("a code follows a block's last change")
    if not (np.bincount(block[real], minlength=len(lengths)) == np.diff(rows[:, 1])).all():
        raise Broken("the gap codes and the block table disagree on the number of changes")
    at = (block * BLOCK + place)[real]
    if (place[real] >= BLOCK).any() or (at >= run.entries).any():
        raise Broken("a gap leads past the end of its block or tensor")
    xor = xors(run)
    if (xor == 0).any():
        raise Broken("an entry that is said to change has an XOR of 0")
    shift = int(run.rows[0, 1]) % 8
    side = np.unpackbits(run.side, bitorder="little")[shift : shift + len(at)]
    return Changes(at, xor, side)


def settle(run: Run, entries: Entries, goal: int, old: Entries, new: Entries) -> Tally:
    """Tell the side of every touched entry and leave `goal` there: KEEP what it is, OLD or NEW.

    `old` and `new` get the touched entries of either side, in order. Raises Broken before anything is written.
    """
    at, xor, side = decode(run)
    now = entries[at]
    is_old = ((now & (xor & (~xor + xor.dtype.type(1)))) != 0) == (side != 0)
    old[:] = np.where(is_old, now, now ^ xor)
    new[:] = old ^ xor
    if goal != KEEP:
        entries[at] = old if goal == OLD else new
    return Tally(int(is_old.sum()), int(len(at) - is_old.sum()), other_codes(run.gap))


def xors(run: Run) -> Entries:
    """The XOR of old and new of every change."""
    xor: Entries = np.zeros(run.changes, np.dtype(f"u{run.width}"))
    for k, plane in enumerate(run.planes):
        if plane is not None:
            xor |= plane.astype(xor.dtype) << xor.dtype.type(8 * k)
    return xor


def other_codes(gap: NDArray[np.unsignedinteger[Any]]) -> int:
    """How many codes the changes of a run, which breaks no rule, would take with the other type of gap."""
    most, other = (255, 65535) if gap.dtype == np.uint8 else (65535, 255)
    real = np.flatnonzero(gap != most)
    skips = np.diff(real, prepend=-1) - 1
    return len(real) + int(((skips * most + gap[real]) // other).sum())
