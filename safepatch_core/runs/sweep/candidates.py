"""Which recipes a sweep tries, in which order: plain data in, plain data out."""

from __future__ import annotations

import copy
import itertools
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safepatch_core.errors import UsageError
from safepatch_core.runs.sweep.config import SweepConfig

FIXED = ("base", "patches", "name")
PATHS = ("scores", "gradients")
# So many draws in a row that bring nothing new end a random search: its values are used up.
REPEATS = 1000

Parameters = dict[str, Any]


def candidates(config: SweepConfig) -> Iterator[Parameters]:
    """The parameters of trial 0, 1, …, each once; the first n are the same for every number of trials.

    A grid goes through the product of the values, the last parameter fastest. Random search draws every parameter
    independently and leaves out what it has drawn before.
    """
    if config.method == "grid":
        every = (p.values or [] for p in config.parameters.values())
        found: Iterator[Parameters] = (
            dict(zip(config.parameters, values, strict=True)) for values in itertools.product(*every)
        )
    else:
        found = _drawn(config)
    return itertools.islice(found, config.trials)


def _drawn(config: SweepConfig) -> Iterator[Parameters]:
    source = random.Random(config.seed)
    seen: set[str] = set()
    repeats = 0
    while repeats < REPEATS:
        parameters = {key: parameter.at(source.random()) for key, parameter in config.parameters.items()}
        text = repr(parameters)
        repeats = repeats + 1 if text in seen else 0
        if not repeats:
            seen.add(text)
            yield parameters


def with_parameters(recipe: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's data with some keys replaced. Raises UsageError for a key that no sweep can set."""
    data = copy.deepcopy(dict(recipe))
    for key, value in parameters.items():
        for place, field in _places(data, key):
            place[field] = copy.deepcopy(value)
    return data


def _places(data: dict[str, Any], key: str) -> list[tuple[dict[str, Any], str]]:
    outer, *inner = key.split(".")
    places: list[tuple[dict[str, Any], str]] = []
    if not inner:
        places = [(data, outer)]
    elif outer == "patches" and len(inner) == 2:
        patches = [patch for patch in data["patches"] if inner[0] in ("*", patch["name"])]
        if not patches:
            names = ", ".join(patch["name"] for patch in data["patches"])
            raise UsageError(f"parameter '{key}' names no patch of the recipe", expected=names)
        places = [(patch, inner[1]) for patch in patches]
    if not places or places[0][1] in FIXED:
        raise UsageError(
            f"parameter '{key}' can't be swept", expected="a key of the recipe like scope or patches.NAME.top"
        )
    return places


def relocated(recipe: Mapping[str, Any], origin: Path, folder: Path) -> dict[str, Any]:
    """The recipe's data with relative paths that led from `origin` leading from `folder`; hub ids stay."""

    def moved(text: str) -> str:
        if os.path.isabs(text) or not os.path.lexists(origin / text):
            return text
        return os.path.relpath(os.path.realpath(origin / text), os.path.realpath(folder))

    data = copy.deepcopy(dict(recipe))
    data["base"] = moved(data["base"])
    for patch in data["patches"]:
        patch["source"] = moved(patch["source"])
        importance = patch.get("importance")
        if isinstance(importance, dict):
            patch["importance"] = {k: moved(v) if k in PATHS else v for k, v in importance.items()}
    return data
