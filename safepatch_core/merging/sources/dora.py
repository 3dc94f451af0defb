"""DoRA: each row of base + LoRA is brought to a trained length. Handed to the engine as patched values.

With v = w + d, d being LoRA's delta, a row's norm is the square root of the sum of its v², added up in float64 in the
order of the entries, rounded to float32; the patched entry is (m / norm) · v. Where the layer is stored transposed,
rows are columns. No sum depends on how the tensor is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Bits, Lora
from safepatch_core.errors import InputError
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.pipeline import align
from safepatch_core.merging.sources.contract import Range
from safepatch_core.merging.sources.decoding import (
    F32Array,
    Rectangle,
    as_bits,
    placed,
    product,
    read_float32,
    rectangles,
)
from safepatch_core.merging.sources.factors import Factors, require_fit
from safepatch_core.spec import ITEMSIZE, Kind


@dataclass(frozen=True, slots=True)
class Directions:
    """Factors and magnitudes of one module."""

    factors: Factors
    magnitude: TensorEntry  # [out]

    @property
    def stored(self) -> str:
        return self.factors.stored

    @property
    def shape(self) -> tuple[int, int]:
        return self.factors.shape

    def fit(self, entry: TensorEntry, cut: bool) -> Dora:
        require_fit(self.factors.a, self.shape, entry)
        out = self.shape[1 if self.factors.transposed else 0]
        if self.magnitude.shape != (out,):
            raise InputError(
                "the magnitudes do not fit the factors",
                file=self.magnitude.path,
                tensor=self.magnitude.name,
                found=list(self.magnitude.shape),
                expected=[out],
            )
        return Dora(entry, self.factors, self.magnitude)


@dataclass(frozen=True, slots=True)
class Dora:
    """Directions of one tensor of the base, `entry`, whose values they start from."""

    entry: TensorEntry
    factors: Factors
    magnitude: TensorEntry
    form: Kind = "checkpoint"
    ring_bytes: int = 4

    @property
    def path(self) -> Path:
        return self.factors.path

    @property
    def entry_bytes(self) -> int:
        return ITEMSIZE[self.entry.dtype]

    @property
    def once_bytes(self) -> int:
        """The base's tensor is read a second time, for the norms."""
        return self.factors.once_bytes + self.magnitude.nbytes + self.entry.nbytes

    @property
    def held_bytes(self) -> int:
        return self.factors.held_bytes + align(4 * self.magnitude.entries)

    def ranges(self, lo: int, hi: int) -> list[Range]:
        size = self.entry_bytes
        once = [(self.magnitude, 0, self.magnitude.nbytes)] if lo == 0 else []
        return [*self.factors.ranges(lo, hi), *once, (self.entry, lo * size, hi * size)]

    def hold(self, inputs: Inputs, memory: NDArray[np.uint8]) -> HeldDora:
        lora = self.factors.lora(inputs, memory)
        (factor,) = placed([read_float32(inputs, self.magnitude)], memory[self.factors.held_bytes :])
        turned = self.factors.transposed
        with np.errstate(all="ignore"):
            np.divide(factor, _norms(inputs, self.entry, lora, turned), out=factor)
        return HeldDora(self.entry, lora, factor[None, :] if turned else factor[:, None])


@dataclass(frozen=True, slots=True)
class HeldDora:
    """Factors of the delta, and by what each row of base + delta is multiplied: a column, or a row if transposed."""

    entry: TensorEntry
    lora: Lora
    factor: F32Array

    def load(self, inputs: Inputs, lo: int, hi: int, memory: NDArray[np.uint8]) -> Bits:
        out = memory[: 4 * (hi - lo)].view(np.float32)
        factor = np.broadcast_to(self.factor, self.entry.shape)
        with np.errstate(all="ignore"):
            for piece in rectangles(lo, hi, self.entry.shape[1]):
                rows, cols = piece.slices
                moved = _moved(inputs, self.entry, self.lora, piece)
                out[piece.at : piece.at + piece.entries] = (factor[rows, cols] * moved).reshape(-1)
        return as_bits(out)


def _moved(inputs: Inputs, entry: TensorEntry, lora: Lora, piece: Rectangle) -> F32Array:
    """base + delta."""
    rows, cols = piece.slices
    first = piece.row * entry.shape[1] + piece.col
    values = read_float32(inputs, entry, first, first + piece.entries).reshape(piece.rows, piece.width)
    return np.add(values, product(lora.b[rows], lora.a[:, cols], lora.scale), out=values)


def _norms(inputs: Inputs, entry: TensorEntry, lora: Lora, turned: bool) -> F32Array:
    """The norm of each row of base + delta, or of each column if `turned`."""
    squares = np.zeros(entry.shape[1] if turned else entry.shape[0], np.float64)
    for piece in rectangles(0, entry.entries, entry.shape[1]):
        across = piece.slices[1 if turned else 0]
        moved = _moved(inputs, entry, lora, piece).astype(np.float64)
        terms = np.square(moved.T if turned else moved)
        # `accumulate` adds one by one, in order; `sum` would add in pairs.
        squares[across] = np.add.accumulate(np.hstack([squares[across, None], terms]), axis=1)[:, -1]
    return np.sqrt(squares).astype(np.float32)
