"""The prompts and the text that are measured, read and described before any model is loaded."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safepatch_core.errors import InputError
from safepatch_core.evaluating.config import OF_SETS, EvalConfig, Kind, PromptSet
from safepatch_core.language.rows import Row, place, read_rows, read_text, slice_rows

RELEARN = "relearn"


@dataclass(frozen=True, slots=True)
class Prompts:
    """One set of prompts: each row has `question`, and `answer` and `category` where the data has them."""

    name: str
    kind: Kind
    path: Path
    rows: list[Row]
    about: dict[str, Any]  # for the report: kind, file, sha256, rows

    @property
    def answered(self) -> bool:
        return "answer" in self.rows[0].values

    @property
    def categories(self) -> list[str] | None:
        """One per row, if there are any."""
        return [row.values["category"] for row in self.rows] if "category" in self.rows[0].values else None

    @property
    def framings(self) -> list[list[int]]:
        """Places of the rows that ask for one thing, of everything that is asked for at least twice."""
        found = defaultdict(list)
        for at, row in enumerate(self.rows):
            if "request" in row.values:
                found[row.values["request"]].append(at)
        return [places for places in found.values() if len(places) > 1]


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text for perplexity."""

    path: Path
    text: str
    about: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Data:
    """Everything to be measured on, and to relearn from; None is left out of the report."""

    sets: list[Prompts]
    text: Text | None
    relearn: Prompts | None = None

    @property
    def about(self) -> dict[str, Any]:
        others = {"text": self.text, "relearn": self.relearn}
        more = {name: part.about for name, part in others.items() if part is not None}
        return {prompts.name: prompts.about for prompts in self.sets} | more

    @property
    def paths(self) -> list[Path]:
        return [part.path for part in (*self.sets, self.text, self.relearn) if part is not None]

    @property
    def harmful(self) -> list[Prompts]:
        """The sets that nobody should comply with."""
        return [prompts for prompts in self.sets if prompts.kind == "harmful"]


def load(config: EvalConfig, tell: Callable[[str], None] = lambda line: None) -> Data:
    """The data of a configuration; `tell` is told where columns have other names.

    Raises InputError naming file and line, UsageError for a bad slice.
    """
    config = config.with_data()
    text = None
    if config.text is not None:
        path = Path(config.text)
        lines = read_text(path).splitlines(keepends=True)
        content = "".join(slice_rows(path, lines, config.text_rows))
        if not content.strip():
            raise InputError("no text", file=path)
        text = Text(path, content, {**_about(path), "characters": len(content)})
    data = Data([_prompts(prompts, tell) for prompts in config.sets], text)
    return data if config.relearn is None else replace(data, relearn=_to_relearn(config, config.relearn, data, tell))


def _to_relearn(config: EvalConfig, file: str, data: Data, tell: Callable[[str], None]) -> Prompts:
    """The rows of the relearning test, which may not hold what is asked after it."""
    found = _prompts(
        PromptSet(
            name=RELEARN,
            kind="harmful",
            file=file,
            column=config.relearn_question_column,
            answer_column=config.relearn_answer_column,
            rows=config.relearn_rows,
            where=config.relearn_where,
        ),
        tell,
    )
    measured = {row.values["question"].strip(): of.name for of in data.harmful for row in of.rows}
    for row in found.rows:
        name = measured.get(row.values["question"].strip())
        if name is not None:
            raise InputError(
                f"{place(found.path, row.line)}: to relearn from is a prompt of '{name}', which is measured",
                file=found.path,
                expected="other rows, as relearn_rows takes them",
            )
    return found


def _prompts(of: PromptSet, tell: Callable[[str], None]) -> Prompts:
    columns = {
        "question": of.column,
        "answer": of.answer_column,
        "category": of.category_column,
        "request": of.request_column,
    }
    wanted = {name: column for name, column in columns.items() if column is not None}
    path = Path(of.file)
    options = {name: "column" if name == "question" else f"{name}_column" for name in columns}
    if of.name == RELEARN:
        options = {name: f"--relearn-{name}-column" for name in columns}
    elif of.name in OF_SETS:
        options = {
            "question": f"--{of.name}-column",
            "answer": "--answer-column",
            "category": f"--{of.name}-category-column",
        }
    rows = read_rows(path, wanted, of.rows, of.where, options=options, tell=tell)
    prompts = Prompts(of.name, of.kind, path, rows, {"kind": of.kind, **_about(path), "prompts": len(rows)})
    if of.request_column is not None and not prompts.framings:
        raise InputError(
            "nothing is asked for in several framings",
            file=path,
            found=f"another '{of.request_column}' in each of {len(rows)} rows",
            expected="rows that share it",
        )
    return prompts


def _about(path: Path) -> dict[str, Any]:
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
