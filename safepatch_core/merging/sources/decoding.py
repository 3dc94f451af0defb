"""From what lies in files to float32 in the ring, a cache's worth at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Bits, Lora
from safepatch_core.backends.reference import to_float32
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.pipeline import align
from safepatch_core.spec import ITEMSIZE, Dtype

F32Array = NDArray[np.float32]

PIECE = 1 << 16  # entries decoded at a time: a sum and a product of float32 stay in the second-level cache


@dataclass(frozen=True, slots=True)
class Ready:
    """What is held is all that there is to hand over."""

    value: Lora

    def load(self, inputs: Inputs, lo: int, hi: int, memory: NDArray[np.uint8]) -> Lora:
        return self.value


class Rectangle(NamedTuple):
    """Consecutive entries of a matrix: columns [col, col + width) of so many rows, whole where there are several."""

    at: int  # of its first entry, counted from the first that was asked for
    row: int
    rows: int
    col: int
    width: int

    @property
    def entries(self) -> int:
        return self.rows * self.width

    @property
    def slices(self) -> tuple[slice, slice]:
        """Its rows and columns."""
        return slice(self.row, self.row + self.rows), slice(self.col, self.col + self.width)


def rectangles(lo: int, hi: int, cols: int, every: int = 0, most: int = PIECE) -> Iterator[Rectangle]:
    """The entries [lo, hi) of a matrix of `cols` columns, cut into rectangles of at most `most` entries (or a row's
    part). None reaches over a row that is a multiple of `every`."""
    at = lo
    while at < hi:
        row, col = divmod(at, cols)
        rows = min((hi - at) // cols, most // cols)
        if every:
            rows = min(rows, every - row % every)
        if col or not rows:
            piece = Rectangle(at - lo, row, 1, col, min(cols - col, hi - at, most))
        else:
            piece = Rectangle(at - lo, row, rows, 0, cols)
        yield piece
        at += piece.entries


def read_float32(inputs: Inputs, entry: TensorEntry, lo: int = 0, hi: int | None = None) -> F32Array:
    """Entries [lo, hi) of a float tensor, widened exactly; one dimension."""
    size, end = ITEMSIZE[entry.dtype], entry.entries if hi is None else hi
    data = np.empty((end - lo) * size, np.uint8)
    inputs.read(entry, lo * size, data)
    return to_float32(Bits(data.view(np.uint32 if size == 4 else np.uint16), cast(Dtype, entry.dtype)))


def read_into(out: F32Array, inputs: Inputs, entry: TensorEntry, lo: int) -> None:
    """As many entries from `lo` on as `out` has room for; a piece at a time, so that little lies beside it."""
    for at in range(0, len(out), PIECE):
        end = min(at + PIECE, len(out))
        out[at:end] = read_float32(inputs, entry, lo + at, lo + end)


def read_matrix(inputs: Inputs, entry: TensorEntry) -> F32Array:
    return read_float32(inputs, entry).reshape(entry.shape)


def placed(matrices: list[F32Array], memory: NDArray[np.uint8]) -> list[F32Array]:
    """The matrices, C-contiguous and aligned, one after another in `memory`."""
    found, used = [], 0
    for matrix in matrices:
        view = memory[used : used + matrix.nbytes].view(np.float32).reshape(matrix.shape)
        view[...] = matrix
        used += align(matrix.nbytes)
        found.append(view)
    return found


def product(left: F32Array, right: F32Array, scale: float) -> F32Array:
    """scale * (left @ right) in the contract's order: from +0 in order of rank, each product and sum rounded."""
    total = np.zeros((len(left), right.shape[1]), np.float32)
    term = np.empty_like(total)
    for r in range(len(right)):
        np.multiply(left[:, r : r + 1], right[r], out=term)
        np.add(total, term, out=total)
    return np.multiply(total, np.float32(scale), out=total)


def as_bits(values: F32Array) -> Bits:
    return Bits(values.view(np.uint32), "F32")
