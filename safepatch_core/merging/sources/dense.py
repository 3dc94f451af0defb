"""Checkpoints whose tensors are as large as the base's: fine-tuned models, deltas, scores and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Bits
from safepatch_core.backends.reference import to_float32
from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint
from safepatch_core.files.parsing import FLOATS
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.names import Exchange, Takes, resolve
from safepatch_core.merging.sources.contract import Origin, PatchTensor, Range
from safepatch_core.merging.sources.decoding import PIECE
from safepatch_core.merging.sources.foreign import refuse_ungathered
from safepatch_core.merging.sources.fusions import Joined, Stored, fused, fusion_of, runs, turned_shape
from safepatch_core.merging.sources.rows import FewerRows, as_in_base, common, first_rows, shapes_of
from safepatch_core.merging.sources.turned import HeldTurned, Turned, TurnedTensor
from safepatch_core.spec import ITEMSIZE, Dtype, Kind, Missing, Rows


@dataclass(frozen=True, slots=True)
class Dense:
    """A tensor of the base's shape, handed to the engine as it lies in its file."""

    entry: TensorEntry | Joined  # F32, F16 or BF16
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
        return runs(self.entry, lo * self.entry_bytes, hi * self.entry_bytes)

    def hold(self, inputs: Inputs, memory: NDArray[np.uint8]) -> Dense:
        return self

    def load(self, inputs: Inputs, lo: int, hi: int, memory: NDArray[np.uint8]) -> Bits:
        buffer, at, ranges = memory[: (hi - lo) * self.entry_bytes], 0, self.ranges(lo, hi)
        if len(ranges) == 1:
            buffer = inputs.load(*ranges[0], memory)
        else:
            for part, begin, end in ranges:
                inputs.read(part, begin, buffer[at : at + end - begin])
                at += end - begin
        return Bits(buffer.view(np.uint32 if self.entry_bytes == 4 else np.uint16), cast(Dtype, self.entry.dtype))


Fitted = Dense | FewerRows | TurnedTensor


@dataclass(frozen=True, slots=True)
class Difference:
    """Patched values minus those of another checkpoint: subtracted here, so that the engine is handed deltas."""

    patched: Fitted
    minus: Fitted
    form: Kind = "delta"
    ring_bytes: int = 4

    @property
    def path(self) -> Path:
        return self.patched.path

    @property
    def entry_bytes(self) -> int:
        return self.patched.entry_bytes + self.minus.entry_bytes

    @property
    def once_bytes(self) -> int:
        return self.patched.once_bytes + self.minus.once_bytes

    @property
    def held_bytes(self) -> int:
        return self.patched.held_bytes + self.minus.held_bytes

    def ranges(self, lo: int, hi: int) -> list[Range]:
        return self.patched.ranges(lo, hi) + self.minus.ranges(lo, hi)

    def hold(self, inputs: Inputs, memory: NDArray[np.uint8]) -> HeldDifference:
        cut = self.patched.held_bytes
        return HeldDifference(self.patched.hold(inputs, memory[:cut]), self.minus.hold(inputs, memory[cut:]))


@dataclass(frozen=True, slots=True)
class HeldDifference:
    """What both need for all of a tensor's chunks."""

    patched: Dense | FewerRows | HeldTurned
    minus: Dense | FewerRows | HeldTurned

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
class Named:
    """A checkpoint whose tensors are found by the base's names."""

    checkpoint: Checkpoint
    exchange: Exchange
    tensors: Mapping[str, Stored]
    rows: Rows

    @classmethod
    def of(cls, checkpoint: Checkpoint, base: Checkpoint, takes: Takes, rows: Rows) -> Named:
        """Raises InputError where names are the base's in two ways."""
        floats = {n: _shapes(n, t.shape, base, rows) for n, t in checkpoint.tensors.items() if t.dtype in FLOATS}
        exchange = resolve(floats, base, partial(_needs_a_name, base, takes), checkpoint.ref)
        tensors = {exchange(name): entry for name, entry in checkpoint.tensors.items()}
        for shard in checkpoint.shards:
            # Where tensors are shared, one name is saved, and the others are noted beside it.
            for alias, name in shard.metadata.items():
                if exchange(alias) in base.tensors and name in checkpoint.tensors:
                    tensors.setdefault(exchange(alias), checkpoint.tensors[name])
        stored, done = fused(tensors, base)
        return cls(checkpoint, replace(exchange, fusions=tuple(done)), stored, rows)


def _shapes(name: str, shape: tuple[int, ...], base: Checkpoint, rows: Rows) -> Sequence[tuple[int, ...]]:
    """Those that the base's tensor may have."""
    turned = turned_shape(name, shape)
    return [*shapes_of(name, shape, base, rows), *([turned] if turned != shape else ())]


def _needs_a_name(base: Checkpoint, takes: Takes, name: str, dimensions: int) -> bool:
    """Whether a tensor would be a target, and the base has it neither joined nor apart."""
    return takes(name, dimensions) and fusion_of(name, base) is None


@dataclass(frozen=True, slots=True)
class DenseSource:
    """A patch that is a whole checkpoint: patched values or deltas."""

    name: str
    kind: Kind
    patch: Named
    minus: Named | None = None

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return (self.patch.checkpoint, *((self.minus.checkpoint,) if self.minus else ()))

    @property
    def config(self) -> Mapping[str, Any] | None:
        return None

    @property
    def exchange(self) -> Exchange:
        of = self.patch.exchange
        if self.minus is None:
            return of
        return replace(of, fusions=of.fusions + tuple(f"of minus, {line}" for line in self.minus.exchange.told))

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.patch.tensors.items() if entry.dtype in FLOATS}

    @property
    def names(self) -> Mapping[str, str]:
        return {name: entry.name for name, entry in self.patch.tensors.items()}

    def lookup(self, entry: TensorEntry, missing: Missing) -> PatchTensor | None:
        tensor = fitted(self.patch, entry, self.kind, missing, f"patch '{self.name}'")
        if self.minus is None or tensor is None:
            return tensor
        minus = fitted(self.minus, entry, self.kind, missing, f"what patch '{self.name}' is measured from")
        return minus and Difference(tensor, minus)


def open_checkpoints(origin: Origin) -> DenseSource:
    """A fine-tuned checkpoint."""
    minus = None if origin.minus is None else Named.of(origin.minus, origin.base, origin.takes, origin.rows)
    return DenseSource(origin.name, "checkpoint", _opened(origin), minus)


def open_deltas(origin: Origin) -> DenseSource:
    """A checkpoint of deltas."""
    return DenseSource(origin.name, "delta", _opened(origin))


def _opened(origin: Origin) -> Named:
    checkpoint = replace(open_checkpoint(origin.path), ref=origin.ref, revision=origin.revision)
    return Named.of(checkpoint, origin.base, origin.takes, origin.rows)


def fitted(patch: Named, entry: TensorEntry, form: Kind, missing: Missing, what: str) -> Fitted | None:
    """The counterpart of the base's tensor `entry`, once it is there and fits."""
    checkpoint, found = patch.checkpoint, patch.tensors.get(entry.name)
    if found is None:
        if missing == "skip":
            return None
        raise InputError(
            f"missing from {what}",
            file=checkpoint.root or checkpoint.shards[0].path,
            tensor=entry.name,
            expected=checkpoint.of_several or f"{list(entry.shape)} as in the base (or missing: skip)",
        )
    if found.shape == entry.shape and found.dtype in ITEMSIZE:
        return TurnedTensor(found, form) if isinstance(found, Turned) else Dense(found, form)
    file = found.path if checkpoint.root is None else checkpoint.root / found.file
    cut = patch.rows == "common" and isinstance(found, TensorEntry) and common(entry.name, found.shape, entry.shape)
    if found.shape != entry.shape:
        refuse_ungathered(file, found)
    if found.shape != entry.shape and not cut:
        raise InputError(
            f"{what} has another shape than the base",
            file=file,
            tensor=entry.name,
            found=list(found.shape),
            expected=as_in_base(entry, found.shape),
        )
    if found.dtype not in ITEMSIZE:
        raise InputError(
            f"{what} has a dtype that can't be used",
            file=file,
            tensor=entry.name,
            found=found.dtype,
            expected=" or ".join(ITEMSIZE),
        )
    # Rows are cut of what lies in one piece alone.
    assert isinstance(found, TensorEntry)
    return FewerRows(entry, found, form) if found.entries < entry.entries else Dense(first_rows(found, entry), form)


@dataclass(frozen=True, slots=True)
class ImportanceFile:
    """A checkpoint of scores or gradients."""

    named: Named

    @classmethod
    def open(cls, ref: str, base: Checkpoint, *, relative_to: Path | None, rows: Rows = "all") -> ImportanceFile:
        """Raises as `open_checkpoint`. Tensors that are no targets, or that the base lacks, are not read."""
        checkpoint = open_checkpoint(ref, relative_to=relative_to)
        return cls(Named.of(checkpoint, base, lambda name, dimensions: False, rows))

    def lookup(self, entry: TensorEntry, missing: Missing) -> PatchTensor | None:
        """The scores or gradients of the base's tensor `entry`; raises as `Source.lookup`."""
        return fitted(self.named, entry, "delta", missing, "the importance")
