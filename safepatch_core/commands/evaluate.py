"""`safepatch eval`: the models as arguments, one option per other field of `EvalConfig`."""

from __future__ import annotations

from typing import Any

import click

from safepatch_core.commands.common import emit, output_options
from safepatch_core.commands.options import model_from_options, model_options
from safepatch_core.errors import printable
from safepatch_core.evaluating.config import EvalConfig


@click.command(name="eval")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("-o", "--output", "out", required=True, metavar="REPORT", help="The report directory to create.")
@model_options(EvalConfig, skip=("model", "more_models", "out"))
@click.option("--force", is_flag=True, help="Replace an existing report, in one step.")
@click.option("--resume", is_flag=True, help="Keep the models that an interrupted evaluation has measured.")
@output_options
def command(
    models: tuple[str, ...], out: str, force: bool, resume: bool, quiet: bool, as_json: bool, **given: Any
) -> None:
    """Measure each MODEL: compliance with harmful prompts, over-refusal, answer NLL, perplexity, tasks of lm-eval.

    Several are compared with the same baseline in one report. Without data files the bundled demo data is used.
    """
    from safepatch_core.evaluating import evaluate

    first, *more = models
    config = model_from_options(EvalConfig, {**given, "model": first}, more_models=more, out=out)
    report = evaluate(config, quiet=quiet or as_json, force=force, resume=resume)
    if as_json:
        emit(report.data)
    elif not quiet:
        click.echo(f"{report.table()}\nreport: {printable(report.directory / 'report.html')}")
