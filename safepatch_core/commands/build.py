"""`safepatch build`: what a recipe or another checkpoint changes, as a fix file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from safepatch_core.commands.common import (
    ByteProgress,
    OutPath,
    any_recipe,
    emit,
    engine_options,
    human,
    output_options,
)
from safepatch_core.errors import UsageError, printable

if TYPE_CHECKING:
    from safepatch_core.merging.engine import EngineOptions


@click.command(name="build")
@click.argument("recipe", required=False, type=click.Path())
@click.option("--from", "base", type=click.Path(), help="Instead of RECIPE: the checkpoint that the fix applies to,")
@click.option("--to", "merged", type=click.Path(), help="and the one that it gives.")
@click.option("-o", "--output", "out", required=True, type=OutPath(), help="The .safetensors file to create.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@engine_options
@output_options
def command(
    recipe: str | None,
    base: str | None,
    merged: str | None,
    out: str,
    force: bool,
    engine: EngineOptions,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write what a RECIPE's merge changes, and nothing else, to a small file. No merged checkpoint is written.

    A mergekit configuration is a recipe too.
    """
    from safepatch_core.fixes.build import build, build_between

    with ByteProgress("build", quiet) as progress:
        if recipe is not None and base is None and merged is None:
            result = build(any_recipe(recipe, quiet), out, force=force, progress=progress, **engine)
        elif recipe is None and base is not None and merged is not None:
            result = build_between(base, merged, out, force=force, progress=progress)
        else:
            raise UsageError("build takes either a RECIPE, or --from and --to")
    for warning in () if quiet else result.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
    if as_json:
        facts = {name: getattr(result, name) for name in ("id", "tensors", "entries", "changes", "size")}
        emit({"output": str(result.out), **facts})
    elif not quiet:
        click.echo(
            f"{result.changes:,d} of {result.entries:,d} entries of {result.tensors} tensors change "
            f"({result.changes / result.entries:.2%}): {human(result.size)}, "
            f"{result.size / result.changes:.2f} bytes for each"
        )
        for note in result.notes:
            click.echo(printable(note))
        click.echo(f"fix {result.id} written: {printable(result.out)}")
