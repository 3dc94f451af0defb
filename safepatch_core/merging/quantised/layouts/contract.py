"""A weight of the float model that the base stores as codes with scales. A layout is a file beside this one.

All positions are those of the logical weight: row-major entries of its shape in the float model, whatever the codes'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import ScaleTable
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.quantised.grids import F32, Codes, Grid
from safepatch_core.merging.sources.contract import Range

Bytes = NDArray[np.uint8]
Places = NDArray[np.int64]
Tensors = Mapping[str, TensorEntry]


class Scales(Protocol):
    """The scales of some entries of one weight, in memory."""

    def at(self, positions: Places) -> F32:
        """The scale of each entry, as float32; positions in the weight, [n] to [n]."""

    def run(self, lo: int, hi: int) -> F32:
        """The same for all entries [lo, hi) of the weight."""

    def table(self) -> ScaleTable:
        """All of them, for engines that take codes."""


class CodedWeight(Protocol):
    """One logical weight: where it lies, and how its codes are found in the bytes of the stored tensor."""

    @property
    def name(self) -> str:
        """As the float model has it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As the float model has it."""

    @property
    def method(self) -> str:
        """For people: "FP8 E4M3 in blocks of 128x128"."""

    @property
    def codes(self) -> TensorEntry:
        """The stored tensor that holds the codes, the only one that a merge changes."""

    @property
    def companions(self) -> tuple[TensorEntry, ...]:
        """What is read beside the codes: scales. Never written."""

    @property
    def grid(self) -> Grid: ...

    @property
    def flip(self) -> int:
        """Bits of a stored code that are the other way round in the grid's: the offset of packed 8-bit integers."""

    @property
    def step(self) -> int:
        """Runs of entries are read and written from one multiple of so many entries to another (or the end)."""

    def stored(self, lo: int, hi: int) -> tuple[int, int]:
        """The bytes of `codes` that hold the entries [lo, hi), both multiples of `step`."""

    def ranges(self, lo: int, hi: int) -> list[Range]:
        """The bytes of the companions that the entries [lo, hi) need."""

    def scales(self, inputs: Inputs, lo: int, hi: int) -> Scales:
        """The scales of the entries [lo, hi)."""

    def unpack(self, data: Bytes) -> Codes:
        """The codes of all entries of a run whose bytes are `data`."""

    def get(self, data: Bytes, at: Places) -> Codes:
        """The codes at these entries of a run; `at` counts from the run's first entry."""

    def put(self, data: Bytes, at: Places, codes: Codes) -> None:
        """Set the codes at these entries of a run, each named once."""


class Finder(Protocol):
    """Recognises one layout."""

    def __call__(self, codes: TensorEntry, tensors: Tensors, config: Mapping[str, Any]) -> CodedWeight | None:
        """The weight whose codes `codes` holds; None where that tensor is not of this layout.

        Raises Unfit for codes of this layout that a merge can't change.
        """


class Unfit(Exception):
    """Codes of a known layout that are not accepted; the text says by which name."""
