"""The rows of the table: what is done with one run's two patches."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

import safepatch_core
from safepatch_core.backends.cpu import CpuBackend
from safepatch_core.deriving.config import PATCHES
from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.files.reading import TensorEntry

DEFAULTS = "SafePatching, defaults"
STRONG = "SafePatching, scale 4"
SWEPT = "SafePatching, swept"
DENSE = {"top": 1.0, "retain": 1.0, "importance": "magnitude"}

# Every method is a recipe: what is said of the whole, and of each patch (None: the patch is left out).
Method = Mapping[str, Any]
METHODS: dict[str, Method] = {
    "ascent only": {"combine": "sum", "patches": [DENSE, None]},
    "descent only": {"combine": "sum", "patches": [None, DENSE]},
    # The mean of the two task vectors.
    "task arithmetic": {"combine": "sum", "patches": [DENSE | {"scale": 0.5}] * 2},
    # mergekit leaves TIES' density to the user; 0.2 is its paper's (Yadav et al., arXiv 2306.01708).
    "TIES": {"combine": "ties", "patches": [DENSE | {"top": 0.2}] * 2},
    "intersection": {"patches": [{}, {}]},
    "no retention": {"patches": [{"retain": 1.0}] * 2},
    DEFAULTS: {"patches": [{}, {}]},
    # What the sensitivity plots speak for, where the patches are trained with a utility term.
    STRONG: {"patches": [{"scale": 4.0}] * 2},
}


def swept_method(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A method from a trial's parameters, whose keys are those of a sweep: patches.safety.top, scope, …"""
    method: dict[str, Any] = {"patches": [{}, {}]}
    for key, value in parameters.items():
        outer, _, rest = key.partition(".")
        if outer == "patches":
            name, _, field = rest.partition(".")
            for at, patch in enumerate(PATCHES):
                if name in (patch, "*"):
                    method["patches"][at][field] = value
        else:
            method[outer] = value
    return method


def recipe_of(run: Path, method: Method) -> dict[str, Any]:
    """The run's recipe with the method's changes. Paths stay relative to the run."""
    recipe: dict[str, Any] = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe |= {key: value for key, value in method.items() if key != "patches"}
    changed = zip(recipe["patches"], method.get("patches", [{}, {}]), strict=True)
    recipe["patches"] = [patch | change for patch, change in changed if change is not None]
    return recipe


def merge(run: Path, method: Method, out: Path, threads: int | None) -> dict[str, int]:
    """The merged checkpoint in `out`, replacing an older one; entries that each patch moved, by its name."""
    recipe = run / "bench-recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(run, method), sort_keys=False))
    shutil.rmtree(out, ignore_errors=True)
    counts = safepatch_core.merge(recipe, out, backend=CpuBackend(threads or 1)).counts
    return {name: patch["applied"] for name, patch in counts.items()}


def intersection(run: Path, method: Method, out: Path, threads: int | None) -> dict[str, int]:
    """As `merge`, keeping both patches where both rank high, and nothing elsewhere.

    Where only one acts, the sum over the two top sets and their difference give the same bits; where both act, the
    difference leaves the base. So the sum is kept exactly where the two disagree, and the base elsewhere.
    """
    other = out.with_name(out.name + "-difference")
    merge(run, {**method, "combine": "difference"}, other, threads)
    merge(run, {**method, "combine": "sum"}, out, threads)
    base = run / recipe_of(run, method)["base"]
    kept = 0
    places = [open_checkpoint(str(path)).tensors for path in (out, other, base)]
    for name, entry in places[0].items():
        mine, theirs, old = _bits(entry, "r+"), _bits(places[1][name], "r"), _bits(places[2][name], "r")
        both = mine != theirs
        kept += int(both.sum())
        mine[~both] = old[~both]
    shutil.rmtree(other)
    return {"both": kept}


def _bits(entry: TensorEntry, mode: Literal["r", "r+"]) -> NDArray[np.uint32]:
    return np.memmap(entry.path, np.uint32, mode, entry.start, entry.entries)
