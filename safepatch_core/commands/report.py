"""`safepatch report`: fixes and merges side by side."""

from __future__ import annotations

import click

from safepatch_core.commands.common import ByteProgress, emit, output_options
from safepatch_core.errors import printable


@click.command(name="report")
@click.argument("items", nargs=-1, required=True, type=click.Path(), metavar="A [B]…")
@click.option("-o", "--output", "out", type=click.Path(), help="The HTML page to create: one file, no requests.")
@click.option(
    "--base", type=click.Path(), help="Their base: counts the changed entries of checkpoints, and compares them."
)
@click.option("--force", is_flag=True, help="Replace an existing page.")
@output_options
def command(
    items: tuple[str, ...], out: str | None, base: str | None, force: bool, quiet: bool, as_json: bool
) -> None:
    """What fix files and merged checkpoints change, side by side: shares, overlap, recipes, checksums."""
    from safepatch_core.fixes.report import report

    with ByteProgress("report", quiet) as progress:
        result = report(items, out, base=base, force=force, progress=progress)
    if as_json:
        emit(result.data())
    elif not quiet:
        for item in result.items:
            total = result.total(item)
            what = f"{item.changes:,d} of {total.entries:,d} entries {item.counted} ({total.share:.3%})"
            click.echo(printable(f"{item.name}: {what}, {len(item.tensors)} tensors"))
        for of in result.overlaps:
            click.echo(printable(f"{of.a} and {of.b}: {of.shared:,d} entries in common, IoU {of.iou:.4f}"))
        if out is not None:
            click.echo(printable(f"page written: {out}"))
