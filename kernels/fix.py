"""A fix on tensors in a device's memory: one program decodes one block of 65536 entries, tells sides and sets them.

A gap code moves on by itself, so where a code leads is a prefix sum of codes, and which change it is a prefix sum of
truth values. Nothing is written outside of the block, whatever lies in the arrays.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .launch import INTERPRETED, Launch

if TYPE_CHECKING:
    import torch

ENTRIES = tl.constexpr(65536)  # of a block
STEP = 1 << 13 if INTERPRETED else 1 << 8  # codes at once: with 512 registers are spilled on gfx942
# What a program may find wrong with its block.
OUTSIDE, MISCOUNTED, UNCHANGED, TRAILING = (tl.constexpr(1 << i) for i in range(4))
FAR = tl.constexpr(1 << 29)  # beyond every place, and no sum of a step's codes beyond it overflows
KEEP, OLD, NEW = (tl.constexpr(i) for i in range(3))  # the side that stays, as in `fixes.reference`


@triton.jit
def fix_kernel(
    entries, gap, rows, side, planes, old, told,
    size: tl.int64, shift: tl.int64,
    which: tl.constexpr, width: tl.constexpr, most: tl.constexpr, goal: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    code, rank = tl.load(rows + 2 * block), tl.load(rows + 2 * block + 1)
    code_end, rank_end = tl.load(rows + 2 * block + 2), tl.load(rows + 2 * block + 3)
    limit = tl.minimum(size - block * ENTRIES, ENTRIES).to(tl.int32)
    mask: tl.constexpr = (1 << (8 * width)) - 1 if width < 4 else -1
    lane = tl.arange(0, STEP)
    after = tl.full([], 0, tl.int32)  # the place behind the last change
    faults = tl.full([], 0, tl.int32)
    olds = tl.full([], 0, tl.int32)
    while code < code_end:
        inside = code + lane < code_end
        step = tl.load(gap + code + lane, mask=inside, other=0).to(tl.int32) & most
        real = inside & (step != most)
        place = after + tl.cumsum(tl.where(inside, step + real.to(tl.int32), 0), 0) - 1
        index = rank + tl.cumsum(real.to(tl.int32), 0) - 1
        fits = real & (place >= 0) & (place < limit) & (index < rank_end)
        x = tl.zeros([STEP], tl.int32)
        for j in tl.static_range(len(which)):
            x |= tl.load(planes[j] + index, mask=fits, other=0).to(tl.int32) << (8 * which[j])
        at = entries + block * ENTRIES + place
        found = tl.load(at, mask=fits, other=0)
        now = found.to(tl.int32) & mask
        bit = index + shift
        sides = (tl.load(side + bit // 8, mask=fits, other=0).to(tl.int32) >> (bit % 8).to(tl.int32)) & 1
        is_old = ((now & (x & -x)) != 0).to(tl.int32) == sides
        before = tl.where(is_old, now, now ^ x)
        tl.store(old + index, before.to(found.dtype), mask=fits)
        if goal == OLD:
            tl.store(at, before.to(found.dtype), mask=fits)
        elif goal == NEW:
            tl.store(at, (before ^ x).to(found.dtype), mask=fits)
        olds += tl.sum((fits & is_old).to(tl.int32))
        wrong = tl.sum((real & ((place < 0) | (place >= limit))).to(tl.int32))
        faults |= tl.where(wrong > 0, OUTSIDE, 0)
        faults |= tl.where(tl.sum((fits & (x == 0)).to(tl.int32)) > 0, UNCHANGED, 0)
        after = tl.minimum(after + tl.sum(tl.where(inside, step + real.to(tl.int32), 0)), FAR)
        last = tl.sum((inside & (code + lane == code_end - 1) & (step == most)).to(tl.int32))
        faults |= tl.where(last > 0, TRAILING, 0)
        rank += tl.sum(real.to(tl.int32))
        code += STEP
    faults |= tl.where(rank != rank_end, MISCOUNTED, 0)
    tl.store(told + 2 * block, faults)
    tl.store(told + 2 * block + 1, olds)


def fix(
    entries: torch.Tensor,
    gap: torch.Tensor,
    rows: torch.Tensor,
    side: torch.Tensor,
    planes: tuple[torch.Tensor | None, ...],
    old: torch.Tensor,
    told: torch.Tensor,
    shift: int,
    goal: int,
) -> Launch:
    """Tell the sides of a run's touched entries, and leave one there.

    Args:
        entries: uint8, int16 or int32 [entries of the run], contiguous.
        gap: uint8 or int16 codes.
        rows: int64 [blocks + 1, 2], first code and first change of each block, from 0 on.
        side: uint8; change i is bit i + shift.
        planes: uint8 [changes] each, one per byte of an entry, None for zeros.
        old: of the entries' type [changes], gets the old side of each.
        told: int32 [blocks, 2], gets faults (see above; 0 is none) and how many entries were old.
        goal: KEEP, OLD or NEW.
    """
    present = tuple(plane for plane in planes if plane is not None)
    which = tuple(k for k, plane in enumerate(planes) if plane is not None)
    most = 255 if gap.element_size() == 1 else 65535
    args = (entries, gap, rows, side, present, old, told, entries.numel(), shift)
    return Launch(fix_kernel, len(rows) - 1, (*args, which, entries.element_size(), most, goal, STEP))
