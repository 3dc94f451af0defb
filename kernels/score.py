"""Score: the delta of an entry, whether retention keeps it, and its importance as an integer key."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from safepatch_core.spec import Acts, Join

from .bits import below, finite, to_float, unpack
from .launch import BLOCK, Launch

if TYPE_CHECKING:
    import torch

# Columns of the patch table (int64): what differs between patches, tensors and passes without changing the code.
RANDOM_KEY, KEEP, SCALE, CUT, BEFORE, LORA_SCALE, RANK = (tl.constexpr(i) for i in range(7))
# The last is the block's, in every row.
SKIP, SKIP_BEFORE, LAMBDA = (tl.constexpr(i) for i in range(7, 10))
FIELDS = tl.constexpr(10)
# Columns of a batch's rows (int64), one per program: its tensor, the index there of its first entry, and which of its
# entries [BEGIN, END) belong to the tensor.
TENSOR, ORIGIN, BEGIN, END = (tl.constexpr(i) for i in range(4))
BATCH_FIELDS = tl.constexpr(4)
# Columns of a tally row, for each patch. The first four are counts that apply adds at once, as a square of 2 by 2
# (BROKEN, where it met faults of any patch, is patch 0's alone). Then come counts of faults by kind, and FIRST
# columns behind each of these EVERY - the lowest index of one.
ELIGIBLE, SELECTED, APPLIED, BROKEN, BAD_DELTA, BAD_SCORE, NEGATIVE = (tl.constexpr(i) for i in range(7))
FIRST, COUNTS = tl.constexpr(3), tl.constexpr(10)
# Behind the patches' columns: entries that overflow, EVERY - first of them, entries acted on, those of them (the next
# column) whose bits have changed, and programs that met any fault.
OVERFLOW, ACTED, CHANGED = (tl.constexpr(i) for i in (0, 2, 3))
ENDING = tl.constexpr(5)
EVERY = tl.constexpr((1 << 63) - 1)
INFINITE = tl.constexpr(0x7F800000)
# How patches combine: the axes of `safepatch_core.spec`.
ALONE, ELECTED = tl.constexpr(Acts.ALONE.value), tl.constexpr(Acts.ELECTED.value)
UP = tl.constexpr(Acts.ELECTED_UP.value)
SUM, MEAN, WEIGHTED = tl.constexpr(Join.SUM.value), tl.constexpr(Join.MEAN.value), tl.constexpr(Join.WEIGHTED.value)


@dataclass(frozen=True)
class Form:
    """What the code of one patch depends on; names as in `safepatch_core.spec`."""

    kind: str
    values: str  # dtype, "" for LoRA
    importance: str
    scores: str  # dtype, "" for magnitude
    weight: str
    retain: bool  # False where every entry is retained
    skip: bool = False  # True where a cut leaves the best out


@dataclass(frozen=True)
class Variant:
    """What the code of a pass depends on."""

    dtype: str  # of the base
    patches: tuple[Form, ...]
    acts: int
    join: int
    order: str


@dataclass(frozen=True)
class Piece:
    """Part of a block in device memory, or a batch of whole tensors.

    Entry buffers hold `padded(head + count)` entries, 16-byte aligned.

    base, values, scores: uint16 or uint32 bit patterns; for LoRA, `values[p]` is the pair of float32
    factors (a [rank, cols], b [rows, rank]) of the whole tensor; `scores[p]` is None for magnitude.
    table: int64 [patches, FIELDS]; tally: int64 [COPIES, patches * COUNTS + ENDING], added to; of a batch, one such
    table and tally per tensor, one after another.
    """

    plan: Variant
    base: torch.Tensor
    values: tuple[Any, ...]
    scores: tuple[Any, ...]
    table: torch.Tensor
    tally: torch.Tensor
    first: int  # index in the tensor of the buffers' first entry, a multiple of ALIGN
    head: int  # entries at the front that belong to the neighbour
    count: int
    cols: int
    batch: torch.Tensor | None = None  # int64 [programs, BATCH_FIELDS]; `first`, `head` and `cols` then mean nothing

    @property
    def programs(self) -> int:
        return triton.cdiv(self.head + self.count, BLOCK) if self.count else 0

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments that all passes begin with."""
        sources = (self.base, self.values, self.scores, self.table)
        return *sources, self.batch, self.first, self.head, self.count, self.cols


# reference.py: philox
@triton.jit
def uniform(key, origin, BLOCK: tl.constexpr):
    """Random uint32 of the entries [origin, origin + BLOCK): lane i mod 4 of Philox counter i div 4."""
    counter = origin // 4 + tl.arange(0, BLOCK // 4)
    zero = tl.zeros([BLOCK // 4], tl.uint32)
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    u0, u1, u2, u3 = tl.philox(key.to(tl.uint64), low, high, zero, zero)
    return tl.interleave(tl.interleave(u0, u2), tl.interleave(u1, u3))


# reference.py: delta
@triton.jit
def product(a, b, rank, scale, origin, cols, end, BLOCK: tl.constexpr):
    """scale * (b @ a) of the entries [origin, origin + BLOCK) below `end`, summed in order of rank from 0."""
    above = origin // cols
    offset = (origin - above * cols).to(tl.uint32) + tl.arange(0, BLOCK).to(tl.uint32)
    # Entries from `end` on have no row of their own; a mask would cost the loads their width.
    row = tl.minimum(above + (offset // cols.to(tl.uint32)).to(tl.int64), (end - 1) // cols)
    col = offset % cols.to(tl.uint32)
    total = tl.zeros([BLOCK], tl.float32)
    for r in range(rank):
        total = total + tl.load(b + row * rank + r) * tl.load(a + r * cols + col)
    return scale * total


# reference.py: delta
@triton.jit
def delta(w, values, row, start, origin, cols, end, plan: tl.constexpr, p: tl.constexpr, BLOCK: tl.constexpr):
    """d of one patch and the patched value x = w + d; `row` is its row of the table."""
    if plan.patches[p].kind == "lora":
        scale = tl.load(row + LORA_SCALE).to(tl.uint32).to(tl.float32, bitcast=True)
        d = product(values[0], values[1], tl.load(row + RANK), scale, origin, cols, end, BLOCK)
        return d, w + d
    else:
        v = to_float(tl.load(values + start + tl.arange(0, BLOCK)), tl.constexpr(plan.patches[p].values))
        if plan.patches[p].kind == "delta":
            return v, w + v
        else:
            return v - w, v


# reference.py: score
@triton.jit
def importance(w, d, x, scores, start, plan: tl.constexpr, p: tl.constexpr, BLOCK: tl.constexpr):
    """s of one patch; only `scores` can be negative."""
    if plan.patches[p].importance == "magnitude":
        return tl.abs(d)
    else:
        s = to_float(tl.load(scores + start + tl.arange(0, BLOCK)), tl.constexpr(plan.patches[p].scores))
        if plan.patches[p].importance == "scores":
            return s
        elif plan.patches[p].weight == "base":
            return tl.abs(w * s)
        elif plan.patches[p].weight == "delta":
            return tl.abs(d * s)
        else:
            return tl.abs(x * s)


# reference.py: Scored
@triton.jit
def score(w, values, scores, row, start, origin, cols, end, plan: tl.constexpr, p: tl.constexpr, BLOCK: tl.constexpr):
    """d and the key of one patch: 0 where s is 0, INFINITE or more at a fault."""
    d, x = delta(w, values, row, start, origin, cols, end, plan, p, BLOCK)
    s = importance(w, d, x, scores, start, plan, p, BLOCK)
    if plan.patches[p].importance == "scores":
        s += 0.0  # -0 becomes 0; a negative score keeps its sign bit and so is a key above all others
    return d, tl.where(finite(d), s.to(tl.uint32, bitcast=True), INFINITE)


# reference.py: retained
@triton.jit
def retained(row, origin, plan: tl.constexpr, p: tl.constexpr, BLOCK: tl.constexpr):
    """Which entries survive random retention."""
    if plan.patches[p].retain:
        return uniform(tl.load(row + RANDOM_KEY), origin, BLOCK) < tl.load(row + KEEP).to(tl.uint32)
    else:
        return tl.full([BLOCK], True, tl.int1)


@triton.jit
def place(batch, first, head, size, program, BLOCK: tl.constexpr):
    """Of a program: its first entry in the buffers and in its tensor, its sets of entries, and which tensor."""
    start = program.to(tl.int64) * BLOCK
    if batch is None:
        inside = below(head + size - start, BLOCK) & ~below(head - start, BLOCK)
        return start, first + start, inside, tl.full([], 0, tl.int64)
    else:
        row = batch + program * BATCH_FIELDS
        inside = below(tl.load(row + END), BLOCK) & ~below(tl.load(row + BEGIN), BLOCK)
        return start, tl.load(row + ORIGIN), inside, tl.load(row + TENSOR)


# reference.py: Scored
@triton.jit(do_not_specialize=["head", "size"])
def score_kernel(
    base, values, scores, table, batch,
    first: tl.int64, head: tl.int32, size: tl.int32, cols: tl.int64,
    keys, stride: tl.int64,
    plan: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start, origin, inside, tensor = place(batch, first, head, size, tl.program_id(0), BLOCK)
    table += tensor * (len(plan.patches) * FIELDS)
    end = first + head + size
    lanes = tl.arange(0, BLOCK)
    w = to_float(tl.load(base + start + lanes), tl.constexpr(plan.dtype))
    for p in tl.static_range(len(plan.patches)):
        row = table + p * FIELDS
        d, key = score(w, values[p], scores[p], row, start, origin, cols, end, plan, p, BLOCK)
        eligible = (key < INFINITE) & unpack(inside)
        if plan.order == "retain-first":
            eligible = eligible & retained(row, origin, plan, p, BLOCK)
        tl.store(keys + p * stride + start + lanes, tl.where(eligible, key, 0))


def score_keys(piece: Piece, keys: torch.Tensor) -> Launch:
    """Write the key of every eligible entry and 0 for the others: `keys` is uint32 [patches, padded entries]."""
    args = (*piece.arguments, keys, keys.shape[1], piece.plan, BLOCK)
    return Launch(score_kernel, piece.programs, args)
