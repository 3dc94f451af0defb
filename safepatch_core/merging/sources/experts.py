"""LoRA of a tensor [experts, …, …]: a pair of factors for every expert, all in one pair of matrices.

The engine takes factors of one matrix, so the deltas of a whole tensor are decoded into the ring, by the same order
of sums. Where the base keeps every expert apart, each gets its own factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Bits, Lora
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.pipeline import align
from safepatch_core.merging.sources.contract import Range
from safepatch_core.merging.sources.decoding import (
    F32Array,
    Ready,
    as_bits,
    placed,
    product,
    read_float32,
    read_matrix,
    rectangles,
)
from safepatch_core.merging.sources.factors import require_fit
from safepatch_core.spec import ITEMSIZE, Kind


@dataclass(frozen=True, slots=True)
class ExpertFactors:
    """Factors of all experts of one tensor: row e·rank + r of `a` and column r·experts + e of `b` are expert e's."""

    a: TensorEntry  # [experts · rank, in]
    b: TensorEntry  # [out, rank · experts]
    experts: int
    rank: int
    scale: float  # a float32 value
    transposed: bool  # the base stores [experts, in, out]
    form: Kind = "delta"
    entry_bytes: int = 0
    ring_bytes: int = 4

    @property
    def path(self) -> Path:
        return self.a.path

    @property
    def stored(self) -> str:
        return self.a.name

    @property
    def shape(self) -> tuple[int, int, int]:
        out, into = self.b.shape[0], self.a.shape[1]
        return (self.experts, into, out) if self.transposed else (self.experts, out, into)

    @property
    def once_bytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    @property
    def held_bytes(self) -> int:
        return align(4 * self.a.entries) + align(4 * self.b.entries)

    def fit(self, entry: TensorEntry, cut: bool) -> ExpertFactors:
        require_fit(self.a, self.shape, entry, " (transposed)" if self.transposed else "")
        return self

    def ranges(self, lo: int, hi: int) -> list[Range]:
        return [(factor, 0, factor.nbytes) for factor in (self.a, self.b)] if lo == 0 else []

    def hold(self, inputs: Inputs, memory: NDArray[np.uint8]) -> HeldExperts:
        a = read_matrix(inputs, self.a).reshape(self.experts, self.rank, -1)
        b = read_matrix(inputs, self.b).reshape(-1, self.rank, self.experts).transpose(2, 0, 1)
        left, right = (a.transpose(0, 2, 1), b.transpose(0, 2, 1)) if self.transposed else (b, a)
        left, right = placed([left, right], memory)
        return HeldExperts(left, right, self.scale)


@dataclass(frozen=True, slots=True)
class ExpertSlice:
    """Rows of one expert's matrix, where the base keeps them in a tensor of their own: factors as of any layer."""

    of: ExpertFactors
    expert: int
    row: int  # the first of them
    every: int  # 1, or by how much the next one is further on
    shape: tuple[int, int]
    form: Kind = "lora"
    entry_bytes: int = 0
    ring_bytes: int = 0

    @property
    def path(self) -> Path:
        return self.of.path

    @property
    def stored(self) -> str:
        return self.of.stored

    @property
    def once_bytes(self) -> int:
        return sum(hi - lo for _, lo, hi in self.ranges(0, 0))

    @property
    def held_bytes(self) -> int:
        rows, cols = self.shape
        return align(4 * self.of.rank * cols) + align(4 * rows * self.of.rank)

    def fit(self, entry: TensorEntry, cut: bool) -> ExpertSlice:
        require_fit(self.of.a, self.shape, entry)
        return self

    def ranges(self, lo: int, hi: int) -> list[Range]:
        if lo:
            return []
        a, b = self._entries()
        sizes = ITEMSIZE[self.of.a.dtype], ITEMSIZE[self.of.b.dtype]
        return [
            (self.of.a, a.start * sizes[0], a.stop * sizes[0]),
            (self.of.b, b.start * sizes[1], b.stop * sizes[1]),
        ]

    def hold(self, inputs: Inputs, memory: NDArray[np.uint8]) -> Ready:
        a, b = self._entries()
        right = read_float32(inputs, self.of.a, a.start, a.stop).reshape(self.of.rank, -1)
        left = read_float32(inputs, self.of.b, b.start, b.stop).reshape(-1, self.of.b.shape[1])
        right, left = placed([right, left[:: self.every, self.expert :: self.of.experts]], memory)
        return Ready(Lora(right, left, self.of.scale))

    def _entries(self) -> tuple[slice, slice]:
        """Which entries of A and B are read: the expert's rows of A, and of B all columns of its rows."""
        (rows, cols), wide = self.shape, self.of.b.shape[1]
        first = self.expert * self.of.rank
        last = self.row + self.every * (rows - 1)
        return slice(first * cols, (first + self.of.rank) * cols), slice(self.row * wide, (last + 1) * wide)


@dataclass(frozen=True, slots=True)
class HeldExperts:
    """Per expert, delta = scale * (left @ right)."""

    left: F32Array  # [experts, rows, rank]
    right: F32Array  # [experts, rank, cols]
    scale: float

    def load(self, inputs: Inputs, lo: int, hi: int, memory: NDArray[np.uint8]) -> Bits:
        out = memory[: 4 * (hi - lo)].view(np.float32)
        height = self.left.shape[1]
        with np.errstate(all="ignore"):
            for piece in rectangles(lo, hi, self.right.shape[2], every=height):
                expert, row = divmod(piece.row, height)
                left = self.left[expert, row : row + piece.rows]
                delta = product(left, self.right[expert][:, piece.slices[1]], self.scale)
                out[piece.at : piece.at + piece.entries] = delta.reshape(-1)
        return as_bits(out)
