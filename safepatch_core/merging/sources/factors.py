"""A pair of LoRA factors, handed to the engine as it is: delta = scale * (b @ a)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Lora
from safepatch_core.errors import InputError
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.pipeline import align
from safepatch_core.merging.sources.contract import Range
from safepatch_core.merging.sources.decoding import F32Array, Ready, placed, read_float32, read_matrix
from safepatch_core.merging.sources.foreign import refuse_ungathered
from safepatch_core.merging.sources.rows import as_in_base
from safepatch_core.spec import ITEMSIZE, Kind


@dataclass(frozen=True, slots=True)
class Factors:
    """LoRA factors of one base tensor, as they lie in the adapter file."""

    a: TensorEntry  # [rank, in]
    b: TensorEntry  # [out, rank]
    rank: int
    scale: float  # a float32 value
    transposed: bool  # the base stores [in, out]
    rows: int | None = None  # of the base's tensor, where it has others than the factors give
    form: ClassVar[Kind] = "lora"
    entry_bytes: ClassVar[int] = 0
    ring_bytes: ClassVar[int] = 0

    @property
    def path(self) -> Path:
        return self.a.path

    @property
    def stored(self) -> str:
        return self.a.name

    @property
    def shape(self) -> tuple[int, int]:
        """That of the delta."""
        out, into = self.b.shape[0], self.a.shape[1]
        rows, cols = (into, out) if self.transposed else (out, into)
        return (rows if self.rows is None else self.rows, cols)

    @property
    def once_bytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    @property
    def held_bytes(self) -> int:
        rows, cols = self.shape
        return align(4 * self.rank * cols) + align(4 * self.rank * rows)

    def fit(self, entry: TensorEntry, cut: bool) -> Factors:
        if cut:
            return replace(self, rows=entry.shape[0])
        require_fit(self.a, self.shape, entry, " (transposed)" if self.transposed else "")
        return self

    def ranges(self, lo: int, hi: int) -> list[Range]:
        """Both factors, with the first of the tensor's chunks."""
        return [(factor, 0, factor.nbytes) for factor in (self.a, self.b)] if lo == 0 else []

    def hold(self, inputs: Inputs, memory: NDArray[np.uint8]) -> Ready:
        return Ready(self.lora(inputs, memory))

    def lora(self, inputs: Inputs, memory: NDArray[np.uint8]) -> Lora:
        """Both factors as float32 in `memory`, laid out for the base's rows and columns.

        The transpose of b @ a is a.T @ b.T with the same products in the same order, so nothing is rounded anew.
        """
        a, b = read_matrix(inputs, self.a), read_matrix(inputs, self.b)
        left, right = (a.T, b.T) if self.transposed else (b, a)
        a, b = placed([right, _with_rows(left, self.rows)], memory)
        return Lora(a, b, self.scale)


def _with_rows(left: F32Array, rows: int | None) -> F32Array:
    """So many rows of it, and zeros where it has fewer."""
    if rows is None or rows <= len(left):
        return left[:rows]
    return np.concatenate([left, np.zeros((rows - len(left), left.shape[1]), np.float32)])


@dataclass(frozen=True, slots=True)
class Bias:
    """A trained bias of a layer's B: delta = scale * bias, which is a product of rank 1."""

    bias: TensorEntry  # [out]
    scale: float  # a float32 value
    form: Kind = "lora"
    entry_bytes: int = 0
    ring_bytes: int = 0

    @property
    def path(self) -> Path:
        return self.bias.path

    @property
    def stored(self) -> str:
        return self.bias.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bias.shape

    @property
    def once_bytes(self) -> int:
        return self.bias.nbytes

    @property
    def held_bytes(self) -> int:
        return align(4 * self.bias.entries) + align(4)

    def fit(self, entry: TensorEntry, cut: bool) -> Bias:
        require_fit(self.bias, self.shape, entry)
        return self

    def ranges(self, lo: int, hi: int) -> list[Range]:
        return [(self.bias, 0, self.bias.nbytes)] if lo == 0 else []

    def hold(self, inputs: Inputs, memory: NDArray[np.uint8]) -> Ready:
        a, b = placed([read_float32(inputs, self.bias)[None], np.ones((1, 1), np.float32)], memory)
        return Ready(Lora(a, b, self.scale))


def require_fit(stored: TensorEntry, shape: tuple[int, ...], entry: TensorEntry, how: str = "") -> None:
    """The adapter's tensor `stored` gives the shape of the base's `entry`, whose dtype can be patched."""
    if shape != entry.shape:
        refuse_ungathered(stored.path, stored)
        raise InputError(
            "an adapter of another base",
            file=stored.path,
            tensor=entry.name,
            found=f"{list(shape)} from its factors{how}",
            expected=as_in_base(entry, shape),
        )
    if entry.dtype not in ITEMSIZE:
        raise InputError(
            "the adapted tensor of the base",
            file=stored.path,
            tensor=entry.name,
            found=entry.dtype,
            expected=" or ".join(ITEMSIZE),
        )
