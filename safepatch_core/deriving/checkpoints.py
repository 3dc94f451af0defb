"""Training checkpoints: RUN/checkpoint-NAME/STEP, the latest alone, gone once the patch is there.

Of several ranks each writes and reads its own part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from safepatch_core.deriving.loop import Tensors
from safepatch_core.deriving.rundir import RunDirectory

FACTS = "training.json"


class TrainingCheckpoints:
    """Those of one patch's training. Each appears whole or not at all, and before the one that it replaces goes."""

    def __init__(self, out: RunDirectory, patch: str) -> None:
        self._out, self._folder = out, f"checkpoint-{patch}"
        ranks = out.ranks
        self._tensors = "training.safetensors" if ranks.size == 1 else f"training-{ranks.rank}.safetensors"

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Writes tensors and facts of a training that has taken `step` steps."""
        with self._out.new_folder(f"{self._folder}/{step}") as folder:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / self._tensors)
            if self._out.ranks.rank == 0:
                (folder / FACTS).write_text(json.dumps(facts), "utf-8")
        for older in self._steps():
            if older != step:
                self._out.remove_folder(f"{self._folder}/{older}")

    def latest(self) -> tuple[Tensors, dict[str, Any]] | None:
        """A reader of the tensors, and the facts, of the checkpoint with the most steps; None if there is none."""
        steps = self._steps()
        if not steps:
            return None
        folder = self._path / str(max(steps))
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text("utf-8"))

        def read(name: str) -> Tensor:
            with safe_open(folder / self._tensors, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
            return tensor

        return read, facts

    def clear(self) -> None:
        """Removes them all."""
        self._out.remove_folder(self._folder)

    @property
    def _path(self) -> Path:
        return self._out.path / self._folder

    def _steps(self) -> list[int]:
        return [int(path.name) for path in self._path.glob("*") if path.name.isdecimal()]
