"""What continual rounds did to a model: the forgetting matrix as data, text and picture. Reads reports, runs nothing.

Row i of the matrix is the model after round i (row 0 the backbone), column j the harmful prompts of round j.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safepatch_core.errors import printable
from safepatch_core.evaluating.statistics import difference_of_rates, mcnemar, pair
from safepatch_core.evaluating.text import cell
from safepatch_core.pictures import picture
from safepatch_core.version import __version__

FORMAT = 1
BACKBONE = "backbone"
COLUMN = "round"  # of the measured prompts: whose they are
COMPLIANCE = "harmful_compliance"

Data = Mapping[str, Any]


def summary(rounds: Sequence[Data], reports: Sequence[Path]) -> dict[str, Any]:
    """The content of rounds.json, from the report directories of the backbone and of the model after each round.

    `rounds` says per round its name and what else is to be recorded. Forgetting is, per round but the last, how much
    more often the last model complies with its prompts than the model right after it did, with Newcombe's interval
    for pairs and McNemar's exact p-value.
    """
    names = [of["name"] for of in rounds]
    matrix = []
    for after, folder in zip([BACKBONE, *names], reports, strict=True):
        metrics = {m["name"]: m for m in json.loads((folder / "report.json").read_bytes())["metrics"]}
        categories = {of["category"]: of for of in metrics[COMPLIANCE]["categories"]}
        matrix.append(
            {
                "after": after,
                COMPLIANCE: {name: {**categories[name]["model"], "n": categories[name]["n"]} for name in names},
                "metrics": {
                    name: {**{k: m[k] for k in ("title", "unit", "better", "n")}, **m["model"]}
                    for name, m in metrics.items()
                },
            }
        )
    complied = [_complied(folder / "answers.jsonl") for folder in reports]
    return {
        "format": FORMAT,
        "safepatch": __version__,
        "rounds": list(rounds),
        "matrix": matrix,
        "forgetting": [
            _forgotten(name, complied[-1][name], complied[i][name]) for i, name in enumerate(names[:-1], 1)
        ],
    }


def _complied(answers: Path) -> dict[str, list[bool]]:
    """Per round, whether each of its prompts was complied with."""
    found: dict[str, list[bool]] = {}
    for line in answers.read_text("utf-8").split("\n")[:-1]:
        row = json.loads(line)
        if row["set"] == "harmful":
            said = row["model"]
            found.setdefault(row["category"], []).append(said.get("harmful", not said["refused"]))
    return found


def _forgotten(name: str, last: Sequence[bool], own: Sequence[bool]) -> dict[str, Any]:
    pairs = pair(last, own)
    return {
        "round": name,
        "value": _round((sum(last) - sum(own)) / len(own)),
        "interval": [_round(end) for end in difference_of_rates(pairs)],
        "only_last": pairs.first,
        "only_own": pairs.second,
        "mcnemar_p": _round(mcnemar(pairs)),
    }


def _round(value: float) -> float:
    return float(f"{value:.6g}")


def tables(data: Data) -> list[list[list[str]]]:
    """The forgetting matrix with the other metrics beside it, and the forgetting of each round."""
    names = [of["name"] for of in data["rounds"]]
    others = [name for name in data["matrix"][0]["metrics"] if name != COMPLIANCE]
    unit = {"unit": "rate"}
    head = ["after", *names, "all", *(printable(data["matrix"][0]["metrics"][name]["title"]) for name in others)]
    rows = [head]
    for row in data["matrix"]:
        of = [{**unit, "model": row[COMPLIANCE][name]} for name in names]
        of += [{**row["metrics"][name], "model": row["metrics"][name]} for name in (COMPLIANCE, *others)]
        rows.append([row["after"], *(cell(metric, "model") for metric in of)])
    forgotten = [["round", "forgetting", "p"]]
    for found in data["forgetting"]:
        forgotten.append(
            [found["round"], cell({**unit, "difference": found}, "difference"), f"{found['mcnemar_p']:.3g}"]
        )
    return [rows, forgotten] if data["forgetting"] else [rows]


def plain(data: Data) -> str:
    """The tables for a terminal."""
    texts = []
    for table in tables(data):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        texts.append("\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table))
    return "\n\n".join(texts)


def markdown(data: Data) -> str:
    """The content of rounds.md."""
    texts = [
        "\n".join(f"| {' | '.join(row)} |" for row in (table[0], ["---"] * len(table[0]), *table[1:]))
        for table in tables(data)
    ]
    parts = [
        "# Continual rounds",
        "Harmful compliance (lower is better) after each round, on each round's own harmful prompts and on all of "
        "them; then the other metrics. In brackets: 95% intervals (rates: Wilson).",
        texts[0],
    ]
    if len(texts) > 1:
        parts += [
            "Forgetting: how much more often the last model complies with a round's prompts than the model right "
            "after that round (Newcombe's interval for pairs, exact McNemar test).",
            texts[1],
        ]
    return "\n\n".join(parts) + "\n"


def heat_map(data: Data) -> bytes | None:
    """A PNG of the forgetting matrix; None without matplotlib."""
    return picture(_draw, data)


def _draw(data: Data, figure: Any) -> bool:
    names = [of["name"] for of in data["rounds"]]
    values = [[row[COMPLIANCE][name]["value"] for name in names] for row in data["matrix"]]
    figure.set_size_inches(2.5 + 1.3 * len(names), 1.5 + 0.7 * len(values))
    axes = figure.add_subplot()
    image = axes.imshow(values, vmin=0, vmax=1, cmap="Reds", aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(j, i, f"{100 * value:.1f}%", ha="center", va="center", color="w" if value > 0.6 else "k")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(values)), [row["after"] for row in data["matrix"]])
    axes.set(xlabel="harmful prompts of round", ylabel="after round")
    figure.colorbar(image, label="harmful compliance")
    return True
