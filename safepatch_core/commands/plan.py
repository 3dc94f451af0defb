"""`safepatch plan`: what a merge will do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from safepatch_core.commands.common import emit, engine_options, human, output_options
from safepatch_core.errors import printable

if TYPE_CHECKING:
    from safepatch_core.merging.engine import EngineOptions


@click.command(name="plan")
@click.argument("recipe", type=click.Path())
@click.option("-o", "--output", "out", type=click.Path(), help="Where it would be written, for the free space.")
@click.option("--tensors", is_flag=True, help="Also list every target tensor.")
@engine_options
@output_options
def command(
    recipe: str,
    out: str | None,
    tensors: bool,
    engine: EngineOptions,
    quiet: bool,
    as_json: bool,
) -> None:
    """What a merge of RECIPE will do: bytes, passes, memory, free space. Writes nothing.

    A mergekit configuration is a recipe too.
    """
    from safepatch_core.commands.common import any_recipe
    from safepatch_core.merging.api import describe
    from safepatch_core.merging.api import plan as make

    made = make(any_recipe(recipe, quiet), **engine)
    data = describe(made, out or ".")
    if not tensors:
        data.pop("tensors")
    if as_json:
        emit(data)
        return
    if quiet:
        return
    for warning in made.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
    rows = [
        ("engine", data["engine"]),
        ("patches", ", ".join(f"{p['name']} ({p['kind']})" for p in data["patches"])),
        ("targets", f"{data['targets']} of {data['base_tensors']} tensors, {data['target_entries']:,d} entries"),
        ("read", f"{human(data['bytes_read'])} in {data['passes']} pass(es)"),
        ("write", f"{human(data['bytes_written'])} in {data['files']} file(s)"),
        ("memory", f"{human(data['memory'])} of buffers (limit {human(data['memory_limit'])})"),
        ("in chunks", f"{data['chunked']} target(s)"),
        ("free space", human(data["free_space"])),
        ("time", "unknown: `safepatch bench floor --save` measures this machine's rates"),
    ]
    if data["seconds"] is not None:
        rows[-1] = ("time", f"about {data['seconds']:.1f} s, inputs not in the page cache")
    rows += [("note", note) for note in made.notes]
    for key, value in rows:
        click.echo(f"{key + ':':12} {printable(value)}")
    if tensors:
        click.echo(f"\n{'dtype':5} {'entries':>14} {'passes':>6}  {'k per patch':24} tensor")
        for row in data["tensors"]:
            quotas = ", ".join("-" if k is None else f"{k:,d}" for k in row["quotas"])
            click.echo(
                f"{row['dtype']:5} {row['entries']:14,d} {row['passes']:6d}  {quotas:24} {printable(row['name'])}"
            )
