"""SHiRA: trained values at a few places of a weight. Their deltas are scattered over zeros in the ring."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Bits
from safepatch_core.errors import InputError
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.pipeline import align
from safepatch_core.merging.sources.contract import Range
from safepatch_core.merging.sources.decoding import F32Array, as_bits, placed, read_float32
from safepatch_core.merging.sources.factors import require_fit
from safepatch_core.merging.sources.folder import PREFIX, Folder, Found, Shape
from safepatch_core.spec import Kind

USED = frozenset({"r"})
HARMLESS = frozenset({"mask_type", "random_seed", "init_weights"})
_KEY = re.compile(rf"{PREFIX}(.+)\.shira_(weight|indices)(?:\.[^.]+)?")


@dataclass(frozen=True, slots=True)
class SparseDelta:
    """Values of one module and where they belong."""

    values: TensorEntry  # [n]
    indices: TensorEntry  # I32 [2, n]: rows, columns
    shape: Shape = (0, 0)  # the base's, once it is known
    form: Kind = "delta"
    entry_bytes: int = 0
    ring_bytes: int = 4

    @property
    def path(self) -> Path:
        return self.values.path

    @property
    def stored(self) -> str:
        return self.values.name

    @property
    def once_bytes(self) -> int:
        return self.values.nbytes + self.indices.nbytes

    @property
    def held_bytes(self) -> int:
        return align(8 * self.values.entries) + align(4 * self.values.entries)

    def fit(self, entry: TensorEntry, cut: bool) -> SparseDelta:
        require_fit(self.values, (*entry.shape[:2],), entry)
        return replace(self, shape=entry.shape)

    def ranges(self, lo: int, hi: int) -> list[Range]:
        return [(entry, 0, entry.nbytes) for entry in (self.values, self.indices)] if lo == 0 else []

    def hold(self, inputs: Inputs, memory: NDArray[np.uint8]) -> HeldSparse:
        """Values by position; those of one place stay in the order of the file."""
        raw = np.empty(self.indices.nbytes, np.uint8)
        inputs.read(self.indices, 0, raw)
        rows, cols = raw.view("<i4").reshape(2, -1).astype(np.int64)
        self._require_inside(rows, cols)
        flat = rows * self.shape[1] + cols
        order = np.argsort(flat, kind="stable")
        places = memory[: flat.nbytes].view(np.int64)
        places[:] = flat[order]
        (values,) = placed([read_float32(inputs, self.values)[order]], memory[align(flat.nbytes) :])
        return HeldSparse(places, values)

    def _require_inside(self, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> None:
        outside = (rows < 0) | (rows >= self.shape[0]) | (cols < 0) | (cols >= self.shape[1])
        if outside.any():
            first = int(np.argmax(outside))
            raise InputError(
                "a place outside of the base's tensor",
                file=self.path,
                tensor=self.indices.name,
                found=[int(rows[first]), int(cols[first])],
                expected=f"inside {list(self.shape)}",
            )


@dataclass(frozen=True, slots=True)
class HeldSparse:
    """Flat positions in ascending order, and the values there."""

    places: NDArray[np.int64]
    values: F32Array

    def load(self, inputs: Inputs, lo: int, hi: int, memory: NDArray[np.uint8]) -> Bits:
        out = memory[: 4 * (hi - lo)].view(np.float32)
        out[:] = 0
        begin, end = np.searchsorted(self.places, [lo, hi])
        with np.errstate(all="ignore"):
            np.add.at(out, self.places[begin:end] - lo, self.values[begin:end])
        return as_bits(out)


def read_shira(folder: Folder) -> Found:
    """What the adapter's values change."""
    folder.require_known(USED, HARMLESS)
    modules: dict[str, dict[str, TensorEntry]] = {}
    for entry in folder.shard.tensors:
        if key := _KEY.fullmatch(entry.name):
            modules.setdefault(key[1], {})[key[2]] = entry
    parts = {f"{module}.weight": SparseDelta(*_checked(folder, sides)) for module, sides in modules.items()}
    taken = frozenset(entry.name for sides in modules.values() for entry in sides.values())
    return Found(dict.fromkeys(parts, folder.shapes((0, 0), lambda s: len(s) == 2)), taken, lambda there: parts)


def _checked(folder: Folder, sides: dict[str, TensorEntry]) -> tuple[TensorEntry, TensorEntry]:
    if len(sides) != 2:
        (side, entry), *_ = sides.items()
        raise InputError(f"shira_{side} without its other half", file=folder.file, tensor=entry.name)
    values, indices = sides["weight"], sides["indices"]
    folder.require_shape(values, 1, "SHiRA values")
    if indices.dtype != "I32" or indices.shape != (2, values.entries):
        raise InputError(
            "SHiRA indices",
            file=folder.file,
            tensor=indices.name,
            found=f"{indices.dtype} {list(indices.shape)}",
            expected=f"I32 [2, {values.entries}]",
        )
    return values, indices
