"""`safepatch revert`: a fix comes out of a checkpoint again."""

from __future__ import annotations

import click

from safepatch_core.commands.apply import tell
from safepatch_core.commands.common import ByteProgress, OutPath, memory_option, output_options, write_options


@click.command(name="revert")
@click.argument("fix", type=click.Path())
@click.option("--from", "checkpoint", required=True, type=click.Path(), help="The checkpoint that carries it.")
@click.option("-o", "--output", "out", type=OutPath(), help="Directory to create: a copy without the change.")
@click.option("--in-place", is_flag=True, help="Change the checkpoint itself; after a crash any run goes on.")
@memory_option
@write_options
@output_options
def command(
    fix: str,
    checkpoint: str,
    out: str | None,
    in_place: bool,
    force: bool,
    resume: bool,
    memory_limit: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Take a FIX (a file, or the id of one that the checkpoint keeps) out again, to the bit."""
    from safepatch_core.fixes.apply import revert

    with ByteProgress("revert", quiet) as progress:
        result = revert(
            *(fix, checkpoint, out),
            in_place=in_place,
            force=force,
            resume=resume,
            memory_limit=memory_limit,
            progress=progress,
        )
    tell(result, quiet, as_json)
