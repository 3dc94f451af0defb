"""Apply: who acts where, the sum, the rounding; everything else keeps the base's bits."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="assignment"
from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .bits import (
    below,
    finite,
    from_float,
    magnitude,
    members,
    pack,
    to_float,
    unpack,
)
from .faults import fault
from .launch import BLOCK, COPIES, Launch
from .score import (
    APPLIED,
    BEFORE,
    COUNTS,
    CUT,
    ELIGIBLE,
    ENDING,
    FIELDS,
    INFINITE,
    SCALE,
    SELECTED,
    Piece,
    delta,
    place,
    retained,
    score,
)

if TYPE_CHECKING:
    import torch


@triton.jit(do_not_specialize=["head", "size"])
def apply_kernel(
    base, values, scores, table,
    first: tl.int64, head: tl.int32, size: tl.int32, cols: tl.int64,
    tally, out,
    plan: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start, origin, inside = place(first, head, size, BLOCK)
    lanes = tl.arange(0, BLOCK)
    end = first + head + size

    # First every patch decides by itself and leaves sets behind. The barriers keep the compiler from working
    # on all patches at once, which takes twice the registers; what is loaded again comes from the cache.
    faulty = tl.zeros([BLOCK // 8], tl.int32)
    once, several = faulty, faulty
    eligibles = ()
    takens = ()
    for p in tl.static_range(len(plan.patches)):
        row = table + p * FIELDS
        kept = pack(retained(row, origin, plan, p, BLOCK))
        tl.debug_barrier()
        w = to_float(tl.load(base + start + lanes), tl.constexpr(plan.dtype))
        d, key = score(w, values[p], scores[p], row, start, origin, cols, end, plan, p, BLOCK)
        cut = tl.minimum(tl.load(row + CUT), INFINITE).to(tl.uint32)
        broken = pack(key >= INFINITE) & inside
        eligible = pack(key > 0) & inside & ~broken
        taken = pack(key > cut) | (pack(key == cut) & below(tl.load(row + BEFORE) - origin, BLOCK))
        if plan.order == "retain-first":
            eligible &= kept
        else:
            taken &= kept
        taken &= eligible
        faulty |= broken
        several |= once & taken
        once |= taken
        eligibles = eligibles + (eligible,)
        takens = takens + (taken,)
        tl.debug_barrier()

    bits = tl.load(base + start + lanes)
    w = to_float(bits, tl.constexpr(plan.dtype))
    acc = w
    if plan.combine == "ties":
        # The sign that wins is known only at the end: keep the sums and members of both.
        total = tl.zeros([BLOCK], tl.float32)
        rise, rises = total, total
        fall, falls = total, total
        ups = ()
        downs = ()
    for p in tl.static_range(len(plan.patches)):
        row = table + p * FIELDS
        d, x = delta(w, values[p], row, start, origin, cols, end, plan, p, BLOCK)
        step = tl.load(row + SCALE).to(tl.uint32).to(tl.float32, bitcast=True) * d
        taken = unpack(takens[p])
        if plan.combine == "ties":
            up, down = taken & (step > 0), taken & (step < 0)
            total = tl.where(taken, total + step, total)
            rise, rises = tl.where(up, rise + step, rise), tl.where(up, rises + 1, rises)
            fall, falls = tl.where(down, fall + step, fall), tl.where(down, falls + 1, falls)
            ups = ups + (pack(up),)
            downs = downs + (pack(down),)
        else:
            acc = tl.where(taken, (acc if plan.combine == "sum" else w) + step, acc)

    if plan.combine == "ties":
        up, down = total > 0, total < 0
        acc = w + tl.div_rn(tl.where(up, rise, fall), tl.maximum(tl.where(up, rises, falls), 1.0))
        up, down = pack(up), pack(down)
        touched = up | down
    elif plan.combine == "sum":
        touched = once
    else:
        touched = once & ~several
    touches = unpack(touched) & finite(w)
    rounded = from_float(acc, tl.constexpr(plan.dtype))
    fits = tl.maximum(magnitude(acc), magnitude(to_float(rounded, tl.constexpr(plan.dtype)))) < INFINITE
    tl.store(out + start + lanes, tl.where(touches & fits, rounded, bits))
    overflow = pack(touches & ~fits)

    columns: tl.constexpr = len(plan.patches) * COUNTS + ENDING
    cells = tally + tl.program_id(0) % COPIES * columns
    for p in tl.static_range(len(plan.patches)):
        if plan.combine == "ties":
            acting = (ups[p] & up) | (downs[p] & down)
        else:
            acting = takens[p] & touched
        # Four 16-bit fields make one reduction.
        low = members(eligibles[p]) | (members(takens[p]) << 16)
        high = members(acting)
        if p == 0:
            high |= members(faulty | overflow) << 16
        fields = tl.sum(low.to(tl.int64) | (high.to(tl.int64) << 32))
        tl.atomic_add(cells + p * COUNTS + ELIGIBLE, fields & 0xFFFF, sem="relaxed")
        tl.atomic_add(cells + p * COUNTS + SELECTED, (fields >> 16) & 0xFFFF, sem="relaxed")
        tl.atomic_add(cells + p * COUNTS + APPLIED, (fields >> 32) & 0xFFFF, sem="relaxed")
        if p == 0:
            broken = fields >> 48 > 0
    if broken:
        tl.atomic_add(tally + columns - 1, 1, sem="relaxed")
        fault(cells + columns - ENDING, overflow, origin, 1, BLOCK)


def apply(piece: Piece, out: torch.Tensor) -> Launch:
    """Write the piece's new bits to `out`, a buffer like `piece.base`, and add to the tally.

    `out` may be the base itself where `faults` won't be asked afterwards: that measures the old bits.
    """
    args = (*piece.arguments, piece.tally, out, piece.plan, COPIES, BLOCK)
    return Launch(apply_kernel, piece.programs, args)
