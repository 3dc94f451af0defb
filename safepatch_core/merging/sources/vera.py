"""VeRA: one pair of random matrices for all layers, scaled by trained vectors: delta = (λ_b ⊙ B) @ (λ_d ⊙ A).

Each product with a vector is rounded once; what comes of them are LoRA factors of scale 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Lora
from safepatch_core.errors import InputError
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.pipeline import align
from safepatch_core.merging.sources.contract import Range
from safepatch_core.merging.sources.decoding import Ready, placed, read_float32
from safepatch_core.merging.sources.factors import require_fit
from safepatch_core.merging.sources.folder import PREFIX, Entries, Folder, Found, Part, Shape
from safepatch_core.merging.sources.orientation import Orientation
from safepatch_core.spec import ITEMSIZE, Kind

USED = frozenset({"r", "save_projection"})
HARMLESS = frozenset({"projection_prng_key", "vera_dropout", "d_initial", "init_weights"})
_KEY = re.compile(rf"{PREFIX}(.+)\.vera_lambda_([bd])(?:\.[^.]+)?")
_SHARED = re.compile(r"base_model\.vera_([AB])(?:\.[^.]+)?")


@dataclass(frozen=True, slots=True)
class VeraFactors:
    """What one tensor of the base gets of the shared matrices: their first columns and rows."""

    a: TensorEntry  # [rank, at least in]
    b: TensorEntry  # [at least out, rank]
    scale_a: TensorEntry  # [rank]
    scale_b: TensorEntry  # [out]
    shape: tuple[int, int]
    transposed: bool  # the base stores [in, out]
    form: Kind = "lora"
    entry_bytes: int = 0
    ring_bytes: int = 0

    @property
    def path(self) -> Path:
        return self.scale_b.path

    @property
    def stored(self) -> str:
        return self.scale_b.name

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """out, in, rank."""
        into = self.shape[0 if self.transposed else 1]
        return self.scale_b.entries, into, self.scale_a.entries

    @property
    def once_bytes(self) -> int:
        return sum(hi - lo for _, lo, hi in self.ranges(0, 0))

    @property
    def held_bytes(self) -> int:
        out, into, rank = self._sizes
        return align(4 * rank * into) + align(4 * out * rank)

    def fit(self, entry: TensorEntry, cut: bool) -> VeraFactors:
        require_fit(self.scale_b, self.shape, entry)
        return self

    def ranges(self, lo: int, hi: int) -> list[Range]:
        if lo:
            return []
        out, into, rank = self._sizes
        size, row = ITEMSIZE[self.a.dtype], self.a.shape[1] * ITEMSIZE[self.a.dtype]
        vectors = [(entry, 0, entry.nbytes) for entry in (self.scale_a, self.scale_b)]
        rows = [(self.a, r * row, r * row + into * size) for r in range(rank)]
        return [*vectors, *rows, (self.b, 0, out * rank * ITEMSIZE[self.b.dtype])]

    def hold(self, inputs: Inputs, memory: NDArray[np.uint8]) -> Ready:
        out, into, rank = self._sizes
        wide = self.a.shape[1]
        a = np.stack([read_float32(inputs, self.a, r * wide, r * wide + into) for r in range(rank)])
        b = read_float32(inputs, self.b, 0, out * rank).reshape(out, rank)
        with np.errstate(all="ignore"):
            a = read_float32(inputs, self.scale_a)[:, None] * a
            b = read_float32(inputs, self.scale_b)[:, None] * b
        right, left = placed([b.T, a.T] if self.transposed else [a, b], memory)
        return Ready(Lora(right, left, 1.0))


def read_vera(folder: Folder) -> Found:
    """What the adapter's vectors change."""
    folder.require_known(USED, HARMLESS)
    shared, modules = _sorted_out(folder)
    if modules and set(shared) != {"A", "B"}:
        raise InputError(
            "the random matrices of VeRA were not saved: they would have to be guessed from a seed",
            file=folder.file,
            expected="an adapter trained with save_projection: true",
        )
    vectors = {f"{module}.weight": _vectors(folder, sides) for module, sides in modules.items()}
    fits = {name: folder.shapes((b.entries, 0), partial(_may_be, b.entries)) for name, (_, b) in vectors.items()}
    taken = [*shared.values(), *(entry for pair in vectors.values() for entry in pair)]

    def parts(there: Entries) -> dict[str, Part]:
        sizes = {name: (b.entries, _inputs(there, name, b.entries)) for name, (_, b) in vectors.items()}
        layers = Orientation(folder.base, there, sizes, folder.flag("fan_in_fan_out"))
        found: dict[str, Part] = {}
        for name, (d, b) in vectors.items():
            _require_room(folder, name, shared["A"], shared["B"], d.entries, sizes[name])
            turned = layers.transposed(name)
            shape = sizes[name][::-1] if turned else sizes[name]
            found[name] = VeraFactors(shared["A"], shared["B"], d, b, shape, turned)
        return found

    return Found(fits, frozenset(entry.name for entry in taken), parts)


def _may_be(out: int, shape: Shape) -> bool:
    return len(shape) == 2 and out in shape


def _sorted_out(folder: Folder) -> tuple[dict[str, TensorEntry], dict[str, dict[str, TensorEntry]]]:
    """The shared matrices by side, and the vectors by module and side."""
    shared: dict[str, TensorEntry] = {}
    vectors: dict[str, dict[str, TensorEntry]] = {}
    for entry in folder.shard.tensors:
        if key := _KEY.fullmatch(entry.name):
            folder.require_shape(entry, 1, "VeRA vector")
            vectors.setdefault(key[1], {})[key[2]] = entry
        elif key := _SHARED.fullmatch(entry.name):
            folder.require_shape(entry, 2, "VeRA matrix")
            shared[key[1]] = entry
    return shared, vectors


def _vectors(folder: Folder, sides: dict[str, TensorEntry]) -> tuple[TensorEntry, TensorEntry]:
    """The vectors d [rank] and b [out] of a module."""
    if len(sides) != 2:
        (side, entry), *_ = sides.items()
        raise InputError(f"vera_lambda_{side} without its other half", file=folder.file, tensor=entry.name)
    return sides["d"], sides["b"]


def _inputs(there: Entries, name: str, out: int) -> int:
    """How many inputs a layer of so many outputs has: only the base tells. 0 where it has no such layer."""
    shape = there[name].shape if name in there else ()
    if not _may_be(out, shape):
        return 0
    return shape[1] if shape[0] == out else shape[0]


def _require_room(
    folder: Folder, target: str, a: TensorEntry, b: TensorEntry, rank: int, shape: tuple[int, int]
) -> None:
    """The shared matrices are of the module's rank and no smaller than its weight."""
    if a.shape[0] != rank or b.shape[1] != rank or a.shape[1] < shape[1] or b.shape[0] < shape[0]:
        raise InputError(
            "an adapter of another base",
            file=folder.file,
            tensor=target,
            found=f"vera_A {list(a.shape)}, vera_B {list(b.shape)} and rank {rank}",
            expected=f"room for {list(shape)}",
        )
