"""What patches say about a weight that is stored as codes, in a form that does not depend on it: deltas.

So the engines choose entries and form deltas as they do for float bases, and are never shown the weight itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Bits
from safepatch_core.backends.reference import from_float32, to_float32
from safepatch_core.errors import InputError
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.quantised.grids import F32, Codes, Grid
from safepatch_core.merging.quantised.layouts.contract import CodedWeight, Scales
from safepatch_core.merging.sources.computed import Computed
from safepatch_core.merging.sources.contract import Held, PatchTensor, Range
from safepatch_core.merging.sources.decoding import PIECE, as_bits
from safepatch_core.spec import Dtype, Kind

DTYPES: dict[str, Dtype] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def rounded(values: F32, dtype: Dtype) -> F32:
    """The values as a tensor of that dtype holds them."""
    return to_float32(Bits(from_float32(values, dtype), dtype))


@dataclass(frozen=True, slots=True)
class Dequantised:
    """v of each entry: its code's number times its scale. A `PatchTensor`."""

    weight: CodedWeight
    form: Kind = "checkpoint"
    ring_bytes: int = 4

    @property
    def held_bytes(self) -> int:
        """Where codes can only be read in long runs, those of one are kept for all that ask for parts of it.

        A byte for each code, and three while they are put into the float model's order.
        """
        return 4 * self.weight.step if self.weight.step > PIECE else 0

    @property
    def path(self) -> Path:
        return self.weight.codes.path

    @property
    def entry_bytes(self) -> float:
        return self.weight.grid.bits / 8

    @property
    def once_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.weight.companions)

    def ranges(self, lo: int, hi: int) -> list[Range]:
        lo, hi = self._whole_steps(lo, hi)
        return [(self.weight.codes, *self.weight.stored(lo, hi)), *self.weight.ranges(lo, hi)]

    def _whole_steps(self, lo: int, hi: int) -> tuple[int, int]:
        step = self.weight.step
        return lo // step * step, -(-hi // step) * step

    def hold(self, inputs: Inputs, memory: NDArray[np.uint8]) -> Held:
        return KeptRun(self, memory[: self.weight.step]) if self.held_bytes else self

    def load(self, inputs: Inputs, lo: int, hi: int, memory: NDArray[np.uint8]) -> Bits:
        first, last = self._whole_steps(lo, hi)
        codes, scales = self.read(inputs, first, last)
        out = memory[: 4 * (hi - lo)].view(np.float32)
        _multiply(self.weight.grid, codes[lo - first : hi - first], scales, lo, out)
        return as_bits(out)

    def read(self, inputs: Inputs, lo: int, hi: int) -> tuple[Codes, Scales]:
        """The codes and the scales of a run."""
        begin, end = self.weight.stored(lo, hi)
        data = np.empty(end - begin, np.uint8)
        inputs.read(self.weight.codes, begin, data)
        return self.weight.unpack(data), self.weight.scales(inputs, lo, hi)


def _multiply(grid: Grid, codes: Codes, scales: Scales, lo: int, out: F32) -> None:
    """The values of entries from `lo` on, a piece at a time, so that little lies beside them."""
    with np.errstate(all="ignore"):  # a scale that is not finite has a rule of its own
        for at in range(0, len(codes), PIECE):
            part = codes[at : at + PIECE]
            np.multiply(grid.decode(part), scales.run(lo + at, lo + at + len(part)), out=out[at : at + len(part)])


@dataclass(slots=True)
class KeptRun:
    """The last run that was read."""

    of: Dequantised
    codes: Codes
    first: int = -1
    scales: Scales | None = None

    def load(self, inputs: Inputs, lo: int, hi: int, memory: NDArray[np.uint8]) -> Bits:
        step, out = self.of.weight.step, memory[: 4 * (hi - lo)].view(np.float32)
        for at in range(lo // step * step, hi, step):
            if at != self.first or self.scales is None:
                self.codes[:], self.scales = self.of.read(inputs, at, at + step)
                self.first = at
            begin, end = max(lo, at), min(hi, at + step)
            codes = self.codes[begin - at : end - at]
            _multiply(self.of.weight.grid, codes, self.scales, begin, out[begin - lo : end - lo])
        return as_bits(out)


def _difference(dtype: Dtype, patched: F32, w: F32) -> F32:
    return np.subtract(patched, rounded(w, dtype))


@dataclass(frozen=True, slots=True)
class Measured(Computed):
    """d of a checkpoint. An engine that takes codes measures it itself, from what the patch says."""

    @property
    def said(self) -> PatchTensor:
        return self.parts[0]


def delta_of(said: PatchTensor, w: PatchTensor, entry: TensorEntry, dtype: str) -> PatchTensor:
    """d of one patch: patched values are measured from w rounded to `dtype`, what its trainer was handed."""
    _require_independent(said, entry)
    return said if said.form != "checkpoint" else Measured(entry, (said, w), partial(_difference, DTYPES[dtype]))


def _require_independent(said: PatchTensor, entry: TensorEntry) -> None:
    """Raises InputError for a patch that has to read the base's own entries: they are codes."""
    if any(part is entry for part, _, _ in said.ranges(0, min(entry.entries, 1))):
        raise InputError(
            "needs the entries of the base, which are quantised",
            file=said.path,
            tensor=entry.name,
            expected="a checkpoint, a delta, or an adapter without magnitudes or rows of its own",
        )
