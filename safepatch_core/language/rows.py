"""Rows of text from a data file: the one reader behind `derive` and `eval`.

- `.csv`: comma separated, the first line is the header.
- `.jsonl`: one JSON object per line; its keys are the columns.
- `.json`: a list of such objects; or lists of strings, alone or under nested keys (a category, then a
  subcategory), which give the columns `text`, `category` and `subcategory`.
- `.parquet`: needs pyarrow.
- `.txt`: one row per line, in the column `text`.

Text is UTF-8 (a byte order mark is ignored). Anything else about the file is an InputError with its line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safepatch_core.errors import InputError, UsageError

T = TypeVar("T")


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
        raise _fault(path, "line", data.count(b"\n", 0, error.start) + 1, "not UTF-8") from error


def read_rows(
    path: str | Path,
    columns: Mapping[str, str] | Sequence[str],
    rows: str | None = None,
    where: Mapping[str, str | Sequence[str]] | None = None,
) -> list[Row]:
    """The wanted columns of the wanted rows, in file order; never an empty list.

    `columns` maps the names of the result to columns of the file, or lists columns that keep their names.
    `where` keeps rows whose column equals the value (or one of the values). `rows` is a slice "start:stop" or
    "start:stop:step" of what `where` left, counted from 0, stop excluded; its bounds must exist.
    Raises InputError for a bad file or an empty or missing wanted value, UsageError for a bad slice.
    """
    path = Path(path)
    wanted = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    where = where or {}
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise InputError(
            "unknown kind of data file",
            file=path,
            found=path.suffix or "no suffix",
            expected=", ".join(_READERS),
        )
    unit = _unit(path)
    kept: list[tuple[int, dict[str, Any]]] = []
    total = 0
    for number, record in read(path):
        total += 1
        for column in (*wanted.values(), *where):
            if column not in record:
                has = ", ".join(record) or "none"
                raise _fault(path, unit, number, f"no column '{column}'", found=f"columns {has}")
        if all(_matches(record[column], value) for column, value in where.items()):
            kept.append((number, record))
    if not total:
        raise InputError("no rows", file=path)
    if not kept:
        raise InputError("no row matches", file=path, expected=" and ".join(f"{k} = {v}" for k, v in where.items()))
    result = []
    for number, record in slice_rows(path, kept, rows):
        values = {}
        for name, column in wanted.items():
            value = record[column]
            if not isinstance(value, str):
                raise _fault(path, unit, number, f"column '{column}'", found=_kind(value), expected="text")
            if not value.strip():
                raise _fault(path, unit, number, f"column '{column}' is empty")
            if any("\ud800" <= char <= "\udfff" for char in value):
                raise _fault(path, unit, number, f"column '{column}' holds half a surrogate pair")
            values[name] = value
        result.append(Row(number, values))
    return result


def place(path: str | Path, row: Row) -> str:
    """Where a row is in its file, for people."""
    return f"{_unit(Path(path))} {row.line}"


def _unit(path: Path) -> str:
    return "row" if path.suffix.lower() in (".json", ".parquet") else "line"


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


def _fault(
    path: Path, unit: str, number: int, what: str, *, found: object = None, expected: object = None
) -> InputError:
    return InputError(f"{unit} {number}: {what}", file=path, found=found, expected=expected)


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _matches(value: Any, wanted: str | Sequence[str]) -> bool:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text == wanted if isinstance(wanted, str) else text in wanted


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(read_text(path).rstrip("\r\n"), newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            if not fields:
                raise _fault(path, "line", line, "empty row")
            if header is None:
                header = fields
                if len(set(header)) < len(header):
                    raise _fault(path, "line", line, "a column name appears twice")
            elif len(fields) != len(header):
                raise _fault(path, "line", line, "wrong number of fields", found=len(fields), expected=len(header))
            else:
                yield line, dict(zip(header, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise _fault(path, "line", line, f"not CSV ({error})") from error


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in _lines(path):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _fault(path, "line", line, f"not JSON ({getattr(error, 'msg', error)})") from error
        if not isinstance(record, dict):
            raise _fault(path, "line", line, "not a JSON object", found=_kind(record))
        yield line, record


def _txt(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in _lines(path):
        yield line, {"text": text}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    text = read_text(path).rstrip()
    for line, content in enumerate(text.split("\n") if text else [], 1):
        if not content.strip():
            raise _fault(path, "line", line, "empty row")
        yield line, content.removesuffix("\r")


def _json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        tree = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise _fault(path, "line", error.lineno, f"not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})", file=path) from error
    yield from enumerate(_leaves(path, tree, ()), 1)


def _leaves(path: Path, node: Any, keys: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    where = f"under {' / '.join(keys)}" if keys else "at the top"
    if isinstance(node, dict) and len(keys) < 2:
        for key, child in node.items():
            yield from _leaves(path, child, (*keys, key))
    elif isinstance(node, list):
        for number, item in enumerate(node, 1):
            if isinstance(item, dict) and not keys:
                yield item
            elif isinstance(item, str):
                yield {"text": item, **dict(zip(("category", "subcategory"), keys, strict=False))}
            else:
                raise InputError(f"item {number} {where}", file=path, found=_kind(item), expected="text")
    else:
        raise InputError(f"JSON {where}", file=path, found=_kind(node), expected="a list of rows")


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
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


_READERS = {".csv": _csv, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".txt": _txt}
