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
    ALONE,
    BEFORE,
    COUNTS,
    CUT,
    ELECTED,
    ELIGIBLE,
    ENDING,
    FIELDS,
    INFINITE,
    LAMBDA,
    MEAN,
    OVERFLOW,
    SCALE,
    SKIP,
    SKIP_BEFORE,
    SUM,
    UP,
    WEIGHTED,
    Piece,
    delta,
    place,
    retained,
    score,
)

if TYPE_CHECKING:
    import torch


# reference.py: Scored.selected
@triton.jit
def within(key, cut, before, origin, BLOCK: tl.constexpr):
    """The entries on the upper side of a cut, as a set."""
    # Almost everywhere all of a program's entries lie on one side of the cut: then one comparison will do.
    cut, ties = tl.minimum(cut, INFINITE).to(tl.uint32), before - origin
    upper = pack(key > tl.where((ties >= BLOCK) & (cut > 0), cut - 1, cut))
    if (ties > 0) & (ties < BLOCK):
        upper |= pack(key == cut) & below(ties, BLOCK)
    return upper


# reference.py: Scored.selected
@triton.jit
def decide(
    base, values, scores, row, start, origin, cols, end, inside,
    plan: tl.constexpr, p: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What one patch finds by itself, as sets: eligible entries, T, and whether there may be a fault."""
    # The barriers keep the compiler from working on all patches at once, which takes twice the registers; what is
    # loaded again later comes from the cache.
    kept = pack(retained(row, origin, plan, p, BLOCK))
    tl.debug_barrier()
    w = to_float(tl.load(base + start + tl.arange(0, BLOCK)), tl.constexpr(plan.dtype))
    d, key = score(w, values, scores, row, start, origin, cols, end, plan, p, BLOCK)
    # A margin's entries may raise a false alarm; `faults` will find nothing there.
    faulty = any_from(key, INFINITE)
    eligible = pack(key - 1 < INFINITE - 1) & inside
    selected = within(key, tl.load(row + CUT), tl.load(row + BEFORE), origin, BLOCK)
    if plan.patches[p].skip:
        selected &= ~within(key, tl.load(row + SKIP), tl.load(row + SKIP_BEFORE), origin, BLOCK)
    if plan.order == "retain-first":
        eligible &= kept
    else:
        selected &= kept
    selected &= eligible
    tl.debug_barrier()
    return eligible, selected, faulty


@triton.jit
def step(w, values, row, start, origin, cols, end, plan: tl.constexpr, p: tl.constexpr, BLOCK: tl.constexpr):
    """c * d of one patch."""
    d, x = delta(w, values, row, start, origin, cols, end, plan, p, BLOCK)
    return tl.load(row + SCALE).to(tl.uint32).to(tl.float32, bitcast=True) * d


# reference.py: acting
@triton.jit
def elect(w, values, table, selected, start, origin, cols, end, plan: tl.constexpr, BLOCK: tl.constexpr):
    """Where the sum of all steps isn't zero, and per patch where its own has the sum's sign."""
    total = tl.zeros([BLOCK], tl.float32)
    ups = ()
    downs = ()
    for p in tl.static_range(len(plan.patches)):
        more = step(w, values[p], table + p * FIELDS, start, origin, cols, end, plan, p, BLOCK)
        total = tl.where(unpack(selected[p]), total + more, total)
        ups = ups + (pack(more > 0) & selected[p],)
        downs = downs + (pack(more < 0) & selected[p],)
        tl.debug_barrier()
    # Steps that are infinite both ways have no sum and elect no sign: all act, and none of what they make is finite.
    up, down, touched = pack(total > 0), pack(total < 0), pack(total != 0)
    lost = touched & ~(up | down)
    if plan.acts == UP:
        up |= pack(total == 0)
        for p in tl.static_range(len(plan.patches)):
            touched |= ups[p] & up
    acting = ()
    for p in tl.static_range(len(plan.patches)):
        acting = acting + ((ups[p] & up) | (downs[p] & down) | (selected[p] & lost),)
    return touched, acting


# reference.py: acting
@triton.jit
def settle(
    w, values, table, selected, once, several, start, origin, cols, end, plan: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The entries that are acted on, and per patch a set that holds those among them that it acts on.

    Cutting those sets to who acts would cost the common rules registers; what is made of an entry that nobody acts on
    is never written.
    """
    if plan.acts >= ELECTED:
        return elect(w, values, table, selected, start, origin, cols, end, plan, BLOCK)
    else:
        if plan.acts == ALONE:
            touched = once & ~several
        else:
            touched = once
        return touched, selected


# reference.py: joined
@triton.jit
def joined(w, values, table, acting, start, origin, cols, end, plan: tl.constexpr, BLOCK: tl.constexpr):
    """What the acting steps make of w, before rounding."""
    zero = tl.zeros([BLOCK], tl.float32)
    if plan.join == SUM:
        total = w
    else:
        total = zero
    number = zero
    for p in tl.static_range(len(plan.patches)):
        more = step(w, values[p], table + p * FIELDS, start, origin, cols, end, plan, p, BLOCK)
        mine = unpack(acting[p])
        if plan.join == WEIGHTED:
            one = tl.load(table + p * FIELDS + SCALE).to(tl.uint32).to(tl.float32, bitcast=True)
        else:
            one = 1.0
        total, number = tl.where(mine, total + more, total), tl.where(mine, number + one, number)
    if plan.join == MEAN or plan.join == WEIGHTED:
        total = tl.div_rn(total, tl.where(number == 0, 1.0, number))
    if plan.join != SUM:
        total = w + tl.load(table + LAMBDA).to(tl.uint32).to(tl.float32, bitcast=True) * total
    return total


@triton.jit
def count(
    cells, eligibles, selected, acting, touched, changed, met, plan: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add a program's counts to the tally; returns how many entries there are in `met`."""
    # Two counts are a number of 32 bits, which the hardware adds up across a warp in one instruction.
    halves = tl.arange(0, 2)
    both = tl.sum(members(touched) | (changed << 16))
    ending = cells + len(plan.patches) * COUNTS
    tl.atomic_add(ending + ACTED + halves, ((both >> (16 * halves)) & 0xFFFF).to(tl.int64), sem="relaxed")
    for p in tl.static_range(len(plan.patches)):
        low, high = members(eligibles[p]) | (members(selected[p]) << 16), members(acting[p] & touched)
        if p == 0:
            high |= members(met) << 16
        pairs = tl.sum(tl.join(low, high), axis=0)
        counts = (pairs[:, None] >> (16 * halves)[None, :]) & 0xFFFF
        cell = cells + p * COUNTS + ELIGIBLE + 2 * halves[:, None] + halves[None, :]
        tl.atomic_add(cell, counts.to(tl.int64), sem="relaxed")
        if p == 0:
            broken = tl.sum(tl.where(halves == 1, pairs, 0)) >> 16
    return broken


# reference.py: ReferenceBackend.apply
@triton.jit(do_not_specialize=["head", "size"])
def apply_kernel(
    base, values, scores, table, batch,
    first: tl.int64, head: tl.int32, size: tl.int32, cols: tl.int64,
    tally, out,
    plan: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start, origin, inside, tensor = place(batch, first, head, size, tl.program_id(0), BLOCK)
    lanes = tl.arange(0, BLOCK)
    end = first + head + size
    columns: tl.constexpr = len(plan.patches) * COUNTS + ENDING
    table += tensor * (len(plan.patches) * FIELDS)
    tally += tensor * (COPIES * columns)

    # First every patch decides by itself and leaves sets behind.
    met = tl.zeros([BLOCK // 8], tl.int32)
    once, several = met, met
    eligibles = ()
    selected = ()
    for p in tl.static_range(len(plan.patches)):
        eligible, mine, faulty = decide(
            base, values[p], scores[p], table + p * FIELDS, start, origin, cols, end, inside, plan, p, BLOCK
        )  # fmt: skip
        met |= faulty
        several |= once & mine
        once |= mine
        eligibles = eligibles + (eligible,)
        selected = selected + (mine,)

    bits = tl.load(base + start + lanes)
    w = to_float(bits, tl.constexpr(plan.dtype))
    touched, acting = settle(
        w, values, table, selected, once, several, start, origin, cols, end, plan, BLOCK
    )  # fmt: skip
    acc = joined(w, values, table, acting, start, origin, cols, end, plan, BLOCK)
    rounded = from_float(acc, tl.constexpr(plan.dtype))
    fits = pack(tl.maximum(magnitude(acc), magnitude(to_float(rounded, tl.constexpr(plan.dtype)))) < INFINITE)
    written = tl.where(unpack(touched & fits), rounded, bits)
    tl.store(out + start + lanes, written)
    # Where the base isn't finite neither is the sum: then nothing overflows, and nothing fits.
    missed = touched & ~fits

    cells = tally + tl.program_id(0) % COPIES * columns
    changed = tl.sum(tl.reshape((written != bits).to(tl.int32), [BLOCK // 8, 8]), axis=1)
    broken = count(cells, eligibles, selected, acting, touched, changed, met | missed, plan, BLOCK)
    if broken > 0:
        tl.atomic_add(tally + columns - 1, 1, sem="relaxed")
        fault(cells + len(plan.patches) * COUNTS + OVERFLOW, missed & pack(finite(w)), origin, 1, BLOCK)


def apply(piece: Piece, out: torch.Tensor) -> Launch:
    """Write the piece's new bits to `out`, a buffer like `piece.base`, and add to the tally.

    `out` may be the base itself where `faults` won't be asked afterwards: that measures the old bits.
    """
    args = (*piece.arguments, piece.tally, out, piece.plan, COPIES, BLOCK)
    return Launch(apply_kernel, piece.programs, args)
