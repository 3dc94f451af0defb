"""`safepatch sweep`: the search from one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from safepatch_core.commands.cli import emit, engine_options, output_options, size_option
from safepatch_core.errors import printable
from safepatch_core.runs.jobs import read_settings, rooted
from safepatch_core.runs.sweep.config import SweepConfig


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
    quiet: bool,
    as_json: bool,
    memory_limit: str | None,
    vram_limit: str | None,
    **engine: Any,
) -> None:
    """Merge and evaluate many variants of a recipe, as CONFIG says, and write out the best one."""
    from safepatch_core.runs.sweep import sweep

    if trials is not None:
        changes += (f"trials={trials}",)
    settings = read_settings(SweepConfig, config, "sweep file", changes)
    origin = Path(config).resolve().parent
    places = rooted({"recipe": settings.recipe}, origin) | {"eval": rooted(settings.eval, origin)}
    result = sweep(
        settings.model_copy(update=places),
        out,
        resume=resume,
        quiet=quiet or as_json,
        memory_limit=size_option(memory_limit),
        vram_limit=size_option(vram_limit),
        **engine,
    )
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
