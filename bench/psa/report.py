"""From the reports of the table's evaluations to one table: means over the seeds, with their range."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safepatch_core.pictures import name_points, picture

from .measures import COLUMNS as ALL_COLUMNS
from .steps import ANSWERED_BY, BACKBONE, PLAIN, VARIED, WITH_UTILITY, Evidence

Data = Mapping[str, Any]
# What these tables show of report.json.
COLUMNS = {
    name: ALL_COLUMNS[name]
    for name in (
        *("harmful_compliance", "harmful_compliance.sst", "over_refusal", "answer_nll", "perplexity"),
        *("lm_eval.psa_knowledge.acc", "lm_eval.psa_continuation.acc"),
    )
}
VARIANTS = {PLAIN: "patches as published", WITH_UTILITY: "with a utility term"}


def collect(report: Data, models: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Method → metric → mean, range and the seeds' own values, from one report.json.

    A method is better (or worse) in a seed if the 95% interval of the paired change from the backbone leaves out 0.
    """
    labels = [label for label in report["models"] if label != "baseline"]
    metrics = {metric["name"]: metric for metric in report["metrics"] if metric["name"] in COLUMNS}
    found: dict[str, Any] = {
        BACKBONE: {
            name: {"mean": m["baseline"]["value"], **m["baseline"], "n": m["n"]} for name, m in metrics.items()
        }
    }
    for (method, seed), label in zip(models, labels, strict=True):
        for name, metric in metrics.items():
            change = metric[f"difference{label.removeprefix('model')}"]
            of = {"seed": seed, **metric[label], "change": change}
            found.setdefault(method, {}).setdefault(name, {"seeds": []})["seeds"].append(of)
    for row in found.values():
        for name, of in row.items():
            if "seeds" in of:
                of |= over_seeds(of["seeds"], metrics[name]["better"])
    return found


def over_seeds(seeds: Sequence[Data], better: str) -> dict[str, Any]:
    """Mean and range of a metric's values, and in how many seeds its change is clear of none, for better or worse."""
    values = [seed["value"] for seed in seeds]
    sign = 1 if better == "higher" else -1
    ends = [sorted(sign * end for end in seed["change"]["interval"] or [0, 0]) for seed in seeds]
    return {
        "seeds": list(seeds),
        "mean": sum(values) / len(values),
        "range": [min(values), max(values)],
        "better": sum(low > 0 for low, _ in ends),
        "worse": sum(high < 0 for _, high in ends),
    }


def markdown(tables: Mapping[str, Data]) -> str:
    """Every variant's table: mean over seeds, range in brackets, arrows where most seeds differ from the backbone."""
    parts = []
    for variant, table in tables.items():
        columns = [name for name in COLUMNS if name in table[BACKBONE]]
        rows = [["", *(COLUMNS[name][0] for name in columns)]]
        rows.append(["---"] * len(rows[0]))
        for method, of in table.items():
            rows.append([method, *(cell(COLUMNS[name][1], of[name]) for name in columns)])
        lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(f"### {VARIANTS[variant].capitalize()}\n\n{lines}")
    return "\n\n".join(parts) + "\n"


def cell(shown: str, of: Data) -> str:
    """A metric's mean, its range over several seeds, and an arrow where most seeds differ from the backbone."""
    text = shown.format(of["mean"])
    if len(of.get("seeds", [])) > 1:
        low, high = (shown.format(end).removesuffix("%") for end in of["range"])
        text += f" ({low}–{high})"
    votes = len(of.get("seeds", [])) / 2
    return text + (" ▲" if of.get("better", 0) > votes else " ▼" if of.get("worse", 0) > votes else "")


def trade_off(tables: Mapping[str, Data]) -> bytes | None:
    """A PNG: over-refusal against harmful compliance, a point per method, bars for the range over the seeds."""
    return picture(_draw, tables)


def _draw(tables: Mapping[str, Data], figure: Any) -> bool:
    figure.set_size_inches(13, 6)
    axes = figure.subplots(1, len(tables), sharex=True, sharey=True, squeeze=False)[0]
    for plot, (variant, table) in zip(axes, tables.items(), strict=True):
        for method, of in table.items():
            across, up = of["harmful_compliance"], of["over_refusal"]
            bars = {}
            if "range" in across:
                bars = {
                    side: [[100 * (value["mean"] - value["range"][0])], [100 * (value["range"][1] - value["mean"])]]
                    for side, value in (("xerr", across), ("yerr", up))
                }
            marker = "*" if method == BACKBONE else "o"
            plot.errorbar(
                [100 * across["mean"]], [100 * up["mean"]], fmt=marker, markersize=14 if bars == {} else 7, **bars
            )
        start = table[BACKBONE]
        plot.axvline(100 * start["harmful_compliance"]["mean"], color="0.8", zorder=0)
        plot.axhline(100 * start["over_refusal"]["mean"], color="0.8", zorder=0)
        plot.set(title=VARIANTS[variant], xlabel="harmful compliance, AdvBench 400–519, %")
    axes[0].set_ylabel("over-refusal, XSTest safe, %")
    for plot, table in zip(axes, tables.values(), strict=True):
        rates = ("harmful_compliance", "over_refusal")
        name_points(plot, [(method, *(100 * of[rate]["mean"] for rate in rates)) for method, of in table.items()])
    return True


def write(job: Evidence, models: Mapping[str, Sequence[tuple[str, int]]], folder: Path) -> None:
    """The figures to keep: table.{json,md}, tradeoff.png, sets.json, and what the sweeps and the rounds drew."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        variant: collect(json.loads((job.out / f"table-{variant}" / "report.json").read_bytes()), of)
        for variant, of in models.items()
    }
    if tables:
        (folder / "table.json").write_text(json.dumps(tables, indent=1) + "\n")
        (folder / "table.md").write_text(markdown(tables))
        drawn = trade_off(tables)
        if drawn is not None:
            (folder / "tradeoff.png").write_bytes(drawn)
    sweeps = [f"sweep-{variant}" for variant in VARIANTS] + [f"sensitivity-{name}-{WITH_UTILITY}" for name in VARIED]
    for name in sweeps:
        for file in ("sweep.json", "pareto.png" if name.startswith("sweep") else "sensitivity.png"):
            if (job.out / name / file).exists():
                shutil.copy(job.out / name / file, folder / f"{name}{Path(file).suffix}")
    for who in ANSWERED_BY:
        for kind in ("json", "md", "png"):
            if (job.out / f"rounds-{who}" / f"rounds.{kind}").exists():
                shutil.copy(job.out / f"rounds-{who}" / f"rounds.{kind}", folder / f"rounds-{who}.{kind}")
    if (job.out / "sets.json").exists():
        shutil.copy(job.out / "sets.json", folder)
