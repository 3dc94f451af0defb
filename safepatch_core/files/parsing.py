"""One strict parser of safetensors headers and of JSON files. Never reads tensor data.

The rules are those of the safetensors format read strictly: whatever the `safetensors` library rejects is
rejected here, and so are leading blanks, duplicate keys, unknown fields and files that are not regular.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from safepatch_core.errors import InputError
from safepatch_core.files.converters import kind_by_name
from safepatch_core.files.reading import (
    Identity,
    TensorEntry,
    fault,
    identify,
    is_sparse,
    is_text,
    open_regular,
    read_exact,
    shown,
)

# Bits per entry of every dtype that the format knows.
BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
FLOATS = frozenset(name for name in BITS if name.startswith(("F", "BF")))
HEADER_LIMIT = 100_000_000  # bytes, the format's own cap
# Braces, brackets, commas, colons, quotes and backslashes that one JSON text may hold: parsing takes time and
# memory by these, about a second for this many. A tensor takes about 26: room for over 100,000 tensors in a file.
MARKS_LIMIT = 3_000_000
_FIELDS = {"dtype", "shape", "data_offsets"}
_INTEGER = frozenset((int,))


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its header verbatim and its table."""

    file: str
    path: Path
    size: int  # bytes
    header: bytes  # the file's first 8+N bytes
    metadata: dict[str, str]
    tensors: tuple[TensorEntry, ...]  # in order of their offsets
    identity: Identity  # when the header was read
    sparse: bool  # has holes


def read_shard(
    path: str | os.PathLike[str], file: str | None = None, *, within: Path | None = None, marks: int = MARKS_LIMIT
) -> Shard:
    """Read and check the header of one safetensors file; `file` is its name within the checkpoint.

    With `within`, a symlink may not lead out of that checkpoint directory. A header of more than so many `marks` is
    refused.
    """
    path = Path(path)
    fd, real, status = open_regular(path, within=within)
    try:
        head = bytearray(min(512, status.st_size))
        read_exact(fd, head, 0, path)
        header = bytearray(8 + _header_length(path, head, status.st_size))
        read_exact(fd, header, 0, path)
    finally:
        os.close(fd)
    name = path.name if file is None else file
    metadata, tensors = _read_table(path, name, real, header, status.st_size, marks)
    return Shard(name, real, status.st_size, bytes(header), metadata, tensors, identify(status), is_sparse(status))


def _header_length(path: Path, head: bytes | bytearray, size: int) -> int:
    """N of the 8+N bytes of the header, once its first 512 bytes look like one."""
    length = int.from_bytes(head[:8], "little")
    if len(head) > 8 and length <= min(HEADER_LIMIT, size - 8) and head[8] == ord("{"):
        return length
    if size == 0:
        raise fault(path, "empty file", expected="a safetensors file")
    kind = _kind_by_content(head) if length > HEADER_LIMIT else None
    if kind is not None:
        raise fault(path, "not a safetensors file", found=kind)
    if size < 8:
        raise fault(path, "no header length", found=f"{size} bytes", expected="at least 8")
    if length == 0:
        raise fault(path, "the header's length is zero")
    if length > HEADER_LIMIT:
        raise fault(path, "header over the cap", found=f"{length} bytes", expected=f"at most {HEADER_LIMIT}")
    if length > size - 8:
        raise fault(path, "truncated header", found=f"a file of {size} bytes", expected=f"at least {length + 8}")
    start = bytes(head[8:11])
    found = "a byte order mark" if start == b"\xef\xbb\xbf" else repr(start[:1])[1:]
    raise fault(path, "the header does not start with its object", found=found, expected="'{'")


def _read_table(
    path: Path, file: str, real: Path, header: bytearray, size: int, marks: int
) -> tuple[dict[str, str], tuple[TensorEntry, ...]]:
    text = _decode(path, header[8:].rstrip(b" "), "the header", marks)
    first = len(header)
    tensors = []
    with uncollected():
        # Numbers are parsed faster by `int`, and the same but for -0, which is none, and for those too long for it.
        table = _parse(_HEADER_DECODER if "-0" in text else _PLAIN_DECODER, path, text, "the header")
        metadata = _check_metadata(path, table.pop("__metadata__", None))
        for name, info in table.items():
            if not _is_plain(name, info):
                _check_entry(path, name, info)
            begin, end = info["data_offsets"]
            shape = tuple(info["shape"])
            tensors.append(TensorEntry(name, info["dtype"], shape, real, file, first + begin, end - begin))
    tensors.sort(key=attrgetter("start", "nbytes"))
    _check_layout(path, tensors, first, size)
    return metadata, tuple(tensors)


def _check_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if metadata is _TWICE:
        raise fault(path, "duplicate key __metadata__ in the header")
    if metadata is None:  # also where it says null, which safetensors reads
        return {}
    if not isinstance(metadata, dict):
        raise fault(path, "__metadata__ is not an object", found=shown(metadata))
    for key, value in metadata.items():
        if value is _TWICE:
            raise fault(path, f"duplicate key '{key}' in __metadata__")
        if not isinstance(value, str):
            raise fault(path, f"__metadata__ key '{key}'", found=shown(value), expected="a string")
        if not (is_text(key) and is_text(value)):
            raise fault(path, f"__metadata__ key '{key}'", found="a lone surrogate")
    return metadata


def _is_plain(name: str, info: Any) -> bool:
    """Whether a tensor breaks no rule, told fast; what is not plain may still be legal."""
    try:
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        begin, end = offsets
        return (
            len(info) == 3
            and type(shape) is type(offsets) is list
            and len(shape) <= 32
            and _INTEGER.issuperset(map(type, shape + offsets))
            and 0 <= begin <= end < 1 << 60
            and min(shape, default=1) > 0
            and math.prod(shape) * BITS[dtype] == 8 * (end - begin)
            and is_text(name)
        )
    except (KeyError, TypeError, ValueError):
        return False


def _check_entry(path: Path, name: str, info: Any) -> None:
    """Raises InputError unless the dtype, shape and range of one tensor are there and agree."""

    def wrong(what: str, found: object, expected: str) -> InputError:
        return fault(path, what, tensor=name, found=shown(found), expected=expected)

    if not is_text(name):
        raise wrong("its name is not text", name, "no lone surrogates")
    if info is _TWICE:
        raise fault(path, "duplicate key in the header", tensor=name)
    if type(info) is not dict:
        raise wrong("its entry is not an object", info, "dtype, shape and data_offsets")
    if info.keys() != _FIELDS:
        raise wrong("its fields", sorted(info), "dtype, shape and data_offsets")
    if _TWICE in info.values():
        raise fault(path, "duplicate key in its entry", tensor=name)
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    bits = BITS.get(dtype) if type(dtype) is str else None
    if bits is None:
        raise wrong("unknown dtype", dtype, f"one of {', '.join(BITS)}")
    if type(shape) is not list or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        raise wrong("its shape", shape, "a list of whole numbers from 0 to 2^63 - 1")
    if (
        type(offsets) is not list
        or len(offsets) != 2
        or not all(type(offset) is int and 0 <= offset < 1 << 63 for offset in offsets)
    ):
        raise wrong("its data_offsets", offsets, "two whole numbers from 0 to 2^63 - 1")
    begin, end = offsets
    if begin > end:
        raise wrong("its range is reversed", offsets, "begin <= end")
    total = bits
    for size in shape:
        total *= size or 1
        if total >= 1 << 64:
            raise wrong(f"shape x {dtype} overflows", shape, "less than 2^64 bits")
    if 0 in shape:
        total = 0
    if total != 8 * (end - begin):
        needed = f"{total // 8} bytes" if total % 8 == 0 else f"{total} bits"
        raise wrong("its range does not fit its shape", f"{end - begin} bytes", f"{needed} for {dtype} {shape}")


def _check_layout(path: Path, tensors: Sequence[TensorEntry], first: int, size: int) -> None:
    """Ranges follow each other from the header to the end of the file."""
    end, before = first, ""
    for entry in tensors:
        if entry.start != end:
            gap = entry.start - end
            what = f"{gap} bytes before it belong to no tensor" if gap > 0 else f"overlaps tensor '{before}'"
            raise fault(
                path,
                what,
                tensor=entry.name,
                found=f"offset {entry.start - first}",
                expected=f"offset {end - first}",
            )
        end, before = entry.start + entry.nbytes, entry.name
    if end > size:
        cut = next(entry for entry in tensors if entry.start + entry.nbytes > size)
        raise fault(path, "truncated data", tensor=cut.name, found=f"a file of {size} bytes", expected=f"{end} bytes")
    if end < size:
        raise fault(path, "bytes after the data", found=f"{size} bytes", expected=f"{end} bytes")


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the collector of cycles, which walks through all of a large header again and again as it grows.

    What is made of a header, and a plan, has no cycles. A fix of 45,000 tensors took 40 % longer to open with it.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def read_json(path: Path, *, within: Path | None = None) -> Any:
    """The value of a JSON file of at most 100 MB; duplicate keys are refused. `within` as in `read_shard`."""
    fd, _, status = open_regular(path, within=within)
    try:
        if status.st_size > HEADER_LIMIT:
            raise fault(path, "too large", found=f"{status.st_size} bytes", expected=f"at most {HEADER_LIMIT}")
        raw = bytearray(status.st_size)
        read_exact(fd, raw, 0, path)
    finally:
        os.close(fd)
    return _parse(_FILE_DECODER, path, _decode(path, raw, "the file").strip(" \t\r\n"), "the file")


class _Duplicate(ValueError):
    """`args[0]` is the key that an object holds twice."""


_TWICE = object()  # stands for the value of a duplicate key in a header, so that its tensor can be named


def _marked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                members[key] = _TWICE
            seen.add(key)
    return members


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = _marked(pairs)
    if len(members) != len(pairs):
        raise _Duplicate(next(key for key, value in members.items() if value is _TWICE))
    return members


def _integer(digits: str) -> int | float:
    """An int that fits 64 bits; `-0` and longer ones come as floats, which no rule accepts for an integer."""
    return int(digits) if len(digits) <= 20 and digits != "-0" else float(digits)


_PLAIN_DECODER = json.JSONDecoder(object_pairs_hook=_marked)
_HEADER_DECODER = json.JSONDecoder(object_pairs_hook=_marked, parse_int=_integer)
_FILE_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)


def count_marks(raw: bytes | bytearray) -> int:
    """What costs time and memory in JSON."""
    return len(raw) - len(raw.translate(None, b'{}[],:"\\'))


def _decode(path: Path, raw: bytearray, where: str, most: int = MARKS_LIMIT) -> str:
    marks = count_marks(raw)
    if marks > most:
        raise fault(
            path,
            f"{where} is too complex",
            found=f"{marks} JSON marks",
            expected=f"at most {most} (split the file into shards)",
        )
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise fault(path, f"{where} is not UTF-8", found=f"byte {raw[error.start]:#04x} at {error.start}") from None


def _parse(decoder: json.JSONDecoder, path: Path, text: str, where: str) -> Any:
    """The JSON value that fills `text` from end to end."""
    try:
        value, end = decoder.raw_decode(text)
    except _Duplicate as error:
        raise fault(path, f"duplicate key '{error.args[0]}' in {where}") from None
    except json.JSONDecodeError as error:
        what = "a byte order mark" if text.startswith("\ufeff") else error.msg
        raise fault(path, f"{where} is not JSON: {what} at {error.pos}") from None
    except RecursionError:
        raise fault(path, f"{where} is nested too deeply") from None
    except ValueError:  # of `int`, which takes some thousands of digits
        if decoder is _PLAIN_DECODER:
            return _parse(_HEADER_DECODER, path, text, where)
        raise
    if end != len(text):
        found = f"{text[end : end + 16]!r} at {end}"
        raise fault(path, f"{where} has bytes after its JSON value", found=found)
    return value


def _kind_by_content(head: bytes | bytearray) -> str | None:
    start = bytes(head).lstrip()[:16].lower()
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (run `git lfs pull`)"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML page"
    if head.startswith(b"GGUF"):
        return "a GGUF file"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive, as PyTorch saves pickles (never loaded)"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle (never loaded)"
    if start.startswith((b"{", b"[")):
        return "a JSON file"
    return None


def file_kind(path: Path) -> str:
    fd, _, status = open_regular(path)
    head = bytearray(min(512, status.st_size))
    try:
        read_exact(fd, head, 0, path)
    finally:
        os.close(fd)
    return _kind_by_content(head) or kind_by_name(path.name) or "another kind of file"
