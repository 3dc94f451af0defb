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


_size = click.option(
    "--size",
    default="full",
    show_default=True,
    type=click.Choice(["full", "half", "quarter", "eighth"]),
    help="How much is measured: all harmful prompts and text, or every second, fourth or eighth.",
)


@click.command(name="psa")
@_options
@click.option(
    "--part",
    "parts",
    multiple=True,
    help="methods, separation, overlap or remembering [default: these]; the first evidence: plain, utility, "
    "sensitivity, rounds.",
)
@_size
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="Of the default parts.")
def command(
    model: str, data: str, out: str, parts: tuple[str, ...], size: str, seeds: int, threads: int | None
) -> None:
    """Whether the patches help MODEL (SmolLM2-135M-Instruct, float32): every method beside the others, whether it
    tells harm better or only refuses more, how much data sets and seeds agree on what matters, rounds that remember.

    What is finished in the output directory is kept, each model is measured once, and tables are told again after
    each; call it again to go on.
    """
    from . import compared, overlap, remembering, report, separation
    from .steps import PARTS, make_backbone, run

    own = {
        "methods": compared.run,
        "separation": separation.run,
        "overlap": overlap.run,
        "remembering": remembering.run,
    }
    unknown = set(parts) - {*own, *PARTS}
    if unknown:
        raise click.BadParameter(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join((*own, *PARTS))}")
    job = _job(model, data, out, threads)
    make_backbone(job)
    for part, does in own.items():
        if part in (parts or own):
            does(job, size, range(seeds))
    first = [part for part in PARTS if part in parts]
    if first:
        report.write(job, run(job, first), job.out / "results")
    click.echo(f"results: {job.out / 'results'}", err=True)


@click.command()
@_options
@_size
def quantised(model: str, data: str, out: str, size: str, threads: int | None) -> None:
    """What is left of the patches in quantised models: in the codes of a twin, or quantised after the merge.

    Takes the directory of `psa` too. Each model is measured once, and the table told again after each; call it again
    to go on.
    """
    from .quantised import run

    job = _job(model, data, out, threads)
    run(job, size)
    click.echo(f"results: {job.out / 'results'}", err=True)
