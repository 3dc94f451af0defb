"""What several tensors of one shape make together, entry by entry: deltas and scores that no file holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Bits, Lora
from safepatch_core.backends.reference import to_float32
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.sources.contract import Held, PatchTensor, Range
from safepatch_core.merging.sources.decoding import PIECE, F32Array, as_bits, product, rectangles
from safepatch_core.merging.sources.dense import Dense
from safepatch_core.spec import Kind, Weight

Rule = Callable[..., F32Array]  # what the float32 values of the parts make


@dataclass(frozen=True, slots=True)
class Computed:
    """What several tensors make together, in float32: a `PatchTensor` that is handed on as deltas or scores."""

    entry: TensorEntry
    parts: tuple[PatchTensor, ...]
    rule: Rule
    form: Kind = "delta"
    ring_bytes: int = 4

    @property
    def path(self) -> Path:
        return self.parts[0].path

    @property
    def entry_bytes(self) -> float:
        return sum(part.entry_bytes for part in self.parts)

    @property
    def once_bytes(self) -> int:
        return sum(part.once_bytes for part in self.parts)

    @property
    def held_bytes(self) -> int:
        return sum(part.held_bytes for part in self.parts)

    def ranges(self, lo: int, hi: int) -> list[Range]:
        return [of for part in self.parts for of in part.ranges(lo, hi)]

    def hold(self, inputs: Inputs, memory: NDArray[np.uint8]) -> HeldParts:
        held, used = [], 0
        for part in self.parts:
            held.append(part.hold(inputs, memory[used : used + part.held_bytes]))
            used += part.held_bytes
        most = int(max(part.ring_bytes for part in self.parts))
        return HeldParts(tuple(held), self.rule, most, _cols(self.entry))


@dataclass(frozen=True, slots=True)
class HeldParts:
    """The parts, once all that their chunks share is in memory."""

    parts: tuple[Held, ...]
    rule: Rule
    most: int  # bytes of the ring that a part takes per entry
    cols: int

    def load(self, inputs: Inputs, lo: int, hi: int, memory: NDArray[np.uint8]) -> Bits:
        """A piece at a time, so that little lies beside the ring."""
        out = memory[: 4 * (hi - lo)].view(np.float32)
        pieces = [np.empty(max(self.most, 4) * PIECE, np.uint8) for _ in self.parts]
        with np.errstate(all="ignore"):  # what is not finite has a rule of its own
            for at in range(lo, hi, PIECE):
                end = min(at + PIECE, hi)
                loaded = (part.load(inputs, at, end, piece) for part, piece in zip(self.parts, pieces, strict=True))
                out[at - lo : end - lo] = self.rule(*(values_of(of, at, end, self.cols) for of in loaded))
        return as_bits(out)


def values_of(given: Bits | Lora, lo: int, hi: int, cols: int) -> F32Array:
    """The entries [lo, hi) as float32."""
    if isinstance(given, Bits):
        return to_float32(given)
    out = np.empty(hi - lo, np.float32)
    for piece in rectangles(lo, hi, cols):
        rows, across = piece.slices
        part = product(given.b[rows], given.a[:, across], given.scale)
        out[piece.at : piece.at + piece.entries] = part.reshape(-1)
    return out


def _cols(entry: TensorEntry) -> int:
    return entry.shape[-1] if entry.shape else 1


def as_delta(said: PatchTensor, entry: TensorEntry) -> PatchTensor:
    """d of each entry: what a patch says, less the base's entries where it says patched values."""
    if said.form != "checkpoint":
        return said
    return Computed(entry, (said, Dense(entry, "checkpoint")), np.subtract)


def scores_of(
    gradients: PatchTensor, weight: Weight, said: PatchTensor, w: PatchTensor, entry: TensorEntry
) -> PatchTensor:
    """|x·g| of one patch, whose x is what `weight` names; `said` is the patch as it lies in its files."""
    if weight == "base":
        return Computed(entry, (gradients, w), _weighed)
    if weight == "delta":
        return Computed(entry, (gradients, as_delta(said, entry)), _weighed)
    if said.form == "checkpoint":
        return Computed(entry, (gradients, said), _weighed)
    return Computed(entry, (gradients, w, said), _weighed_sum)


def _weighed(gradients: F32Array, x: F32Array) -> F32Array:
    size: F32Array = np.abs(x * gradients)
    return size


def _weighed_sum(gradients: F32Array, w: F32Array, d: F32Array) -> F32Array:
    return _weighed(gradients, w + d)
