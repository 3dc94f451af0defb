"""Matrices that lie the other way round in a patch: what is a row of the base's is there a column, or half of one.

A transposed matrix has no run of bytes that is in the base's order. Where the base's entries are asked for in order,
a band of rows is read at a time, a piece of every column, so that each byte is read once and little memory is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Bits
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.pipeline import align
from safepatch_core.merging.sources.contract import Range
from safepatch_core.merging.sources.decoding import PIECE, rectangles
from safepatch_core.spec import ITEMSIZE, Dtype, Kind

# Each column of a band is a read of its own, of so many bytes as the band has rows: at 8 MiB those are some hundred
# bytes for the widest experts, and calls are no longer what takes the time.
BAND_BYTES = 8 << 20
Words = NDArray[Any]  # entries as integers of their width


@dataclass(frozen=True, slots=True)
class Tile:
    """Columns at, at + step, … of a matrix: row r of column j is entry first + every·r of the source's row j."""

    source: TensorEntry  # [columns, at least every · rows]
    first: int = 0
    every: int = 1
    at: int = 0
    step: int = 1

    def strips(self, inputs: Inputs, cols: range, row: int, rows: int) -> Iterator[tuple[int, Words]]:
        """So many rows of the columns `cols` of the tile, some at a time: the first's number, and [columns, rows]."""
        size, wide = ITEMSIZE[self.source.dtype], self.source.shape[1]
        offset, span = self.first % self.every, self.every * rows
        begin = self.first - offset + self.every * row
        many = max(PIECE // max(span, 1), 1)
        for at in range(cols.start, cols.stop, many):
            strip = np.empty((min(many, cols.stop - at), span), np.uint32 if size == 4 else np.uint16)
            if span == wide:
                inputs.read(self.source, at * wide * size, strip.reshape(-1).view(np.uint8))
            else:
                for j, line in enumerate(strip, at):
                    inputs.read(self.source, (j * wide + begin) * size, line.view(np.uint8))
            yield at, strip[:, offset :: self.every]


@dataclass(frozen=True, slots=True)
class Turned:
    """A tensor made of matrices of one shape, one after another, each of tiles."""

    name: str
    shape: tuple[int, ...]
    rows: int  # of a matrix
    cols: int
    blocks: tuple[tuple[Tile, ...], ...]  # of one dtype

    @property
    def source(self) -> TensorEntry:
        return self.blocks[0][0].source

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def file(self) -> str:
        return self.source.file

    def read(self, inputs: Inputs, block: int, row: int, col: int, out: Words) -> None:
        """The matrix's entries from `row` and `col` on, as many as `out` [rows, columns] has room for."""
        for tile in self.blocks[block]:
            first, end = (max(-(-(edge - tile.at) // tile.step), 0) for edge in (col, col + out.shape[1]))
            cols = range(first, min(end, tile.source.shape[0]))
            for at, strip in tile.strips(inputs, cols, row, len(out)):
                to = tile.at + tile.step * at - col
                out[:, to : to + tile.step * len(strip) : tile.step] = strip.T


@dataclass(frozen=True, slots=True)
class TurnedTensor:
    """Such a tensor, handed to the engine in the base's order."""

    of: Turned
    form: Kind

    @property
    def path(self) -> Path:
        return self.of.path

    @property
    def ring_bytes(self) -> int:
        return ITEMSIZE[self.of.dtype]

    @property
    def entry_bytes(self) -> int:
        """What lies between the entries of a column is read with them."""
        return self.ring_bytes * self.of.blocks[0][0].every

    @property
    def once_bytes(self) -> int:
        return 0

    @property
    def band_rows(self) -> int:
        return max(min(BAND_BYTES // max(self.of.cols * self.ring_bytes, 1), self.of.rows), 1)

    @property
    def held_bytes(self) -> int:
        return align(self.band_rows * self.of.cols * self.ring_bytes)

    def ranges(self, lo: int, hi: int) -> list[Range]:
        """All of a matrix with its last entry: its bytes are needed until then."""
        size = self.of.rows * self.of.cols
        done = self.of.blocks[lo // size : hi // size] if size else ()
        return [(tile.source, 0, tile.source.nbytes) for block in done for tile in block]

    def hold(self, inputs: Inputs, memory: NDArray[np.uint8]) -> HeldTurned:
        words = memory.view(np.uint32 if self.ring_bytes == 4 else np.uint16)
        return HeldTurned(self.of, words[: self.band_rows * self.of.cols].reshape(self.band_rows, self.of.cols))


@dataclass(slots=True)
class HeldTurned:
    """The tensor, and the band of rows that was read last."""

    of: Turned
    band: Words
    block: int = -1
    first: int = 0  # its row in the block
    there: int = 0  # how many rows it has
    following: int = 0  # the entry after those that were asked for last

    def load(self, inputs: Inputs, lo: int, hi: int, memory: NDArray[np.uint8]) -> Bits:
        size = self.band.itemsize
        out = memory[: (hi - lo) * size].view(self.band.dtype)
        in_order, self.following = lo == self.following, hi
        for piece in rectangles(lo, hi, self.of.cols, every=self.of.rows, most=hi - lo):
            block, row = divmod(piece.row, self.of.rows)
            to = out[piece.at : piece.at + piece.entries].reshape(piece.rows, piece.width)
            if in_order:
                self._from_band(inputs, block, row, piece.col, to)
            else:
                self.of.read(inputs, block, row, piece.col, to)
        return Bits(out, cast(Dtype, self.of.dtype))

    def _from_band(self, inputs: Inputs, block: int, row: int, col: int, out: Words) -> None:
        done = 0
        while done < len(out):
            if block != self.block or not 0 <= row + done - self.first < self.there:
                self.block, self.first = block, row + done
                self.there = min(len(self.band), self.of.rows - self.first)
                self.of.read(inputs, block, self.first, 0, self.band[: self.there])
            at = row + done - self.first
            rows = min(self.there - at, len(out) - done)
            out[done : done + rows] = self.band[at : at + rows, col : col + out.shape[1]]
            done += rows
