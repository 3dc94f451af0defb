from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Numbers for names are those of csrc/include/safepatch.h.
# entries, dtype
Bits = tuple[NDArray[np.unsignedinteger], int]
# a, b, scale
Lora = tuple[NDArray[np.float32], NDArray[np.float32], float]
# kind, importance, weight, values, scores, Philox key, keep, scale
Patch = tuple[int, int, int, Bits | Lora, Bits | None, int, int, float]
# grid, flip, data, first, entries, (rows, columns, and of a block), (scales, their first row, turned), handed dtype,
# rounding, Philox key, original
Codes = tuple[
    int,
    int,
    NDArray[np.uint8],
    int,
    int,
    tuple[int, int, int, int],
    tuple[NDArray[np.float32], int, bool],
    int,
    int,
    int,
    Bits | None,
]
# base, start, columns, patches, acts, join, order, lambda, codes
Block = tuple[Bits, int, int, Sequence[Patch | None], int, int, int, float, Codes | None]
# key, before, skip_key, skip_before
Cut = tuple[int, int, int, int]

# (count, lowest index)
_Fault = tuple[int, int]
# eligible, selected, applied, bad delta, bad score, negative
_Patch = tuple[int, int, int, _Fault, _Fault, _Fault]
# per patch (acted, changed, saturated, three sums as little-endian integers), bad scales, saturated
Kept = tuple[list[tuple[int, int, int, tuple[bytes, bytes, bytes]]], _Fault, _Fault]
# per patch, overflow, acted, changed, what is kept in codes
_Report = tuple[list[_Patch], _Fault, int, int, Kept | None]

class Unsupported(RuntimeError): ...
class BadData(ValueError): ...

def version() -> str: ...
def abi_version() -> int: ...
def spec_version() -> int: ...
def isa_usable(isa: str) -> bool: ...

# The fix file: see fixes/codec.py. Arrays are contiguous, and as long as the others say.
_Entries = NDArray[np.unsignedinteger]
_Bytes = NDArray[np.uint8]

def fix_find(
    old: _Entries,
    new: _Entries,
    start: int,
    counts: NDArray[np.int64],
    at: NDArray[np.uint16],
    side: _Bytes,
    planes: _Bytes,
    olds: _Entries,
    news: _Entries,
) -> int: ...
def fix_gaps(
    at: NDArray[np.uint16],
    counts: NDArray[np.int64],
    gap_width: int,
    codes: NDArray[np.unsignedinteger] | None,
    lengths: NDArray[np.int64],
) -> None: ...
def fix_settle(
    rows: NDArray[np.uint64],
    gap: NDArray[np.unsignedinteger],
    side: _Bytes,
    planes: Sequence[_Bytes | None],
    changes: int,
    entries: _Entries,
    goal: int,
    olds: _Entries,
    news: _Entries,
) -> tuple[int, int, int]: ...

class Notes:
    @property
    def nbytes(self) -> int: ...

class Engine:
    def __init__(self, threads: int, isa: str | None = None) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    def scratch(self, entries: int, patches: int) -> int: ...
    # windows: patch, lo, shift, counts
    def histogram(self, block: Block, windows: Sequence[tuple[int, int, int, NDArray[np.int64]]]) -> _Report: ...
    def note(
        self, block: Block, windows: Sequence[tuple[int, int, int, NDArray[np.int64]]]
    ) -> tuple[_Report, Notes | None]: ...
    def count_equal(self, block: Block, keys: Sequence[int]) -> list[int]: ...
    def apply(
        self, block: Block, cuts: Sequence[Cut], out: NDArray[np.unsignedinteger], notes: Notes | None = None
    ) -> _Report: ...
    def merge(
        self,
        block: Block,
        quotas: Sequence[int],
        out: NDArray[np.unsignedinteger],
        skips: Sequence[int],
        notes: Notes | None = None,
    ) -> tuple[list[Cut], _Report]: ...
    def take_notes(self, block: Block, quotas: Sequence[int]) -> Notes | None: ...
