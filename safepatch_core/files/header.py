"""How a safetensors file begins: the one rule by which this project lays out the files that it makes itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safepatch_core.files.parsing import BITS

Ranges = dict[str, tuple[int, int]]


def make_header(
    tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, Ranges]:
    """The first bytes of a file of these tensors (name, dtype, shape).

    Returns:
        The header with its length, padded to 8 bytes, and where each tensor lies behind it, in the order of the file:
        widest entries first, so that every tensor starts aligned to its entries; else as given.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    ranges: Ranges = {}
    end = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -BITS[tensor[1]]):
        begin, end = end, end + math.prod(shape) * BITS[dtype] // 8
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        ranges[name] = begin, end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ranges
