"""RUN/curves.png: the two trainings as their traces tell them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

COLOURS = {"safety": "tab:blue", "over-safety": "tab:orange"}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(traces: Mapping[str, Path], nlls: Mapping[str, float], bound: float | None, file: BinaryIO) -> None:
    """Draws answer NLL and gradient norm over the optimiser steps of the patches whose traces are given, as PNG.

    `nlls` are the record's, of which the backbone's is drawn; `bound` is the ascent bound. The same traces give the
    same bytes (same versions of matplotlib and its fonts).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, trace in traces.items():
        records = [json.loads(line) for line in trace.read_text("utf-8").splitlines()]
        colour = COLOURS.get(name)
        left.plot(*_series(records, "nll"), color=colour, label=name)
        if any("utility_nll" in record for record in records):
            left.plot(*_series(records, "utility_nll"), color=colour, linestyle=":", label=f"{name}: utility rows")
        right.plot(*_series(records, "grad_norm"), color=colour, label=name)
    for value, text in ((nlls.get("backbone"), "backbone"), (bound, "ascent bound")):
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
    # The name of the program is the only entry that tells one matplotlib from another.
    figure.savefig(file, format="png", metadata={"Software": None})


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have the key."""
    found = [record for record in records if key in record]
    return [record["step"] for record in found], [record[key] for record in found]
