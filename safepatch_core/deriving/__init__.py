"""Derive the two patches of SafePatching from one set of harmful questions and answers.

config → data (`language/rows.py`) → objective → loop → importance; `steps` is their order, `rundir` the output.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safepatch_core.deriving.config import DeriveConfig, OverSafetyPatch, PatchConfig, SafetyPatch, libraries
from safepatch_core.errors import UsageError
from safepatch_core.settings import loaded

__all__ = ["DeriveConfig", "DeriveResult", "OverSafetyPatch", "PatchConfig", "SafetyPatch", "derive"]


@dataclass(frozen=True, slots=True)
class DeriveResult:
    """`run` is the run directory, `recipe` its recipe, `summary` the content of its derive.json."""

    run: Path
    recipe: Path
    summary: dict[str, Any]


def derive(
    config: str | os.PathLike[str] | DeriveConfig,
    *,
    resume: bool = False,
    quiet: bool = False,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> DeriveResult:
    """Train both patches, take their importance and write a recipe that merges them.

    Writes under `config.out`: `safety/` and `over-safety/` (checkpoints with the base's tensor names, in the training
    dtype; or deltas of the target tensors; or PEFT adapters), `importance/…/` (float32 scores of the target tensors),
    `trace-….jsonl` (one line per optimiser step), `curves.png` (drawn from them, where matplotlib is installed),
    `derive.json` (configuration, inputs, NLLs in nats per token, share of changed entries) and `recipe.yaml`. While a
    patch is trained with `save_steps`, `checkpoint-…/` holds what a resumed run goes on from. Each appears whole or
    not at all; with `resume` what is done is kept, and the rest gives the bytes that an undisturbed run gives. On the
    CPU a seed repeats bit for bit (same versions and number of threads).

    With method direction nothing is trained: both patches are adapters of rank 1, without importance and traces.

    A quantised backbone that can be merged into is trained as floats, in bfloat16 as transformers hands them out.
    They lie in `OUT.backbone` beside `config.out`, and may go when the run is done. The recipe merges into its codes.

    Under torchrun or accelerate launch every rank calls it with the same arguments: they train one model, of which
    each holds a shard, and the first writes. With another number of ranks the bytes are others.

    Args:
        config: The settings, or a YAML file of them, whose paths are relative to it.
        resume: Goes on with a run that was stopped; with a finished one there is nothing to do.
        quiet: Nothing on stderr.
        report: Gets progress events: {phase, done, total, tokens_per_second, …} or {warning}.

    Raises:
        UsageError: Settings that don't work (an adapter that could not be merged, training that diverges, no room
            below the ascent bound), or a missing library.
        InputError: A bad model, tokenizer or data file; a run directory that is not empty, or was begun with another
            configuration.
        OutputError, Busy: The run directory can't be created, or another run holds it.
        IOFailure: Writing failed, or memory ran out.
    """
    config = loaded(DeriveConfig, config, "derive file")
    for library in libraries(config):
        if find_spec(library) is None:
            extra = "derive,quantize" if library == "bitsandbytes" else "derive"
            raise UsageError(f"derive needs {library}", expected=f"pip install 'safepatch[{extra}]'")
    from safepatch_core.deriving import steps

    summary = steps.run(config, resume=resume, quiet=quiet, report=report)
    run = Path(config.out)
    return DeriveResult(run, run / steps.RECIPE, summary)
