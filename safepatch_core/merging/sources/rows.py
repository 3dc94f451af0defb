"""`rows: common`: where a patch has another vocabulary than the base, it acts on the rows that both have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Bits
from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.recipe import NOT_LINEAR
from safepatch_core.merging.sources.contract import Range
from safepatch_core.merging.sources.decoding import as_bits, read_into
from safepatch_core.spec import ITEMSIZE, Kind, Rows

Shape = tuple[int, ...]


def common(name: str, shape: Shape, base: Shape) -> bool:
    """Whether a tensor of the base is an embedding or a head, and its rows are as long as those of the patch."""
    return any(part in name for part in NOT_LINEAR) and len(shape) == len(base) > 0 and shape[1:] == base[1:]


def as_in_base(entry: TensorEntry, shape: Shape) -> str:
    """What is expected of a patch that has another shape."""
    return (
        f"{list(entry.shape)} as in the base{' (or rows: common)' if common(entry.name, shape, entry.shape) else ''}"
    )


def shapes_of(name: str, shape: Shape, base: Checkpoint, rows: Rows) -> Sequence[Shape]:
    """The shapes that the base's tensor may have for a tensor `name` of the patch."""
    if rows == "all":
        return [shape]
    others = {t.shape for t in base.tensors.values() if common(name, shape, t.shape)}
    return [shape, *sorted(others - {shape})]


def first_rows(found: TensorEntry, entry: TensorEntry) -> TensorEntry:
    """The rows of the patch's tensor `found` that the base's `entry` has too."""
    return found._replace(shape=entry.shape, nbytes=entry.entries * ITEMSIZE[found.dtype])


@dataclass(frozen=True, slots=True)
class FewerRows:
    """A tensor of fewer rows than the base's `entry`: its other rows stay, or get no delta."""

    entry: TensorEntry
    found: TensorEntry
    form: Kind
    ring_bytes: int = 4
    entry_bytes: int = 0
    held_bytes: int = 0

    @property
    def path(self) -> Path:
        return self.found.path

    @property
    def once_bytes(self) -> int:
        return sum(hi - lo for _, lo, hi in self.ranges(0, self.entry.entries))

    def ranges(self, lo: int, hi: int) -> list[Range]:
        cut = min(max(self.found.entries, lo), hi)
        size, rest = ITEMSIZE[self.found.dtype], ITEMSIZE[self.entry.dtype]
        ranges = [(self.found, lo * size, cut * size)]
        return [*ranges, (self.entry, cut * rest, hi * rest)] if self.form == "checkpoint" else ranges

    def hold(self, inputs: Inputs, memory: NDArray[np.uint8]) -> FewerRows:
        return self

    def load(self, inputs: Inputs, lo: int, hi: int, memory: NDArray[np.uint8]) -> Bits:
        out = memory[: 4 * (hi - lo)].view(np.float32)
        cut = min(max(self.found.entries, lo), hi)
        read_into(out[: cut - lo], inputs, self.found, lo)
        if self.form == "checkpoint":
            read_into(out[cut - lo :], inputs, self.entry, cut)
        else:
            out[cut - lo :] = 0
        return as_bits(out)
