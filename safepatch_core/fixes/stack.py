"""A checkpoint as a stack of fixes makes it, tensor by tensor as it is read; no file of it is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.files.reading import read_tensor
from safepatch_core.fixes import codec
from safepatch_core.fixes.checking import check_table, require
from safepatch_core.fixes.memory import live_of, settle
from safepatch_core.fixes.reading import Fix, open_fix

# What torch calls the dtypes of a checkpoint.
_DTYPES = {
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "BF16": "bfloat16",
    "C64": "complex64",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}


class FixedCheckpoint:
    """A base and fixes on top of it, the lowest first. Its methods may be called from several threads.

    Close it after use, or use it as a context manager.
    """

    def __init__(self, base: str | os.PathLike[str], fixes: Iterable[str | os.PathLike[str]]) -> None:
        self.base = open_checkpoint(base)
        self.read_fixed: set[str] = set()  # tensors that fixes touch, among those that were read
        with ExitStack() as opened:
            self.fixes: tuple[Fix, ...] = tuple(opened.enter_context(open_fix(path)) for path in fixes)
            for fix in self.fixes:
                check_table(fix, self.base)
            self._opened = opened.pop_all()

    def __enter__(self) -> FixedCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._opened.close()

    @property
    def touched(self) -> set[str]:
        """The tensors that any of the fixes changes."""
        return {name for fix in self.fixes for name in fix.tensors}

    def dtype(self, name: str) -> Any:
        """The torch dtype of a tensor. Raises InputError where torch lacks it."""
        import torch

        stored = self.base.tensors[name].dtype
        found = getattr(torch, _DTYPES.get(stored, ""), None)
        if found is None:
            raise InputError("torch has no such dtype", file=self.base.ref, tensor=name, found=stored)
        return found

    def read(self, name: str) -> Any:
        """A tensor with the fixes applied, in memory of its own.

        Raises:
            InputError: the base carries something else than the fixes expect there.
            IOFailure: a file can't be read, or changed meanwhile.
        """
        import torch

        entry = self.base.tensors[name]
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=self.dtype(name))
        data = read_tensor(entry, self.base.identity_of(entry))
        tensor = torch.frombuffer(data, dtype=self.dtype(name)).view(entry.shape)
        self.patch(name, tensor)
        return tensor

    def patch(self, name: str, tensor: Any) -> None:
        """Apply the fixes to a tensor of the base that somebody else read, in place. Raises as `read`.

        After a failure the tensor holds neither side: throw it away.
        """
        for fix in self.fixes:
            if name in fix.tensors:
                require(fix, settle(fix, name, live_of(name, tensor), codec.NEW), "apply", self.base.ref)
                fix.check_unchanged()
                self.read_fixed.add(name)

    def check(self) -> None:
        """Read all that the fixes touch, and keep nothing. Raises as `read`."""
        for name in sorted(self.touched):
            self.read(name)

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """Every tensor by its name, in the order in which they lie in the files. Raises as `read`."""
        for shard in self.base.shards:
            for entry in shard.tensors:
                yield entry.name, self.read(entry.name)

    def require_effect(self) -> None:
        """Raises InputError if nothing of what was read is touched by a fix."""
        if self.fixes and not self.read_fixed:
            raise InputError("no tensor that was loaded is touched by the fixes", file=self.base.ref)


def open_fixed(base: str | os.PathLike[str], fixes: Iterable[str | os.PathLike[str]]) -> FixedCheckpoint:
    """Open a base with fixes on top, to be read tensor by tensor with the change.

    Args:
        base: a checkpoint as `open_checkpoint` takes it.
        fixes: fix files, in the order in which they are applied.

    Raises:
        InputError: a broken fix, or one of a base with another table of tensors.
    """
    return FixedCheckpoint(base, fixes)
