"""The fix file's layout: names, types and order of its arrays, its metadata, its hashes (SPEC, "The fix file")."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

from safepatch_core.errors import InputError
from safepatch_core.files.parsing import HEADER_LIMIT, count_marks
from safepatch_core.files.reading import TensorEntry

BLOCK = 65536  # entries that one row of the block table stands for
FORMAT, VERSION = "safepatch-fix", "1"
# Marks of JSON that a fix's header may have: a touched tensor takes about 200, for its arrays and in the metadata.
MARKS = 12_000_000
KEYS = frozenset({"format", "version", "recipe", "base", "tensors", "id"})
# Bytes of an entry, by dtype. Wider and narrower entries can't be fixed.
WIDTH: dict[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
}
WIDEST = 4
# A code of this value moves on by as much and is no change.
SKIP = {"U8": 255, "U16": 65535}
# Codes of one block: a change each, and U8 skips over the rest.
MOST_CODES = BLOCK + BLOCK // 255


class Facts(NamedTuple):
    """What the metadata says about a touched tensor: N, n, and the hashes of the touched entries' bytes."""

    entries: int
    changes: int
    old: str
    new: str


def compact(value: Any) -> str:
    """JSON as it lies in a fix file."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def blocks(entries: int) -> int:
    return -(-entries // BLOCK)


def is_sparse(nonzero: int, changes: int) -> bool:
    """Whether a plane with so many bytes that are not zero is stored as places and values."""
    return 5 * nonzero < changes


def place_type(changes: int) -> str:
    """The dtype of a sparse plane's places."""
    return "U64" if changes >= 1 << 32 else "U32"


def digest(data: bytes, size: int) -> str:
    return blake2b(data, digest_size=size).hexdigest()


def table_hash(tensors: Mapping[str, TensorEntry]) -> str:
    """The hash of a checkpoint's table, by which a fix knows its base."""
    found = blake2b(digest_size=32)
    for name in sorted(tensors, key=str.encode):
        entry = tensors[name]
        found.update(f"{name}\0{entry.dtype}\0{','.join(map(str, entry.shape))}\n".encode())
    return found.hexdigest()


def fix_id(base: str, tensors: str) -> str:
    """The name of a fix: the hash of its base's hash and of what it says about the tensors, as stored."""
    return digest(f"{base}\n{tensors}".encode(), 16)


def metadata(base: str, facts: Mapping[str, Facts], recipe: Any) -> dict[str, str]:
    """The `__metadata__` of a fix; `recipe` is plain data, None where there is none."""
    tensors = compact(
        {
            name: {"entries": of.entries, "changes": of.changes, "old": of.old, "new": of.new}
            for name, of in facts.items()
        }
    )
    return {
        "base": base,
        "format": FORMAT,
        "id": fix_id(base, tensors),
        "recipe": compact(recipe),
        "tensors": tensors,
        "version": VERSION,
    }


def header(about: Mapping[str, str], arrays: Iterable[tuple[str, str, list[int], int]]) -> bytes:
    """The first 8+N bytes of a fix file, from (name, dtype, shape, bytes) of each array in order."""
    table: dict[str, Any] = {"__metadata__": dict(about)}
    end = 0
    for name, dtype, shape, nbytes in arrays:
        table[name] = {"data_offsets": [end, end + nbytes], "dtype": dtype, "shape": shape}
        end += nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT or count_marks(text) > MARKS:
        raise InputError("so many tensors change that one file's header can't hold them", found=f"{len(text)} bytes")
    return len(text).to_bytes(8, "little") + text
