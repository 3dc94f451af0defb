"""Trained rows of an embedding or head (PEFT's trainable tokens): values that replace the base's rows."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Bits
from safepatch_core.errors import InputError
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.pipeline import align
from safepatch_core.merging.sources.contract import Range
from safepatch_core.merging.sources.decoding import F32Array, as_bits, placed, read_into, read_matrix
from safepatch_core.merging.sources.factors import require_fit
from safepatch_core.merging.sources.folder import PREFIX, Folder, Found, Shape
from safepatch_core.spec import ITEMSIZE, Kind

USED = frozenset({"token_indices"})
HARMLESS = frozenset({"init_weights"})
_KEY = re.compile(rf"{PREFIX}(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?")


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of one module's weight, and which."""

    rows: TensorEntry  # [n, columns]
    tokens: tuple[int, ...]

    @property
    def stored(self) -> str:
        return self.rows.name

    @property
    def shape(self) -> tuple[int, int]:
        """The least that holds them."""
        return (max(self.tokens, default=-1) + 1, self.rows.shape[1])

    def may_be(self, shape: Shape) -> bool:
        return len(shape) == 2 and shape[0] >= self.shape[0] and shape[1] == self.shape[1]

    def fit(self, entry: TensorEntry, cut: bool) -> ReplacedRows:
        there = entry.shape[:1] if self.shape[0] <= entry.shape[0] or cut else self.shape[:1]
        require_fit(self.rows, (*there, self.shape[1]), entry)
        return ReplacedRows(entry, self.rows, self.tokens)


@dataclass(frozen=True, slots=True)
class ReplacedRows:
    """Trained rows of the base's tensor `entry`, whose other rows stay; of that only what is asked for is read."""

    entry: TensorEntry
    rows: TensorEntry
    tokens: tuple[int, ...]
    form: Kind = "checkpoint"
    ring_bytes: int = 4

    @property
    def path(self) -> Path:
        return self.rows.path

    @property
    def entry_bytes(self) -> int:
        return ITEMSIZE[self.entry.dtype]

    @property
    def once_bytes(self) -> int:
        return self.rows.nbytes

    @property
    def held_bytes(self) -> int:
        return align(4 * self.rows.entries)

    def ranges(self, lo: int, hi: int) -> list[Range]:
        once = [(self.rows, 0, self.rows.nbytes)] if lo == 0 else []
        return [*once, (self.entry, lo * self.entry_bytes, hi * self.entry_bytes)]

    def hold(self, inputs: Inputs, memory: NDArray[np.uint8]) -> HeldRows:
        there = [i for i, token in enumerate(self.tokens) if token < self.entry.shape[0]]
        order = sorted(there, key=self.tokens.__getitem__)
        (rows,) = placed([read_matrix(inputs, self.rows)[order]], memory)
        return HeldRows(self.entry, rows, tuple(self.tokens[i] for i in order))


@dataclass(frozen=True, slots=True)
class HeldRows:
    """Rows in the order of their tokens."""

    entry: TensorEntry
    rows: F32Array
    tokens: tuple[int, ...]

    def load(self, inputs: Inputs, lo: int, hi: int, memory: NDArray[np.uint8]) -> Bits:
        out = memory[: 4 * (hi - lo)].view(np.float32)
        read_into(out, inputs, self.entry, lo)
        cols = self.entry.shape[1]
        first, last = bisect_left(self.tokens, lo // cols), bisect_left(self.tokens, -(-hi // cols))
        for token, row in zip(self.tokens[first:last], self.rows[first:last], strict=True):
            begin, end = max(token * cols, lo), min((token + 1) * cols, hi)
            out[begin - lo : end - lo] = row[begin - token * cols : end - token * cols]
        return as_bits(out)


def read_tokens(folder: Folder) -> Found:
    """An adapter that is nothing but trained rows."""
    folder.require_known(USED, HARMLESS)
    return trained_rows(folder, folder.config.get("token_indices"), "token_indices")


def trained_rows(folder: Folder, indices: object, key: str) -> Found:
    """The trained rows of the file, which the config's `key` gives `indices`: a list, or one per module."""
    rows: dict[str, TokenRows] = {}
    for entry in folder.shard.tensors:
        # The pattern tries every end of a module's name, which a large file has no time for.
        if "trainable_tokens_delta" in entry.name and (found := _KEY.fullmatch(entry.name)):
            folder.require_shape(entry, 2, "trained rows")
            rows[f"{found[1]}.weight"] = TokenRows(entry, _tokens(folder, found[1], indices, key))
    for of in rows.values():
        if len(of.tokens) != of.rows.shape[0]:
            raise InputError(
                f"other rows than {key} names",
                file=folder.file,
                tensor=of.stored,
                found=list(of.rows.shape),
                expected=f"{len(of.tokens)} rows",
            )
    if indices and not rows:
        raise folder.fault(f"{key}, but the file has no trained rows", indices, "an adapter as PEFT saves it")
    fits = {name: folder.shapes(of.shape, of.may_be) for name, of in rows.items()}
    return Found(fits, frozenset(of.stored for of in rows.values()), lambda there: rows)


def _tokens(folder: Folder, module: str, indices: object, key: str) -> tuple[int, ...]:
    """The rows of one module, each once."""
    if isinstance(indices, dict):
        indices = next((given for name, given in indices.items() if f".{module}".endswith(f".{name}")), None)
    if not isinstance(indices, Sequence) or not all(type(i) is int and i >= 0 for i in indices):
        raise folder.fault(f"{key} of {module}", indices, "a list of rows, from 0")
    if len(set(indices)) != len(indices):
        raise folder.fault(f"{key} of {module}", indices, "each row once")
    return tuple(indices)
