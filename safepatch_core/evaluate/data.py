"""The prompts and the text that are measured, read and described before any model is loaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safepatch_core.errors import InputError
from safepatch_core.evaluate.config import EvalConfig, Where
from safepatch_core.rows import Row, read_rows, read_text, slice_rows


@dataclass(frozen=True, slots=True)
class Prompts:
    """One set of prompts: each row has `question`, and `answer` where answers are measured."""

    path: Path
    rows: list[Row]
    about: dict[str, Any]  # for the report: file, sha256, rows

    @property
    def answered(self) -> bool:
        return "answer" in self.rows[0].values


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text for perplexity."""

    path: Path
    text: str
    about: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Data:
    """Everything to be measured on; None is left out of the report."""

    harmful: Prompts | None
    harmless: Prompts | None
    text: Text | None

    @property
    def about(self) -> dict[str, Any]:
        parts = {"harmful": self.harmful, "harmless": self.harmless, "text": self.text}
        return {name: part.about for name, part in parts.items() if part is not None}

    @property
    def paths(self) -> list[Path]:
        return [part.path for part in (self.harmful, self.harmless, self.text) if part is not None]


def load(config: EvalConfig) -> Data:
    """The data of a configuration. Raises InputError naming file and line, UsageError for a bad slice."""
    config = config.with_data()
    harmful = harmless = text = None
    if config.harmful is not None:
        columns = {"question": config.harmful_column}
        if config.answer_column is not None:
            columns["answer"] = config.answer_column
        harmful = _prompts(config.harmful, columns, config.harmful_rows, config.harmful_where)
    if config.harmless is not None:
        columns = {"question": config.harmless_column}
        harmless = _prompts(config.harmless, columns, config.harmless_rows, config.harmless_where)
    if config.text is not None:
        path = Path(config.text)
        lines = read_text(path).splitlines(keepends=True)
        content = "".join(slice_rows(path, lines, config.text_rows))
        if not content.strip():
            raise InputError("no text", file=path)
        text = Text(path, content, {**_about(path), "characters": len(content)})
    return Data(harmful, harmless, text)


def _prompts(file: str, columns: dict[str, str], rows: str | None, where: Where) -> Prompts:
    path = Path(file)
    read = read_rows(path, columns, rows, where)
    return Prompts(path, read, {**_about(path), "prompts": len(read)})


def _about(path: Path) -> dict[str, Any]:
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
