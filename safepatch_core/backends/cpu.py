"""The C++ engine (csrc/): code for several instruction sets from one source, chosen when it is opened."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.codes import CodesReport, Kept
from safepatch_core.backends.contract import (
    Bits,
    Block,
    Codes,
    Cut,
    Fault,
    GridName,
    Lora,
    Notes,
    PatchData,
    PatchReport,
    Report,
    Rounding,
    Window,
)
from safepatch_core.errors import UsageError, lacks_memory
from safepatch_core.spec import Dtype, Importance, Kind, Order, Weight, numbers

if TYPE_CHECKING:
    from safepatch_core import _engine

_DTYPES, _KINDS, _IMPORTANCES = numbers(Dtype), numbers(Kind), numbers(Importance)
_WEIGHTS, _ORDERS = numbers(Weight), numbers(Order)
_GRIDS, _ROUNDINGS = numbers(GridName), numbers(Rounding)

_UNSIGNED: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.uint32),
    "F16": np.dtype(np.uint16),
    "BF16": np.dtype(np.uint16),
}
_HUGE_PAGE = 2 << 20


def _open(threads: int, isa: str | None) -> _engine.Engine:
    try:
        from safepatch_core import _engine
    except ImportError as error:
        if lacks_memory(error):
            raise
        raise UsageError("the cpu engine can't be loaded", found=str(error)) from error
    try:
        return _engine.Engine(threads, isa)
    except _engine.Unsupported as error:
        raise UsageError(f"the cpu engine can't run here: {error}") from error
    except (RuntimeError, MemoryError) as error:
        raise UsageError(f"the cpu engine can't be opened: {error}", found=f"{threads} threads") from error


class CpuBackend:
    """The engine that runs anywhere. Its methods are documented on `Backend`.

    `threads` counts all threads of a call, the caller's included. `isa` is "scalar", "avx2", "avx512" or "neon"; by
    default the environment variable SAFEPATCH_FORCE_ISA decides, or else the best that the machine has.
    Raises UsageError if that can't run here. Calls from several threads take turns; a call that is wrong in itself
    (lengths, dtypes) raises ValueError, lack of memory MemoryError.
    """

    takes_codes = True
    takes_turns = True

    def __init__(self, threads: int, isa: str | None = None) -> None:
        if threads < 1:
            raise UsageError("threads out of range", found=threads, expected="at least 1")
        self._engine = _open(threads, isa)

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._engine.isa

    @property
    def threads(self) -> int:
        return self._engine.threads

    def describe(self) -> str:
        return f"cpu ({self.isa}, {self.threads} thread{'s' if self.threads > 1 else ''})"

    def allocate(self, nbytes: int) -> NDArray[np.uint8]:
        """Anonymous memory, in huge pages where that is possible: its first touch is several times faster."""
        pages = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if nbytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(pages, dtype=np.uint8, count=nbytes)

    def scratch(self, entries: int, patches: int) -> int:
        """Upper bound, in bytes, of what `merge` of this many entries and patches allocates (and keeps for reuse)."""
        return self._engine.scratch(entries, patches)

    def histogram(self, block: Block, windows: Sequence[Sequence[Window]]) -> Report:
        return _report(*self._engine.histogram(_given(block), _given_windows(windows, block)))

    def count_equal(self, block: Block, keys: Sequence[int]) -> list[int]:
        given = _given(block)
        _check_length("keys", keys, block)
        return self._engine.count_equal(given, keys)

    def apply(self, block: Block, cuts: Sequence[Cut], out: NDArray[np.unsignedinteger]) -> Report:
        given = _given(block)
        _check_length("cuts", cuts, block)
        _check_output(block, out)
        return _report(*self._engine.apply(given, cuts, out))

    def merge(
        self, block: Block, quotas: Sequence[int], out: NDArray[np.unsignedinteger], skips: Sequence[int] = ()
    ) -> tuple[list[Cut], Report]:
        given = _given(block)
        _check_length("quotas", quotas, block)
        _check_length("skips", skips or quotas, block)
        _check_output(block, out)
        cuts, found = self._engine.merge(given, quotas, out, skips)
        return [Cut(*cut) for cut in cuts], _report(*found)

    def take_notes(self, block: Block, quotas: Sequence[int]) -> Notes | None:
        given = _given(block)
        _check_length("quotas", quotas, block)
        return self._engine.take_notes(given, quotas)

    def note(self, block: Block, windows: Sequence[Sequence[Window]]) -> tuple[Report, Notes | None]:
        found, notes = self._engine.note(_given(block), _given_windows(windows, block))
        return _report(*found), notes

    def apply_noted(
        self, notes: Notes, block: Block, cuts: Sequence[Cut], out: NDArray[np.unsignedinteger]
    ) -> Report:
        _check_base(block, out)
        _check_length("cuts", cuts, block)
        return _report(*self._engine.apply(_in_numbers(block), cuts, out, cast("_engine.Notes", notes)))

    def merge_noted(
        self,
        notes: Notes,
        block: Block,
        quotas: Sequence[int],
        out: NDArray[np.unsignedinteger],
        skips: Sequence[int] = (),
    ) -> tuple[list[Cut], Report]:
        _check_base(block, out)
        _check_length("quotas", quotas, block)
        _check_length("skips", skips or quotas, block)
        cuts, found = self._engine.merge(_in_numbers(block), quotas, out, skips, cast("_engine.Notes", notes))
        return [Cut(*cut) for cut in cuts], _report(*found)


def open_engine(*, threads: int | None, device: str | None, vram_limit: int | None) -> CpuBackend:
    """A `contract.Opener`: by default all cores, which ranks on one machine share."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return CpuBackend(threads or max(1, len(os.sched_getaffinity(0)) // ranks))


def _given(block: Block) -> _engine.Block:
    """A block in the bindings' words. Raises ValueError where its arrays don't fit each other."""
    if block.codes is None:
        _check_bits("base", block.base, len(block))
    else:
        _check_codes(block.codes)
    for patch in block.patches:
        if patch is not None:
            _check_patch(patch, block)
    return _in_numbers(block)


def _given_windows(
    windows: Sequence[Sequence[Window]], block: Block
) -> list[tuple[int, int, int, NDArray[np.int64]]]:
    _check_length("windows", windows, block)
    flat = [(p, w.lo, w.shift, w.counts) for p, wanted in enumerate(windows) for w in wanted]
    for _, lo, shift, counts in flat:
        _check_array("window counts", counts, np.dtype(np.int64), None)
        if not (0 <= lo < 1 << 32 and 0 <= shift < 32):
            raise ValueError(f"window: found lo {lo} and shift {shift}")
    return flat


def _in_numbers(block: Block) -> _engine.Block:
    patches = [None if patch is None else _given_patch(patch) for patch in block.patches]
    codes = None if block.codes is None else _given_codes(block.codes)
    rule = *block.rule, _ORDERS[block.order], block.lambda_
    return _given_bits(block.base), block.start, block.cols, patches, *rule, codes


def _given_codes(codes: Codes) -> _engine.Codes:
    table = codes.scales
    return (
        _GRIDS[codes.grid],
        codes.flip,
        codes.data,
        codes.first,
        codes.entries,
        (table.rows, table.cols, *table.block),
        (table.values, table.first, table.turned),
        _DTYPES[codes.handed],
        _ROUNDINGS[codes.rounding],
        codes.random_key,
        None if codes.original is None else _given_bits(codes.original),
    )


def _given_patch(patch: PatchData) -> _engine.Patch:
    return (
        _KINDS[patch.kind],
        _IMPORTANCES[patch.importance],
        _WEIGHTS[patch.weight],
        patch.values if isinstance(patch.values, Lora) else _given_bits(patch.values),
        None if patch.scores is None or patch.importance == "magnitude" else _given_bits(patch.scores),
        patch.random_key,
        patch.keep,
        patch.scale,
    )


def _given_bits(bits: Bits) -> _engine.Bits:
    return bits.data, _DTYPES[bits.dtype]


def _report(
    patches: list[Any], overflow: tuple[int, int], acted: int, changed: int, codes: _engine.Kept | None
) -> Report:
    told = [
        PatchReport(eligible, selected, applied, Fault(*delta), Fault(*score), Fault(*negative))
        for eligible, selected, applied, delta, score, negative in patches
    ]
    if codes is None:
        return Report(told, Fault(*overflow), acted, changed)
    kept, bad_scale, saturated = codes
    sums = [Kept(*counts, *(int.from_bytes(of, "little", signed=True) for of in exact)) for *counts, exact in kept]
    return CodesReport(told, Fault(*overflow), acted, changed, sums, Fault(*bad_scale), Fault(*saturated))


def _check_array(what: str, array: NDArray[Any], dtype: np.dtype[Any], shape: tuple[int, ...] | None) -> None:
    if array.dtype != dtype or not (array.flags.c_contiguous and array.flags.aligned):
        raise ValueError(f"{what}: found {array.dtype}, expected a contiguous, aligned array of {dtype}")
    if array.shape != shape if shape is not None else array.ndim != 1:
        raise ValueError(f"{what}: found shape {array.shape}, expected {shape or 'one dimension'}")


def _check_length(what: str, given: Sequence[object], block: Block) -> None:
    if len(given) != len(block.patches):
        raise ValueError(f"{what}: found {len(given)}, expected one per patch, {len(block.patches)}")


def _check_bits(what: str, bits: Bits, entries: int) -> None:
    if bits.dtype not in _UNSIGNED:
        raise ValueError(f"{what}: found dtype {bits.dtype}, expected one of {', '.join(_UNSIGNED)}")
    _check_array(what, bits.data, _UNSIGNED[bits.dtype], (entries,))


def _check_base(block: Block, out: NDArray[np.unsignedinteger]) -> None:
    """What of a block is read where notes stand for its patches, and what is written."""
    _check_bits("base", block.base, len(block))
    _check_array("output", out, block.base.data.dtype, block.base.data.shape)


def _check_patch(patch: PatchData, block: Block) -> None:
    if isinstance(patch.values, Lora) != (patch.kind == "lora"):
        raise ValueError(f"patch: found {type(patch.values).__name__} for kind {patch.kind}")
    if isinstance(patch.values, Lora):
        a, b, _ = patch.values
        _check_array("LoRA factor a", a, np.dtype(np.float32), (a.shape[0], block.cols))
        _check_array("LoRA factor b", b, np.dtype(np.float32), (b.shape[0], a.shape[0]))
    else:
        _check_bits("patch values", patch.values, len(block))
    if patch.importance != "magnitude":
        if patch.scores is None:
            raise ValueError(f"patch: found no scores for importance {patch.importance}")
        _check_bits("patch scores", patch.scores, len(block))


def _check_codes(codes: Codes) -> None:
    table, width = codes.scales, 4 if codes.grid in ("E2M1", "INT4") else 8
    _check_array("codes", codes.data, np.dtype(np.uint8), (-(-codes.entries * width // 8),))
    _check_array("scales", table.values, np.dtype(np.float32), (len(table.values), -(-table.cols // table.block[1])))
    if codes.original is not None:
        _check_bits("original", codes.original, codes.entries)


def _check_output(block: Block, out: NDArray[np.unsignedinteger]) -> None:
    if block.codes is not None:
        if out.ctypes.data != block.codes.data.ctypes.data or not out.flags.writeable:
            raise ValueError("output: of codes, expected their own data")
        return
    _check_array("output", out, block.base.data.dtype, block.base.data.shape)
    if not out.flags.writeable:
        raise ValueError("output: found a read-only array")
    base = block.base.data
    inputs = [bits.data for p in block.patches if p for bits in (p.values, p.scores) if isinstance(bits, Bits)]
    if out.ctypes.data != base.ctypes.data:
        inputs.append(base)
    if any(np.may_share_memory(out, array) for array in inputs):
        raise ValueError("output: overlaps an input other than the whole base")
