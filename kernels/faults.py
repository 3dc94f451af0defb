"""Faults: how many entries have a bad delta, a bad score or a negative one, and where the first of each is."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from .bits import finite, members, pack, to_float, unpack
from .launch import BLOCK, COPIES, Launch
from .score import (
    BAD_DELTA,
    BAD_SCORE,
    COUNTS,
    ENDING,
    EVERY,
    FIELDS,
    FIRST,
    NEGATIVE,
    Piece,
    delta,
    importance,
    place,
)


# reference.py: fault
@triton.jit
def fault(cell, sets, origin, after: tl.constexpr, BLOCK: tl.constexpr):
    """Count a kind of fault; `after` the count, keep the lowest index as the largest EVERY - index."""
    found = tl.sum(members(sets))
    if found > 0:
        first = tl.min(tl.where(unpack(sets), tl.arange(0, BLOCK), BLOCK))
        tl.atomic_add(cell, found.to(tl.int64), sem="relaxed")
        tl.atomic_max(cell + after, (origin + first) ^ EVERY, sem="relaxed")


# reference.py: Scored
@triton.jit(do_not_specialize=["head", "size"])
def faults_kernel(
    base, values, scores, table, batch,
    first: tl.int64, head: tl.int32, size: tl.int32, cols: tl.int64,
    tally,
    plan: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = len(plan.patches) * COUNTS + ENDING
    start, origin, inside, tensor = place(batch, first, head, size, tl.program_id(0), BLOCK)
    tally += tensor * (COPIES * columns)
    if tl.load(tally + columns - 1) != 0:
        table += tensor * (len(plan.patches) * FIELDS)
        end = first + head + size
        w = to_float(tl.load(base + start + tl.arange(0, BLOCK)), tl.constexpr(plan.dtype))
        for p in tl.static_range(len(plan.patches)):
            row = table + p * FIELDS
            cells = tally + tl.program_id(0) % COPIES * columns + p * COUNTS
            d, x = delta(w, values[p], row, start, origin, cols, end, plan, p, BLOCK)
            s = importance(w, d, x, scores[p], start, plan, p, BLOCK)
            good, real = pack(finite(d)), pack(finite(s))
            fault(cells + BAD_DELTA, inside & ~good, origin, FIRST, BLOCK)
            fault(cells + BAD_SCORE, inside & good & ~real, origin, FIRST, BLOCK)
            fault(cells + NEGATIVE, inside & good & real & pack(s < 0), origin, FIRST, BLOCK)


def faults(piece: Piece) -> Launch:
    """Add the piece's faults to the tally, if a pass before it (into the same tally) has met one.

    Passes only notice faults: telling them apart there would double their registers for what almost never is.
    """
    args = (*piece.arguments, piece.tally, piece.plan, COPIES, BLOCK)
    return Launch(faults_kernel, piece.programs, args)
