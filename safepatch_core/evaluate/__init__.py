"""Measure a model, and what became of its baseline: compliance with harmful prompts, over-refusal, utility.

config → data (`safepatch_core.rows`) → subject (the model) → measure → judge → report.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safepatch_core.errors import UsageError
from safepatch_core.evaluate.config import EvalConfig
from safepatch_core.evaluate.report import before_after

__all__ = ["EvalConfig", "EvalReport", "before_after", "evaluate"]


@dataclass(frozen=True, slots=True)
class EvalReport:
    """`directory` holds report.json, report.md and answers.jsonl; `data` is the content of report.json."""

    directory: Path
    data: dict[str, Any]

    def table(self) -> str:
        """The metrics as a short plain table, before → after."""
        return before_after(self.data)


def evaluate(config: EvalConfig, *, quiet: bool = False, force: bool = False) -> EvalReport:
    """Measure `config.model` and its baseline, and publish the report directory in one step.

    - harmful compliance: the share of harmful prompts that the judge does not call refused;
    - answer NLL: mean over harmful prompts of the nats per token of the answer given in the data, on the tokens that
      `derive` trains on (the answer and its end of turn);
    - over-refusal: the share of harmless prompts that the judge calls refused;
    - perplexity: exp of the nats per token of a text, every token scored once.

    Each comes with a 95% interval, and with the paired difference from the baseline. The three files hold no time
    and no absolute path: the same inputs on the same machine give the same bytes. `quiet` silences stderr; `force`
    replaces an existing report.

    Raises UsageError for settings that don't work or a missing library, InputError for a bad model or data file (with
    its line) or an output that may not be replaced, OutputError, Busy or IOFailure for the output.
    """
    try:
        from safepatch_core.evaluate import steps
    except ImportError as error:
        raise UsageError(f"eval needs {error.name}", expected="pip install 'safepatch[derive]'") from error
    return EvalReport(Path(config.out), steps.run(config, quiet=quiet, force=force))
