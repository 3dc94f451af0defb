"""Scales that lie in a tensor of their own, one per rectangle of the weight: per tensor, channel, block or group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np

from safepatch_core.backends.contract import Bits, ScaleTable
from safepatch_core.backends.reference import to_float32
from safepatch_core.files.parsing import BITS
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.quantised.grids import E4M3, E8M0, F32
from safepatch_core.merging.quantised.layouts.contract import Places
from safepatch_core.merging.sources.contract import Range
from safepatch_core.spec import ITEMSIZE, Dtype

EXPONENTS = ("F8_E8M0", "U8")
DTYPES = (*ITEMSIZE, *EXPONENTS)
# Of blocks that fit a table of scales, the first is meant; those that fit at once differ in nothing.
BLOCKS = ((128, 128), (32, 32), (1, 32))


def read_scales(inputs: Inputs, entry: TensorEntry, lo: int, hi: int) -> F32:
    """Scales [lo, hi) of a tensor, exactly."""
    size = BITS[entry.dtype] // 8
    data = np.empty((hi - lo) * size, np.uint8)
    inputs.read(entry, lo * size, data)
    if entry.dtype in EXPONENTS:
        return E8M0[data]
    if entry.dtype == "F8_E4M3":
        return E4M3.decode(data)
    return to_float32(Bits(data.view(np.uint32 if size == 4 else np.uint16), cast(Dtype, entry.dtype)))


@dataclass(frozen=True, slots=True)
class Blocks:
    """How the scales of a weight lie over its entries."""

    entry: TensorEntry  # the scales
    rows: int  # of one matrix of the weight
    cols: int
    block: tuple[int, int]  # rows and columns that share a scale

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return (self.entry,)

    @property
    def table(self) -> tuple[int, int]:
        """Scales of one matrix, by rows and columns."""
        return -(-self.rows // self.block[0]), -(-self.cols // self.block[1])

    def row_of(self, positions: Places) -> Places:
        """The row of the table of scales, those of all matrices one below another."""
        row = positions // self.cols
        if self.block[0] == 1:
            return row
        return row // self.rows * self.table[0] + row % self.rows // self.block[0]

    def _span(self, lo: int, hi: int) -> tuple[int, int]:
        """The rows of scales that the entries [lo, hi) need."""
        first, last = self.row_of(np.array([lo, max(hi - 1, lo)]))
        return int(first), int(last) + 1

    def ranges(self, lo: int, hi: int) -> list[Range]:
        width = self.table[1] * BITS[self.entry.dtype] // 8
        first, last = self._span(lo, hi)
        return [(self.entry, first * width, last * width)]

    def read(self, inputs: Inputs, lo: int, hi: int) -> BlockScales:
        first, last = self._span(lo, hi)
        width = self.table[1]
        return BlockScales(
            self, first, read_scales(inputs, self.entry, first * width, last * width).reshape(-1, width)
        )


@dataclass(frozen=True, slots=True)
class BlockScales:
    """Rows of a table of scales, from the row `first` on. A `layouts.contract.Scales`."""

    of: Blocks
    first: int
    values: F32  # [rows, columns] of the table

    def at(self, positions: Places) -> F32:
        rows = self.of.row_of(positions) - self.first
        return self.values[rows, positions % self.of.cols // self.of.block[1]]

    def run(self, lo: int, hi: int) -> F32:
        cols, (_, across) = self.of.cols, self.of.block
        first, last = lo // cols, -(-hi // cols)
        rows = self.of.row_of(np.arange(first, last) * cols) - self.first
        least = rows[0]
        wide = np.repeat(self.values[least : rows[-1] + 1], across, axis=1)[:, :cols]
        values: F32 = wide[rows - least].reshape(-1)
        return values[lo - first * cols : hi - first * cols]

    def table(self) -> ScaleTable:
        return ScaleTable(self.values, self.first, self.of.rows, self.of.cols, self.of.block)


def laid_out(
    entry: TensorEntry, shape: tuple[int, ...], blocks: tuple[tuple[int, int], ...] = BLOCKS
) -> Blocks | None:
    """How the scales `entry` lie over a weight of that shape (two dimensions or more); None where they do not fit.

    One scale is the tensor's, a column of them the rows'. Else the first of `blocks` (rows, columns) that fits, edges
    rounded up, is taken.
    """
    *batch, rows, cols = shape
    if entry.entries == 1:
        every = math.prod(shape[:-1])
        return Blocks(entry, every, cols, (every, cols))
    if entry.shape in ((*batch, rows, 1), (*batch, rows)):
        return Blocks(entry, rows, cols, (1, cols))
    for down, across in blocks:
        if entry.shape == (*batch, -(-rows // down), -(-cols // across)):
            return Blocks(entry, rows, cols, (down, across))
    return None
