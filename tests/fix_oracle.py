"""The fix file once more, by brute force: lists of whole tensors' entries, one at a time, no code of the product.

Read beside "The fix file" in SPEC.md, whose words name the variables.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

from tests.oracle import Tensor

BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
BITS |= {"I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}
BLOCK = 65536


class Change(NamedTuple):
    """One entry that differs."""

    p: int
    x: int
    side: int


class Part(NamedTuple):
    """What a fix holds of one tensor."""

    N: int
    changes: list[Change]
    old: str
    new: str


def compact(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(data: bytes, size: int) -> str:
    return blake2b(data, digest_size=size).hexdigest()


def entries_of(t: Tensor) -> list[int]:
    w = BITS[t.dtype] // 8
    return [int.from_bytes(t.data[i : i + w], "little") for i in range(0, len(t.data), w)]


def base_hash(table: Mapping[str, Tensor]) -> str:
    text = b""
    for name in sorted(table, key=str.encode):
        shape = ",".join(str(size) for size in table[name].shape)
        text += f"{name}\0{table[name].dtype}\0{shape}\n".encode()
    return digest(text, 32)


def gap_codes(N: int, positions: list[int], M: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The codes, and the rows of the block table."""
    codes: list[int] = []
    rows = []
    done = 0
    for b in range(-(-N // BLOCK)):
        rows.append((len(codes), done))
        previous = BLOCK * b - 1
        while done < len(positions) and positions[done] < BLOCK * (b + 1):
            while positions[done] - previous - 1 >= M:
                codes.append(M)
                previous += M
            codes.append(positions[done] - previous - 1)
            previous = positions[done]
            done += 1
    return codes, [*rows, (len(codes), done)]


def arrays(N: int, w: int, changes: list[Change]) -> list[tuple[str, str, list[int], bytes]]:
    """(suffix, dtype, shape, data), in the order of the file."""
    n = len(changes)
    short, long = (gap_codes(N, [c.p for c in changes], M) for M in (255, 65535))
    wide = 2 * len(long[0]) < len(short[0])
    codes, rows = long if wide else short
    found = [("block", "U64", [len(rows), 2], b"".join(struct.pack("<QQ", *row) for row in rows))]
    packed = struct.pack(f"<{len(codes)}{'H' if wide else 'B'}", *codes)
    found.append(("gap", "U16" if wide else "U8", [len(codes)], packed))
    side = bytearray(-(-n // 8))
    for i, c in enumerate(changes):
        side[i // 8] |= c.side << (i % 8)
    found.append(("side", "U8", [len(side)], bytes(side)))
    for k in range(w):
        plane = [c.x >> (8 * k) & 255 for c in changes]
        at = [i for i, value in enumerate(plane) if value]
        if at and 5 * len(at) < n:
            wide_at = n >= 2**32
            ranks = struct.pack(f"<{len(at)}{'Q' if wide_at else 'I'}", *at)
            found.append((f"xor{k}.at", "U64" if wide_at else "U32", [len(at)], ranks))
            found.append((f"xor{k}.val", "U8", [len(at)], bytes(plane[i] for i in at)))
        elif at:
            found.append((f"xor{k}", "U8", [n], bytes(plane)))
    return found


def changes_between(old: Tensor, new: Tensor) -> list[Change]:
    found = []
    for p, (a, b) in enumerate(zip(entries_of(old), entries_of(new), strict=True)):
        if a != b:
            lowest = (a ^ b) & -(a ^ b)
            found.append(Change(p, a ^ b, int(a & lowest != 0)))
    return found


def encode(base: Mapping[str, Tensor], merged: Mapping[str, Tensor], recipe: Any = None) -> bytes:
    """The fix file that turns `base` into `merged`."""
    header: dict[str, Any] = {"__metadata__": None}
    data, table = b"", {}
    for name in sorted(base, key=str.encode):
        old, new = base[name], merged[name]
        if old.data == new.data:
            continue
        w = BITS[old.dtype] // 8
        changes = changes_between(old, new)
        touched = [slice(w * c.p, w * c.p + w) for c in changes]
        olds, news = (b"".join(t.data[at] for at in touched) for t in (old, new))
        N = len(old.data) // w
        table[name] = {"entries": N, "changes": len(changes), "old": digest(olds, 16), "new": digest(news, 16)}
        for suffix, dtype, shape, content in arrays(N, w, changes):
            place = [len(data), len(data) + len(content)]
            header[f"{name}::{suffix}"] = {"data_offsets": place, "dtype": dtype, "shape": shape}
            data += content
    known, tensors = base_hash(base), compact(table)
    metadata = {"format": "safepatch-fix", "version": "1", "recipe": compact(recipe), "base": known}
    metadata |= {"tensors": tensors, "id": digest(f"{known}\n{tensors}".encode(), 16)}
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def read(blob: bytes) -> tuple[dict[str, str], dict[str, tuple[str, list[int], bytes]]]:
    """Metadata and arrays of a safetensors file."""
    (size,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + size])
    metadata = header.pop("__metadata__")
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = (entry["dtype"], entry["shape"], blob[8 + size + begin : 8 + size + end])
    return metadata, found


def decode(blob: bytes) -> dict[str, Part]:
    """What each touched tensor's entries become."""
    metadata, stored = read(blob)
    parts = {}
    for name, facts in json.loads(metadata["tensors"]).items():
        N, n = facts["entries"], facts["changes"]
        kind, _, gap = stored[f"{name}::gap"]
        M, codes = (255, list(gap)) if kind == "U8" else (65535, [c for (c,) in struct.iter_unpack("<H", gap)])
        rows = list(struct.iter_unpack("<QQ", stored[f"{name}::block"][2]))
        positions = []
        for b in range(len(rows) - 1):
            previous = BLOCK * b - 1
            for code in codes[rows[b][0] : rows[b + 1][0]]:
                previous += M if code == M else code + 1
                if code != M:
                    positions.append(previous)
        x = [0] * n
        for k in range(4):
            if f"{name}::xor{k}" in stored:
                for i, value in enumerate(stored[f"{name}::xor{k}"][2]):
                    x[i] |= value << (8 * k)
            elif f"{name}::xor{k}.at" in stored:
                dtype, _, at = stored[f"{name}::xor{k}.at"]
                ranks = [i for (i,) in struct.iter_unpack("<Q" if dtype == "U64" else "<I", at)]
                for i, value in zip(ranks, stored[f"{name}::xor{k}.val"][2], strict=True):
                    x[i] |= value << (8 * k)
        side = stored[f"{name}::side"][2]
        changes = [Change(positions[i], x[i], side[i // 8] >> (i % 8) & 1) for i in range(n)]
        parts[name] = Part(N, changes, facts["old"], facts["new"])
    return parts


def applied(blob: bytes, tensors: Mapping[str, Tensor], *, revert: bool = False) -> dict[str, Tensor]:
    """`tensors` with every touched entry on the new side (or the old), whichever side it is on now."""
    result = dict(tensors)
    for name, part in decode(blob).items():
        t = tensors[name]
        w = BITS[t.dtype] // 8
        data = bytearray(t.data)
        for p, x, side in part.changes:
            c = int.from_bytes(data[w * p : w * p + w], "little")
            is_old = int(c & (x & -x) != 0) == side
            if is_old != revert:
                data[w * p : w * p + w] = (c ^ x).to_bytes(w, "little")
        result[name] = Tensor(t.dtype, t.shape, bytes(data))
    return result
