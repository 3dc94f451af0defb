"""Apply: who acts where, the sum, the rounding; everything else keeps the base's bits."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="assignment"
from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .bits import (
    any_from,
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
    ACTED,
    BEFORE,
    COUNTS,
    CUT,
    ELIGIBLE,
    ENDING,
    FIELDS,
    INFINITE,
    OVERFLOW,
    SCALE,
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
        # A margin's entries may raise a false alarm; `faults` will find nothing there.
        faulty |= any_from(key, INFINITE)
        eligible = pack(key - 1 < INFINITE - 1) & inside
        # Almost everywhere all of a program's entries lie on one side of the cut: then one comparison will do.
        cut, ties = tl.minimum(tl.load(row + CUT), INFINITE).to(tl.uint32), tl.load(row + BEFORE) - origin
        taken = pack(key > tl.where((ties >= BLOCK) & (cut > 0), cut - 1, cut))
        if (ties > 0) & (ties < BLOCK):
            taken |= pack(key == cut) & below(ties, BLOCK)
        if plan.order == "retain-first":
            eligible &= kept
        else:
            taken &= kept
        taken &= eligible
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
        # Of steps that are infinite both ways the sum is NaN and has no sign: all act, and overflow, as -inf does.
        acc = w + tl.div_rn(tl.where(up, rise, fall), tl.maximum(tl.where(up, rises, falls), 1.0))
        up, down, touched = pack(up), pack(down), pack(total != 0)
        lost = touched & ~(up | down)
    elif plan.combine == "sum":
        touched = once
    else:
        touched = once & ~several
    rounded = from_float(acc, tl.constexpr(plan.dtype))
    fits = pack(tl.maximum(magnitude(acc), magnitude(to_float(rounded, tl.constexpr(plan.dtype)))) < INFINITE)
    written = tl.where(unpack(touched & fits), rounded, bits)
    tl.store(out + start + lanes, written)
    # Where the base isn't finite neither is the sum: then nothing overflows, and nothing fits.
    missed = touched & ~fits

    columns: tl.constexpr = len(plan.patches) * COUNTS + ENDING
    cells = tally + tl.program_id(0) % COPIES * columns
    ending = cells + len(plan.patches) * COUNTS
    # Two counts are a number of 32 bits, which the hardware adds up across a warp in one instruction.
    halves = tl.arange(0, 2)
    changed = tl.sum(tl.reshape((written != bits).to(tl.int32), [BLOCK // 8, 8]), axis=1)
    both = tl.sum(members(touched) | (changed << 16))
    tl.atomic_add(ending + ACTED + halves, ((both >> (16 * halves)) & 0xFFFF).to(tl.int64), sem="relaxed")
    met = faulty | missed
    for p in tl.static_range(len(plan.patches)):
        if plan.combine == "ties":
            acting = (ups[p] & up) | (downs[p] & down) | (takens[p] & lost)
        else:
            acting = takens[p] & touched
        low, high = members(eligibles[p]) | (members(takens[p]) << 16), members(acting)
        if p == 0:
            high |= members(met) << 16
        pairs = tl.sum(tl.join(low, high), axis=0)
        counts = (pairs[:, None] >> (16 * halves)[None, :]) & 0xFFFF
        cell = cells + p * COUNTS + ELIGIBLE + 2 * halves[:, None] + halves[None, :]
        tl.atomic_add(cell, counts.to(tl.int64), sem="relaxed")
        if p == 0:
            broken = tl.sum(tl.where(halves == 1, pairs, 0)) >> 16
    if broken > 0:
        tl.atomic_add(tally + columns - 1, 1, sem="relaxed")
        fault(ending + OVERFLOW, missed & pack(finite(w)), origin, 1, BLOCK)


def apply(piece: Piece, out: torch.Tensor) -> Launch:
    """Write the piece's new bits to `out`, a buffer like `piece.base`, and add to the tally.

    `out` may be the base itself where `faults` won't be asked afterwards: that measures the old bits.
    """
    args = (*piece.arguments, piece.tally, out, piece.plan, COPIES, BLOCK)
    return Launch(apply_kernel, piece.programs, args)
