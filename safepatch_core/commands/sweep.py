"""`safepatch sweep`: the search from one YAML file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from safepatch_core.commands.common import emit, engine_options, output_options
from safepatch_core.errors import printable

if TYPE_CHECKING:
    from safepatch_core.merging.engine import EngineOptions


@click.command(name="sweep")
@click.argument("config", type=click.Path())
@click.option("-o", "--output", "out", required=True, type=click.Path(), help="Directory for all of its outputs.")
@click.option("--trials", metavar="N", help="At most so many, instead of the file's trials.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Replace a value: recipe=PATH.")
@click.option("--resume", is_flag=True, help="Keep the trials in OUT, do the rest.")
@engine_options
@output_options
def command(
    config: str,
    out: str,
    trials: str | None,
    changes: tuple[str, ...],
    resume: bool,
    engine: EngineOptions,
    quiet: bool,
    as_json: bool,
) -> None:
    """Merge and evaluate many variants of a recipe, as CONFIG says, and write out the best one."""
    from safepatch_core.runs.sweep import sweep

    if trials is not None:
        changes += (f"trials={trials}",)
    result = sweep(config, out, changes=changes, resume=resume, quiet=quiet or as_json, **engine)
    if as_json:
        emit(result.data)
    elif not quiet:
        click.echo(f"{result.table()}\n")
        if result.recipe is None:
            click.echo("no trial meets the constraints: no recipe is written")
        else:
            click.echo(
                f"* chosen: {printable(result.recipe)}\n  measure it on other prompts: the best of many flatters"
            )
