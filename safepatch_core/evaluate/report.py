"""From measurements to the report: report.json, report.md, answers.jsonl. No torch here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safepatch_core import __version__
from safepatch_core.errors import printable
from safepatch_core.evaluate.config import EvalConfig
from safepatch_core.evaluate.judge import HELD_OUT, TUNED, Agreement
from safepatch_core.evaluate.statistics import (
    Interval,
    Statistic,
    bootstrap,
    difference_of_rates,
    mcnemar,
    pair,
    wilson,
)

if TYPE_CHECKING:
    from safepatch_core.evaluate.data import Data, Prompts
    from safepatch_core.evaluate.measure import Measurement, Replies

FORMAT = 1
SHOWN = 200  # characters of an answer in report.md


class _Metric(NamedTuple):
    """A metric's name in report.json, its title, its unit and the direction that is an improvement."""

    name: str
    title: str
    unit: str
    better: str


COMPLIANCE = _Metric("harmful_compliance", "Harmful compliance", "rate", "lower")
ANSWER_NLL = _Metric("answer_nll", "NLL of harmful answers", "nats per token", "higher")
OVER_REFUSAL = _Metric("over_refusal", "Over-refusal", "rate", "lower")
PERPLEXITY = _Metric("perplexity", "Perplexity", "per token", "lower")


def build(
    config: EvalConfig, refs: Mapping[str, str], data: Data, measured: Mapping[str, Measurement]
) -> dict[str, Any]:
    """The content of report.json. `measured` holds "model", and "baseline" where there is one."""
    after, before = measured["model"], measured.get("baseline")
    metrics = []
    if after.harmful is not None:
        past = None if before is None else before.harmful
        metrics.append(_rate(COMPLIANCE, _complied(after.harmful), None if past is None else _complied(past)))
        if after.harmful.nll is not None:
            metrics.append(_mean(ANSWER_NLL, after.harmful.nll, None if past is None else past.nll, config.seed))
    if after.harmless is not None:
        past = None if before is None else before.harmless
        metrics.append(_rate(OVER_REFUSAL, after.harmless.refused, None if past is None else past.refused))
    if after.text is not None:
        metrics.append(_perplexity(after.text, None if before is None else before.text, config.seed))
    return {
        "format": FORMAT,
        "safepatch": __version__,
        "models": {label: {"name": _name(refs[label]), **of.about} for label, of in measured.items()},
        "data": data.about,
        "metrics": metrics,
        "judge": {
            "rule": "prefix matcher, safepatch_core.evaluate.judge",
            "measured_on": "XSTest completions with human labels, full refusal against full compliance",
            "tuned": _rounded(TUNED),
            "held_out": _rounded(HELD_OUT),
        },
        "settings": config.with_data().settings(),
    }


def _complied(replies: Replies) -> list[bool]:
    return [not refused for refused in replies.refused]


def _rate(metric: _Metric, model: Sequence[bool], baseline: Sequence[bool] | None) -> dict[str, Any]:
    def value(of: Sequence[bool]) -> dict[str, Any]:
        return {**_value(sum(of) / len(of), wilson(sum(of), len(of))), "count": sum(of)}

    found = metric._asdict() | {"n": len(model), "model": value(model)}
    if baseline is not None:
        pairs = pair(model, baseline)
        found["baseline"] = value(baseline)
        found["difference"] = {
            **_value((sum(model) - sum(baseline)) / len(model), difference_of_rates(pairs)),
            "only_model": pairs.first,
            "only_baseline": pairs.second,
            "mcnemar_p": _round(mcnemar(pairs)),
        }
    return found


def _mean(metric: _Metric, model: Sequence[float], baseline: Sequence[float] | None, seed: int) -> dict[str, Any]:
    def value(of: Sequence[float] | NDArray[np.float64]) -> dict[str, Any]:
        array = np.asarray(of)
        return _value(float(array.mean()), bootstrap(len(array), lambda units: array[units].mean(-1), seed))

    found = metric._asdict() | {"n": len(model), "model": value(model)}
    if baseline is not None:
        found |= {"baseline": value(baseline), "difference": value(np.subtract(model, baseline))}
    return found


def _perplexity(
    model: list[tuple[float, int]], baseline: list[tuple[float, int]] | None, seed: int
) -> dict[str, Any]:
    def value(statistic: Statistic, units: int) -> dict[str, Any]:
        return _value(float(statistic(np.arange(units))), bootstrap(units, statistic, seed))

    after = _perplexity_over(model)
    found = PERPLEXITY._asdict() | {
        "n": len(model),
        "tokens": sum(tokens for _, tokens in model),
        "model": value(after, len(model)),
    }
    if baseline is not None:
        before = _perplexity_over(baseline)
        found["baseline"] = value(before, len(baseline))
        # Two tokenizers cut a text differently; then the windows can't be paired, nor tokens compared.
        if [tokens for _, tokens in model] == [tokens for _, tokens in baseline]:
            found["difference"] = value(lambda units: after(units) - before(units), len(model))
    return found


def _perplexity_over(windows: list[tuple[float, int]]) -> Statistic:
    nats, tokens = np.array(windows, dtype=np.float64).T
    # A model that was taken apart may be out of range of exp; what counts is that it is very bad.
    return lambda units: np.exp(np.minimum(700.0, nats[units].sum(-1) / tokens[units].sum(-1)))


def _value(value: float, interval: Interval | None) -> dict[str, Any]:
    return {"value": _round(value), "interval": None if interval is None else [_round(end) for end in interval]}


def _round(value: float) -> float:
    """Six significant digits: more would be noise of the last float operations."""
    return float(f"{value:.6g}")


def _rounded(agreement: Agreement) -> dict[str, Any]:
    return {name: value if isinstance(value, int) else round(value, 4) for name, value in agreement._asdict().items()}


def _name(ref: str) -> str:
    path = Path(ref)
    return path.resolve().name if path.exists() else ref


def files(report: Mapping[str, Any], data: Data, measured: Mapping[str, Measurement]) -> dict[str, bytes]:
    """Name → content of every file of the report."""
    rows = list(_answers(data, measured))
    return {
        "report.json": (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode(),
        "report.md": _markdown(report, rows).encode(),
        "answers.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(),
    }


def _answers(data: Data, measured: Mapping[str, Measurement]) -> list[dict[str, Any]]:
    """One record per prompt, harmful ones first: what was asked, and what each model said to it."""
    rows = []
    for kind in ("harmful", "harmless"):
        prompts: Prompts | None = getattr(data, kind)
        for at, row in enumerate(prompts.rows if prompts is not None else []):
            record: dict[str, Any] = {"set": kind, "line": row.line, "prompt": row.values["question"]}
            for label, measurement in measured.items():
                replies: Replies = getattr(measurement, kind)
                said = {"answer": replies.answers[at], "refused": replies.refused[at]}
                record[label] = said if replies.nll is None else said | {"nll": _round(replies.nll[at])}
            rows.append(record)
    return rows


def before_after(report: Mapping[str, Any]) -> str:
    """The metrics of a report.json as a plain aligned table, for a terminal."""
    rows = _table(report)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _table(report: Mapping[str, Any]) -> list[list[str]]:
    paired = "baseline" in report["models"]
    rows = [["metric", "n", *(["before", "after", "change"] if paired else ["value"])]]
    for metric in report["metrics"]:
        columns = ("baseline", "model", "difference") if paired else ("model",)
        cells = [_cell(metric, key) if key in metric else "-" for key in columns]
        rows.append([f"{metric['title']} ({metric['better']} is better)", str(metric["n"]), *cells])
    return rows


def _cell(metric: Mapping[str, Any], key: str) -> str:
    sign = "+" if key == "difference" else ""
    rate = metric["unit"] == "rate"

    def number(value: float) -> str:
        return f"{100 * value:{sign}.1f}" if rate else f"{value:{sign}.3f}"

    of = metric[key]
    text = number(of["value"]) + ("%" if rate else "")
    if of["interval"] is not None:
        text += f" [{number(of['interval'][0])}, {number(of['interval'][1])}]"
    return text


def _markdown(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    models, judge = report["models"], report["judge"]
    table = _table(report)
    parts = [
        "# Evaluation of " + _escaped(models["model"]["name"]),
        "\n".join(
            f"- {'before' if label == 'baseline' else 'after' if 'baseline' in models else 'model'}: "
            f"**{_escaped(of['name'])}**, {of['parameters']:,d} parameters, measured in {of['dtype']}"
            for label, of in models.items()
        ),
        "\n".join(f"| {' | '.join(row)} |" for row in (table[0], ["---"] * len(table[0]), *table[1:])),
        "In brackets: 95% intervals. Rates: Wilson; change of a rate: Newcombe's for pairs. Means and perplexity: "
        "percentile bootstrap over prompts and windows (neighbouring windows are not independent, so the "
        "interval of the perplexity is rather too narrow). NLL in nats per token, averaged over prompts.",
    ]
    tests = [
        f"- {m['title']}: {m['difference']['only_baseline']} prompts only before, "
        f"{m['difference']['only_model']} only after, p = {m['difference']['mcnemar_p']:.3g}"
        for m in report["metrics"]
        if "mcnemar_p" in m.get("difference", {})
    ]
    if tests:
        parts += ["Exact McNemar tests on the same prompts:", "\n".join(tests)]
    parts += [
        "## Judge",
        "Refusals are called by a prefix matcher that reads how an answer opens; gibberish and empty promises "
        f"count as compliance. On {judge['measured_on']}:",
        "\n".join(
            f"- {title}: accuracy {of['accuracy']:.1%}, precision {of['precision']:.1%}, "
            f"recall {of['recall']:.1%}, n = {of['n']}"
            for title, of in (
                ("answers held out while the rule was written", judge["held_out"]),
                ("answers it was written on", judge["tuned"]),
            )
        ),
        "## Data and settings",
        "\n".join(f"- {name}: {_escaped(_facts(about))}" for name, about in report["data"].items()),
        "\n".join(f"- {name}: {_escaped(json.dumps(value))}" for name, value in report["settings"].items()),
    ]
    shown = report["settings"]["samples"]
    samples = [row for kind in ("harmful", "harmless") for row in [r for r in rows if r["set"] == kind][:shown]]
    if samples:
        parts += [
            "## Answers side by side",
            "Written by the models under test, unedited, and cut where “… [cut]” stands; some may be offensive or "
            "wrong. All of them are in `answers.jsonl`.",
            *(_sample(row) for row in samples),
        ]
    return "\n\n".join(parts) + "\n"


def _facts(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in about.items())


def _sample(row: Mapping[str, Any]) -> str:
    lines = [f"**{row['set']}, line {row['line']}:** {_escaped(_cut(row['prompt']))}", ""]
    for label, title in (("baseline", "before"), ("model", "after" if "baseline" in row else "answer")):
        if label in row:
            verdict = "refused" if row[label]["refused"] else "complied"
            answer = _escaped(_cut(row[label]["answer"])) or "(nothing)"
            lines.append(f"- {title}, {verdict}: {answer}")
    return "\n".join(lines)


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[:SHOWN].rstrip() + "… [cut]"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is: nobody's answer becomes a heading, a link or HTML."""
    text = re.sub(r"([\\`*_\[\]<>#|~!])", r"\\\1", printable(text))
    return re.sub(r"^([-+]|\d+[.)])", r"\\\1", text)
