"""Merges of like recipes in one process, as a sweep does them.

`python series_steps.py RECIPE FOLDER THREADS`

The recipe by `merge`, as sweeps did it once; then as a series: the recipe, and one each with another scale, top and
combine. Prints JSON: per merge the seconds, wall and processor, until it can be loaded, those of hashing it, which a
sweep does beside the evaluation, and its digest.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safepatch_core.merging.api import merge
from safepatch_core.merging.recipe import Recipe, load_recipe
from safepatch_core.merging.series import Series
from safepatch_core.runs.jobs import files_digest


def like(recipe: Recipe) -> dict[str, Recipe]:
    """Recipes that can share the lists of the first."""

    def changed(**keys: Any) -> Recipe:
        return recipe.model_copy(update={"patches": [p.model_copy(update=keys) for p in recipe.patches]})

    return {
        "first": recipe,
        "scale": changed(scale=2.0),
        "top": changed(top=recipe.patches[-1].top / 2),
        "combine": recipe.model_copy(update={"combine": "sum"}),
    }


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    wall, processor = time.perf_counter(), spent()
    call()
    return time.perf_counter() - wall, spent() - processor


def main(path: str, folder: str, threads: str) -> None:
    recipe, out, found = load_recipe(path), Path(folder), {}
    series = Series(like(recipe).values(), backend="cpu", threads=int(threads))
    calls: dict[str, Callable[[], object]] = {
        "merge": lambda: merge(recipe, out, backend="cpu", threads=int(threads)),
        **{name: partial(series.merge, of, out) for name, of in like(recipe).items()},
    }
    for name, call in calls.items():
        wall, processor = seconds(call)
        begin = time.perf_counter()
        digest = files_digest(out)
        hashing = time.perf_counter() - begin
        found[name] = {"wall_s": wall, "cpu_s": processor, "hash_s": hashing, "digest": digest}
        shutil.rmtree(out)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
