"""`safepatch info`: what a fix changes."""

from __future__ import annotations

from pathlib import Path

import click

from safepatch_core.commands.common import emit, human, output_options
from safepatch_core.errors import printable


@click.command(name="info")
@click.argument("fix", type=click.Path())
@click.option("--tensors", is_flag=True, help="List every tensor instead of layers.")
@click.option("--svg", type=click.Path(), metavar="FILE", help="Draw the share of each layer that changes.")
@click.option("--card", type=click.Path(), metavar="FILE", help="Write a README.md for a repository of the fix.")
@output_options
def command(fix: str, tensors: bool, svg: str | None, card: str | None, quiet: bool, as_json: bool) -> None:
    """What a FIX changes, per layer or tensor."""
    from safepatch_core.files.disk import replacing
    from safepatch_core.fixes.info import as_svg, fix_card, info

    found = info(fix)
    for path, text in ((svg, as_svg), (card, lambda of: fix_card(of, fix))):
        if path is not None:
            with replacing(Path(path), go_on="run it again") as file:
                file.write(text(found))
    rows = found.tensors if tensors else found.layers
    if as_json:
        facts = {"id": found.id, "base": found.base, "recipe": found.recipe, "size": found.size}
        facts |= {"entries": found.total.entries, "changes": found.total.changes}
        shares = {name: {"entries": of.entries, "changes": of.changes} for name, of in rows.items()}
        emit({**facts, "tensors" if tensors else "layers": shares})
    elif not quiet:
        click.echo(f"fix {found.id}, {human(found.size)}")
        width = max(map(len, [*rows, "in all"]))
        for name, of in [*rows.items(), ("in all", found.total)]:
            click.echo(printable(f"{name:{width}}  {of.changes:14,d} of {of.entries:14,d}  {of.share:8.3%}"))
