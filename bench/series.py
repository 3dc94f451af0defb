"""Candidates of a sweep: what the second costs that differs from the first in scale, top or combine alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safepatch_core.merging.api import merge
from safepatch_core.merging.recipe import load_recipe
from safepatch_core.merging.series import Series
from safepatch_core.runs.jobs import files_digest, weights_digest

from . import models
from .measure import Red, alternate, prepared, run
from .merges import inputs, output_bytes
from .models import SHAPES
from .peers import PYTHON
from .registry import Bench, Case, Measured
from .series_steps import like

STEPS = Path(__file__).resolve().parent / "series_steps.py"
NAMES = ("SmolLM2-135M", "1.1B")
SUBJECTS = ("merge", "first", "scale", "top", "combine")


def equals_merges(bench: Bench) -> None:
    """The gate: every candidate has the weights that `merge` gives it alone."""
    recipe = load_recipe(models.recipe_path(bench.models(SHAPES["tiny"])))
    recipes = like(recipe)
    series = Series(recipes.values(), backend="cpu", threads=bench.threads)
    for name, of in recipes.items():
        with bench.scratch() as scratch:
            series.merge(of, scratch / "series")
            merge(of, scratch / "alone", backend="cpu", threads=bench.threads)
            if files_digest(scratch / "series") != weights_digest(scratch / "alone"):
                raise Red(f"the candidate '{name}' differs from its merge alone")


def subjects(bench: Bench, recipe: Path, out: Path) -> dict[str, Callable[[], dict[str, float]]]:
    """One process per round: the first subject starts it, the others tell what it found."""
    found: dict[str, Any] = {}
    digests: dict[str, str] = {}

    def measured(name: str) -> dict[str, float]:
        if name == SUBJECTS[0]:
            found.update(json.loads(run([*PYTHON, STEPS, recipe, out, str(bench.threads)], timeout=bench.timeout)[1]))
        costs = dict(found[name])
        digest = costs.pop("digest")
        if digests.setdefault(name, digest) != digest:
            raise Red(f"'{name}': two merges of it wrote different bytes")
        return costs

    return {name: partial(measured, name) for name in SUBJECTS}


def _measure(shape: str, bench: Bench) -> Measured:
    folder = bench.models(SHAPES[shape])
    files, written = inputs(folder, "checkpoint"), output_bytes(folder)
    with bench.scratch() as scratch, prepared(files, "warm", 2 * written) as before:
        of = subjects(bench, models.recipe_path(folder), scratch / "out")
        series = alternate(of, bench.rounds, before)
    ratios = [(name, "first") for name in SUBJECTS[2:]] + [("first", "merge"), ("scale", "merge")]
    return Measured(series, ratios, {"entries": SHAPES[shape].entries})


def cases() -> list[Case]:
    """Cases of the group `sweep`."""
    return [
        Case(
            f"sweep/{shape}/candidates/warm",
            f"candidates of a sweep of {shape} that share their lists, beside the first, warm inputs",
            {"shape": shape, "entries": SHAPES[shape].entries},
            equals_merges,
            partial(_measure, shape),
            short=shape == NAMES[0],
        )
        for shape in NAMES
    ]
