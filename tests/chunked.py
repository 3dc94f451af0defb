"""The command line, with larger targets cut into chunks of so many entries: `python -m tests.chunked N merge …`."""

from __future__ import annotations

import sys
from typing import Any

from safepatch_core.backends.contract import Backend
from safepatch_core.commands import cli
from safepatch_core.merging import api, plan
from safepatch_core.merging.recipe import Recipe


def cut_into(entries: int) -> None:
    """All merges of this process from now on."""

    def make_plan(recipe: Recipe, engine: Backend, limit: int | None = None, **_: Any) -> plan.Plan:
        return plan.make_plan(recipe, engine, limit, chunk_entries=entries)

    vars(api)["make_plan"] = make_plan


if __name__ == "__main__":
    cut_into(int(sys.argv.pop(1)))
    cli.main()
