"""From measurements to report.json: every metric of every model, with its interval and its change from the baseline.

`models` and every metric share their labels: "baseline" where there is one, "model", and "model_2", "model_3", …
where several were measured. The change of each from the baseline stands beside it: "difference", "difference_2", …
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from safepatch_core.evaluating.coherence import Read, repeats
from safepatch_core.evaluating.config import EvalConfig
from safepatch_core.evaluating.judge import HELD_OUT, TUNED, Agreement, Verdict
from safepatch_core.evaluating.page import page
from safepatch_core.evaluating.statistics import (
    Interval,
    Statistic,
    bootstrap,
    difference_of_rates,
    mcnemar,
    normal,
    pair,
    wilson,
)
from safepatch_core.evaluating.text import difference_of, markdown
from safepatch_core.version import __version__

if TYPE_CHECKING:
    from safepatch_core.evaluating.data import Data, Prompts
    from safepatch_core.evaluating.measure import Measurement
    from safepatch_core.evaluating.tasks import Score

FORMAT = 1
BASELINE = "baseline"
# Scores of lm-eval that lie between 0 and 1 and are shown in percent.
SHARES = ("acc", "exact_match", "em", "f1", "mc1", "mc2")
# A model that was taken apart may be out of range; what counts is that it is very bad.
LARGEST_EXPONENT = 700.0

T = TypeVar("T")
# Label of a model → set → a verdict on each answer.
Verdicts = Mapping[str, Mapping[str, Sequence[Verdict]]]


class _Metric(NamedTuple):
    """A metric's name in report.json, its title, its unit and the direction that is an improvement."""

    name: str
    title: str
    unit: str
    better: str

    def of_set(self, name: str) -> _Metric:
        """The metric on one of the further sets."""
        if name in ("harmful", "harmless"):
            return self
        return self._replace(name=f"{self.name}.{name}", title=f"{self.title}, {name}")


COMPLIANCE = _Metric("harmful_compliance", "Harmful compliance", "rate", "lower")
ANSWER_NLL = _Metric("answer_nll", "NLL of harmful answers", "nats per token", "higher")
OVER_REFUSAL = _Metric("over_refusal", "Over-refusal", "rate", "lower")
PERPLEXITY = _Metric("perplexity", "Perplexity", "per token", "lower")
REPEATS = _Metric("repeats", "Repeats in answers", "rate", "lower")
ALIKE = _Metric("consistency", "The same verdict in all framings", "rate", "higher")
IN_ANY = {
    "harmful": _Metric("harmful_compliance_in_any", "Harmful compliance in any framing", "rate", "lower"),
    "harmless": _Metric("over_refusal_in_any", "Over-refusal in any framing", "rate", "lower"),
}
ODDITY = _Metric("answer_perplexity", "Perplexity of answers under the baseline", "per token", "lower")


def build(
    config: EvalConfig,
    data: Data,
    measured: Mapping[str, Measurement],
    verdicts: Verdicts,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of report.json.

    Args:
        config: How it was measured.
        data: On what.
        measured: What each model showed, by its label.
        verdicts: On each of its answers.
        facts: What else is known: `models`, per label name and digest; `patches`, per label what a merge counted, and
            `survival`, what rounding left of it; `read`, how likely the baseline finds each answer; `stages`, per
            label and step of relearning the verdicts; `judge`, the classifier, if one was used; `tasks`, about
            lm-eval; `fingerprint`, a digest of all inputs.
    """
    metrics = []
    for prompts in data.sets:
        said = {label: of[prompts.name] for label, of in verdicts.items()}
        if prompts.kind == "harmful":
            complied = {label: [v.harmful for v in of] for label, of in said.items()}
            metrics.append(_on_prompts(COMPLIANCE, prompts, complied, _rate, _change_of_rate))
        else:
            refused = {label: [v.refused for v in of] for label, of in said.items()}
            metrics.append(_on_prompts(OVER_REFUSAL, prompts, refused, _rate, _change_of_rate))
        nll = {label: of.replies[prompts.name].nll or [] for label, of in measured.items()}
        if prompts.answered:
            mean, change = _means(config.seed)
            metrics.append(_on_prompts(ANSWER_NLL, prompts, nll, mean, change))
    if data.text is not None:
        metrics.append(_perplexity({label: of.text or [] for label, of in measured.items()}, config.seed))
    first = next(iter(measured.values()))
    for at in range(len(first.scores)):
        metrics.append(_score({label: of.scores[at] for label, of in measured.items()}))
    tasks = {} if facts.get("tasks") is None else {"lm_eval": facts["tasks"]}
    return {
        "format": FORMAT,
        "safepatch": __version__,
        "fingerprint": facts.get("fingerprint"),
        "models": {
            label: {**facts["models"][label], "parameters": of.parameters, "dtype": of.dtype}
            for label, of in measured.items()
        },
        "data": data.about | tasks,
        "metrics": metrics,
        "coherence": _coherence(data, measured, facts.get("read", {}), config.seed) + _consistency(data, verdicts),
        "relearning": _relearning(data, measured, facts.get("stages", {}), config),
        "patches": facts.get("patches", {}),
        "survival": facts.get("survival", {}),
        "judge": _judge(facts.get("judge")),
        "settings": config.with_data().settings(),
    }


def _judge(classifier: Mapping[str, Any] | None) -> dict[str, Any]:
    """The prefix judge, and the classifier that judged in its place."""
    prefix = {
        "rule": "prefix matcher, safepatch_core.evaluating.judge",
        "measured_on": "XSTest completions with human labels, full refusal against full compliance",
        "tuned": _agreement(TUNED),
        "held_out": _agreement(HELD_OUT),
    }
    return prefix if classifier is None else {**prefix, "classifier": classifier}


def _coherence(data: Data, measured: Mapping[str, Measurement], read: Read, seed: int) -> list[dict[str, Any]]:
    """Per set, whether the answers are still answers."""
    found = []
    for prompts in data.sets:
        title = {"harmful": "harmful prompts", "harmless": "harmless prompts"}.get(prompts.name, prompts.name)
        repeated = {
            label: [repeats(answer) for answer in of.replies[prompts.name].answers] for label, of in measured.items()
        }
        mean, change = _means(seed)
        about = {"set": prompts.name, "n": len(prompts.rows)}
        found.append({**_named(REPEATS, prompts.name, title), **about, **_compare(repeated, mean, change)})
        pairs = {label: of[prompts.name] for label, of in read.items() if prompts.name in of}
        if pairs:
            found.append({**_named(ODDITY, prompts.name, title), **about, **_odd(pairs, seed)})
    return found


def _consistency(data: Data, verdicts: Verdicts) -> list[dict[str, Any]]:
    """Per set whose rows tell what is one request: is it answered alike however it is framed?"""
    return [
        {
            **_named(metric, prompts.name, prompts.name),
            **{"set": prompts.name, "n": len(prompts.framings)},
            **_compare(values, _rate, _change_of_rate),
        }
        for prompts in data.sets
        if prompts.framings
        for metric, values in _over_framings(prompts, verdicts)
    ]


def _over_framings(prompts: Prompts, verdicts: Verdicts) -> Iterator[tuple[_Metric, dict[str, list[bool]]]]:
    """Per request: whether all its framings got one verdict, and whether any of them got the bad one."""
    harmful = prompts.kind == "harmful"
    bad = {label: [v.harmful if harmful else v.refused for v in of[prompts.name]] for label, of in verdicts.items()}
    each = {label: [[of[at] for at in places] for places in prompts.framings] for label, of in bad.items()}
    yield ALIKE, {label: [len(set(request)) == 1 for request in of] for label, of in each.items()}
    yield IN_ANY[prompts.kind], {label: [any(request) for request in of] for label, of in each.items()}


def _relearning(
    data: Data, measured: Mapping[str, Measurement], stages: Mapping[str, Mapping[int, Any]], config: EvalConfig
) -> list[dict[str, Any]]:
    """Per harmful set: what becomes of the models while they are fine-tuned on harmful rows."""
    if data.relearn is None:
        return []
    mean, change = _means(config.seed)
    found = []
    for prompts in data.harmful:
        about = {"set": prompts.name, "n": len(prompts.rows)}
        complied, nll = [], []
        for step in (0, *config.relearn_looks):
            harmful = {label: [v.harmful for v in of[step][prompts.name]] for label, of in stages.items()}
            complied.append({"step": step, **_compare(harmful, _rate, _change_of_rate)})
            if prompts.answered:
                values = {label: of.stages[step][prompts.name].nll or [] for label, of in measured.items()}
                nll.append({"step": step, **_compare(values, mean, change)})
        metrics = [{**COMPLIANCE.of_set(prompts.name)._asdict(), **about, "steps": complied}]
        if nll:
            metrics.append({**ANSWER_NLL.of_set(prompts.name)._asdict(), **about, "steps": nll})
        found.append({**about, "until_baseline": _until_baseline(complied), "metrics": metrics})
    return found


def _until_baseline(complied: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    """Per model, after how many steps it complied as often as the baseline did untouched; None: it never did."""
    first = complied[0]
    if BASELINE not in first:
        return {}
    goal = first[BASELINE]["count"]
    return {
        label: next((at["step"] for at in complied if at[label]["count"] >= goal), None)
        for label in first
        if label.startswith("model")
    }


def _named(metric: _Metric, name: str, title: str) -> dict[str, str]:
    return {**metric._asdict(), "name": f"{metric.name}.{name}", "title": f"{metric.title}, {title}"}


def _odd(of: Mapping[str, Sequence[tuple[float, int]]], seed: int) -> dict[str, Any]:
    """Models whose answers are all empty have no value."""
    told = {label: pairs for label, pairs in of.items() if sum(tokens for _, tokens in pairs)}

    def value(statistic: Statistic, units: int) -> dict[str, Any]:
        return _value(float(statistic(np.arange(units))), bootstrap(units, statistic, seed))

    def change(model: Sequence[tuple[float, int]], baseline: Sequence[tuple[float, int]]) -> dict[str, Any]:
        after, before = _perplexity_over(model), _perplexity_over(baseline)
        return value(lambda units: after(units) - before(units), len(model))

    return _compare(told, lambda pairs: value(_perplexity_over(pairs), len(pairs)), change)


def _compare(
    of: Mapping[str, T], one: Callable[[T], dict[str, Any]], change: Callable[[T, T], dict[str, Any] | None]
) -> dict[str, Any]:
    """Every model's value, and its change from the baseline where there is one and it can be told."""
    found = {label: one(value) for label, value in of.items()}
    if BASELINE in of:
        for label in [label for label in of if label != BASELINE]:
            difference = change(of[label], of[BASELINE])
            if difference is not None:
                found[difference_of(label)] = difference
    return found


def _on_prompts(
    metric: _Metric,
    prompts: Prompts,
    of: Mapping[str, Sequence[T]],
    one: Callable[[Sequence[T]], dict[str, Any]],
    change: Callable[[Sequence[T], Sequence[T]], dict[str, Any] | None],
) -> dict[str, Any]:
    """A metric with one value per prompt, over all of them and per category."""
    metric = metric.of_set(prompts.name)
    found = {**metric._asdict(), "set": prompts.name, "n": len(prompts.rows), **_compare(of, one, change)}
    if prompts.categories is not None:
        places = defaultdict(list)
        for at, category in enumerate(prompts.categories):
            places[category].append(at)
        found["categories"] = [
            {
                "category": category,
                "n": len(rows),
                **_compare({label: [values[at] for at in rows] for label, values in of.items()}, one, change),
            }
            for category, rows in places.items()
        ]
    return found


def _rate(of: Sequence[bool]) -> dict[str, Any]:
    return {**_value(sum(of) / len(of), wilson(sum(of), len(of))), "count": sum(of)}


def _change_of_rate(model: Sequence[bool], baseline: Sequence[bool]) -> dict[str, Any]:
    pairs = pair(model, baseline)
    return {
        **_value((sum(model) - sum(baseline)) / len(model), difference_of_rates(pairs)),
        "only_model": pairs.first,
        "only_baseline": pairs.second,
        "mcnemar_p": _round(mcnemar(pairs)),
    }


def _means(
    seed: int,
) -> tuple[Callable[[Sequence[float]], dict[str, Any]], Callable[[Sequence[float], Sequence[float]], dict[str, Any]]]:
    """The mean of a value per prompt, and its change."""

    def mean(of: Sequence[float]) -> dict[str, Any]:
        array = np.asarray(of)
        return _value(float(array.mean()), bootstrap(len(array), lambda units: array[units].mean(-1), seed))

    return mean, lambda model, baseline: mean(list(np.subtract(model, baseline)))


def _perplexity(of: Mapping[str, list[tuple[float, int]]], seed: int) -> dict[str, Any]:
    def value(statistic: Statistic, units: int) -> dict[str, Any]:
        return _value(float(statistic(np.arange(units))), bootstrap(units, statistic, seed))

    def one(windows: list[tuple[float, int]]) -> dict[str, Any]:
        return value(_perplexity_over(windows), len(windows))

    def change(model: list[tuple[float, int]], baseline: list[tuple[float, int]]) -> dict[str, Any] | None:
        # Two tokenizers cut a text differently; then the windows can't be paired, nor tokens compared.
        if [tokens for _, tokens in model] != [tokens for _, tokens in baseline]:
            return None
        after, before = _perplexity_over(model), _perplexity_over(baseline)
        return value(lambda units: after(units) - before(units), len(model))

    windows = of["model"]
    counted = {"n": len(windows), "tokens": sum(tokens for _, tokens in windows)}
    return {**PERPLEXITY._asdict(), **counted, **_compare(of, one, change)}


def _perplexity_over(windows: Sequence[tuple[float, int]]) -> Statistic:
    nats, tokens = np.array(windows, dtype=np.float64).T
    return lambda units: np.exp(
        np.minimum(LARGEST_EXPONENT, nats[units].sum(-1) / np.maximum(1, tokens[units].sum(-1)))
    )


def _score(of: Mapping[str, Score]) -> dict[str, Any]:
    """One metric of one task of lm-eval, with intervals from its standard errors."""
    first = of["model"]
    share = first.metric.split(",")[0].startswith(SHARES)

    def one(score: Score) -> dict[str, Any]:
        return _value(score.value, normal(score.value, score.error, share))

    def change(model: Score, baseline: Score) -> dict[str, Any] | None:
        if model.values is None or baseline.values is None or len(model.values) != len(baseline.values):
            return None
        if {*model.values, *baseline.values} <= {0.0, 1.0}:
            return _change_of_rate([v == 1 for v in model.values], [v == 1 for v in baseline.values])
        changes = np.subtract(model.values, baseline.values)
        error = float(changes.std(ddof=1)) / len(changes) ** 0.5 if len(changes) > 1 else None
        return _value(float(changes.mean()), normal(float(changes.mean()), error, False))

    return {
        "name": f"lm_eval.{first.task}.{first.metric}",
        "title": f"{first.task}, {first.metric}",
        "unit": "rate" if share else "score",
        "better": "lower" if first.higher_is_better is False else "higher",
        "n": first.n,
        **_compare(of, one, change),
    }


def _value(value: float, interval: Interval | None) -> dict[str, Any]:
    return {"value": _round(value), "interval": None if interval is None else [_round(end) for end in interval]}


def _round(value: float) -> float:
    """Six significant digits: more would be noise of the last float operations."""
    return float(f"{value:.6g}")


def _agreement(agreement: Agreement) -> dict[str, Any]:
    return {name: value if isinstance(value, int) else round(value, 4) for name, value in agreement._asdict().items()}


def names(refs: Mapping[str, str]) -> dict[str, str]:
    """What the report calls each model: the last part of its path, with those before it where two are the same."""
    paths = {label: Path(ref).resolve() for label, ref in refs.items() if Path(ref).exists()}
    depth = {label: 1 for label in paths}
    found = {}
    for label, ref in refs.items():
        if label not in paths:
            found[label] = ref
            continue
        parts = paths[label].parts
        others = {path.parts for path in paths.values() if path != paths[label]}
        while depth[label] < len(parts) and any(o[-depth[label] :] == parts[-depth[label] :] for o in others):
            depth[label] += 1
        found[label] = "/".join(parts[-depth[label] :])
    return found


def files(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """Name → content of every file of the report."""
    return {
        "report.json": (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode(),
        "report.md": markdown(report, rows).encode(),
        "report.html": page(report, rows).encode(),
        "answers.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(),
    }


def answers(
    data: Data, measured: Mapping[str, Measurement], verdicts: Verdicts, classified: bool
) -> list[dict[str, Any]]:
    """One record per prompt, in the sets' order: what was asked, and what each model said to it."""
    rows = []
    for prompts in data.sets:
        for at, row in enumerate(prompts.rows):
            record: dict[str, Any] = {"set": prompts.name, "line": row.line, "prompt": row.values["question"]}
            if prompts.categories is not None:
                record["category"] = prompts.categories[at]
            for label, of in measured.items():
                replies, verdict = of.replies[prompts.name], verdicts[label][prompts.name][at]
                record[label] = {"answer": replies.answers[at], "refused": verdict.refused}
                if classified:
                    record[label]["harmful"] = verdict.harmful
                if replies.nll is not None:
                    record[label]["nll"] = _round(replies.nll[at])
            rows.append(record)
    return rows
