"""`safepatch import`: a mergekit configuration becomes a recipe."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="import")
@click.argument("config", type=click.Path())
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Recipe to write [default: stdout].")
def command(config: str, out: Path | None) -> None:
    """A mergekit CONFIG as a recipe, and what holds between the two merges."""
    import yaml

    from safepatch_core.errors import OutputError
    from safepatch_core.integrations.mergekit import read_mergekit

    recipe, promise = read_mergekit(config)
    text = f"# From {Path(config).name}: {promise}.\n" + yaml.safe_dump(recipe, sort_keys=False)
    if out is None:
        click.echo(text, nl=False)
    else:
        try:
            with out.open("x") as file:
                file.write(text)
        except OSError as error:
            raise OutputError("the recipe can't be created", file=out, found=error.strerror) from None
    click.echo(f"{Path(config).name}: {promise}", err=True)
