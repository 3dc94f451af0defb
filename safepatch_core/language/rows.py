"""Rows of text from a data file: the one reader behind `derive` and `eval`.

- `.csv`, `.tsv`: separated by commas or tabs, the first line is the header. A `.csv` whose header has no comma may
  be separated by semicolons, as spreadsheets write it, or by tabs.
- `.jsonl`, `.ndjson`: one JSON object per line; its keys are the columns.
- `.json`: a list of such objects, or of strings, which give the column `text`; alone or under nested keys (a
  category, then a subcategory), which give the columns `category` and `subcategory`.
- `.parquet`: needs pyarrow.
- `.txt`: one row per line, in the column `text`.

Text is UTF-8 (a byte order mark is ignored), and blank lines are skipped. Anything else about the file is an
InputError with its line.

A question or an answer may also be the one that a chat holds: a list of messages with `role` and `content`, or with
`from` and `value`, also as JSON in a text. A chat that holds more than a question and its answer is refused.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from safepatch_core.errors import InputError, UsageError
from safepatch_core.settings import Where

T = TypeVar("T")
Record = dict[str, Any]
Wanted = dict[str, tuple[str, ...]]  # name of the result -> columns, of which the second may be missing or empty

# Where others keep questions and answers. Of a pair that was chosen and rejected, only people can say which is meant.
KNOWN = {
    "question": (
        *("prompt", "instruction", "query", "goal", "behavior", "text", "messages", "conversations", "conversation"),
        *("input", "user"),
    ),
    "answer": (
        *("response", "output", "completion", "target", "messages", "conversations", "conversation", "assistant"),
    ),
}
CONTEXT = {"instruction": "input"}  # of Alpaca's rows
MORE = {"system": "a system message", "history": "earlier turns"}  # that such rows may also hold
ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai"), "assistant"),
    "developer": "system",
}
SPEAKS = {"question": "user", "answer": "assistant", "chosen": "assistant"}
_CHAT = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']""")
_LISTS = "a list of rows (pandas writes one with orient='records')"
# YAML and data files have several words for them.
BOOLEANS = {True: ("true", "yes", "on"), False: ("false", "no", "off")}


@dataclass(frozen=True, slots=True)
class Row:
    """One row: `line` is where it starts in the file, from 1 (its ordinal in JSON and parquet)."""

    line: int
    values: dict[str, str]


def read_text(path: str | Path) -> str:
    """A whole UTF-8 text file. Raises InputError, with the line of the first undecodable byte."""
    path = Path(path)
    if not path.is_file():
        raise InputError("not a regular file" if path.exists() else "no such file", file=path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"can't be read ({error.strerror})", file=path) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"line {line}: not UTF-8", file=path) from error


def read_rows(
    path: str | Path,
    columns: Mapping[str, str] | Sequence[str],
    rows: str | None = None,
    where: Where | None = None,
    *,
    options: Mapping[str, str] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """The wanted columns of the wanted rows, in file order; never an empty list.

    Args:
        path: The data file.
        columns: Names of the result -> columns of the file; or columns that keep their names. Where a file has no
            column `question` or `answer`, one that others call so is taken.
        rows: A slice "start:stop" or "start:stop:step" of what `where` leaves, counted from 0, stop excluded; its
            bounds must exist.
        where: Keeps rows whose column equals the value (or one of the values): text, numbers or booleans.
        options: Names of the result -> the option that names its column, for errors.
        tell: Is told in a line which other columns were taken.

    Raises:
        InputError: A bad file, or an empty or missing wanted value.
        UsageError: A bad slice.
    """
    path = Path(path)
    asked = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    read = _READERS.get(path.suffix.lower())
    if read is None:
        if not path.exists():
            raise InputError("no such file", file=path)
        raise InputError(
            "unknown kind of data file",
            file=path,
            found="a folder" if path.is_dir() else path.suffix or "no suffix",
            expected=", ".join(_READERS),
        )
    kept: list[tuple[int, Record]] = []
    wanted: Wanted = {}
    for number, record in read(path):
        wanted = wanted or _found(path, asked, record, tell)
        needed = {columns[0]: (options or {}).get(name) for name, columns in wanted.items()}
        for column in (*needed, *(where or {})):
            if column not in record:
                has, option = ", ".join(record) or "none", needed.get(column)
                expected = option and f"{option} to name one"
                raise _fault(path, number, f"no column '{column}'", found=f"columns {has}", expected=expected)
        if all(_matches(record[column], value) for column, value in (where or {}).items()):
            kept.append((number, record))
    if not wanted:
        raise InputError("no rows", file=path)
    if not kept:
        expected = " and ".join(f"{k} = {v}" for k, v in (where or {}).items())
        raise InputError("no row matches", file=path, expected=expected)
    taken = slice_rows(path, kept, rows)
    if any(columns[0] != asked[name] for name, columns in wanted.items()):
        for number, record in taken:
            _refuse_more(path, number, record)
    return [
        Row(number, {name: _text(path, number, name, columns, record) for name, columns in wanted.items()})
        for number, record in taken
    ]


def _found(path: Path, asked: Mapping[str, str], record: Record, tell: Callable[[str], None]) -> Wanted:
    """The columns to take, judged by the file's first record."""
    wanted: Wanted = {}
    others = []
    for name, column in asked.items():
        wanted[name] = (column,)
        if column in record or column != name:
            continue
        by_name = {key.lower(): key for key in record}
        known = next((by_name[other] for other in (name, *KNOWN.get(name, ())) if other in by_name), None)
        if known is not None:
            context = by_name.get(CONTEXT.get(known.lower(), ""))
            wanted[name] = (known,) if context is None else (known, context)
            others.append(f"{name}s are in " + " and ".join(f"'{column}'" for column in wanted[name]))
    if others:
        tell(f"{path}: {', '.join(others)}")
    return wanted


def _refuse_more(path: Path, number: int, record: Record) -> None:
    """What belongs to a question that was found, and would be left out of it."""
    for column, what in MORE.items():
        if record.get(column):
            expected = "rows without, or --question-column to say that the question is whole"
            raise _fault(path, number, f"column '{column}' holds {what}", expected=expected)


def _text(path: Path, number: int, name: str, columns: Sequence[str], record: Record) -> str:
    """The wanted text of a record."""
    column, *context = columns
    parts = [record[column], *(record[c] for c in context if record.get(c))]
    for at, value in enumerate(parts):
        turns = _turns(_parsed(path, number, columns[at], value)) if name in SPEAKS else None
        if turns is not None:
            parts[at] = value = _said(path, number, turns, SPEAKS[name])
        if not isinstance(value, str):
            raise _fault(path, number, f"column '{columns[at]}'", found=_kind(value), expected="text")
        if not value.strip():
            raise _fault(path, number, f"column '{columns[at]}' is empty")
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise _fault(path, number, f"column '{columns[at]}' holds half a surrogate pair")
    return "\n\n".join(parts)


def _parsed(path: Path, number: int, column: str, value: object) -> object:
    """A chat's messages where they are given as JSON in a text, as tables have to."""
    if not isinstance(value, str) or not _CHAT.match(value):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise _fault(
            path, number, f"column '{column}'", found="messages that are not JSON", expected="JSON"
        ) from None


def _turns(value: object) -> list[tuple[str, Any]] | None:
    """(role, content) of a chat's messages; None if the value is no chat."""
    if not isinstance(value, list) or not value:
        return None
    turns = []
    for message in value:
        if not isinstance(message, dict):
            return None
        keys = ("role", "content") if "role" in message else ("from", "value")
        role, content = (message.get(key) for key in keys)
        if not isinstance(role, str):
            return None
        if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
            content = "".join(str(part["text"]) for part in content)
        turns.append((ROLES.get(role.lower(), role.lower()), content))
    return turns


def _said(path: Path, number: int, turns: Sequence[tuple[str, Any]], role: str) -> Any:
    """What `role` says in a chat of one question and one answer."""
    roles = [who for who, _ in turns]
    if "system" in roles:
        expected = "none; system_prompt gives one to every row"
        raise _fault(path, number, "a system message", expected=expected)
    if roles not in (["user", "assistant"], [role]):
        expected = "one question and one answer"
        raise _fault(path, number, "a conversation", found=", ".join(roles)[:80], expected=expected)
    return next(content for who, content in turns if who == role)


def place(path: str | Path, number: int) -> str:
    """Where in its file the row with that `line` is, for people."""
    return f"{'row' if Path(path).suffix.lower() in ('.json', '.parquet') else 'line'} {number}"


def slice_rows(path: Path, items: Sequence[T], rows: str | None) -> Sequence[T]:
    """The items that "start:stop" or "start:stop:step" selects; None takes all. Errors as in `read_rows`."""
    if rows is None:
        return items
    parts = rows.split(":")
    if not 2 <= len(parts) <= 3 or not all(p == "" or (p.isascii() and p.isdigit()) for p in parts):
        raise UsageError("bad slice of rows", found=repr(rows), expected="start:stop or start:stop:step")
    start, stop, step = (int(p) if p else None for p in (*parts, "")[:3])
    if step == 0 or (stop is not None and stop <= (start or 0)):
        raise UsageError("slice of rows selects nothing", found=repr(rows))
    if max(stop or 0, (start or 0) + 1) > len(items):
        raise InputError(f"rows {rows} asked for", file=path, found=f"{len(items)} rows")
    return items[start:stop:step]


def _fault(path: Path, number: int, what: str, *, found: object = None, expected: object = None) -> InputError:
    return InputError(f"{place(path, number)}: {what}", file=path, found=found, expected=expected)


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _matches(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return any(_matches(value, one) for one in wanted)
    if isinstance(wanted, bool):
        return value is wanted or (isinstance(value, str) and value.lower() in BOOLEANS[wanted])
    if isinstance(wanted, int | float):
        return not isinstance(value, bool) and _number(value) == wanted
    return bool((value if isinstance(value, str) else json.dumps(value, default=str)) == wanted)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _csv(path: Path, delimiters: str = ",;\t") -> Iterator[tuple[int, Record]]:
    text = read_text(path)
    first = text.partition("\n")[0]
    delimiter = next((mark for mark in delimiters if mark in first), delimiters[0])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            if not fields:
                pass
            elif header is None:
                header = fields
                if len(set(header)) < len(header):
                    raise _fault(path, line, "a column name appears twice")
            elif len(fields) != len(header):
                raise _fault(path, line, "wrong number of fields", found=len(fields), expected=len(header))
            else:
                yield line, dict(zip(header, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise _fault(path, line, f"not CSV ({error})") from error


def _jsonl(path: Path) -> Iterator[tuple[int, Record]]:
    for line, text in _lines(path):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            what = f"not JSON ({getattr(error, 'msg', error)})"
            raise _fault(path, line, what, expected="an object on each line (else .json)") from error
        if not isinstance(record, dict):
            raise _fault(path, line, "not a JSON object", found=_kind(record))
        yield line, record


def _txt(path: Path) -> Iterator[tuple[int, Record]]:
    for line, text in _lines(path):
        yield line, {"text": text}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for line, content in enumerate(read_text(path).split("\n"), 1):
        if content.strip():
            yield line, content.removesuffix("\r")


def _json(path: Path) -> Iterator[tuple[int, Record]]:
    try:
        tree = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"line {error.lineno}: not JSON ({error.msg})", file=path) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})", file=path) from error
    yield from enumerate(_leaves(path, tree, ()), 1)


def _leaves(path: Path, node: Any, keys: tuple[str, ...]) -> Iterator[Record]:
    where = f"under {' / '.join(keys)}" if keys else "at the top"
    if isinstance(node, dict) and len(keys) < 2:
        for key, child in node.items():
            yield from _leaves(path, child, (*keys, key))
    elif isinstance(node, list):
        for number, item in enumerate(node, 1):
            if not isinstance(item, dict | str):
                raise InputError(f"item {number} {where}", file=path, found=_kind(item), expected="text")
            record = {"text": item} if isinstance(item, str) else item
            yield dict(zip(("category", "subcategory"), keys, strict=False)) | record
    else:
        raise InputError(f"JSON {where}", file=path, found=_kind(node), expected=_LISTS)


def _parquet(path: Path) -> Iterator[tuple[int, Record]]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError("reading parquet needs pyarrow", expected="pip install 'safepatch[derive]'") from error
    if not path.is_file():
        raise InputError("not a regular file" if path.exists() else "no such file", file=path)
    try:
        with parquet.ParquetFile(path) as table:
            records = [record for batch in table.iter_batches() for record in batch.to_pylist()]
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"not a readable parquet file ({str(error).splitlines()[0]})", file=path) from error
    yield from enumerate(records, 1)


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Record]]]] = {
    ".csv": _csv,
    ".tsv": partial(_csv, delimiters="\t"),
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _txt,
}
