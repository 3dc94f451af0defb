"""`safepatch merge`: a recipe becomes a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from safepatch_core.commands.common import (
    ByteProgress,
    OutPath,
    emit,
    engine_options,
    output_options,
    streams_option,
    write_options,
)
from safepatch_core.errors import printable

if TYPE_CHECKING:
    from safepatch_core.merging.engine import EngineOptions
    from safepatch_core.merging.quantised.comparison import SurviveResult
    from safepatch_core.merging.recipe import Recipe


@click.command(name="merge")
@click.argument("recipe", type=click.Path())
@click.option("-o", "--output", "out", required=True, type=OutPath(), help="Directory to create.")
@click.option(
    "--survive", "formats", metavar="NAME,…", help="Also tell what later quantisations would leave: see `survive`."
)
@streams_option
@engine_options
@write_options
@output_options
def command(
    recipe: str,
    out: str,
    formats: str | None,
    streams: int | None,
    engine: EngineOptions,
    force: bool,
    resume: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Merge a RECIPE's patches into its base: a new checkpoint. A mergekit configuration is a recipe too."""
    from safepatch_core.commands.common import any_recipe
    from safepatch_core.merging.api import merge
    from safepatch_core.merging.text import codes_line, count_table, survival_lines

    told = any_recipe(recipe, quiet)
    later = None if formats is None else _Later(told, formats, engine)
    at_once = engine.copy()
    at_once["streams"] = streams
    with ByteProgress("merge", quiet) as progress:
        result = merge(told, out, force=force, resume=resume, progress=progress, **at_once)
    survival = None if later is None else later.survive(out, quiet)
    for warning in () if quiet else result.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
    if as_json:
        emit(
            {
                "output": str(result.out),
                "counts": result.counts,
                "acted": result.acted,
                "changed": result.changed,
                "surviving": result.surviving,
                "codes": result.kept,
                "bytes_read": result.bytes_read,
                "bytes_written": result.bytes_written,
                **({} if survival is None else {"survive": survival.facts()}),
            }
        )
    elif not quiet:
        click.echo(count_table(result.counts))
        if result.surviving is not None:
            lost = "; the others' steps are lost in rounding" if result.changed < result.acted else ""
            click.echo(
                f"stored bits changed at {result.changed:,d} of {result.acted:,d} entries that patches act on "
                f"({result.surviving:.1%}){lost}"
            )
        for name, kept in (result.kept or {}).items():
            click.echo(codes_line(name, kept))
        for line in () if survival is None else survival_lines(survival):
            click.echo(printable(line))
        for note in result.notes:
            click.echo(printable(note))
        click.echo(f"written: {printable(result.out)}")


class _Later:
    """What quantisations after the merge leave of it. What is wrong with the request is said before the merge."""

    def __init__(self, recipe: Recipe | str, formats: str, engine: EngineOptions) -> None:
        from safepatch_core.merging.api import plan
        from safepatch_core.merging.quantised.formats import chosen, format_names
        from safepatch_core.merging.survive import require_floats, require_room

        self._recipe, self._formats, self._engine = recipe, format_names(formats), engine
        chosen(self._formats)
        require_room(engine)
        self._base = plan(recipe, **engine).base
        require_floats(self._base)

    def survive(self, out: str, quiet: bool) -> SurviveResult | None:
        """Told by the first rank alone."""
        from safepatch_core.merging.survive import survive
        from safepatch_core.ranks import is_first

        if not is_first():
            return None
        base = self._base.root or self._base.shards[0].path
        with ByteProgress("survive", quiet) as progress:
            return survive(out, base, self._formats, recipe=self._recipe, progress=progress, **self._engine)
