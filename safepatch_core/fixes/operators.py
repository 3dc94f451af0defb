"""A fix on torch tensors as operators of torch, `torch.ops.safepatch.tell` and `.settle_`, which graphs know of.

Both take one window: its entries, flat, as uint8, int16 or int32, and what the fix says of it, on the same device.

    gap     uint8 or int16 codes
    rows    int64 [blocks + 1, 2]: first code and first change of each block, from 0 on
    side    uint8; change i is bit i + shift
    planes  uint8 [changes] each, one per byte of an entry, None for zeros
    changes how many

They return the touched entries' old and new sides, and on the host int64 [2]: how many were old, and how many codes
the other type of gap would take. A window that breaks a rule of the encoding raises Broken: on the host its entries
are as they were then, on a device nothing outside of it has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safepatch_core.fixes import codec, reference
from safepatch_core.fixes.reference import Broken, Run

Planes = Sequence[Tensor | None]
Settled = tuple[Tensor, Tensor, Tensor]
_GIVEN = "Tensor gap, Tensor rows, Tensor side, Tensor?[] planes, int changes, int shift"


@torch.library.custom_op(
    "safepatch::tell", mutates_args=(), schema=f"(Tensor entries, {_GIVEN}) -> (Tensor, Tensor, Tensor)"
)
def tell(
    entries: Tensor, gap: Tensor, rows: Tensor, side: Tensor, planes: Planes, changes: int, shift: int
) -> Settled:
    """Tell the side of every touched entry; nothing changes."""
    return way(entries)(entries, gap, rows, side, planes, changes, shift, codec.KEEP)


@torch.library.custom_op(
    "safepatch::settle_",
    mutates_args=("entries",),
    schema=f"(Tensor(a!) entries, {_GIVEN}, int goal) -> (Tensor, Tensor, Tensor)",
)
def settle_(
    entries: Tensor, gap: Tensor, rows: Tensor, side: Tensor, planes: Planes, changes: int, shift: int, goal: int
) -> Settled:
    """Tell sides as `tell` does, and leave the side `goal`, OLD or NEW."""
    return way(entries)(entries, gap, rows, side, planes, changes, shift, goal)


@tell.register_fake
def _(entries: Tensor, gap: Tensor, rows: Tensor, side: Tensor, planes: Planes, changes: int, shift: int) -> Settled:
    return entries.new_empty(changes), entries.new_empty(changes), torch.empty(2, dtype=torch.int64, device="cpu")


@settle_.register_fake
def _(
    entries: Tensor, gap: Tensor, rows: Tensor, side: Tensor, planes: Planes, changes: int, shift: int, goal: int
) -> Settled:
    return entries.new_empty(changes), entries.new_empty(changes), torch.empty(2, dtype=torch.int64, device="cpu")


def way(entries: Tensor) -> Callable[..., Settled]:
    """What settles a window where it lies."""
    if entries.device.type == "cpu":
        return by_codec
    return by_kernel if entries.device.type == "cuda" and _has_triton() else by_index


def _has_triton() -> bool:
    try:
        import safepatch_core.kernels.fix  # noqa: F401
    except ImportError:
        return False
    return True


def by_codec(
    entries: Tensor, gap: Tensor, rows: Tensor, side: Tensor, planes: Planes, changes: int, shift: int, goal: int
) -> Settled:
    """On the host."""
    old, new = entries.new_empty(changes), entries.new_empty(changes)
    told = np.array([0, shift], np.uint64) + rows.numpy().view(np.uint64)
    run = Run(len(entries), told, _bits(gap), side.numpy(), tuple(p if p is None else p.numpy() for p in planes))
    tally = codec.settle(run, _bits(entries), goal, _bits(old), _bits(new))
    return old, new, torch.tensor([tally.old, tally.codes])


def by_kernel(
    entries: Tensor, gap: Tensor, rows: Tensor, side: Tensor, planes: Planes, changes: int, shift: int, goal: int
) -> Settled:
    """One program per block decodes it there."""
    from safepatch_core.kernels.fix import fix

    old = entries.new_empty(changes)
    told = torch.empty((len(rows) - 1, 2), dtype=torch.int32, device=entries.device)
    with torch.cuda.device_of(entries):  # type: ignore[no-untyped-call]
        fix(entries, gap, rows, side, tuple(planes), old, told, shift, goal).run()
    faults, counts = told.cpu().numpy().T
    if faults.any():
        raise Broken("gaps, ranks or XORs break a rule of the encoding")
    return old, old ^ _xors(old, planes), torch.tensor([int(counts.sum()), reference.other_codes(_bits(gap.cpu()))])


def by_index(
    entries: Tensor, gap: Tensor, rows: Tensor, side: Tensor, planes: Planes, changes: int, shift: int, goal: int
) -> Settled:
    """Decoded on the host, gathered and scattered there: for devices that have no kernel."""
    told = np.array([0, shift], np.uint64) + rows.cpu().numpy().view(np.uint64)
    host = tuple(None if plane is None else plane.cpu().numpy() for plane in planes)
    run = Run(len(entries), told, _bits(gap.cpu()), side.cpu().numpy(), host)
    at, _, sides = reference.decode(run)
    index, is_set = (torch.from_numpy(array).to(entries.device) for array in (at, sides != 0))
    now, x = entries[index], _xors(entries.new_empty(changes), planes)
    is_old = ((now & (x & -x)) != 0) == is_set
    old = torch.where(is_old, now, now ^ x)
    new = old ^ x
    if goal != codec.KEEP:
        entries[index] = old if goal == codec.OLD else new
    return old, new, torch.tensor([int(is_old.sum()), reference.other_codes(run.gap)])


def _xors(like: Tensor, planes: Planes) -> Tensor:
    """The XOR of old and new of every change, of the type of `like`."""
    found = torch.zeros_like(like)
    for k, plane in enumerate(planes):
        if plane is not None:
            found |= plane.to(like.dtype) << (8 * k)
    return found


def _bits(tensor: Tensor) -> Any:
    """The memory of a tensor on the host as unsigned integers."""
    array = tensor.numpy()
    return array.view(f"u{array.itemsize}")
