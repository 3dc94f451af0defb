"""`safepatch verify`: is a checkpoint what it says it is?"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from safepatch_core.commands.common import any_recipe, emit, engine_options, output_options
from safepatch_core.errors import printable

if TYPE_CHECKING:
    from safepatch_core.merging.engine import EngineOptions


@click.command(name="verify")
@click.argument("out", type=click.Path())
@click.option("--recipe", type=click.Path(), help="Also recompute every byte from this recipe and compare.")
@click.option("--base", type=click.Path(), help="OUT is a fix: also check it on this checkpoint.")
@engine_options
@output_options
def command(
    out: str,
    recipe: str | None,
    base: str | None,
    engine: EngineOptions,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check a merged checkpoint, by checksums, and with a recipe every byte; or a fix file, and its base."""
    from safepatch_core.merging.verification import verify as run

    if base is not None or os.path.isfile(out):
        _verify_fix(out, base, quiet, as_json)
        return
    verdict = run(out, recipe and any_recipe(recipe, quiet), **engine)
    if as_json:
        emit(
            {
                "ok": verdict.ok,
                "files": verdict.files,
                "tensors": verdict.tensors,
                "recomputed": verdict.recomputed,
                "problems": verdict.problems,
                "warnings": verdict.warnings,
            }
        )
    elif verdict.ok and not quiet:
        for warning in verdict.warnings:
            click.echo(f"warning: {printable(warning)}", err=True)
        how = "recomputed from the recipe, all equal" if verdict.recomputed else "checksums match"
        click.echo(f"ok: {verdict.files} files, {verdict.tensors} tensors, {how}")
    if not verdict.ok:
        if not as_json:
            for problem in verdict.problems:
                click.echo(printable(problem), err=True)
        sys.exit(65)


def _verify_fix(fix: str, base: str | None, quiet: bool, as_json: bool) -> None:
    from safepatch_core.fixes.info import verify_fix

    verdict = verify_fix(fix, base)
    if as_json:
        names = ("ok", "tensors", "changes", "state", "problems")
        emit({name: getattr(verdict, name) for name in names})
    elif verdict.ok and not quiet:
        state = "" if verdict.state is None else f", {verdict.state} by the base"
        click.echo(f"ok: {verdict.changes:,d} entries of {verdict.tensors} tensors{state}")
    if not verdict.ok:
        if not as_json:
            for problem in verdict.problems:
                click.echo(printable(problem), err=True)
        sys.exit(65)
