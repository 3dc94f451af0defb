"""`safepatch derive`: one option per field of `DeriveConfig`."""

from __future__ import annotations

from typing import Any

import click

from safepatch_core.commands.common import emit, output_options
from safepatch_core.commands.options import model_from_options, model_options
from safepatch_core.deriving.config import DeriveConfig
from safepatch_core.errors import printable
from safepatch_core.ranks import is_first


@click.command(name="derive")
@click.option("-o", "--output", "out", required=True, metavar="RUN", help="The run directory to create.")
@model_options(DeriveConfig, skip=("out",))
@click.option("--resume", is_flag=True, help="Keep the finished steps of an interrupted run and do the rest.")
@output_options
def command(out: str, resume: bool, quiet: bool, as_json: bool, **given: Any) -> None:
    """Train the two patches of a model from harmful data, rank their entries, and write RUN/recipe.yaml."""
    from safepatch_core.deriving import derive

    result = derive(model_from_options(DeriveConfig, given, out=out), resume=resume, quiet=quiet or as_json)
    if not is_first():
        return
    if as_json:
        emit(result.summary)
    elif not quiet:
        click.echo(f"next: safepatch merge {printable(result.recipe)} -o OUT")
