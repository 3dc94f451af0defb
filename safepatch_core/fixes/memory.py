"""Apply a fix to tensors in memory, or take it out: modules, state dicts, arrays. Checked first, all or nothing."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from safepatch_core.errors import InputError
from safepatch_core.fixes import codec
from safepatch_core.fixes.checking import GOAL, Direction, Sides, Teller, require
from safepatch_core.fixes.reading import Fix, open_fix
from safepatch_core.fixes.reference import Entries, Run, Tally

# What compiling and wrapping for several devices put into names.
_WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Applied:
    """What applying a fix in memory did, or taking it out."""

    id: str
    direction: Direction
    tensors: int  # that the fix touches
    changes: int  # touched entries


def apply_(model: Any, fix: str | os.PathLike[str] | Fix) -> Applied:
    """Apply a fix to a model in memory.

    Every touched entry is told apart and hashed before one changes, so a model of another base is refused.

    Args:
        model: a torch module, or a mapping from the names that tensors have in the checkpoint to torch tensors on any
            device, numpy arrays, or whatever has DLPack; contiguous. They are changed in place.
        fix: a fix file, or an open one.

    Raises:
        InputError: the fix is broken or applied already; or a tensor is missing, laid out otherwise, or carries
            something else.
    """
    return _run(model, fix, "apply")


def revert_(model: Any, fix: str | os.PathLike[str] | Fix) -> Applied:
    """Take a fix out of a model in memory, which gives back the entries that were there, to the bit.

    Args:
        model: what carries the fix, as for `apply_`.
        fix: as for `apply_`.

    Raises:
        InputError: as for `apply_`.
    """
    return _run(model, fix, "revert")


class Live(Protocol):
    """The entries of one tensor in memory, in windows."""

    width: int  # bytes of an entry
    entries: int
    place: tuple[Any, int]  # the same for tensors that share their memory

    def settle(self, lo: int, goal: int, run: Run, old: Entries, new: Entries) -> Tally:
        """`codec.settle` for the window from entry `lo` on."""


def _run(model: Any, fix: str | os.PathLike[str] | Fix, direction: Direction) -> Applied:
    with _opened(fix) as opened:
        live = _found(opened, _tensors_of(model))
        _all_on_one_side(opened, live, direction)
        done: list[str] = []
        try:
            for name, tensor in live.items():
                done.append(name)
                settle(opened, name, tensor, GOAL[direction])
        except BaseException:
            for name in done:  # whatever side an entry is on
                settle(opened, name, live[name], codec.OLD if direction == "apply" else codec.NEW)
            raise
        return Applied(opened.id, direction, len(opened.tensors), opened.changes)


@contextmanager
def _opened(fix: str | os.PathLike[str] | Fix) -> Iterator[Fix]:
    if isinstance(fix, Fix):
        yield fix
        return
    with open_fix(fix) as opened:
        yield opened


def _tensors_of(model: Any) -> dict[str, Any]:
    """Tensors by the names that they have in a checkpoint."""
    tensors = model if isinstance(model, Mapping) else model.state_dict()
    return {_WRAPPERS.sub(r"\1", name): tensor for name, tensor in tensors.items()}


def _found(fix: Fix, tensors: Mapping[str, Any]) -> dict[str, Live]:
    """The tensors that a fix touches; of several names for one of them the first."""
    live: dict[str, Live] = {}
    known: dict[tuple[Any, int], str] = {}
    for name, touched in fix.tensors.items():
        if name not in tensors:
            raise InputError(
                "the model has no such tensor: it may have been fused, renamed or quantised when it was loaded",
                file=fix.path,
                tensor=name,
                expected="the names of the checkpoint; apply the fix to the checkpoint, and load that",
            )
        tensor = live_of(name, tensors[name])
        if tensor.entries != touched.entries:
            raise InputError(
                "is not the tensor that the fix touches",
                tensor=name,
                found=f"{tensor.entries} entries",
                expected=f"{touched.entries}",
            )
        other = known.setdefault(tensor.place, name)
        if other == name:
            live[name] = tensor
        elif fix.tensors[other].facts != touched.facts:
            raise InputError(f"shares its memory with '{other}', which the fix changes otherwise", tensor=name)
    return live


def _all_on_one_side(fix: Fix, live: Mapping[str, Live], direction: Direction) -> None:
    sides = Sides(0, 0)
    for name, tensor in live.items():
        sides += settle(fix, name, tensor, codec.KEEP)
    require(fix, sides, direction, "the model")


def settle(fix: Fix, name: str, tensor: Live, goal: int) -> Sides:
    """Tell the sides of one tensor's touched entries, leave the side `goal` there, then prove what it met."""
    teller = Teller(fix, fix.tensors[name], tensor.width, "the model")
    for lo, run in teller.windows():
        teller.settle(run, partial(tensor.settle, lo, goal))
    return teller.finish()


def live_of(name: str, tensor: Any) -> Live:
    """The entries of an array. Raises InputError where they can't be changed in place."""
    torch = sys.modules.get("torch")
    if not isinstance(tensor, np.ndarray) and hasattr(tensor, "__dlpack__"):
        if torch is None or not isinstance(tensor, torch.Tensor):
            tensor = _by_dlpack(name, tensor)
        return _live_torch(name, tensor) if not isinstance(tensor, np.ndarray) else _live_numpy(name, tensor)
    if isinstance(tensor, np.ndarray):
        return _live_numpy(name, tensor)
    raise InputError("is no array", tensor=name, found=type(tensor).__name__, expected="torch, numpy or DLPack")


def _by_dlpack(name: str, array: Any) -> Any:
    """Torch takes every dtype and device; without it numpy takes what it knows."""
    try:
        import torch.utils.dlpack
    except ImportError:
        return np.from_dlpack(array)
    try:
        return torch.utils.dlpack.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError) as error:
        raise InputError(f"can't be changed in place: {error}", tensor=name) from None


def _refuse_layout(name: str, found: str) -> None:
    raise InputError("can't be changed in place", tensor=name, found=found, expected="one contiguous, writable array")


class _Numpy:
    """Entries in the host's memory."""

    def __init__(self, flat: Entries) -> None:
        self.width, self.entries, self._flat = flat.itemsize, len(flat), flat
        self.place = ("cpu", flat.ctypes.data)

    def settle(self, lo: int, goal: int, run: Run, old: Entries, new: Entries) -> Tally:
        return codec.settle(run, self._flat[lo : lo + run.entries], goal, old, new)


def _live_numpy(name: str, array: Any) -> Live:
    if not (array.flags.c_contiguous and array.flags.writeable and array.flags.aligned):
        _refuse_layout(name, f"strides {array.strides} of shape {array.shape}, writable: {array.flags.writeable}")
    return _Numpy(_unsigned(name, array.reshape(-1), array.itemsize))


def _unsigned(name: str, flat: Any, width: int) -> Entries:
    if width not in (1, 2, 4):
        _refuse_layout(name, f"entries of {width} bytes")
    view: Entries = flat.view(f"u{width}")
    return view


class _Torch:
    """Entries in the memory of a device: what the fix says travels there, both sides come back for the hashes."""

    def __init__(self, tensor: Any) -> None:
        import torch

        self._torch, self._tensor = torch, tensor
        self.width, self.entries = tensor.element_size(), tensor.numel()
        self._type = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[self.width]
        self.place = (str(tensor.device), tensor.data_ptr())

    def settle(self, lo: int, goal: int, run: Run, old: Entries, new: Entries) -> Tally:
        from safepatch_core.fixes.operators import settle_, tell

        flat = self._tensor.detach().view(-1).view(self._type)[lo : lo + run.entries]
        planes = [None if plane is None else self._sent(plane) for plane in run.planes]
        rows, shift = self._sent((run.rows - run.rows[0]).astype(np.int64)), int(run.rows[0, 1]) % 8
        given = (flat, self._sent(run.gap), rows, self._sent(run.side), planes, run.changes, shift)
        olds, news, told = tell(*given) if goal == codec.KEEP else settle_(*given, goal)
        for side, found in ((old, olds), (new, news)):
            side[:] = found.cpu().numpy().view(side.dtype)
        count, codes = told.tolist()
        return Tally(count, run.changes - count, codes)

    def _sent(self, array: Any) -> Any:
        """An array in the memory of the device; torch lacks unsigned types of more than a byte."""
        signed = array if array.itemsize == 1 else array.view(f"i{array.itemsize}")
        return self._torch.from_numpy(np.ascontiguousarray(signed)).to(self._tensor.device)


def _live_torch(name: str, tensor: Any) -> Live:
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        _refuse_layout(name, f"a {type(tensor).__name__}, which is sharded or quantised")
    if tensor.device.type == "meta":
        _refuse_layout(name, "a tensor without memory (offloaded, or on the meta device)")
    if not tensor.is_contiguous() or tensor.layout != torch.strided:
        _refuse_layout(name, f"strides {tuple(tensor.stride())} of shape {tuple(tensor.shape)}")
    if tensor.element_size() not in (1, 2, 4):
        _refuse_layout(name, f"entries of {tensor.element_size()} bytes")
    return _Torch(tensor)
