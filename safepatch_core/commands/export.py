"""`safepatch export`: a fix in another tool's format."""

from __future__ import annotations

import click

from safepatch_core.commands.common import OutPath, emit, output_options
from safepatch_core.errors import printable


@click.command(name="export")
@click.argument("fix", type=click.Path())
@click.option("--to", "form", required=True, type=click.Choice(["dense", "shira", "slime"]), help="The format.")
@click.option("--base", type=click.Path(), help="What the fix applies to [default: the base of its recipe].")
@click.option("-o", "--output", "out", required=True, type=OutPath(), help="Directory to create.")
@click.option("--version", type=click.IntRange(min=1), default=1, show_default=True, help="Of slime's deltas.")
@click.option("--force", is_flag=True, help="Replace an existing output, in one step.")
@output_options
def command(
    fix: str, form: str, base: str | None, out: str, version: int, force: bool, quiet: bool, as_json: bool
) -> None:
    """Write a FIX as a whole checkpoint (dense), PEFT's adapter (shira) or a server's byte deltas (slime)."""
    from safepatch_core.fixes.export import export

    result = export(fix, form, base, out, version=version, force=force)  # type: ignore[arg-type]
    if as_json:
        emit({"output": str(result.out), "format": result.format, "id": result.id, "tensors": result.tensors})
    elif not quiet:
        click.echo(f"fix {result.id} written as {result.format}: {printable(result.out)}")
