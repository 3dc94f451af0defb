"""The command line, with larger targets cut into chunks of so many entries: `python -m tests.chunked N merge …`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

from safepatch_core import MergeResult
from safepatch_core.backends.contract import Backend
from safepatch_core.commands import cli
from safepatch_core.merging import api, plan
from safepatch_core.merging.engine import EngineOptions, open_engine
from safepatch_core.merging.recipe import Recipe, load_recipe


def cut_into(entries: int) -> None:
    """All merges of this process from now on."""

    def make_plan(recipe: Recipe, engine: Backend, limit: int | None = None, **_: Any) -> plan.Plan:
        return plan.make_plan(recipe, engine, limit, chunk_entries=entries)

    vars(api)["make_plan"] = make_plan


def merge_chunked(recipe: Path, out: Path, chunk: int | None, **options: Any) -> MergeResult:
    """`merge`, with targets of more than `chunk` entries cut up; `options` go to the engine or the merge."""
    of = {name: options.pop(name) for name in EngineOptions.__annotations__.keys() & options.keys()}
    engine, limit = open_engine(cast(EngineOptions, of))
    return api.merge(plan.make_plan(load_recipe(recipe), engine, limit, chunk_entries=chunk), out, **options)


if __name__ == "__main__":
    cut_into(int(sys.argv.pop(1)))
    cli.main()
