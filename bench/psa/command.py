"""`safepatch bench psa` and `safepatch bench quantised`: the evidence from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from .steps import Evidence

F = TypeVar("F", bound=Callable[..., Any])


def _options(function: F) -> F:
    """What both commands are given."""
    folder = click.Path(exists=True, file_okay=False)
    options = (
        click.argument("model", type=folder),
        click.option("--data", required=True, type=folder, help="Folder of the corpora."),
        click.option(
            *("-o", "--output", "out"), required=True, type=click.Path(), help="Directory to work in; it is kept."
        ),
        click.option(
            "--threads", type=click.IntRange(min=1), help="Of torch and of merges [default: their own choice]."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def _job(model: str, data: str, out: str, threads: int | None) -> Evidence:
    from .data import Corpora
    from .steps import Evidence

    Path(out).mkdir(parents=True, exist_ok=True)
    return Evidence(model, Corpora(Path(data)), Path(out), threads, lambda text: click.echo(text, err=True))


@click.command(name="psa")
@_options
@click.option("--part", "parts", multiple=True, help="plain, utility, sensitivity or rounds [default: all].")
def command(model: str, data: str, out: str, parts: tuple[str, ...], threads: int | None) -> None:
    """Whether the patches help MODEL (SmolLM2-135M-Instruct, float32): the table, sensitivity, continual rounds.

    What is finished in the output directory is kept; call it again to go on.
    """
    from . import report
    from .steps import PARTS, run

    unknown = set(parts) - set(PARTS)
    if unknown:
        raise click.BadParameter(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    job = _job(model, data, out, threads)
    report.write(job, run(job, parts or PARTS), job.out / "results")
    click.echo(f"results: {job.out / 'results'}", err=True)


@click.command()
@_options
@click.option(
    "--size",
    default="full",
    show_default=True,
    type=click.Choice(["full", "half", "quarter"]),
    help="How much is measured: all harmful prompts and text, or every second or fourth.",
)
def quantised(model: str, data: str, out: str, size: str, threads: int | None) -> None:
    """What is left of the patches in quantised models: in the codes of a twin, or quantised after the merge.

    Takes the directory of `psa` too. Each model is measured once, and the table told again after each; call it again
    to go on.
    """
    from .quantised import run

    job = _job(model, data, out, threads)
    run(job, size)
    click.echo(f"results: {job.out / 'results'}", err=True)
