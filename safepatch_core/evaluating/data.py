"""The prompts and the text that are measured, read and described before any model is loaded."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safepatch_core.errors import InputError
from safepatch_core.evaluating.config import OF_SETS, EvalConfig, Kind, PromptSet
from safepatch_core.language.rows import Row, read_rows, read_text, slice_rows


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
        for place, row in enumerate(self.rows):
            if "request" in row.values:
                found[row.values["request"]].append(place)
        return [places for places in found.values() if len(places) > 1]


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text for perplexity."""

    path: Path
    text: str
    about: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Data:
    """Everything to be measured on; None is left out of the report."""

    sets: list[Prompts]
    text: Text | None

    @property
    def about(self) -> dict[str, Any]:
        texts = {} if self.text is None else {"text": self.text.about}
        return {prompts.name: prompts.about for prompts in self.sets} | texts

    @property
    def paths(self) -> list[Path]:
        return [part.path for part in (*self.sets, self.text) if part is not None]


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
    return Data([_prompts(prompts, tell) for prompts in config.sets], text)


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
    if of.name in OF_SETS:
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
