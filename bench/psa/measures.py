"""What every model of the evidence is measured on, at a size, and what is told of it beside the backbone.

Each model is measured once: what it showed is kept in a file, with a digest of what was asked and of what made it. A
measure that `safepatch eval` has is a line of `asked`; its column in a table is a line of `COLUMNS`.
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
from safepatch_core.evaluating.judge import prefix_verdict
from safepatch_core.evaluating.measure import Measurement, measure
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
}


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


class Measures:
    """The measurements of models at a size, kept in OUT/measured-SIZE."""

    def __init__(self, job: Evidence, size: str) -> None:
        self.job, self.size, self.out = job, size, job.out / f"measured-{size}"
        config = EvalConfig.model_validate(asked(job, size) | {"model": "any", "out": "any"})
        self.config = config.fitted([limits(job.backbone).positions])
        self.data: Data = load(self.config)

    @cached_property
    def _tasks(self) -> Tasks | None:
        return Tasks(self.config) if self.config.tasks else None

    def found(self, name: str, made_from: Any, make: Callable[[], Path]) -> Found:
        """What the model showed; measured now if it was not, or if what made it or what is asked has changed."""
        file = self.out / f"{name}.json"
        identity = digest([self.config.settings(), self.data.about, made_from])
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
            read = read_by(self.job.backbone, self.data, said, self.config, quiet=True)
        return {"measured": shown.model_dump(), "read": read["model"]}

    def told(self, found: Found, backbone: Found) -> dict[str, Any]:
        """Every measure of a model, and its change from the backbone."""
        return told(self.config, self.data, {"baseline": backbone, "model": found})


def told(config: EvalConfig, data: Data, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By name the measures of the model labelled so, as `safepatch eval` tells them: n, value, interval, and change
    from the baseline where there is one."""
    measured = {label: Measurement.model_validate(of["measured"]) for label, of in found.items()}
    verdicts = {
        label: {name: [prefix_verdict(answer) for answer in said.answers] for name, said in each.replies.items()}
        for label, each in measured.items()
    }
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
