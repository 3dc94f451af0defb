"""What a patch says about the base, however it is stored. Plan and stream know this much, and no format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Bits, Lora
from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.names import Exchange, Takes
from safepatch_core.spec import Kind, Missing, Rows

Range = tuple[TensorEntry, int, int]  # bytes [lo, hi) of a tensor


@dataclass(frozen=True, slots=True)
class Origin:
    """Which patch is opened from where."""

    name: str
    ref: str  # as the user named it
    path: Path
    revision: str | None  # commit hash of a hub id
    minus: Checkpoint | None  # what the change is measured from, where it is not the base
    base: Checkpoint
    takes: Takes  # the recipe's rule of targets
    rows: Rows


class Held(Protocol):
    """What a patch says about a tensor, once all that its chunks share is in memory."""

    def load(self, inputs: Inputs, lo: int, hi: int, memory: NDArray[np.uint8]) -> Bits | Lora:
        """Entries [lo, hi), read or decoded into `memory` of `ring_bytes` per entry. Raises IOFailure."""


class PatchTensor(Protocol):
    """What one patch, or its importance, says about one tensor of the base.

    What lies in files may differ from what the engine is handed: a reader decodes it into the ring.
    """

    @property
    def form(self) -> Kind:
        """In which of the three forms it reaches the engine: patched values (checkpoint), deltas, or LoRA factors."""

    @property
    def path(self) -> Path:
        """The file that complaints name."""

    @property
    def entry_bytes(self) -> float:
        """Bytes that are read from files per entry."""

    @property
    def once_bytes(self) -> int:
        """Bytes that are read once per sweep, however many entries there are."""

    @property
    def ring_bytes(self) -> int:
        """Bytes of the ring per entry."""

    @property
    def held_bytes(self) -> int:
        """Bytes, aligned, that stay in memory while the tensor is worked on: the same for all of its chunks."""

    def ranges(self, lo: int, hi: int) -> list[Range]:
        """What is read of the files for the entries [lo, hi)."""

    def hold(self, inputs: Inputs, memory: NDArray[np.uint8]) -> Held:
        """Read what all chunks share into `memory` of `held_bytes`. Raises IOFailure."""


class Source(Protocol):
    """One patch: the files that it lies in, and what it says about each tensor of the base."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> Kind: ...

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """All that is read of it; the first is the patch itself."""

    @property
    def config(self) -> Mapping[str, Any] | None:
        """An adapter's adapter_config.json."""

    @property
    def exchange(self) -> Exchange:
        """What its own names are in the base."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """What of the base it changes: its float tensors, by the base's names, also where the base lacks them."""

    @property
    def names(self) -> Mapping[str, str]:
        """By the base's names all that it brings, integers too, and what each is called in the patch."""

    def lookup(self, entry: TensorEntry, missing: Missing) -> PatchTensor | None:
        """What it says about the base's tensor `entry`; None for no change.

        Raises InputError where the tensor is missing (`missing="skip"` and adapters aside) or does not fit.
        """


def load_alone(tensor: PatchTensor, inputs: Inputs, lo: int, hi: int) -> Bits | Lora:
    """Entries [lo, hi) of one tensor in memory of their own."""
    held = tensor.hold(inputs, np.empty(tensor.held_bytes, np.uint8))
    return held.load(inputs, lo, hi, np.empty(tensor.ring_bytes * (hi - lo), np.uint8))
