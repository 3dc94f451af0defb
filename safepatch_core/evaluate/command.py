"""`safepatch eval`: the model as argument, one option per other field of `EvalConfig`."""

from __future__ import annotations

from typing import Any

import click

from safepatch_core.cli import emit, output_options
from safepatch_core.errors import printable
from safepatch_core.evaluate.config import EvalConfig
from safepatch_core.options import model_from_options, model_options


@click.command(name="eval")
@click.argument("model")
@click.option("-o", "--output", "out", required=True, metavar="REPORT", help="The report directory to create.")
@model_options(EvalConfig, skip=("model", "out"))
@click.option("--force", is_flag=True, help="Replace an existing report, in one step.")
@output_options
def command(model: str, out: str, force: bool, quiet: bool, as_json: bool, **given: Any) -> None:
    """Measure MODEL: compliance with harmful prompts, over-refusal, answer NLL and perplexity.

    Without data files the bundled demo data is used.
    """
    from safepatch_core.evaluate import evaluate

    config = model_from_options(EvalConfig, {**given, "model": model}, out=out)
    report = evaluate(config, quiet=quiet or as_json, force=force)
    if as_json:
        emit(report.data)
    elif not quiet:
        click.echo(f"{report.table()}\nreport: {printable(report.directory / 'report.md')}")
