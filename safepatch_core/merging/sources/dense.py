"""Checkpoints whose tensors are as large as the base's: fine-tuned models, deltas, scores and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Bits
from safepatch_core.backends.reference import to_float32
from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import FLOATS, Checkpoint, TensorEntry, open_checkpoint
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.sources.contract import Origin, PatchTensor, Range
from safepatch_core.spec import ITEMSIZE, Dtype, Kind, Missing

PIECE = 1 << 16  # entries that are decoded at a time


@dataclass(frozen=True, slots=True)
class Dense:
    """A tensor of the base's shape, handed to the engine as it lies in its file."""

    entry: TensorEntry  # F32, F16 or BF16
    form: Kind

    @property
    def path(self) -> Path:
        return self.entry.path

    @property
    def entry_bytes(self) -> int:
        return ITEMSIZE[self.entry.dtype]

    @property
    def ring_bytes(self) -> int:
        return self.entry_bytes

    @property
    def once_bytes(self) -> int:
        return 0

    @property
    def held_bytes(self) -> int:
        return 0

    def ranges(self, lo: int, hi: int) -> list[Range]:
        return [(self.entry, lo * self.entry_bytes, hi * self.entry_bytes)]

    def load(self, inputs: Inputs, lo: int, hi: int, memory: NDArray[np.uint8]) -> Bits:
        buffer = memory[: (hi - lo) * self.entry_bytes]
        inputs.read(self.entry, lo * self.entry_bytes, buffer)
        return Bits(buffer.view(np.uint32 if self.entry_bytes == 4 else np.uint16), cast(Dtype, self.entry.dtype))


@dataclass(frozen=True, slots=True)
class Difference:
    """Patched values minus those of another checkpoint: subtracted here, so that the engine is handed deltas."""

    patched: Dense
    minus: Dense
    form: Kind = "delta"
    ring_bytes: int = 4
    once_bytes: int = 0
    held_bytes: int = 0

    @property
    def path(self) -> Path:
        return self.patched.path

    @property
    def entry_bytes(self) -> int:
        return self.patched.entry_bytes + self.minus.entry_bytes

    def ranges(self, lo: int, hi: int) -> list[Range]:
        return self.patched.ranges(lo, hi) + self.minus.ranges(lo, hi)

    def load(self, inputs: Inputs, lo: int, hi: int, memory: NDArray[np.uint8]) -> Bits:
        """f32(patched) - f32(minus), rounded once; a piece at a time, so that little lies beside the ring."""
        out = memory[: 4 * (hi - lo)].view(np.float32)
        piece = np.empty(4 * PIECE, np.uint8)
        with np.errstate(all="ignore"):  # what is not finite has a rule of its own
            for at in range(lo, hi, PIECE):
                end = min(at + PIECE, hi)
                to = out[at - lo : end - lo]
                to[:] = to_float32(self.patched.load(inputs, at, end, piece))
                np.subtract(to, to_float32(self.minus.load(inputs, at, end, piece)), out=to)
        return Bits(out.view(np.uint32), "F32")


@dataclass(frozen=True, slots=True)
class DenseSource:
    """A patch that is a whole checkpoint: patched values or deltas."""

    name: str
    kind: Kind
    checkpoint: Checkpoint
    minus: Checkpoint | None = None

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return (self.checkpoint,) if self.minus is None else (self.checkpoint, self.minus)

    @property
    def config(self) -> Mapping[str, Any] | None:
        return None

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.checkpoint.tensors.items() if entry.dtype in FLOATS}

    @property
    def names(self) -> Mapping[str, str]:
        return {name: name for name in self.checkpoint.tensors}

    def lookup(self, entry: TensorEntry, missing: Missing) -> PatchTensor | None:
        found = self.checkpoint.tensors.get(entry.name)
        tensor = fitted(self.checkpoint, found, entry, self.kind, missing, f"patch '{self.name}'")
        if self.minus is None or tensor is None:
            return tensor
        found = self.minus.tensors.get(entry.name)
        minus = fitted(self.minus, found, entry, self.kind, missing, f"what patch '{self.name}' is measured from")
        return minus and Difference(tensor, minus)


def open_checkpoints(origin: Origin, base: Checkpoint) -> DenseSource:
    """A fine-tuned checkpoint."""
    return DenseSource(origin.name, "checkpoint", _opened(origin), origin.minus)


def open_deltas(origin: Origin, base: Checkpoint) -> DenseSource:
    """A checkpoint of deltas."""
    return DenseSource(origin.name, "delta", _opened(origin))


def _opened(origin: Origin) -> Checkpoint:
    return replace(open_checkpoint(origin.path), ref=origin.ref, revision=origin.revision)


def fitted(
    checkpoint: Checkpoint, found: TensorEntry | None, entry: TensorEntry, form: Kind, missing: Missing, what: str
) -> Dense | None:
    """`found` of the checkpoint as the counterpart of the base's tensor `entry`, once it is there and fits."""
    if found is None:
        if missing == "skip":
            return None
        raise InputError(
            f"missing from {what}",
            file=checkpoint.root or checkpoint.shards[0].path,
            tensor=entry.name,
            expected=f"{list(entry.shape)} as in the base (or missing: skip)",
        )
    file = found.path if checkpoint.root is None else checkpoint.root / found.file
    if found.shape != entry.shape:
        raise InputError(
            f"{what} has another shape than the base",
            file=file,
            tensor=entry.name,
            found=list(found.shape),
            expected=list(entry.shape),
        )
    if found.dtype not in ITEMSIZE:
        raise InputError(
            f"{what} has a dtype that can't be used",
            file=file,
            tensor=entry.name,
            found=found.dtype,
            expected=" or ".join(ITEMSIZE),
        )
    return Dense(found, form)


@dataclass(frozen=True, slots=True)
class ImportanceFile:
    """A checkpoint of scores or gradients."""

    checkpoint: Checkpoint

    @classmethod
    def open(cls, ref: str, *, relative_to: Path | None) -> ImportanceFile:
        """Raises as `open_checkpoint`."""
        return cls(open_checkpoint(ref, relative_to=relative_to))

    def lookup(self, entry: TensorEntry, missing: Missing) -> PatchTensor | None:
        """The scores or gradients of the base's tensor `entry`; raises as `Source.lookup`."""
        found = self.checkpoint.tensors.get(entry.name)
        return fitted(self.checkpoint, found, entry, "delta", missing, "the importance")
