"""Codes in bytes: one to a byte, or two, the low one first. Little-endian words of 4-bit codes are such bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from safepatch_core.backends.contract import ScaleTable
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.quantised.grids import F32, Codes, Grid, split
from safepatch_core.merging.quantised.layouts.contract import Bytes, Places, Scales
from safepatch_core.merging.quantised.layouts.scales import Blocks, BlockScales
from safepatch_core.merging.sources.contract import Range


class Factors(Protocol):
    """Where the scales of a weight lie."""

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The tensors that hold them."""

    def ranges(self, lo: int, hi: int) -> list[Range]:
        """The bytes that the entries [lo, hi) of the weight need."""

    def read(self, inputs: Inputs, lo: int, hi: int) -> Scales:
        """The scales of the entries [lo, hi)."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Row-major codes of 4 or 8 bits, whose rows fill whole bytes. A `layouts.contract.CodedWeight`."""

    name: str
    shape: tuple[int, ...]
    method: str
    codes: TensorEntry
    grid: Grid
    factors: Factors
    flip: int = 0

    @property
    def companions(self) -> tuple[TensorEntry, ...]:
        return self.factors.entries

    @property
    def step(self) -> int:
        return 8 // self.grid.bits

    def stored(self, lo: int, hi: int) -> tuple[int, int]:
        return lo // self.step, -(-hi // self.step)

    def ranges(self, lo: int, hi: int) -> list[Range]:
        return self.factors.ranges(lo, hi)

    def scales(self, inputs: Inputs, lo: int, hi: int) -> Scales:
        return self.factors.read(inputs, lo, hi)

    def unpack(self, data: Bytes) -> Codes:
        return split(data) if self.step == 2 else data ^ np.uint8(self.flip)

    def get(self, data: Bytes, at: Places) -> Codes:
        if self.step == 1:
            return data[at] ^ np.uint8(self.flip)
        shifted: Codes = data[at >> 1] >> ((at & 1) << 2).astype(np.uint8)
        return shifted & np.uint8(15)

    def put(self, data: Bytes, at: Places, codes: Codes) -> None:
        if self.step == 1:
            data[at] = codes ^ np.uint8(self.flip)
            return
        # One half after the other: both codes of a byte may be among them.
        for half in (0, 1):
            mine = at & 1 == half
            where = at[mine] >> 1
            kept = data[where] & np.uint8(0x0F if half else 0xF0)
            data[where] = kept | np.left_shift(codes[mine], 4 * half, dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Turned:
    """Matrices [..., in, out] of the float model that are stored [..., out, in]. A `layouts.contract.CodedWeight`.

    Runs are whole matrices, of which all positions are known either way.
    """

    of: Packed  # as it is stored
    groups: Blocks  # its factors: a scale for each group of a stored row

    @property
    def name(self) -> str:
        return self.of.name

    @property
    def shape(self) -> tuple[int, ...]:
        *batch, rows, cols = self.of.shape
        return (*batch, cols, rows)

    @property
    def method(self) -> str:
        return self.of.method

    @property
    def codes(self) -> TensorEntry:
        return self.of.codes

    @property
    def companions(self) -> tuple[TensorEntry, ...]:
        return self.of.companions

    @property
    def grid(self) -> Grid:
        return self.of.grid

    @property
    def flip(self) -> int:
        return self.of.flip

    @property
    def step(self) -> int:
        return self.of.shape[-2] * self.of.shape[-1]

    def stored(self, lo: int, hi: int) -> tuple[int, int]:
        return self.of.stored(lo, hi)

    def ranges(self, lo: int, hi: int) -> list[Range]:
        return self.of.ranges(lo, hi)

    def scales(self, inputs: Inputs, lo: int, hi: int) -> TurnedScales:
        return TurnedScales(self, self.groups.read(inputs, lo, hi))

    def unpack(self, data: Bytes) -> Codes:
        return self.of.unpack(data).reshape(-1, *self.of.shape[-2:]).transpose(0, 2, 1).reshape(-1)

    def get(self, data: Bytes, at: Places) -> Codes:
        return self.of.get(data, self.place(at))

    def put(self, data: Bytes, at: Places, codes: Codes) -> None:
        self.of.put(data, self.place(at), codes)

    def place(self, positions: Places) -> Places:
        """Where entries are stored; from the first of a matrix on, as runs are, or of the weight."""
        rows, cols = self.of.shape[-2:]
        matrix, inside = np.divmod(positions, rows * cols)
        across, down = np.divmod(inside, rows)
        place: Places = matrix * (rows * cols) + down * cols + across
        return place


@dataclass(frozen=True, slots=True)
class TurnedScales:
    """A `layouts.contract.Scales` of the entries as the float model has them."""

    weight: Turned
    stored: BlockScales

    def at(self, positions: Places) -> F32:
        return self.stored.at(self.weight.place(positions))

    def run(self, lo: int, hi: int) -> F32:
        """Row by row of the float model, each of which lies in one group of every stored row."""
        rows, cols = self.weight.of.shape[-2:]
        first, last = lo // rows, -(-hi // rows)
        matrix, down = np.divmod(np.arange(first, last), cols)
        table = self.stored.values.reshape(-1, rows, self.weight.groups.table[1])
        every = table[matrix - self.stored.first // rows, :, down // self.weight.groups.block[1]]
        flat: F32 = every.reshape(-1)[lo - first * rows : hi - first * rows]
        return flat

    def table(self) -> ScaleTable:
        return self.stored.table()._replace(turned=True)
