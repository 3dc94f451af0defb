"""`safepatch survive`: what a later quantisation leaves of a merge."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from safepatch_core.commands.common import ByteProgress, any_recipe, emit, engine_options, output_options
from safepatch_core.errors import printable

if TYPE_CHECKING:
    from safepatch_core.merging.engine import EngineOptions


@click.command(name="survive")
@click.argument("out", type=click.Path())
@click.option("--base", required=True, type=click.Path(), help="What OUT was merged from.")
@click.option(
    "--formats",
    metavar="NAME,…",
    help="Of fp8-block, fp8-channel, int8-channel, int4-g128, int4-g32, mxfp4, nvfp4 [default: all].",
)
@click.option("--recipe", type=click.Path(), help="What OUT was merged with, to tell its patches apart.")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@engine_options
@output_options
def command(
    out: str,
    base: str,
    formats: str | None,
    recipe: str | None,
    tensors: bool,
    engine: EngineOptions,
    quiet: bool,
    as_json: bool,
) -> None:
    """What quantising OUT, a merge of floats, would leave of the patches that BASE hasn't got.

    Both are quantised by the rules of compressed-tensors, to the nearest code. Survival is the share of the change
    that is left along its own direction: 1 all, 0 nothing. A small cosine says that rounding noise drowns it.
    """
    from safepatch_core.merging.quantised.formats import format_names
    from safepatch_core.merging.survive import survive
    from safepatch_core.merging.text import survival_lines

    with ByteProgress("survive", quiet) as progress:
        told = None if recipe is None else any_recipe(recipe, quiet)
        found = survive(out, base, format_names(formats), recipe=told, progress=progress, **engine)
    if as_json:
        emit(found.facts())
    elif not quiet:
        for line in survival_lines(found, tensors=tensors):
            click.echo(printable(line))
