"""Select: histograms of keys, and ties counted by segment, from which the host finds thresholds and cuts."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .bits import any_from, members, pack, to_float, unpack
from .launch import BLOCK, COPIES, HISTOGRAMS, Launch
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
    base, values, scores, table,
    first: tl.int64, head: tl.int32, size: tl.int32, cols: tl.int64,
    tally, windows, counts, stride: tl.int64,
    owners: tl.constexpr, plan: tl.constexpr,
    COPIES: tl.constexpr, HISTOGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start, origin, inside = place(first, head, size, BLOCK)
    end = first + head + size
    columns: tl.constexpr = len(plan.patches) * COUNTS + ENDING
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
    counts: int64 [HISTOGRAMS, bins of all windows], to be added up by `fold`.
    """
    args = (*piece.arguments, piece.tally, windows, counts, counts.shape[1], owners, piece.plan)
    return Launch(histogram_kernel, piece.programs, (*args, COPIES, HISTOGRAMS, BLOCK))


@triton.jit
def fold_kernel(counts, total, bins: tl.int64, HISTOGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    bin = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = bin < bins
    sums = tl.zeros([BLOCK], tl.int64)
    for copy in tl.static_range(HISTOGRAMS):
        sums += tl.load(counts + copy * bins + bin, mask=inside, other=0)
    tl.store(total + bin, sums, mask=inside)


def fold(counts: torch.Tensor, total: torch.Tensor) -> Launch:
    """Add up the copies of a histogram: counts int64 [HISTOGRAMS, bins], total int64 [bins]."""
    bins = counts.shape[1]
    return Launch(fold_kernel, triton.cdiv(bins, BLOCK), (counts, total, bins, HISTOGRAMS, BLOCK))


# reference.py: ReferenceBackend.count_equal
@triton.jit(do_not_specialize=["head", "size"])
def count_equal_kernel(
    base, values, scores, table,
    first: tl.int64, head: tl.int32, size: tl.int32, cols: tl.int64,
    counts, stride: tl.int64,
    plan: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start, origin, inside = place(first, head, size, BLOCK)
    end = first + head + size
    w = to_float(tl.load(base + start + tl.arange(0, BLOCK)), tl.constexpr(plan.dtype))
    for p in tl.static_range(len(plan.patches)):
        row = table + p * FIELDS
        d, key = score(w, values[p], scores[p], row, start, origin, cols, end, plan, p, BLOCK)
        cut = tl.load(row + CUT)
        equal = pack(key == cut.to(tl.uint32)) & tl.where((cut > 0) & (cut < INFINITE), inside, 0)
        if plan.order == "retain-first":
            equal &= pack(retained(row, origin, plan, p, BLOCK))
        tl.store(counts + p * stride + tl.program_id(0), tl.sum(members(equal)))


def count_equal(piece: Piece, counts: torch.Tensor) -> Launch:
    """Count each patch's eligible entries whose key is its CUT, per segment of BLOCK entries.

    counts: int32 [patches, segments], written from its first column on; a view of a wider array will do.
    """
    args = (*piece.arguments, counts, counts.stride(0), piece.plan, BLOCK)
    return Launch(count_equal_kernel, piece.programs, args)
