"""`safepatch run`: derive, merge, verify and eval from one YAML file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from safepatch_core.commands.common import ByteProgress, emit, engine_options, output_options, say_to_stderr

if TYPE_CHECKING:
    from safepatch_core.merging.engine import EngineOptions


@click.command(name="run")
@click.argument("config", type=click.Path())
@click.option("-o", "--output", "out", required=True, type=click.Path(), help="Directory for all of its outputs.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Replace a value: derive.model=PATH.")
@click.option("--resume", is_flag=True, help="Keep what is complete and unchanged in OUT, do the rest.")
@engine_options
@output_options
def command(
    config: str,
    out: str,
    changes: tuple[str, ...],
    resume: bool,
    engine: EngineOptions,
    quiet: bool,
    as_json: bool,
) -> None:
    """Derive two patches, merge them, verify the result and evaluate it, as CONFIG says."""
    from safepatch_core.runs.run import run

    with ByteProgress("merge", quiet) as progress:
        result = run(
            config,
            out,
            changes=changes,
            resume=resume,
            say=say_to_stderr(quiet),
            progress=progress,
            quiet=quiet,
            **engine,
        )
    if as_json:
        emit(result.data)
    elif not quiet:
        click.echo(result.table)
