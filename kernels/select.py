"""Select: histograms of keys, and ties counted by segment, from which the host finds thresholds and cuts."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .bits import any_from, members, pack, to_float, unpack
from .launch import BLOCK, COPIES, Launch
from .score import (
    COUNTS,
    CUT,
    ELIGIBLE,
    ENDING,
    FIELDS,
    INFINITE,
    Piece,
    place,
    retained,
    score,
)

if TYPE_CHECKING:
    import torch

# Columns of the window table (int64): counts[offset + ((key - lo) >> shift)] for keys that fall into `bins`.
LO, SHIFT, BINS, OFFSET = (tl.constexpr(i) for i in range(4))
WINDOW_FIELDS = tl.constexpr(4)


# reference.py: ReferenceBackend.histogram
@triton.jit(do_not_specialize=["head", "size"])
def histogram_kernel(
    base, values, scores, table, batch,
    first: tl.int64, head: tl.int32, size: tl.int32, cols: tl.int64,
    tally, windows, counts, stride: tl.int64,
    owners: tl.constexpr, plan: tl.constexpr,
    COPIES: tl.constexpr, HISTOGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start, origin, inside, tensor = place(batch, first, head, size, tl.program_id(0), BLOCK)
    end = first + head + size
    columns: tl.constexpr = len(plan.patches) * COUNTS + ENDING
    table += tensor * (len(plan.patches) * FIELDS)
    windows += tensor * (len(owners) * WINDOW_FIELDS)
    tally += tensor * (COPIES * columns)
    cells = tally + tl.program_id(0) % COPIES * columns
    mine = counts + tl.program_id(0) % HISTOGRAMS * stride
    one = tl.full([BLOCK], 1, tl.int64)
    w = to_float(tl.load(base + start + tl.arange(0, BLOCK)), tl.constexpr(plan.dtype))
    for p in tl.static_range(len(plan.patches)):
        row = table + p * FIELDS
        d, key = score(w, values[p], scores[p], row, start, origin, cols, end, plan, p, BLOCK)
        eligible = pack(key - 1 < INFINITE - 1) & inside
        if plan.order == "retain-first":
            eligible &= pack(retained(row, origin, plan, p, BLOCK))
        for i in tl.static_range(len(owners)):
            if owners[i] == p:
                window = windows + i * WINDOW_FIELDS
                lo = tl.load(window + LO)
                bin = (key - lo.to(tl.uint32)) >> tl.load(window + SHIFT).to(tl.uint32)
                fits = (key >= lo.to(tl.uint32)) & (bin < tl.load(window + BINS).to(tl.uint32))
                cell = mine + tl.load(window + OFFSET) + bin
                tl.atomic_add(cell, one, mask=unpack(eligible) & fits, sem="relaxed")
        both = tl.sum(members(eligible) | (any_from(key, INFINITE) << 16))
        tl.atomic_add(cells + p * COUNTS + ELIGIBLE, (both & 0xFFFF).to(tl.int64), sem="relaxed")
        if both >> 16 != 0:
            tl.atomic_add(tally + columns - 1, 1, sem="relaxed")


def histogram(piece: Piece, windows: torch.Tensor, owners: tuple[int, ...], counts: torch.Tensor) -> Launch:
    """Count the keys of eligible entries; add eligible counts to the tally.

    windows: int64 [len(owners), 4], a row per window (see the columns above); owners: the patch of each window;
    counts: int64 [copies, bins of all windows], to be added up by `fold`. A batch has the windows of its tensors, one
    after another.
    """
    copies, bins = counts.shape
    args = (*piece.arguments, piece.tally, windows, counts, bins, owners, piece.plan)
    return Launch(histogram_kernel, piece.programs, (*args, COPIES, copies, BLOCK))


@triton.jit
def fold_kernel(
    counts, total, sums, bins: tl.int64, stride: tl.int64, HISTOGRAMS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    bin = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = bin < bins
    both = tl.zeros([BLOCK], tl.int64)
    for copy in tl.static_range(HISTOGRAMS):
        both += tl.load(counts + copy * stride + bin, mask=inside, other=0)
    tl.store(total + bin, both, mask=inside)
    if sums is not None:
        tl.store(sums + tl.program_id(0), tl.sum(both))


def fold(counts: torch.Tensor, total: torch.Tensor, sums: torch.Tensor | None = None) -> Launch:
    """Add up the copies of a histogram: counts int64 [copies, bins], total int64 [bins], which may be the only copy.

    counts may be columns of a wider array; sums: int64, of each BLOCK bins.
    """
    copies, bins = counts.shape
    args = (counts, total, sums, bins, counts.stride(0), copies, BLOCK)
    return Launch(fold_kernel, triton.cdiv(bins, BLOCK), args)


# reference.py: ReferenceBackend.count_equal
@triton.jit
def ties(
    w, values, scores, row, cut, start, origin, cols, end, inside,
    plan: tl.constexpr, p: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A patch's eligible entries whose key is `cut`, that of a finite score above 0, as sets."""
    d, key = score(w, values, scores, row, start, origin, cols, end, plan, p, BLOCK)
    equal = pack(key == cut.to(tl.uint32)) & inside
    if plan.order == "retain-first":
        equal &= pack(retained(row, origin, plan, p, BLOCK))
    return equal


@triton.jit(do_not_specialize=["head", "size"])
def count_equal_kernel(
    base, values, scores, table, batch,
    first: tl.int64, head: tl.int32, size: tl.int32, cols: tl.int64,
    counts, stride: tl.int64,
    plan: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start, origin, inside, tensor = place(batch, first, head, size, tl.program_id(0), BLOCK)
    end = first + head + size
    table += tensor * (len(plan.patches) * FIELDS)
    w = to_float(tl.load(base + start + tl.arange(0, BLOCK)), tl.constexpr(plan.dtype))
    for p in tl.static_range(len(plan.patches)):
        row = table + p * FIELDS
        cut = tl.load(row + CUT)
        found = 0
        if (cut > 0) & (cut < INFINITE):
            equal = ties(w, values[p], scores[p], row, cut, start, origin, cols, end, inside, plan, p, BLOCK)
            found = tl.sum(members(equal))
        tl.store(counts + p * stride + tl.program_id(0), found)


def count_equal(piece: Piece, counts: torch.Tensor) -> Launch:
    """Count each patch's eligible entries whose key is its CUT, per segment of BLOCK entries.

    counts: int32 [patches, segments], written from its first column on; a view of a wider array will do.
    """
    args = (*piece.arguments, counts, counts.stride(0), piece.plan, BLOCK)
    return Launch(count_equal_kernel, piece.programs, args)
