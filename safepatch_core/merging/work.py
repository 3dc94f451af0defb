"""What there is to do: targets with what the patches bring for them, cut into units that fit the ring."""

from __future__ import annotations

from dataclasses import dataclass

from safepatch_core.files.checkpoint import TensorEntry
from safepatch_core.merging.sources.contract import PatchTensor, align
from safepatch_core.spec import ITEMSIZE


@dataclass(frozen=True, slots=True)
class PatchInput:
    """What one patch brings to one target tensor."""

    delta: PatchTensor
    scores: PatchTensor | None
    random_key: int
    keep: int  # retention threshold
    scale: float  # c

    @property
    def tensors(self) -> list[PatchTensor]:
        return [self.delta] if self.scores is None else [self.delta, self.scores]


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor that is patched; `patches[p]` is None where patch p has nothing for it."""

    entry: TensorEntry
    patches: tuple[PatchInput | None, ...]
    quotas: tuple[int, ...]  # k per patch, for scope: tensor
    skips: tuple[int, ...]  # how many of them are skipped
    whole: bool  # done in one piece, read once

    @property
    def given(self) -> list[PatchTensor]:
        """All that is read beside the base."""
        return [tensor for patch in self.patches if patch for tensor in patch.tensors]

    @property
    def entry_bytes(self) -> int:
        """Bytes of all files per entry."""
        return ITEMSIZE[self.entry.dtype] + sum(tensor.entry_bytes for tensor in self.given)

    @property
    def ring_bytes(self) -> int:
        """Bytes of the ring per entry."""
        return ITEMSIZE[self.entry.dtype] + sum(tensor.ring_bytes for tensor in self.given)

    @property
    def once_bytes(self) -> int:
        """Bytes that are read once per sweep."""
        return sum(tensor.once_bytes for tensor in self.given)

    @property
    def held_bytes(self) -> int:
        """Bytes that all chunks of the tensor need."""
        return sum(tensor.held_bytes for tensor in self.given)

    def unit_bytes(self, entries: int) -> int:
        """Ring bytes of a unit of so many entries: one aligned buffer per input.

        What is held lies in the unit of a tensor that is done whole; chunks of one tensor share it.
        """
        buffers = [ITEMSIZE[self.entry.dtype], *(tensor.ring_bytes for tensor in self.given)]
        held = self.held_bytes if self.whole else 0
        return held + sum(align(size * entries) for size in buffers)


@dataclass(frozen=True, slots=True)
class Unit:
    """Entries [lo, hi) of a target tensor, or bytes [lo, hi) of one that is copied."""

    entry: TensorEntry
    target: Target | None
    lo: int
    hi: int
    ring_bytes: int
