"""`safepatch plan`: what a merge will do, or a fix that is applied or taken out."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from safepatch_core.commands.common import any_recipe, emit, engine_options, human, output_options, streams_option
from safepatch_core.errors import UsageError, printable

if TYPE_CHECKING:
    from safepatch_core.merging.engine import EngineOptions


@click.command(name="plan")
@click.argument("recipe", metavar="RECIPE|FIX", type=click.Path())
@click.option("--to", type=click.Path(), help="Of a fix: the checkpoint that it would be applied to,")
@click.option("--from", "from_", type=click.Path(), help="or taken out of.")
@click.option("--in-place", is_flag=True, help="Of a fix: without a copy.")
@click.option("-o", "--output", "out", type=click.Path(), help="Where it would be written, for the free space.")
@click.option("--tensors", is_flag=True, help="Also list every target tensor.")
@click.option(
    "--cosines", is_flag=True, help="Also the cosine of every two patches' changes, per target; reads them all."
)
@streams_option
@engine_options
@output_options
def command(
    recipe: str,
    to: str | None,
    from_: str | None,
    in_place: bool,
    out: str | None,
    tensors: bool,
    cosines: bool,
    streams: int | None,
    engine: EngineOptions,
    quiet: bool,
    as_json: bool,
) -> None:
    """What a merge of RECIPE will do, or applying a FIX `--to` a checkpoint: bytes, memory, space. Writes nothing.

    A mergekit configuration is a recipe too.
    """
    if to is not None or from_ is not None:
        if (to is None) == (from_ is None):
            raise UsageError("either --to or --from")
        _tell_fix(recipe, to, from_, out, in_place, engine, quiet, as_json)
    elif in_place or is_fix(recipe):
        raise UsageError("a fix is planned for a checkpoint", expected="--to, or --from to take it out")
    else:
        engine["streams"] = streams
        _tell_recipe(recipe, out, tensors, cosines, engine, quiet, as_json)


def is_fix(path: str) -> bool:
    """Whether a path is called as fix files are, and no recipe is."""
    return path.endswith(".safetensors")


def _tell_fix(
    fix: str,
    to: str | None,
    from_: str | None,
    out: str | None,
    in_place: bool,
    engine: EngineOptions,
    quiet: bool,
    as_json: bool,
) -> None:
    from safepatch_core.fixes.apply import opened
    from safepatch_core.fixes.plan import plan_fix

    checkpoint = to or from_ or ""
    with opened(fix, checkpoint, engine.get("memory_limit")) as it:
        made = plan_fix(it, checkpoint, "apply" if to else "revert", out, in_place=in_place)
    if as_json:
        emit(asdict(made))
    elif not quiet:
        how = ("in place" if in_place else "as a copy") + (
            ", goes on with an interrupted run" if made.goes_on else ""
        )
        _table(
            [
                ("fix", f"{made.id}, {made.direction} {how}"),
                ("changes", f"{made.changes:,d} of {made.entries:,d} entries of {made.tensors} tensors"),
                ("read", human(made.bytes_read)),
                ("write", f"{human(made.bytes_written)} in {made.files} file(s)"),
                ("memory", f"about {human(made.memory)}"),
                ("space", f"{human(made.space)} needed, {human(made.free)} free"),
            ]
        )


def _table(rows: list[tuple[str, str]]) -> None:
    for key, value in rows:
        click.echo(f"{key + ':':12} {printable(value)}")


def _tell_recipe(
    recipe: str,
    out: str | None,
    tensors: bool,
    cosines: bool,
    engine: EngineOptions,
    quiet: bool,
    as_json: bool,
) -> None:
    from safepatch_core.files.parsing import uncollected
    from safepatch_core.fixes.expected import expected_fix
    from safepatch_core.merging.api import cosines as all_cosines
    from safepatch_core.merging.api import describe
    from safepatch_core.merging.api import plan as make

    with uncollected():
        made = make(any_recipe(recipe, quiet), **engine)
        if cosines and len(made.patch_names) < 2:
            raise UsageError("--cosines are of two patches", found="one")
        fix = expected_fix(made)
        data = {**describe(made, out or ".", tensors=tensors), "fix": asdict(fix)}
    if cosines:
        data["cosines"] = all_cosines(made)
    if as_json:
        emit(data)
        return
    if quiet:
        return
    for warning in made.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
    most = "at most " if data["bytes_read_at_most"] else ""
    rows = [
        ("engine", data["engine"]),
        ("patches", ", ".join(f"{p['name']} ({p['kind']})" for p in data["patches"])),
        ("targets", f"{data['targets']} of {data['base_tensors']} tensors, {data['target_entries']:,d} entries"),
        ("read", f"{most}{human(data['bytes_read'])} in {data['passes']} pass(es)"),
        ("write", f"{human(data['bytes_written'])} in {data['files']} file(s)"),
        ("memory", f"{human(data['memory'])} of buffers (limit {human(data['memory_limit'])})"),
        ("at once", f"{data['streams']} file(s)"),
        ("as a fix", f"at most {fix.changes:,d} entries, then about {human(fix.size)} (`safepatch build`)"),
        ("in chunks", f"{data['chunked']} target(s)"),
        ("free space", human(data["free_space"])),
        ("time", "unknown: `safepatch bench floor --save` measures this machine's rates"),
    ]
    if data["seconds"] is not None:
        rows[-1] = ("time", f"{most}about {data['seconds']:.1f} s, inputs not in the page cache")
    rows += [("note", note) for note in made.notes]
    _table(rows)
    if tensors:
        click.echo(f"\n{'dtype':5} {'entries':>14} {'passes':>6}  {'k per patch':24} tensor")
        for row in data["tensors"]:
            quotas = ", ".join("-" if k is None else f"{k:,d}" for k in row["quotas"])
            click.echo(
                f"{row['dtype']:5} {row['entries']:14,d} {row['passes']:6d}  {quotas:24} {printable(row['name'])}"
            )
    if cosines:
        _tell_cosines(data["cosines"])


def _tell_cosines(cosines: dict[str, dict[str, float]]) -> None:
    """A column for every two patches, a row for each target."""
    pairs = list(cosines)
    click.echo("\n" + "".join(f"{pair:>{max(9, len(pair))}}  " for pair in pairs) + "tensor")
    for name in cosines[pairs[0]]:
        row = "".join(f"{cosines[pair][name]:{max(9, len(pair))}.4f}  " for pair in pairs)
        click.echo(row + printable(name))
