"""What there is to do: targets with what the patches bring for them, cut into units that fit the ring."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.pipeline import align, room
from safepatch_core.merging.quantised.values import Dequantised, Measured
from safepatch_core.merging.quantised.writing import Coded
from safepatch_core.merging.sources.contract import PatchTensor
from safepatch_core.merging.sources.dense import Dense
from safepatch_core.spec import ITEMSIZE, Importance


@dataclass(frozen=True, slots=True)
class PatchInput:
    """What one patch brings to one target tensor."""

    delta: PatchTensor
    scores: PatchTensor | None
    importance: Importance  # as the engine is told
    random_key: int
    keep: int  # retention threshold
    scale: float  # c

    @property
    def tensors(self) -> list[PatchTensor]:
        return [self.delta] if self.scores is None else [self.delta, self.scores]

    @property
    def unmeasured(self) -> PatchInput:
        """The same for an engine that takes codes: it measures checkpoints itself."""
        return replace(self, delta=self.delta.said) if isinstance(self.delta, Measured) else self


@dataclass(frozen=True)
class Target:
    """A tensor that is patched; `patches[p]` is None where patch p has nothing for it.

    What a plan asks several times of each of some ten thousand targets is kept.

    `entry` has the name and shape that recipe and patches know: those of the float model, where the base stores the
    tensor as codes, which `coded` says.
    """

    entry: TensorEntry
    patches: tuple[PatchInput | None, ...]
    quotas: tuple[int, ...]  # k per patch, for scope: tensor
    skips: tuple[int, ...]  # how many of them are skipped
    whole: bool  # done in one piece, read once
    coded: Coded | None = None

    @property
    def unmeasured(self) -> Target:
        """The same for an engine that takes codes."""
        patches = tuple([patch and patch.unmeasured for patch in self.patches])
        return self if patches == self.patches else replace(self, patches=patches)

    @property
    def stored(self) -> TensorEntry:
        """The tensor of the base's files whose bytes change."""
        return self.entry if self.coded is None else self.coded.weight.codes

    def stored_bytes(self, entries: int) -> int:
        """Bytes that the first so many entries take there, a multiple of `step`."""
        return ITEMSIZE[self.entry.dtype] * entries if self.coded is None else self.coded.weight.stored(0, entries)[1]

    @cached_property
    def base(self) -> PatchTensor:
        """The entries as float32 or as they are stored in floats."""
        return Dense(self.entry, "checkpoint") if self.coded is None else Dequantised(self.coded.weight)

    @property
    def listable(self) -> bool:
        """Whether keys stand for all that patches say (see `lists`)."""
        return self.coded is None and all(p is None or p.importance == "magnitude" for p in self.patches)

    @property
    def present(self) -> int:
        """How many patches have something for it."""
        return sum(patch is not None for patch in self.patches)

    @property
    def said(self) -> list[PatchTensor]:
        """What patches say."""
        return [tensor for patch in self.patches if patch for tensor in patch.tensors]

    @property
    def given(self) -> list[PatchTensor]:
        """All that is read beside the base."""
        if self.coded is None or self.coded.original is None:
            return self.said
        return [self.coded.original, *self.said]

    def tensors(self, selecting: bool = False) -> list[PatchTensor]:
        """All that is read, or what is needed to select."""
        floats = self.coded is not None and not self.coded.direct
        return self.said if selecting and floats else [self.base, *self.given]

    @property
    def step(self) -> int:
        """Units begin at multiples of so many entries."""
        return 1 if self.coded is None else self.coded.weight.step

    def bytes_of(self, entries: int, selecting: bool = False) -> int:
        """Bytes of all files that so many entries take; for selecting alone, what is changed need not be read."""
        return math.ceil(entries * sum([tensor.entry_bytes for tensor in self.tensors(selecting)]))

    @property
    def buffers(self) -> int:
        """Of a unit, each filled up to ALIGN."""
        return len(self._sizes)

    @property
    def ring_bytes(self) -> float:
        """Bytes of the ring per entry."""
        return sum(self._sizes)

    @cached_property
    def _sizes(self) -> list[float]:
        """Bytes of the ring per entry of each buffer of a unit, the first one being what is written."""
        said: list[float] = [tensor.ring_bytes for tensor in self.said]
        if self.coded is None:
            return [ITEMSIZE[self.entry.dtype], *said]
        original = self.coded.original
        tiles = [] if self.coded.direct else [4] * max(1, self.present)
        return [self.base.entry_bytes, *tiles, *([original.ring_bytes] if original else []), *said]

    def once_bytes(self, selecting: bool = False) -> int:
        """Bytes that are read once per sweep."""
        return sum(tensor.once_bytes for tensor in self.tensors(selecting))

    @cached_property
    def held_bytes(self) -> int:
        """Bytes that all chunks of the tensor need."""
        return sum([tensor.held_bytes for tensor in self.given])

    def unit_bytes(self, entries: int) -> int:
        """Ring bytes of a unit of so many entries: room for one buffer per input.

        What is held lies in the unit of a tensor that is done whole; chunks of one tensor share it.
        """
        held = sum([align(tensor.held_bytes) for tensor in self.given]) if self.whole else 0
        return held + sum([room(math.ceil(size * entries)) for size in self._sizes])


@dataclass(frozen=True, slots=True)
class Unit:
    """Entries [lo, hi) of a target tensor, or bytes [lo, hi) of one that is copied."""

    entry: TensorEntry
    target: Target | None
    lo: int
    hi: int
    ring_bytes: int
