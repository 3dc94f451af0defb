"""What a sweep shows of itself: lines and a table for the terminal, and pictures where matplotlib is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safepatch_core.evaluating.text import cell
from safepatch_core.pictures import picture

Data = Mapping[str, Any]
CUT = 4


def one_line(record: Data, backbone: Data) -> str:
    """The metrics of a trial, or why it has none."""
    if "failed" in record:
        return f"failed ({record['failed']})"
    return ", ".join(
        f"{name} {cell({**backbone[name], 'model': of}, 'model')}" for name, of in record["metrics"].items()
    )


def table(data: Data) -> str:
    """The backbone and the Pareto front, a trial per point of it and the chosen one marked, as a plain table."""
    metrics = data["backbone"]["metrics"]
    rows = [
        ["trial", *metrics, "parameters"],
        ["backbone", *(cell({**m, "model": m}, "model") for m in metrics.values()), ""],
    ]
    shown: dict[tuple[float, ...], int] = {}
    for number in data["front"]:
        point = tuple(data["trials"][number]["metrics"][name]["value"] for name in data["search"]["objectives"])
        if point not in shown or number == data["chosen"]:
            shown[point] = number
    for _, number in sorted(shown.items()):
        trial = data["trials"][number]
        mark = f"{number}{' *' if number == data['chosen'] else ''}"
        parameters = ", ".join(f"{k.removeprefix('patches.')}={_text(v)}" for k, v in trial["parameters"].items())
        rows.append(
            [mark, *(cell({**metrics[n], "model": of}, "model") for n, of in trial["metrics"].items()), parameters]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def plots(data: Data) -> dict[str, bytes]:
    """PNG pictures by file name, of what there are trials for; none without matplotlib."""
    pictures = {
        name: picture(draw, data) for name, draw in (("pareto.png", _pareto), ("sensitivity.png", _sensitivity))
    }
    return {name: png for name, png in pictures.items() if png is not None}


def _scored(data: Data) -> list[Data]:
    return [trial for trial in data["trials"] if "metrics" in trial]


def _values(data: Data, name: str, trials: Sequence[Data]) -> list[float]:
    """A metric of some trials. A model that was taken apart would flatten the picture of the others: it is cut."""
    most = CUT * abs(data["backbone"]["metrics"][name]["value"])
    rate = data["backbone"]["metrics"][name]["unit"] == "rate"
    values = [trial["metrics"][name]["value"] for trial in trials]
    return values if rate else [max(-most, min(value, most)) for value in values]


def _title(data: Data, name: str) -> str:
    metric = data["backbone"]["metrics"][name]
    cut = "" if metric["unit"] == "rate" else f", at most {CUT}× the backbone's"
    return f"{metric['title']} ({metric['better']} is better{cut})"


def _pareto(data: Data, figure: Any) -> bool:
    """The first two objectives against each other, the first constrained metric as colour."""
    trials, objectives = _scored(data), list(data["search"]["objectives"])
    if not trials or len(objectives) < 2:
        return False
    backbone = data["backbone"]["metrics"]
    across, up = objectives[:2]
    colour = next((name for name in data["search"]["constraints"] if name in backbone), None)
    figure.set_size_inches(8, 6)
    axes = figure.add_subplot()

    def points(of: Sequence[Data]) -> tuple[list[float], list[float]]:
        return _values(data, across, of), _values(data, up, of)

    for met, marker in ((True, "o"), (False, "x")):
        of = [trial for trial in trials if trial["meets_constraints"] == met]
        if not of:
            continue
        style: dict[str, Any] = {"marker": marker, "label": f"trials{'' if met else ' that miss a constraint'}"}
        if colour is not None:
            every = _values(data, colour, trials)
            style |= {"c": _values(data, colour, of), "cmap": "viridis", "vmin": min(every), "vmax": max(every)}
        drawn = axes.scatter(*points(of), zorder=2, **style)
    if colour is not None:
        figure.colorbar(drawn, label=_title(data, colour))
    front = sorted((data["trials"][n] for n in data["front"]), key=lambda t: t["metrics"][across]["value"])
    axes.plot(*points(front), color="0.6", zorder=1, label="Pareto front")
    axes.scatter(
        backbone[across]["value"], backbone[up]["value"], marker="*", s=160, color="tab:red", label="backbone"
    )
    if data["chosen"] is not None:
        circle = {"s": 140, "facecolors": "none", "edgecolors": "tab:red", "label": "chosen"}
        axes.scatter(*points([data["trials"][data["chosen"]]]), **circle)
    axes.set(xlabel=_title(data, across), ylabel=_title(data, up))
    axes.legend()
    return True


def _sensitivity(data: Data, figure: Any) -> bool:
    """Each numeric parameter against each metric that counts; a line joins trials that else equal the chosen one."""
    trials = _scored(data)
    metrics = [*data["search"]["objectives"], *data["search"]["constraints"]]
    metrics = [name for name in dict.fromkeys(metrics) if name in data["backbone"]["metrics"]]
    parameters = [key for key in data["search"]["parameters"] if len({*_numbers(key, trials)}) > 1]
    if not parameters:
        return False
    figure.set_size_inches(max(6, 1 + 3 * len(parameters)), 1 + 2.5 * len(metrics))
    figure.suptitle("every trial; line: else as the chosen one; dotted: backbone", fontsize="medium")
    grid = figure.subplots(len(metrics), len(parameters), squeeze=False, sharex="col", sharey="row")
    for row, name in zip(grid, metrics, strict=True):
        row[0].set_ylabel(data["backbone"]["metrics"][name]["title"])
        for axes, key in zip(row, parameters, strict=True):
            of = [trial for trial in trials if _is_number(trial["parameters"][key])]
            axes.scatter(_numbers(key, of), _values(data, name, of), s=12, color="0.6")
            axes.axhline(data["backbone"]["metrics"][name]["value"], color="tab:red", linewidth=0.8, linestyle=":")
            line = sorted(filter(_like_the_chosen(data, key), of), key=lambda t: t["parameters"][key])
            if len(line) > 1:
                axes.plot(_numbers(key, line), _values(data, name, line), "o-", color="tab:blue")
    for axes, key in zip(grid[-1], parameters, strict=True):
        axes.set_xlabel(key.removeprefix("patches."))
        numbers = _numbers(key, trials)
        if min(numbers) > 0 and max(numbers) >= 10 * min(numbers):
            axes.set_xscale("log")
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(key: str, trials: Sequence[Data]) -> list[float]:
    return [value for trial in trials if _is_number(value := trial["parameters"][key])]


def _like_the_chosen(data: Data, key: str) -> Callable[[Data], bool]:
    if data["chosen"] is None:
        return lambda trial: False
    chosen = {**data["trials"][data["chosen"]]["parameters"], key: None}
    return lambda trial: {**trial["parameters"], key: None} == chosen
