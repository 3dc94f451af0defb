"""`safepatch merge`: a recipe becomes a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from safepatch_core.commands.common import ByteProgress, OutPath, emit, engine_options, output_options, write_options
from safepatch_core.errors import printable

if TYPE_CHECKING:
    from safepatch_core.merging.engine import EngineOptions


@click.command(name="merge")
@click.argument("recipe", type=click.Path())
@click.option("-o", "--output", "out", required=True, type=OutPath(), help="Directory to create.")
@engine_options
@write_options
@output_options
def command(
    recipe: str,
    out: str,
    engine: EngineOptions,
    force: bool,
    resume: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Merge a RECIPE's patches into its base: a new checkpoint. A mergekit configuration is a recipe too."""
    from safepatch_core.commands.common import any_recipe
    from safepatch_core.merging.api import merge
    from safepatch_core.merging.text import count_table

    with ByteProgress("merge", quiet) as progress:
        result = merge(any_recipe(recipe, quiet), out, force=force, resume=resume, progress=progress, **engine)
    for warning in () if quiet else result.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
    if as_json:
        emit(
            {
                "output": str(result.out),
                "counts": result.counts,
                "acted": result.acted,
                "changed": result.changed,
                "surviving": result.surviving,
                "bytes_read": result.bytes_read,
                "bytes_written": result.bytes_written,
            }
        )
    elif not quiet:
        click.echo(count_table(result.counts))
        if result.surviving is not None:
            lost = "; the others' steps are lost in rounding" if result.changed < result.acted else ""
            click.echo(
                f"stored bits changed at {result.changed:,d} of {result.acted:,d} entries that patches act on "
                f"({result.surviving:.1%}){lost}"
            )
        for note in result.notes:
            click.echo(printable(note))
        click.echo(f"written: {printable(result.out)}")
