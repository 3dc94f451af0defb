"""`safepatch log`: which fixes a checkpoint carries."""

from __future__ import annotations

from dataclasses import asdict

import click

from safepatch_core.commands.common import emit, output_options
from safepatch_core.errors import printable


@click.command(name="log")
@click.argument("checkpoint", type=click.Path())
@click.option("--probe", "probes", multiple=True, type=click.Path(), metavar="FIX", help="Look for this fix's bytes.")
@click.option("--finish", is_flag=True, help="Complete what an interrupted apply or revert in place has begun.")
@output_options
def command(checkpoint: str, probes: tuple[str, ...], finish: bool, quiet: bool, as_json: bool) -> None:
    """List the fixes that CHECKPOINT carries by its ledger, in order."""
    from safepatch_core.fixes.log import log

    found = log(checkpoint, probes, finish=finish)
    if as_json:
        emit(asdict(found))
        return
    if quiet:
        return
    if found.finished is not None:
        click.echo(f"finished: fix {found.finished}")
    for i, entry in enumerate(found.fixes, 1):
        state = f"  under way: {entry['direction']}" if entry["under_way"] else ""
        date = f"  {entry['date']}" if "date" in entry else ""
        click.echo(f"{i}. {entry['id']}{printable(date)}{state}")
    if not found.fixes:
        click.echo("no fixes in the ledger")
    if found.hidden and found.under_way is None:
        click.echo("config.json has not got its name back: --finish gives it")
    elif found.under_way is not None:
        click.echo("the checkpoint can't be loaded until it is done: --finish, or apply or revert it")
    for probe in found.probes:
        counts = f" ({probe.new:,d} of {probe.old + probe.new:,d} entries)" if probe.state == "mixed" else ""
        reason = f": {probe.reason}" if probe.reason else ""
        click.echo(printable(f"{probe.file}: {probe.state}{counts}{reason}"))
