"""libsafepatch by ctypes, its structs read from the header: what a program in another language sees."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import safepatch_core
from safepatch_core.backends.contract import Bits, Block, Codes, Cut, GridName, Lora, PatchData, Rounding
from safepatch_core.spec import Dtype, Importance, Kind, Order, Weight, numbers

LIB = Path(safepatch_core.get_library_dir())
HEADER = (Path(safepatch_core.get_include()) / "safepatch.h").read_text()
PLAIN = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.S)
# Structs that are parts of others, and begin with no size.
PARTS = ("sp_bits", "sp_lora", "sp_fault")
NUMBERS = {
    "size_t": ctypes.c_size_t,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
}
Read = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t)
Sync = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
Length = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
Progress = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def fields() -> dict[str, list[tuple[str, str]]]:
    """Struct → (field, its type as written, with the length of an array behind it)."""
    found = {}
    for name, body in re.findall(r"typedef struct (\w+) \{(.*?)\}", PLAIN, re.S):
        lines = [line.strip() for line in body.split(";") if line.strip()]
        parsed = [re.fullmatch(r"(.*?)(\w+)(\[\d+\])?", line, re.S) for line in lines]
        found[name] = [(m[2], m[1].strip() + (m[3] or "")) for m in parsed if m]
    return found


def _ctype(text: str, known: dict[str, Any]) -> Any:
    if array := re.fullmatch(r"(.*)\[(\d+)\]", text):
        return _ctype(array[1], known) * int(array[2])
    return ctypes.c_void_p if "*" in text or text not in known else known[text]


def _structs() -> dict[str, Any]:
    known: dict[str, Any] = {**NUMBERS, "sp_progress": Progress, "sp_read_at": Read, "sp_write_at": Read}
    known |= {"sp_sync": Sync, "sp_length": Length}
    for name, of in fields().items():
        members = [(field, _ctype(text, known)) for field, text in of]
        known[name] = type(name, (ctypes.Structure,), {"_fields_": members})
    return known


STRUCTS = _structs()


def constant(name: str) -> int:
    """A macro's or an enumerator's number."""
    found = re.search(rf"(?:#define )?\b{name}(?: =)? (\d+)", PLAIN)
    assert found is not None, name
    return int(found[1])


def library() -> Any:
    """The library that the Python package runs."""
    lib = ctypes.CDLL(str(LIB / f"libsafepatch.so.{constant('SP_ABI_VERSION')}"))
    for name in ("sp_last_error", "sp_strerror", "sp_engine_isa", "sp_version_string"):
        getattr(lib, name).restype = ctypes.c_char_p
    lib.sp_fix_id.restype = ctypes.c_char_p
    lib.sp_scratch.restype = ctypes.c_size_t
    return lib


def made(name: str, count: int = 0, **values: Any) -> Any:
    """A struct, or an array of them, that says its size and is zero but for what is given."""
    kind = STRUCTS[name]
    if count:
        array = (kind * count)()
        array[0].size = ctypes.sizeof(kind)
        return array
    return kind(size=ctypes.sizeof(kind), **values)


class Memory:
    """A file in memory as the library sees it, and how often it was synced."""

    def __init__(self, data: bytes, *, fails: str = "") -> None:
        self.data, self.synced = bytearray(data), 0

        def read(user: int, offset: int, to: int, n: int) -> int:
            part = bytes(self.data[offset : offset + min(n, 1000)])  # a caller may give less than was asked for
            ctypes.memmove(to, part, len(part))
            return -1 if fails == "read_at" else len(part)

        def write(user: int, offset: int, data: int, n: int) -> int:
            self.data[offset : offset + n] = ctypes.string_at(data, n)
            return -1 if fails == "write_at" else n

        def sync(user: int) -> int:
            self.synced += 1
            return int(fails == "sync")

        def length(user: int) -> int:
            return -1 if fails == "length" else len(self.data)

        self.io = made("sp_io", read_at=Read(read), write_at=Read(write), sync=Sync(sync), length=Length(length))


def address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


def bits_of(bits: Bits | None) -> Any:
    return STRUCTS["sp_bits"](address(bits.data), numbers(Dtype)[bits.dtype]) if bits else STRUCTS["sp_bits"]()


def patch_of(patch: PatchData, cols: int) -> Any:
    given = made("sp_patch", present=1, kind=numbers(Kind)[patch.kind], scores=bits_of(patch.scores))
    given.importance, given.weight = numbers(Importance)[patch.importance], numbers(Weight)[patch.weight]
    given.random_key, given.keep, given.scale = patch.random_key, patch.keep, patch.scale
    if isinstance(patch.values, Lora):
        a, b, scale = patch.values
        given.lora = STRUCTS["sp_lora"](address(a), address(b), a.shape[0], b.shape[0], cols, scale)
    else:
        given.values = bits_of(patch.values)
    return given


def cut_of(cut: Any) -> Cut:
    return Cut(cut.key, cut.before, cut.skip_key, cut.skip_before)


def codes_of(codes: Codes) -> Any:
    table = codes.scales
    given = made("sp_codes", grid=numbers(GridName)[codes.grid], flip=codes.flip, data=address(codes.data))
    given.first, given.entries, given.original = codes.first, codes.entries, bits_of(codes.original)
    given.rows, given.cols, (given.block_rows, given.block_cols) = table.rows, table.cols, table.block
    given.scales, given.scale_first, given.scale_rows = address(table.values), table.first, len(table.values)
    given.turned, given.handed = table.turned, numbers(Dtype)[codes.handed]
    given.rounding, given.random_key = numbers(Rounding)[codes.rounding], codes.random_key
    return given


class CBlock:
    """A block in the header's words, and the arrays it points to."""

    def __init__(self, block: Block) -> None:
        self.block, n = block, max(len(block.patches), 1)
        self.patches = made("sp_patch", n)
        for p, patch in enumerate(block.patches):
            if patch is not None:
                self.patches[p] = patch_of(patch, block.cols)
        self.c = made("sp_block", base=bits_of(block.base), entries=len(block), start=block.start)
        self.c.patches, self.c.patch_count = ctypes.addressof(self.patches), len(block.patches)
        self.c.acts, self.c.join = block.rule
        self.c.order = numbers(Order)[block.order]
        self.lambda_ = ctypes.c_float(block.lambda_)
        self.c.__setattr__("lambda", ctypes.addressof(self.lambda_))
        self.reports = made("sp_patch_report", n)
        self.report = made("sp_report", patches=ctypes.addressof(self.reports))
        if block.codes is not None:
            self.codes, self.kept = codes_of(block.codes), made("sp_kept", n)
            self.c.codes, self.report.kept = ctypes.addressof(self.codes), ctypes.addressof(self.kept)


class CEngine:
    """An engine of the library, with what the tests call."""

    def __init__(self, threads: int = 1) -> None:
        self.lib, self.engine = library(), ctypes.c_void_p()
        assert self.lib.sp_engine_open(threads, None, ctypes.byref(self.engine)) == 0

    def close(self) -> None:
        self.lib.sp_engine_close(self.engine)

    def apply(self, block: CBlock, cuts: Any, out: NDArray[Any]) -> int:
        """Status; `cuts` is an array of sp_cut."""
        given = ctypes.byref(block.c), cuts, ctypes.c_void_p(address(out)), ctypes.byref(block.report)
        return int(self.lib.sp_apply(self.engine, *given))

    def merge(self, block: CBlock, quotas: list[int], out: NDArray[Any]) -> tuple[int, list[Cut]]:
        k = np.array(quotas, np.int64)
        cuts = made("sp_cut", max(len(quotas), 1))
        given = ctypes.c_void_p(address(k)), ctypes.c_void_p(address(out)), cuts, ctypes.byref(block.report)
        status = self.lib.sp_merge(self.engine, ctypes.byref(block.c), *given)
        return status, [cut_of(cuts[p]) for p in range(len(quotas))]
