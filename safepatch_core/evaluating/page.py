"""A report.json as one HTML file that asks for nothing else: no script, no request, every answer escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safepatch_core.evaluating import text
from safepatch_core.evaluating.plots import layer_shares, relearning, trade_off
from safepatch_core.pages import document, shown
from safepatch_core.pictures import can_draw

TEMPLATE = Path(__file__).with_name("page.html")


def page(report: text.Report, rows: Sequence[Mapping[str, Any]]) -> str:
    """The content of report.html; without matplotlib it has no plots."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = shown
    drawn = can_draw()
    names = ", ".join(report["models"][label]["name"] for label in text.labels(report))
    body = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        report=report,
        models=report["models"],
        names=names,
        roles=text.roles(report),
        metrics=[_entry(report, metric, metric) for metric in report["metrics"]],
        categories=[
            (text.title(metric), [_entry(report, metric, of) for of in metric["categories"]])
            for metric in report["metrics"]
            if "categories" in metric
        ],
        coherence=[_entry(report, metric, metric) for metric in report["coherence"]],
        about_coherence=text.about_coherence(report),
        relearning=[
            (f"{text.title(metric)}, by steps", [_entry(report, metric, of) for of in text.by_steps(metric)])
            for of in report["relearning"]
            for metric in of["metrics"]
        ],
        about_relearning=text.about_relearning(report) if report["relearning"] else "",
        relearned=text.relearned(report),
        relearning_plots=relearning(report) if drawn else [],
        drawn=drawn,
        planes=trade_off(report) if drawn else [],
        survival=text.survival(report) + text.later(report),
        layers=layer_shares(report) if drawn else [],
        samples=text.samples(report, rows),
        verdict=text.verdict,
        about_judge=text.about_judge(report),
        accuracy=text.accuracy(report),
        intervals=text.INTERVALS + (f" {text.OF_TASKS}" if "lm_eval" in report["data"] else ""),
        facts={name: _plain(about) for name, about in report["data"].items()},
        settings=_plain(report["settings"]),
    )
    return document(f"Evaluation of {names}", body)


def _entry(report: text.Report, metric: Mapping[str, Any], of: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table: what it is called, and a cell per model."""
    cells: dict[str, dict[str, Any]] = {}
    for label in report["models"]:
        if label not in of:  # a model that says nothing
            cells[label] = {"value": "–", "interval": "", "share": None, "change": None}
            continue
        value, interval = _signed({**metric, **of}, label)
        share = of[label]["value"] if metric["unit"] == "rate" else None
        cells[label] = {"value": value, "interval": interval, "share": share, "change": None}
        change = of.get(text.difference_of(label)) if label != "baseline" else None
        if change is not None:
            by, between = _signed({**metric, **of}, text.difference_of(label))
            p = change.get("mcnemar_p")
            cells[label]["change"] = {
                "value": by,
                "interval": between,
                "p": "" if p is None else f"p = {p:.2g}",
                "call": _call(change["interval"], metric["better"]),
            }
    name = {"title": of["category"]} if "category" in of else {"title": of["title"]}
    return {**name, "better": metric["better"], "n": of["n"], "cells": cells}


def _signed(metric: Mapping[str, Any], key: str) -> tuple[str, str]:
    """A value and its interval, with a true minus sign."""
    value, _, interval = text.cell(metric, key).replace("-", "\N{MINUS SIGN}").partition(" ")
    return value, interval


def _call(interval: Sequence[float] | None, better: str) -> str:
    """Whether a change's interval lies on one side of zero, and on which."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "unclear"
    return "better" if (interval[0] > 0) == (better == "higher") else "worse"


def _plain(about: Mapping[str, Any]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
