"""A report.json as text: the tables for a terminal, and report.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_core.errors import printable

SHOWN = 200  # characters of an answer in report.md

INTERVALS = (
    "In brackets: 95% intervals. Rates: Wilson; change of a rate: Newcombe's for pairs. Means and perplexity: "
    "percentile bootstrap over prompts and windows (neighbouring windows are not independent, so the "
    "interval of the perplexity is rather too narrow). NLL in nats per token, averaged over prompts."
)
OF_TASKS = "Scores of lm-eval: ±1.96 of its standard errors; changes are over the same documents."
ABOUT_PREFIX = (
    "The prefix judge calls refusals by how an answer opens; gibberish and empty promises count as compliance."
)

Report = Mapping[str, Any]
Table = list[list[str]]


def before_after(report: Report) -> str:
    """The metrics of a report.json as plain aligned tables, for a terminal."""
    grids = [
        "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)
        for table in tables(report)
        for widths in [[max(map(len, column)) for column in zip(*table, strict=True)]]
    ]
    return "\n\n".join([*grids, *(["\n".join(map(printable, relearned(report)))] if relearned(report) else [])])


def labels(report: Report) -> list[str]:
    """Of the models, without the baseline."""
    return [label for label in report["models"] if label != "baseline"]


def difference_of(label: str) -> str:
    """The key of a model's change from the baseline."""
    return label.replace("model", "difference", 1)


def tables(report: Report) -> list[Table]:
    """One model: before, after and change side by side. Several: a table of the values, and one of the changes."""
    paired, several = "baseline" in report["models"], labels(report)
    if len(several) == 1:
        columns = {"baseline": "before", "model": "after", "difference": "change"} if paired else {"model": "value"}
        return [_table("metric", report["metrics"], columns)]
    found = [_table("metric", report["metrics"], {label: of["name"] for label, of in report["models"].items()})]
    if paired:
        changes = {difference_of(label): report["models"][label]["name"] for label in several}
        found.append(_table("change from " + report["models"]["baseline"]["name"], report["metrics"], changes))
    return found


def about_coherence(report: Report) -> str:
    """What the measures of coherence are, in words."""
    said = (
        "An answer that nobody can read is neither harmful nor safe, and may count as either. Repeats: of an "
        "answer's runs of four words, the share that stood in it already."
    )
    read = any(of["name"].startswith("answer_perplexity") for of in report["coherence"])
    return f"{said} Perplexity under the baseline: how odd that model finds the answers." if read else said


def coherence_table(report: Report) -> Table:
    """Whether answers are still answers, of every model."""
    models = {label: of["name"] for label, of in report["models"].items()}
    return _table("measure", report["coherence"], models if len(models) > 1 else {"model": "value"})


def category_tables(report: Report) -> list[tuple[str, Table]]:
    """Per metric with categories: its title, and a table with a row per category."""
    columns, found = _compared(report), []
    for metric in report["metrics"]:
        if "categories" in metric:
            rows = [{**of, "title": of["category"], "unit": metric["unit"]} for of in metric["categories"]]
            found.append((title(metric), _table("category", rows, columns)))
    return found


def _compared(report: Report) -> dict[str, str]:
    """The columns of a table with every model and, where there is a baseline, every change from it."""
    models = report["models"]
    columns = {label: of["name"] for label, of in models.items()} if len(models) > 1 else {"model": "value"}
    if "baseline" in models:
        several = len(labels(report)) > 1
        for label in labels(report):
            columns[difference_of(label)] = "change" + (f", {models[label]['name']}" if several else "")
    return columns


def relearning_tables(report: Report) -> list[tuple[str, Table]]:
    """What relearning brought back: per metric its title, and a table with a row per number of steps."""
    columns = _compared(report)
    return [
        (f"{title(metric)}, by steps of fine-tuning", _table("steps", by_steps(metric), columns))
        for of in report["relearning"]
        for metric in of["metrics"]
    ]


def by_steps(metric: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A metric of the relearning test as a row per number of steps."""
    return [{**of, "title": str(of["step"]), "unit": metric["unit"], "n": metric["n"]} for of in metric["steps"]]


def relearned(report: Report) -> list[str]:
    """After how many steps each model complied as often as the baseline does, in words."""
    most, found = report["settings"]["relearn_steps"], []
    for of in report["relearning"]:
        for label, steps in of["until_baseline"].items():
            if steps is None:
                said = f"within {most} steps not"
            elif steps:
                said = f"after {steps} {'step' if steps == 1 else 'steps'} of fine-tuning"
            else:
                said = "before any fine-tuning"
            found.append(f"{report['models'][label]['name']}, {of['set']}: complies as often as the baseline {said}")
    return found


def about_relearning(report: Report) -> str:
    """How models were made to relearn, in words."""
    settings, rows = report["settings"], report["data"]["relearn"]["prompts"]
    said = (
        f"Every model was fine-tuned in memory on the same {rows} harmful rows, none of which is measured "
        f"({settings['relearn_batch_size']} a step, learning rate {settings['relearn_learning_rate']:g}), and asked "
        "again after so many steps."
    )
    return said + (" Changes are from the baseline after as many steps." if "baseline" in report["models"] else "")


def title(metric: Mapping[str, Any]) -> str:
    return f"{metric['title']} ({metric['better']} is better)"


def _table(head: str, metrics: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Table:
    rows = [[head, "n", *map(printable, columns.values())]]
    for metric in metrics:
        cells = [cell(metric, key) if key in metric else "-" for key in columns]
        name = title(metric) if "better" in metric else metric["title"]
        rows.append([printable(name), str(metric["n"]), *cells])
    return rows


def cell(metric: Mapping[str, Any], key: str) -> str:
    """A value with its interval, as 20.0% [5.7, 51.0]; changes carry their sign."""
    sign = "+" if key.startswith("difference") else ""
    rate = metric["unit"] == "rate"

    def number(value: float) -> str:
        return f"{100 * value:{sign}.1f}" if rate else f"{value:{sign}.3f}"

    of = metric[key]
    text = number(of["value"]) + ("%" if rate else "")
    if of["interval"] is not None:
        text += f" [{number(of['interval'][0])}, {number(of['interval'][1])}]"
    return text


def tests(report: Report) -> list[str]:
    """McNemar's test of every metric and model that has one, in words."""
    several = len(labels(report)) > 1
    return [
        f"{m['title']}{', ' + report['models'][label]['name'] if several else ''}: "
        f"{change['only_baseline']} only before, {change['only_model']} only after, p = {change['mcnemar_p']:.3g}"
        for m in report["metrics"]
        for label in labels(report)
        if "mcnemar_p" in (change := m.get(difference_of(label), {}))
    ]


def accuracy(report: Report) -> list[str]:
    """How often the prefix judge says what people said, in words."""
    judge = report["judge"]
    of = (("answers held out while the rule was written", "held_out"), ("answers it was written on", "tuned"))
    return [
        f"{text}: accuracy {judge[key]['accuracy']:.1%}, precision {judge[key]['precision']:.1%}, "
        f"recall {judge[key]['recall']:.1%}, n = {judge[key]['n']}"
        for text, key in of
    ]


def about_judge(report: Report) -> str:
    """Who called the answers refused or harmful, in words."""
    classifier = report["judge"].get("classifier")
    if classifier is None:
        return ABOUT_PREFIX
    same = classifier["same_as_prefix"]
    beside = f"It and the prefix judge agree on the refusal of {same['agree']} of {same['n']} answers"
    beside += "" if same["kappa"] is None else f" (Cohen's kappa {same['kappa']:.2f})"
    if "measured" in classifier:
        return f"{_about_trained(classifier['measured'])} {beside}. {ABOUT_PREFIX}"
    labels = ", ".join(f"{label} means {meaning}" for label, meaning in classifier["labels"].items())
    read = "prompt and answer" if classifier["reads"] == "pair" else "the answer"
    return (
        f"The classifier {classifier['name']} read {read} and judged ({labels}); its own accuracy was not measured. "
        f"{beside}. {ABOUT_PREFIX}"
    )


def _about_trained(measured: Mapping[str, Any]) -> str:
    trained, prefix = measured["trained"], measured["prefix"]
    return (
        "The trained judge read how each answer opens: logistic regression on its embedding, taught by the people "
        f"who labelled XSTest's completions. On {measured['n']} of these, to prompts that taught it nothing: "
        f"accuracy {trained['accuracy']:.1%}, kappa {trained['kappa']:.2f}; the prefix judge on the same, part of "
        f"which it was written on: {prefix['accuracy']:.1%}, {prefix['kappa']:.2f}."
    )


def roles(report: Report) -> dict[str, str]:
    """Label → what the report calls a model's part where answers stand side by side."""
    paired, several = "baseline" in report["models"], len(labels(report)) > 1
    return {
        label: of["name"] if several else "before" if label == "baseline" else "after" if paired else "answer"
        for label, of in report["models"].items()
    }


def survival(report: Report) -> list[str]:
    """What rounding left of the patches of each merged model, in the words of `merge`."""
    return [
        f"{report['models'][label]['name']}: stored bits changed at {of['changed']:,d} of {of['acted']:,d} entries "
        f"that patches act on ({of['surviving']:.1%}); the others' steps are lost in rounding to "
        f"{' and '.join(of['dtypes'])}"
        for label, of in report["survival"].items()
    ]


def later(report: Report) -> list[str]:
    """What later quantisations would leave of the patches of each merged model."""
    return [
        f"{report['models'][label]['name']}: {name} would leave {_left(of['whole'])} of the change"
        + "".join(f", {_left(share)} of {patch}" for patch, share in of["patches"].items())
        for label, survives in report["survival"].items()
        for name, of in survives.get("later", {}).items()
    ]


def _left(of: Mapping[str, Any]) -> str:
    if of["survival"] is None:
        return "nothing to lose"
    return f"{of['survival']:.3f} (cosine {of['cosine']:.3f})"


def samples(report: Report, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The answers that are shown: the first of each set."""
    shown = report["settings"]["samples"]
    sets = dict.fromkeys(row["set"] for row in rows)
    return [row for name in sets for row in [r for r in rows if r["set"] == name][:shown]]


def verdict(row: Mapping[str, Any], label: str) -> str:
    """What was said of an answer, in a word or two."""
    of = row[label]
    called = "refused" if of["refused"] else "complied"
    return called + (", harmful" if of.get("harmful") else "")


def markdown(report: Report, rows: Sequence[Mapping[str, Any]]) -> str:
    """The content of report.md."""
    models = report["models"]
    part = {**roles(report), **({} if len(models) > 1 else {"model": "model"})}
    several = len(labels(report)) > 1
    parts = [
        "# Evaluation of " + ", ".join(_escaped(models[label]["name"]) for label in labels(report)),
        "\n".join(
            f"- {'' if several else part[label] + ': '}**{_escaped(of['name'])}**, "
            f"{'the baseline, ' if several and label == 'baseline' else ''}"
            f"{of['parameters']:,d} parameters, measured in {of['dtype']}"
            for label, of in models.items()
        ),
        *(_grid(table) for table in tables(report)),
        INTERVALS + (f" {OF_TASKS}" if "lm_eval" in report["data"] else ""),
    ]
    if tests(report):
        parts += ["Exact McNemar tests on the same prompts:", _list(tests(report))]
    for heading, table in category_tables(report):
        parts += [f"## {_escaped(heading)}, by category", _grid(table)]
    if report["coherence"]:
        parts += ["## Coherence", about_coherence(report), _grid(coherence_table(report))]
    if report["relearning"]:
        parts += ["## Relearning", about_relearning(report)]
        parts += [_list(relearned(report))] if relearned(report) else []
        parts += [part for heading, table in relearning_tables(report) for part in (_escaped(heading), _grid(table))]
    if survival(report):
        parts += ["## Patches", _list(survival(report) + later(report))]
    parts += [
        "## Judge",
        f"{_escaped(about_judge(report))} On {report['judge']['measured_on']}:",
        "\n".join(f"- {line}" for line in accuracy(report)),
        "## Data and settings",
        _list(f"{name}: {_facts(about)}" for name, about in report["data"].items()),
        _list(f"{name}: {json.dumps(value)}" for name, value in report["settings"].items()),
    ]
    if shown := samples(report, rows):
        parts += [
            "## Answers side by side",
            "Written by the models under test, unedited, and cut where “… [cut]” stands; some may be offensive or "
            "wrong. All of them are in `answers.jsonl`.",
            *(_sample(row, roles(report)) for row in shown),
        ]
    return "\n\n".join(parts) + "\n"


def _grid(table: Table) -> str:
    head = list(map(_escaped, table[0]))
    rows = [[_escaped(name), *cells] for name, *cells in table[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _list(lines: Any) -> str:
    return "\n".join(f"- {_escaped(line)}" for line in lines)


def _facts(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in about.items())


def _sample(row: Mapping[str, Any], part: Mapping[str, str]) -> str:
    lines = [f"**{row['set']}, line {row['line']}:** {_escaped(_cut(row['prompt']))}", ""]
    for label, name in part.items():
        answer = _escaped(_cut(row[label]["answer"])) or "(nothing)"
        lines.append(f"- {_escaped(name)}, {verdict(row, label)}: {answer}")
    return "\n".join(lines)


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[:SHOWN].rstrip() + "… [cut]"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is: nobody's answer becomes a heading, a link or HTML."""
    text = re.sub(r"([\\`*_\[\]<>#|~!])", r"\\\1", printable(text))
    return re.sub(r"^([-+]|\d+[.)])", r"\\\1", text)
