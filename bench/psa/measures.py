"""What every model of the evidence is measured on, at a size, and what is told of it beside the backbone.

Each model is measured once: what it showed is kept in a file, with a digest of what was asked and of what made it. A
measure that `safepatch eval` has is a line of `asked`, or of `asked_again` where a model is fine-tuned first; its
column in a table is a line of `COLUMNS`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safepatch_core.evaluating import EvalConfig
from safepatch_core.evaluating.coherence import read_by
from safepatch_core.evaluating.data import Data, load
from safepatch_core.evaluating.judge import Verdict, prefix_verdict
from safepatch_core.evaluating.measure import Measurement, Replies, measure
from safepatch_core.evaluating.report import build
from safepatch_core.evaluating.tasks import Tasks
from safepatch_core.files.records import digest
from safepatch_core.language.model import at_work, limits

from . import tasks
from .data import SIZES
from .steps import Evidence

Found = dict[str, Any]

# Of a model's line: title of the column, and how it is shown.
COLUMNS = {
    "harmful_compliance": ("harmful, AdvBench", "{:.1%}"),
    "harmful_compliance.sst": ("harmful, SimpleSafetyTests", "{:.1%}"),
    "harmful_compliance.catqa": ("harmful, CatQA", "{:.1%}"),
    "over_refusal": ("over-refusal, XSTest", "{:.1%}"),
    "answer_nll": ("NLL of harmful answers", "{:.2f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "lm_eval.psa_knowledge.acc": ("knowledge", "{:.1%}"),
    "lm_eval.psa_continuation.acc": ("continuation", "{:.1%}"),
    "consistency.framed-harmful": ("same verdict in all framings, harmful", "{:.1%}"),
    "consistency.framed-harmless": ("same verdict in all framings, harmless", "{:.1%}"),
    "repeats.harmful": ("repeats in answers", "{:.1%}"),
    "answer_perplexity.harmful": ("perplexity of answers under the backbone", "{:.2f}"),
    "relearned.1": ("harmful, AdvBench, one step of fine-tuning later", "{:.1%}"),
    "relearned.2": ("two steps", "{:.1%}"),
}
# Sets whose answers the backbone reads: those with a column. Reading all of them took a fifth of a row.
READ = ("harmful",)
RELEARNING = 2  # steps; after two an earlier trial found most of what can be undone undone


def asked(job: Evidence, size: str) -> dict[str, Any]:
    """Fields of `EvalConfig`: all that a model is asked."""
    corpora, step = job.corpora, SIZES[size]
    framed = corpora.write_framings(job.out / f"framings-{size}", step)
    return (
        corpora.held_out(step)
        | {"more_sets": [corpora.simple_tests(step), corpora.questions(step), *framed]}
        | {"harmless_rows": f"1:250:{4 * max(1, step // 4)}"}
        | {"lm_eval": ",".join(tasks.NAMES), "lm_eval_limit": None if step == 1 else 2 * tasks.DOCUMENTS // step}
        | {"lm_eval_include": str(tasks.write(job.out / "tasks", corpora.wikitext))}
        | job.measuring
    )


def asked_again(job: Evidence, size: str) -> dict[str, Any]:
    """Fields of `EvalConfig`: what a model is fine-tuned on, and asked afterwards."""
    return job.corpora.relearned(SIZES[size]) | job.measuring | {"relearn_steps": RELEARNING}


class Measures:
    """The measurements of models at a size, kept in OUT/measured-SIZE."""

    def __init__(self, job: Evidence, size: str) -> None:
        self.job, self.size, self.out = job, size, job.out / f"measured-{size}"
        self.config, self.data = self._ready(asked(job, size))
        self.again, self.data_again = self._ready(asked_again(job, size))

    def _ready(self, fields: dict[str, Any]) -> tuple[EvalConfig, Data]:
        config = EvalConfig.model_validate(fields | {"model": "any", "out": "any"})
        config = config.fitted([limits(self.job.backbone).positions])
        return config, load(config)

    @cached_property
    def _tasks(self) -> Tasks | None:
        return Tasks(self.config) if self.config.tasks else None

    def found(self, name: str, made_from: Any, make: Callable[[], Path]) -> Found:
        """What the model showed; measured now if it was not, or if what made it or what is asked has changed."""
        file = self.out / f"{name}.json"
        asked = [self.config.settings(), self.data.about, self.again.settings(), self.data_again.about]
        identity = digest([*asked, made_from])
        if file.exists():
            known: Found = json.loads(file.read_text())
            if known["identity"] == identity:
                return known
        model = make()
        self.job.say(f"measure: {name}")
        told = json.dumps({"identity": identity, **self._measured(model)})
        self.out.mkdir(parents=True, exist_ok=True)
        replace(file, told)
        found: Found = json.loads(told)
        return found

    def _measured(self, model: Path) -> Found:
        with at_work(self.job.threads, "take a smaller size"):
            shown = measure(model, model.name, self.data, self._tasks, self.config, quiet=True)
            said = {"model": {name: replies.answers for name, replies in shown.replies.items()}}
            reading = Data([of for of in self.data.sets if of.name in READ], text=None)
            read = read_by(self.job.backbone, reading, said, self.config, quiet=True)
            later = measure(model, model.name, self.data_again, None, self.again, quiet=True)
        return {"measured": shown.model_dump(), "read": read["model"], "relearned": later.model_dump()}

    def told(self, found: Found, backbone: Found) -> dict[str, Any]:
        """Every measure of a model, and its change from the backbone."""
        pair = {"baseline": backbone, "model": found}
        return told(self.config, self.data, pair) | relearned(self.again, self.data_again, pair)


def relearned(config: EvalConfig, data: Data, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By name the compliance of the model labelled so after each step of fine-tuning, beside the baseline's."""
    measured = {label: Measurement.model_validate(of["relearned"]) for label, of in found.items()}
    stages = {
        label: {step: _judged(replies) for step, replies in of.stages.items()} for label, of in measured.items()
    }
    first = {label: of[0] for label, of in stages.items()}
    report = build(config, data, measured, first, {"models": {label: {} for label in measured}, "stages": stages})
    compliance = report["relearning"][0]["metrics"][0]
    return {
        f"relearned.{at['step']}": {"n": compliance["n"], "better": compliance["better"], **at["model"]}
        | {"change": at["difference"]}
        for at in compliance["steps"]
        if at["step"]
    }


def _judged(replies: Mapping[str, Replies]) -> dict[str, list[Verdict]]:
    return {name: [prefix_verdict(answer) for answer in said.answers] for name, said in replies.items()}


def told(config: EvalConfig, data: Data, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By name the measures of the model labelled so, as `safepatch eval` tells them: n, value, interval, and change
    from the baseline where there is one."""
    measured = {label: Measurement.model_validate(of["measured"]) for label, of in found.items()}
    verdicts = {label: _judged(each.replies) for label, each in measured.items()}
    read = {label: of["read"] for label, of in found.items() if "read" in of}
    report = build(config, data, measured, verdicts, {"models": {label: {} for label in measured}, "read": read})
    return {
        metric["name"]: {"n": metric["n"], "better": metric["better"], **metric["model"]}
        | ({"change": metric["difference"]} if "difference" in metric else {})
        for metric in (*report["metrics"], *report["coherence"])
        if "model" in metric
    }


def replace(file: Path, content: str | bytes) -> None:
    """The file with new content, by one rename."""
    staged = file.with_name(f".{file.name}.part")
    staged.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(staged, file)
