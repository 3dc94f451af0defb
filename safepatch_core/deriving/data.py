"""The rows that a derive run trains on, read and seen as the model sees them before any weight is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safepatch_core.deriving.config import DeriveConfig
from safepatch_core.errors import InputError
from safepatch_core.files.disk import hash_file
from safepatch_core.language.chat import Example, Format, encode_rows
from safepatch_core.language.model import Limits
from safepatch_core.language.rows import Row, read_rows

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Pair(Example):
    """A row whose answer is rejected for another."""

    chosen: Example = Example((), 0)


@dataclass(frozen=True, slots=True)
class Data:
    """The rows as token ids.

    Attributes:
        examples: Trained on; `Pair`s where one answer is chosen and the other rejected.
        utility: Kept likely beside them.
        probe: Of `examples`, those of importance and of the reported NLLs.
        refused: Harmless questions that look harmful; of them and of the others only the prompt counts, where
            directions are read.
        inputs: What a resumed run must share of both files, as JSON types.
    """

    examples: Sequence[Example]
    utility: Sequence[Example]
    probe: Sequence[Example]
    inputs: Mapping[str, Any]
    refused: Sequence[Example] = ()


def read_data(config: DeriveConfig, tokenizer: Any, limits: Limits, tell: Tell) -> Data:
    """The data of a run. `tell` is told what is done to it beyond the settings.

    Raises:
        InputError: A file or a row can't be used, or the chat template refuses the conversation.
        UsageError: A bad slice.
    """
    chat, length = _format(config, tokenizer, limits, tell)
    columns = {"question": config.question_column, "answer": config.answer_column}
    columns |= {"chosen": config.chosen_column} if config.prefers else {}
    options = {name: f"--{name}-column" for name in columns}
    rows = read_rows(config.data, columns, config.rows, config.data_where, options=options, tell=tell)
    examples = encode_rows(chat, config.data, rows, length)
    if config.prefers:
        chosen = [Row(row.line, row.values | {"answer": row.values["chosen"]}) for row in rows]
        examples = _paired(examples, encode_rows(chat, config.data, chosen, length))
    about: dict[str, Any] = {
        "sha256": hash_file(Path(config.data)),
        "rows": len(rows),
        "answer_tokens": sum(e.answer_tokens for e in examples),
        "truncated_rows": sum(e.truncated for e in examples),
    }
    if config.utility_data is None:
        return Data(examples, (), _sample(examples, config), {"data": about})
    columns = {"question": config.utility_question_column, "answer": config.utility_answer_column}
    options = {name: f"--utility-{name}-column" for name in columns}
    rows = read_rows(config.utility_data, columns, config.utility_rows, options=options, tell=tell)
    utility = encode_rows(chat, config.utility_data, rows, length)
    other = {"sha256": hash_file(Path(config.utility_data)), "rows": len(rows)}
    return Data(examples, utility, _sample(examples, config), {"data": about, "utility_data": other})


def _paired(rejected: Sequence[Example], chosen: Sequence[Example]) -> list[Example]:
    return [Pair(e.ids, e.answer, e.truncated, other) for e, other in zip(rejected, chosen, strict=True)]


def read_replay(
    config: DeriveConfig, tokenizer: Any, limits: Limits, tell: Tell
) -> tuple[Sequence[Example], dict[str, Any]]:
    """The rows of earlier rounds, and what a resumed run must share of them. Raises as `read_data`."""
    if config.replay_data is None:
        return (), {}
    chat, length = _format(config, tokenizer, limits, tell)
    columns = {"question": config.replay_question_column, "answer": config.replay_answer_column}
    options = {name: f"--replay-{name}-column" for name in columns}
    path = config.replay_data
    rows = read_rows(path, columns, config.replay_rows, config.replay_where, options=options, tell=tell)
    inputs = {"replay_data": {"sha256": hash_file(Path(path)), "rows": len(rows)}}
    return encode_rows(chat, path, rows, length), inputs


def read_prompts(config: DeriveConfig, tokenizer: Any, limits: Limits, tell: Tell) -> Data:
    """The questions that directions are read from; answers are not asked for. Raises as `read_data`."""
    chat, length = _format(config, tokenizer, limits, tell)
    files = {
        "data": (config.question_column, config.rows, config.data_where),
        "utility_data": (config.utility_question_column, config.utility_rows, {}),
        "refused_data": (config.refused_question_column, config.refused_rows, config.refused_where),
    }
    found, inputs = [], {}
    for key, (column, some, where) in files.items():
        path, option = getattr(config, key), key.removesuffix("data").replace("_", "-") + "question-column"
        rows = read_rows(path, {"question": column}, some, where, options={"question": f"--{option}"}, tell=tell)
        found.append(encode_rows(chat, path, rows, length))
        inputs[key] = {"sha256": hash_file(Path(path)), "rows": len(rows)}
    harmful, ordinary, refused = found
    return Data(harmful, ordinary, (), inputs, refused)


def _format(config: DeriveConfig, tokenizer: Any, limits: Limits, tell: Tell) -> tuple[Format, int]:
    """How the model sees a row, and the most tokens that a row has."""
    try:
        chat = Format(tokenizer, config.system_prompt, thinking=config.thinking, vocabulary=limits.vocabulary)
    except InputError as error:
        raise InputError(str(error), file=config.model) from error
    if chat.closed:
        tell("the chat template opens a thinking block: it is closed before each answer")
    return chat, min(config.max_length, limits.positions or config.max_length)


def _sample(examples: Sequence[Example], config: DeriveConfig) -> list[Example]:
    """A seeded draw, in file order."""
    count = min(config.importance_samples or len(examples), len(examples))
    generator = torch.Generator().manual_seed(config.seed)
    drawn = torch.randperm(len(examples), generator=generator)[:count].tolist()
    return [examples[i] for i in sorted(drawn)]
