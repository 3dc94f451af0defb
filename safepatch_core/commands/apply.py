"""`safepatch apply`: a fix goes into a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from safepatch_core.commands.common import ByteProgress, OutPath, emit, memory_option, output_options, write_options
from safepatch_core.errors import printable

if TYPE_CHECKING:
    from safepatch_core.fixes.apply import ApplyResult


def tell(result: ApplyResult, quiet: bool, as_json: bool) -> None:
    """What `apply` and `revert` say in the end."""
    if as_json:
        facts = ("id", "direction", "tensors", "changes", "resumed")
        emit({"output": str(result.out), **{n: getattr(result, n) for n in facts}, "fixes": list(result.fixes)})
    elif not quiet:
        did = "applied" if result.direction == "apply" else "taken out"
        went_on = " (went on with an interrupted run)" if result.resumed else ""
        click.echo(f"fix {result.id} {did}: {result.changes:,d} entries of {result.tensors} tensors{went_on}")
        click.echo(f"written: {printable(result.out)}")


@click.command(name="apply")
@click.argument("fix", type=click.Path())
@click.option("--to", "checkpoint", required=True, type=click.Path(), help="The checkpoint.")
@click.option("-o", "--output", "out", type=OutPath(), help="Directory to create: a copy with the change.")
@click.option("--in-place", is_flag=True, help="Change the checkpoint itself; after a crash any run goes on.")
@click.option("--date", metavar="TEXT", help="Note a date in the ledger.")
@memory_option
@write_options
@output_options
def command(
    fix: str,
    checkpoint: str,
    out: str | None,
    in_place: bool,
    date: str | None,
    force: bool,
    resume: bool,
    memory_limit: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Apply a FIX to a checkpoint of its base. Anything else there is refused before a byte changes."""
    from safepatch_core.fixes.apply import apply

    with ByteProgress("apply", quiet) as progress:
        result = apply(
            *(fix, checkpoint, out),
            in_place=in_place,
            date=date,
            force=force,
            resume=resume,
            memory_limit=memory_limit,
            progress=progress,
        )
    tell(result, quiet, as_json)
