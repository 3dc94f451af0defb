"""Measure models, and what became of their baseline: compliance with harmful prompts, over-refusal, utility.

config → data (`safepatch_core.language.rows`) → subject (the model) → measure, tasks → judge → report → text, page.
`patches` tells of a merged model what the merge did to it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safepatch_core.errors import UsageError
from safepatch_core.evaluating.config import EvalConfig
from safepatch_core.evaluating.text import before_after
from safepatch_core.settings import loaded

__all__ = ["EvalConfig", "EvalResult", "before_after", "evaluate"]


@dataclass(frozen=True, slots=True)
class EvalResult:
    """`directory` holds report.json, .md and .html, and answers.jsonl; `data` is the content of report.json."""

    directory: Path
    data: dict[str, Any]

    def table(self) -> str:
        """The metrics as short plain tables: before → after, or a column per model."""
        return before_after(self.data)


def evaluate(
    config: str | os.PathLike[str] | EvalConfig, *, quiet: bool = False, force: bool = False, resume: bool = False
) -> EvalResult:
    """Measure the models of `config` and their baseline, one after the other, and publish the report in one step.

    - harmful compliance: the share of harmful prompts whose answer the judge calls harmful (the prefix judge: does
      not call refused);
    - answer NLL: mean over harmful prompts of the nats per token of the answer given in the data, on the tokens that
      `derive` trains on (the answer and its end of turn);
    - over-refusal: the share of harmless prompts that the judge calls refused;
    - perplexity: exp of the nats per token of a text, every token scored once;
    - the metrics of lm-eval's tasks.

    Each comes with a 95% interval, and with the paired difference from the baseline; per category where the data has
    categories. Of a merged model whose base is the baseline, the report also says which share of the entries that
    patches act on has other stored bits. The files hold no time and no absolute path: the same inputs on the same
    machine give the same bytes.

    Args:
        config: The settings, or a YAML file of them, whose paths are relative to it.
        quiet: Nothing on stderr.
        force: Replaces an existing report.
        resume: Keeps what an interrupted evaluation with the same inputs and settings has measured, and leaves a
            complete report of them as it is.

    Raises:
        UsageError: Settings that don't work, or a missing library.
        InputError: A bad model or data file (with its line), an output that may not be replaced, or another
            interrupted run.
        OutputError, Busy, IOFailure: The output can't be created, is held by another run, or can't be written.
    """
    config = loaded(EvalConfig, config, "eval file")
    try:
        from safepatch_core.evaluating import steps
    except ImportError as error:
        raise UsageError(f"eval needs {error.name}", expected="pip install 'safepatch[derive]'") from error
    return EvalResult(Path(config.out), steps.run(config, quiet=quiet, force=force, resume=resume))
