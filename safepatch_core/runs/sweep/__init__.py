"""Search a recipe's keys for one that makes the model safer, less prone to refuse, and no less useful.

config → candidates (which recipes, in which order) → steps (merge and evaluate each) → choice → plots.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from safepatch_core.merging.engine import EngineOptions
from safepatch_core.runs.sweep.config import Parameter, SweepConfig
from safepatch_core.settings import read_settings, rooted

__all__ = ["Parameter", "SweepConfig", "SweepResult", "sweep"]


@dataclass(frozen=True, slots=True)
class SweepResult:
    """`directory` holds the outputs, `recipe` is the chosen one (None if no trial meets the constraints), `data` is
    the content of sweep.json."""

    directory: Path
    recipe: Path | None
    data: dict[str, Any]

    def table(self) -> str:
        """The backbone, the Pareto front and the chosen trial as a plain table."""
        from safepatch_core.runs.sweep.report import table

        return table(self.data)


def sweep(
    config: str | os.PathLike[str] | SweepConfig,
    out: str | os.PathLike[str],
    *,
    changes: Sequence[str] = (),
    resume: bool = False,
    quiet: bool = False,
    **engine: Unpack[EngineOptions],
) -> SweepResult:
    """Merge and evaluate a candidate after another, each into a directory that is removed once it is scored.

    Trials that differ in scale, top, skip or combine alone choose from the same lists of entries: only the first
    looks at the patches, where the memory limit has room for what it found.

    Writes to `out`: `trials.jsonl`, a line per finished trial: its parameters, the first trial whose lists it shares
    (`lists`), the entries applied per patch, the SHA-256 of its weights (as `jobs.weights_digest`) and its metrics
    with 95% intervals; `sweep.json`, the backbone's metrics, all trials, the Pareto front of those that meet the
    constraints, and the chosen one; `recipe.yaml`, which merges to the chosen trial's weights from where it lies;
    with matplotlib, `pareto.png` and `sensitivity.png`.

    With `resume`, finished trials are kept, and the rest gives the bytes that an undisturbed sweep gives; more
    `trials` than before extend it. The chosen trial is the best of many on the same prompts, so its rates there
    flatter it: measure it on others.

    Raises UsageError for settings, recipe or metrics that don't work, InputError for bad inputs or a resumed sweep
    with other settings, recipe, inputs, data or versions; OutputError, Busy or IOFailure for the output.
    """
    from safepatch_core.runs.jobs import OutputFolder
    from safepatch_core.runs.sweep import steps

    if not isinstance(config, SweepConfig):
        origin = Path(config).resolve().parent
        settings = read_settings(SweepConfig, config, "sweep file", changes)
        places = rooted({"recipe": settings.recipe}, origin) | {"eval": rooted(settings.eval, origin)}
        config = settings.model_copy(update=places)
    with OutputFolder(out, resume=resume) as folder:
        data = steps.run(config, folder, engine, quiet=quiet)
    recipe = Path(out) / steps.RECIPE
    return SweepResult(Path(out), recipe if data["chosen"] is not None else None, data)
