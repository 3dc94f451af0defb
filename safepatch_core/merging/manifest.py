"""The manifest of a merged checkpoint, `safepatch.json`, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from safepatch_core.errors import InputError
from safepatch_core.spec import COMBINE, Acts, Combine

Count = Annotated[int, Field(ge=0)]


class TensorCounts(BaseModel):
    """Entries of one tensor: all, in a patch's set, and acted on by that patch."""

    entries: Count
    selected: Count
    applied: Count


class Patch(BaseModel):
    """What the manifest says about one patch; every patch has the same tensors."""

    name: str
    tensors: dict[str, TensorCounts]


class Made(BaseModel):
    """The resolved recipe; only what matters here is looked at."""

    model_config = ConfigDict(extra="allow")

    base: str
    combine: Combine


class File(BaseModel):
    """One file of the checkpoint."""

    size: Count
    sha256: str


class Manifest(BaseModel):
    """What is read of it; what `merge` writes beside is ignored."""

    recipe: Made
    patches: list[Patch]
    files: dict[str, File] = {}

    def acted(self) -> dict[str, int] | None:
        """Per target, on how many entries at least one patch acts; None where counts per patch don't tell.

        Unless patches act alone, two may act on the same entry, and the manifest doesn't say on how many.
        """
        applied = {t: [patch.tensors[t].applied for patch in self.patches] for t in self.patches[0].tensors}
        shared = COMBINE[self.recipe.combine].acts != Acts.ALONE
        if shared and any(np.count_nonzero(of) > 1 for of in applied.values()):
            return None
        return {tensor: sum(of) for tensor, of in applied.items()}


def read_manifest(path: Path) -> Manifest:
    """Raises InputError if the file is no manifest of a merge."""
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
        if len({frozenset(patch.tensors) for patch in manifest.patches}) != 1:
            raise ValueError("patches with different targets, or none")
        return manifest
    except ValueError as error:
        raise InputError("not the manifest of a merge", file=path) from error
