"""RUN/curves.png: the two trainings as their traces tell them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

COLOURS = {"safety": "tab:blue", "over-safety": "tab:orange"}


class Curves(NamedTuple):
    """What is drawn: the traces by patch, and the NLLs that mark a level, by what they are of."""

    traces: Mapping[str, Path]
    levels: Mapping[str, float | None]


def draw(curves: Curves, figure: Any) -> bool:
    """Answer NLL and gradient norm over the optimiser steps."""
    figure.set_size_inches(8, 3.4)
    left, right = figure.subplots(1, 2)
    for name, trace in curves.traces.items():
        records = [json.loads(line) for line in trace.read_text("utf-8").splitlines()]
        colour = COLOURS.get(name)
        left.plot(*_series(records, "nll"), color=colour, label=name)
        if any("utility_nll" in record for record in records):
            left.plot(*_series(records, "utility_nll"), color=colour, linestyle=":", label=f"{name}: utility rows")
        right.plot(*_series(records, "grad_norm"), color=colour, label=name)
    for text, value in curves.levels.items():
        if value is not None:
            left.axhline(value, color="grey", linewidth=0.8, linestyle="--" if text == "ascent bound" else "-.")
            left.annotate(text, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    left.set_ylabel("answer NLL (nats per token)")
    right.set_ylabel("gradient norm, unclipped")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("optimiser step")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    return True


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have the key."""
    found = [record for record in records if key in record]
    return [record["step"] for record in found], [record[key] for record in found]
