"""Decide: thresholds and cuts from histograms and counted ties, on the device: no host waits between sweeps.

A search is one patch's for one quota in one tensor: first the searches for the quotas of all patches, then, where
some skip their best entries, those for the skips. `backends/select.py` is the same for the host, which sees streams.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="assignment,misc"
from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from safepatch_core.spec import KEY_BITS
from safepatch_core.spec import NO_KEY as NO_KEY_

from .bits import to_float, unpack
from .launch import BLOCK, Launch
from .score import BEFORE, CUT, EVERY, FIELDS, SKIP, SKIP_BEFORE, Piece, place
from .select import BINS, LO, WINDOW_FIELDS, ties

if TYPE_CHECKING:
    import torch

# Columns of the search table (int64): how many entries are wanted; then how many keys lie above the bin of the last
# one, the threshold, and how many of the entries that have it are taken: 0, EVERY, or those that lie first.
WANTED, OVER, KEY, LEFT = (tl.constexpr(i) for i in range(4))
SEARCH_FIELDS = tl.constexpr(4)
LOW_BITS = tl.constexpr(15)
COARSE, FINE = tl.constexpr(1 << (KEY_BITS - 15)), tl.constexpr(1 << 15)
NO_KEY = tl.constexpr(NO_KEY_)


# select.py: _bin_of
@triton.jit
def highest(counts, rank, above, SIZE: tl.constexpr):
    """The last of some bins at which, with all higher ones and what lies `above`, there are `rank` keys.

    Also how many keys lie above it, and how many in it.
    """
    tails = above + tl.sum(counts) - tl.cumsum(counts, axis=0) + counts
    place = tl.sum((tails >= rank).to(tl.int32)) - 1
    bins = tl.arange(0, SIZE)
    return place, above + tl.sum(tl.where(bins > place, counts, 0)), tl.sum(tl.where(bins == place, counts, 0))


@triton.jit
def locate(counts, sums, rank, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """`highest` of SIZE bins, of which `sums` has a sum per BLOCK; there are `rank` keys in them."""
    groups: tl.constexpr = SIZE // BLOCK
    group, above, _ = highest(tl.load(sums + tl.arange(0, groups)), rank, tl.full([], 0, tl.int64), groups)
    place, above, here = highest(tl.load(counts + group * BLOCK + tl.arange(0, BLOCK)), rank, above, BLOCK)
    return group * BLOCK + place, above, here


@triton.jit
def narrow_kernel(
    counts, sums, searches, fine,
    patches: tl.constexpr, roles: tl.constexpr, COARSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    search = tl.program_id(0)
    owner = search // (patches * roles) * patches + search % patches
    groups: tl.constexpr = COARSE // BLOCK
    sums += owner * groups
    row, window = searches + search * SEARCH_FIELDS, fine + search * WINDOW_FIELDS
    wanted = tl.load(row + WANTED)
    tl.store(row + KEY, tl.where(wanted > 0, 0, NO_KEY))
    tl.store(row + LEFT, tl.where(wanted > 0, EVERY, 0))
    if (wanted > 0) & (tl.sum(tl.load(sums + tl.arange(0, groups))) > wanted):
        place, over, _ = locate(counts + owner.to(tl.int64) * COARSE, sums, wanted, COARSE, BLOCK)
        tl.store(row + OVER, over)
        tl.store(window + LO, place.to(tl.int64) << LOW_BITS)
        tl.store(window + BINS, FINE)


def narrow(
    counts: torch.Tensor, sums: torch.Tensor, searches: torch.Tensor, fine: torch.Tensor, patches: int, roles: int
) -> Launch:
    """From the keys' upper bits, choose each search's window for the lower ones.

    counts, sums: as `fold` makes them, COARSE bins per tensor and patch; searches: int64 [tensors * roles * patches,
    SEARCH_FIELDS]; fine: a window table's rows per search, of no bins where nothing is left to be searched.
    """
    return Launch(narrow_kernel, len(searches), (counts, sums, searches, fine, patches, roles, COARSE, BLOCK))


@triton.jit
def settle_kernel(
    counts, sums, searches, fine, cuts,
    tensors: tl.int32, patches: tl.constexpr, roles: tl.constexpr, FINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    search = tl.program_id(0)
    tensor, role, p = search // (patches * roles), search // patches % roles, search % patches
    row, window = searches + search * SEARCH_FIELDS, fine + search * WINDOW_FIELDS
    if tl.load(window + BINS) > 0:
        rank = tl.load(row + WANTED) - tl.load(row + OVER)
        groups: tl.constexpr = FINE // BLOCK
        place, over, here = locate(counts + search.to(tl.int64) * FINE, sums + search * groups, rank, FINE, BLOCK)
        key, left = tl.load(window + LO) + place, rank - over
        tl.store(row + KEY, key)
        tl.store(row + LEFT, tl.where(left == here, EVERY, left))
        if left < here:
            tl.store(cuts + ((role * tensors + tensor) * patches + p) * FIELDS + CUT, key)


def settle(
    counts: torch.Tensor, sums: torch.Tensor, searches: torch.Tensor, fine: torch.Tensor, cuts: torch.Tensor
) -> Launch:
    """From the keys' lower bits, find the thresholds; where some of their ties are left over, set CUT in `cuts`.

    cuts: int64 [roles, tensors, patches, FIELDS], a table per role, whose CUT is 0 before.
    """
    roles, tensors, patches, _ = cuts.shape
    args = (counts, sums, searches, fine, cuts, tensors, patches, roles, FINE, BLOCK)
    return Launch(settle_kernel, len(searches), args)


@triton.jit
def segment_of(counts, segments, left, BLOCK: tl.constexpr):
    """The segment that the `left`-th tie lies in, and the tie's number there."""
    segment, before, passed = left * 0, left * 0, left * 0
    for at in range(0, segments, BLOCK):
        lane = at + tl.arange(0, BLOCK)
        here = lane < segments
        few = tl.load(counts + lane, mask=here, other=0).to(tl.int64)
        short = (passed + tl.cumsum(few, axis=0) < left) & here
        segment += tl.sum(short.to(tl.int64))
        before += tl.sum(tl.where(short, few, 0))
        passed += tl.sum(few)
    return segment, left - before


# reference.py: cut_of
@triton.jit(do_not_specialize=["head", "size"])
def cut_kernel(
    base, values, scores, table, batch,
    first: tl.int64, head: tl.int32, size: tl.int32, cols: tl.int64,
    searches, counts, stride: tl.int64, extents, cuts, tensors: tl.int32,
    roles: tl.constexpr, plan: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, role, patches = tl.program_id(0) // roles, tl.program_id(0) % roles, len(plan.patches)
    end = first + head + size
    begin, segments = tl.load(extents + tensor * 2), tl.load(extents + tensor * 2 + 1)
    for p in tl.static_range(len(plan.patches)):
        row = cuts + ((role * tensors + tensor) * patches + p) * FIELDS
        search = searches + (tl.program_id(0) * patches + p) * SEARCH_FIELDS
        key, before = tl.load(search + KEY), tl.load(search + LEFT)
        if (before > 0) & (before < EVERY):
            segment, rank = segment_of(counts + (role * patches + p) * stride + begin, segments, before, BLOCK)
            start, origin, inside, _ = place(batch, first, head, size, begin + segment, BLOCK)
            w = to_float(tl.load(base + start + tl.arange(0, BLOCK)), tl.constexpr(plan.dtype))
            equal = ties(w, values[p], scores[p], row, key, start, origin, cols, end, inside, plan, p, BLOCK)
            equal = unpack(equal)
            last = equal & (tl.cumsum(equal.to(tl.int32), axis=0) == rank)
            before = origin + tl.sum(tl.where(last, tl.arange(0, BLOCK), 0)) + 1
        tl.debug_barrier()  # one search after the other: all at once don't fit the registers
        tl.store(row + CUT, key)
        tl.store(row + BEFORE, before)


def cut(
    piece: Piece, searches: torch.Tensor, counts: torch.Tensor, extents: torch.Tensor, cuts: torch.Tensor
) -> Launch:
    """Find where the ties of each threshold end, and set CUT and BEFORE of `cuts`, a table per role.

    piece: all of the tensors' entries; counts: int32 [roles, patches, segments], of `count_equal` by role; extents:
    int64 [tensors, 2], each one's first segment and how many it has.
    """
    roles = len(cuts)
    args = (
        *piece.arguments,
        searches,
        counts,
        counts.stride(1),
        extents,
        cuts,
        len(extents),
        roles,
        piece.plan,
        BLOCK,
    )
    return Launch(cut_kernel, len(extents) * roles, args)


# contract.py: Cut.without
@triton.jit
def without_kernel(cuts, rows: tl.int32):
    row = cuts + tl.program_id(0) * FIELDS
    best = row + rows * FIELDS
    key, before = tl.load(best + CUT), tl.load(best + BEFORE)
    if (key == 0) & (before == EVERY):  # all that there is
        tl.store(row + CUT, NO_KEY)
        tl.store(row + BEFORE, 0)
    else:
        tl.store(row + SKIP, key)
        tl.store(row + SKIP_BEFORE, before)


def without(cuts: torch.Tensor) -> Launch:
    """Make what the cuts of the second role select what those of the first skip; `cuts` as in `cut`."""
    rows = cuts.shape[1] * cuts.shape[2]
    return Launch(without_kernel, rows, (cuts, rows))
