"""Reports of measurements that are made up, so that every number in them is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safepatch_core.evaluating import EvalConfig
from safepatch_core.evaluating.coherence import Read
from safepatch_core.evaluating.config import Kind
from safepatch_core.evaluating.data import Data, Prompts, Text
from safepatch_core.evaluating.judge import prefix_verdict
from safepatch_core.evaluating.measure import Measurement, Replies
from safepatch_core.evaluating.report import answers, build, files
from safepatch_core.language.rows import Row

TEXT = Text(Path("t.txt"), "t", {"file": "t.txt"})


def prompts(kind: Kind, count: int, categories: str = "", **values: str) -> Prompts:
    """Rows of a set; `categories` gives one letter per row."""
    rows = [Row(i + 1, {"question": f"question {i}", **values}) for i in range(count)]
    for row, category in zip(rows, categories, strict=False):
        row.values["category"] = category
    about = {"kind": kind, "file": "set.jsonl", "sha256": "0", "prompts": count}
    return Prompts(kind, kind, Path("set.jsonl"), rows, about)


def replies(refused: Sequence[bool], nll: list[float] | None = None) -> Replies:
    return Replies(answers=["I cannot." if r else "Sure." for r in refused], nll=nll)


def measurement(**of: Any) -> Measurement:
    return Measurement(parameters=1, dtype="float32", **of)


def built(
    data: Data,
    measured: dict[str, Measurement],
    patches: dict[str, Any] | None = None,
    survival: dict[str, Any] | None = None,
    read: Read | None = None,
    **changes: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, bytes]]:
    """The report, the answers and the files of known measurements."""
    refs = {"model": "patched"} | ({"baseline": "original"} if "baseline" in measured else {})
    more = [label for label in measured if label.startswith("model_")]
    config = EvalConfig.model_validate({**refs, "more_models": more, "out": "report", **changes})
    stages = {
        label: {
            step: {name: list(map(prefix_verdict, of.answers)) for name, of in said.items()}
            for step, said in found.stages.items()
        }
        for label, found in measured.items()
    }
    verdicts = {label: of[0] for label, of in stages.items()}
    facts: dict[str, Any] = {"models": {label: {"name": ref, "sha256": "0"} for label, ref in config.models.items()}}
    facts |= {"patches": patches or {}, "survival": survival or {}, "read": read or {}, "stages": stages}
    report = build(config, data, measured, verdicts, facts)
    rows = answers(data, measured, verdicts, False)
    return report, rows, files(report, rows)
