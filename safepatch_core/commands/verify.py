"""`safepatch verify`: is a checkpoint what it says it is?"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from safepatch_core.commands.common import emit, engine_options, output_options
from safepatch_core.errors import printable

if TYPE_CHECKING:
    from safepatch_core.merging.engine import EngineOptions


@click.command(name="verify")
@click.argument("out", type=click.Path())
@click.option("--recipe", type=click.Path(), help="Also recompute every byte from this recipe and compare.")
@engine_options
@output_options
def command(
    out: str,
    recipe: str | None,
    engine: EngineOptions,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check a merged checkpoint: checksums, and with a recipe every byte."""
    from safepatch_core.merging.verification import verify as run

    verdict = run(
        out,
        recipe,
        **engine,
    )
    if as_json:
        emit(
            {
                "ok": verdict.ok,
                "files": verdict.files,
                "tensors": verdict.tensors,
                "recomputed": verdict.recomputed,
                "problems": verdict.problems,
            }
        )
    elif verdict.ok and not quiet:
        how = "recomputed from the recipe, all equal" if verdict.recomputed else "checksums match"
        click.echo(f"ok: {verdict.files} files, {verdict.tensors} tensors, {how}")
    if not verdict.ok:
        if not as_json:
            for problem in verdict.problems:
                click.echo(printable(problem), err=True)
        sys.exit(65)
