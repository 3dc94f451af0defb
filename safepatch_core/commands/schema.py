"""`safepatch schema`: what a recipe may say, for editors and validators."""

from __future__ import annotations

import click

from safepatch_core.commands.common import emit


@click.command(name="schema")
def command() -> None:
    """The JSON Schema of recipes. In an editor: `# yaml-language-server: $schema=recipe.schema.json`."""
    from safepatch_core.merging.keys import described_schema

    emit(described_schema())
