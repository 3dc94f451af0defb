"""`safepatch bench psa`: the evidence from the command line."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="psa")
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False), help="Folder of the corpora.")
@click.option("-o", "--output", "out", required=True, type=click.Path(), help="Directory to work in; it is kept.")
@click.option("--part", "parts", multiple=True, help="plain, utility, sensitivity or rounds [default: all].")
@click.option("--threads", type=click.IntRange(min=1), help="Of torch and of merges [default: their own choice].")
def command(model: str, data: str, out: str, parts: tuple[str, ...], threads: int | None) -> None:
    """Whether the patches help MODEL (SmolLM2-135M-Instruct, float32): the table, sensitivity, continual rounds.

    What is finished in the output directory is kept; call it again to go on.
    """
    from . import report
    from .data import Corpora
    from .steps import PARTS, Evidence, run

    unknown = set(parts) - set(PARTS)
    if unknown:
        raise click.BadParameter(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    job = Evidence(model, Corpora(Path(data)), Path(out), threads, lambda text: click.echo(text, err=True))
    report.write(job, run(job, parts or PARTS), job.out / "results")
    click.echo(f"results: {job.out / 'results'}", err=True)
