"""The calls of the C library beside what they must equal: spec.py, sorting, the reference engine; bad arguments."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from safepatch_core.backends.codes import CodesReport
from safepatch_core.backends.contract import Bits, Block, Cut, Lora, PatchData
from safepatch_core.backends.cpu import CpuBackend
from safepatch_core.backends.reference import ReferenceBackend
from safepatch_core.fixes.build import build_between
from safepatch_core.fixes.reading import Fix, open_fix
from safepatch_core.merging.quantised.grids import E2M1
from safepatch_core.merging.recipe import Quantized
from safepatch_core.spec import Acts, Importance, Join, Rule, Weight, keep_threshold, numbers, quota, random_key
from tests.c_library import PLAIN, STRUCTS, CBlock, CEngine, Memory, Progress, constant, cut_of, library, made
from tests.oracle import Tensor
from tests.test_codes import Stored, f32, told, whole
from tests.test_embed import save_shards
from tests.test_select import block_of, expected, members

LIB = library()
OK, BAD, STOPPED = 0, constant("SP_BAD_ARGUMENT"), constant("SP_STOPPED")
DATA, FAILED = constant("SP_BAD_DATA"), constant("SP_IO_FAILED")


@pytest.fixture
def engine() -> Iterator[CEngine]:
    opened = CEngine(2)
    yield opened
    opened.close()


# --- numbers of the contract


def c_number(kind: Any, call: Any, *arguments: Any) -> int:
    out = kind()
    assert call(*arguments, ctypes.byref(out)) == OK, LIB.sp_last_error()
    return int(out.value)


def test_random_keys_are_those_of_the_contract() -> None:
    rng = np.random.default_rng(1)
    names = ["", "a", "model.layers.0.mlp.down_proj.weight", "é漢", *("x" * n for n in range(90, 130))]
    for name in names:
        seed, patch = int(rng.integers(2**64, dtype=np.uint64)), names[int(rng.integers(len(names)))]
        given = ctypes.c_uint64(seed), patch.encode(), name.encode()
        assert c_number(ctypes.c_uint64, LIB.sp_random_key, *given) == random_key(seed, patch, name)


def test_keep_is_that_of_the_contract() -> None:
    shares = [0.0, 5e-324, 2.0**-32, 0.3, 0.5, 1 - 2.0**-53, 1.0, 7.0, *np.random.default_rng(2).random(500)]
    for share in shares:
        assert c_number(ctypes.c_uint64, LIB.sp_keep, ctypes.c_double(share)) == keep_threshold(share)


def test_quotas_are_those_of_the_contract() -> None:
    rng = np.random.default_rng(3)
    cases = [(0.5, n) for n in range(20)] + [(1.0, 2**62 + 1), (0.1, 2**53 + 1), (0.0, 5), (0.25, 2), (0.75, 2)]
    cases += [(float(rng.random()), int(rng.integers(2**40))) for _ in range(500)]
    for top, entries in cases:
        found = c_number(ctypes.c_int64, LIB.sp_quota, ctypes.c_double(top), ctypes.c_int64(entries))
        assert found == quota(top, entries)


def test_numbers_outside_of_their_range_are_refused() -> None:
    out = ctypes.c_int64()
    for share in (-0.1, float("nan")):
        assert LIB.sp_keep(ctypes.c_double(share), ctypes.byref(out)) == BAD
    for top, entries in [(1.1, 5), (-0.1, 5), (float("nan"), 5), (0.5, -1)]:
        assert LIB.sp_quota(ctypes.c_double(top), ctypes.c_int64(entries), ctypes.byref(out)) == BAD
    assert LIB.sp_last_error() == b"entries: expected 0 and more"


# --- selection


class CSelection:
    def __init__(self, tensors: int, entries: int, quotas: Sequence[int], skips: Sequence[int] = ()) -> None:
        self.patches, self.select = len(quotas), ctypes.c_void_p()
        k = (ctypes.c_int64 * len(quotas))(*quotas)
        given = ctypes.c_size_t(tensors), ctypes.c_int64(entries), k, ctypes.c_size_t(len(quotas))
        assert LIB.sp_select_open(*given, ctypes.byref(self.select)) == OK
        for p, skip in enumerate(skips):
            assert LIB.sp_select_skip(self.select, ctypes.c_size_t(p), ctypes.c_int64(skip)) == OK

    def guess(self, engine: CEngine, sample: Sequence[Block]) -> int:
        blocks = [CBlock(block) for block in sample]
        array = made("sp_block", max(len(blocks), 1))
        for i, block in enumerate(blocks):
            array[i] = block.c
        return int(LIB.sp_select_guess(self.select, engine.engine, array, ctypes.c_size_t(len(blocks))))

    @property
    def pending(self) -> bool:
        return bool(LIB.sp_select_pending(self.select))

    def count(self, engine: CEngine, tensor: int, block: Block) -> None:
        most = constant("SP_SELECT_WINDOWS")
        windows, count, c = made("sp_window", most * self.patches), ctypes.c_size_t(), CBlock(block)
        assert LIB.sp_select_windows(self.select, ctypes.c_size_t(tensor), windows, ctypes.byref(count)) == OK
        given = ctypes.byref(c.c), windows, count, ctypes.byref(c.report)
        assert LIB.sp_histogram(engine.engine, *given) == OK

    def advance(self) -> int:
        return int(LIB.sp_select_advance(self.select))

    def cuts(self, engine: CEngine, tensor: int, block: Block) -> list[Cut]:
        cuts, c = made("sp_cut", self.patches), CBlock(block)
        given = ctypes.c_size_t(tensor), ctypes.byref(c.c), cuts
        assert LIB.sp_select_cuts(self.select, engine.engine, *given) == OK, LIB.sp_last_error()
        return list(map(cut_of, cuts))

    def close(self) -> None:
        LIB.sp_select_close(self.select)


def streamed(
    engine: CEngine,
    blocks: Sequence[Block],
    quotas: Sequence[int],
    chunk: int,
    sample: Sequence[Block],
    skips: Sequence[int] = (),
) -> tuple[list[np.ndarray[Any, Any]], int]:
    """Per patch the selected positions over all tensors, and how many sweeps it took."""
    selection = CSelection(len(blocks), sum(map(len, blocks)), quotas, skips)
    assert selection.guess(engine, sample) == OK
    sweeps = 0
    while selection.pending:
        for tensor, block in enumerate(blocks):
            for lo in range(0, len(block), chunk):
                selection.count(engine, tensor, block.slice(lo, min(lo + chunk, len(block))))
        assert selection.advance() == OK
        sweeps += 1
    chosen: list[list[int]] = [[] for _ in quotas]
    offset = 0
    for tensor, block in enumerate(blocks):
        for lo in range(0, len(block), chunk):
            part = block.slice(lo, min(lo + chunk, len(block)))
            for p, cut in enumerate(selection.cuts(engine, tensor, part)):
                chosen[p] += [offset + i for i in members(part, p, cut)]
        offset += len(block)
    selection.close()
    return [np.array(c, dtype=np.int64) for c in chosen], sweeps


@pytest.mark.parametrize("spread", ["ties", "steps", "smooth"])
@pytest.mark.parametrize("sizes", [[1], [4096], [0, 5, 1000, 1], [300, 300, 300]])
@pytest.mark.parametrize("chunk", [257, 10_000])
def test_selection_equals_sorting(engine: CEngine, spread: str, sizes: list[int], chunk: int) -> None:
    rng = np.random.default_rng(len(sizes) * 1000 + chunk + len(spread))
    for top in (0.0, 1e-4, 0.03, 0.31, 0.999, 1.0):
        blocks = [block_of(rng, n, spread) for n in sizes]
        quotas = [quota(top, sum(sizes)), quota(top / 2, sum(sizes))]
        wanted = expected(blocks, quotas)
        liar = [block_of(rng, 500, "ties")]
        for sample in ([], [b.slice(0, max(len(b) // 3, 1)) for b in blocks if len(b)], blocks, liar):
            found, sweeps = streamed(engine, blocks, quotas, chunk, sample)
            assert sweeps <= 3
            for a, b in zip(wanted, found, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("spread", ["ties", "steps", "smooth"])
@pytest.mark.parametrize("sizes", [[1], [900], [0, 5, 1000, 1]])
def test_what_is_skipped_is_not_selected(engine: CEngine, spread: str, sizes: list[int]) -> None:
    rng = np.random.default_rng(len(sizes) + len(spread))
    blocks, n = [block_of(rng, size, spread) for size in sizes], sum(sizes)
    for quotas, skips in (([n, n // 3], [n // 9, 1]), ([n // 2, n // 2], [n // 2, 0]), ([n, n], [n, n // 2])):
        for sample in ([], blocks):
            found, sweeps = streamed(engine, blocks, quotas, 257, sample, skips)
            assert sweeps <= 3
            for a, b in zip(expected(blocks, quotas, skips), found, strict=True):
                np.testing.assert_array_equal(a, b)


def test_a_good_guess_needs_one_sweep(engine: CEngine) -> None:
    rng = np.random.default_rng(3)
    blocks = [block_of(rng, 20_000, "steps") for _ in range(4)]
    assert streamed(engine, blocks, [4000, 100], 99_999, blocks, [1000, 0])[1] == 1
    assert streamed(engine, blocks, [4000, 100], 99_999, blocks)[1] == 1
    assert streamed(engine, blocks, [4000, 100], 99_999, [])[1] > 1


def test_selection_out_of_order_is_refused(engine: CEngine) -> None:
    block = block_of(np.random.default_rng(4), 100, "smooth")
    selection, c, cuts = CSelection(1, 100, [10, 10]), CBlock(block), made("sp_cut", 2)
    given = ctypes.c_size_t(0), ctypes.byref(c.c), cuts
    assert LIB.sp_select_cuts(selection.select, engine.engine, *given) == BAD
    assert LIB.sp_last_error() == b"a sweep is pending"
    selection.count(engine, 0, block)
    assert selection.guess(engine, [block]) == BAD
    while selection.pending:
        assert selection.advance() == OK
        selection.count(engine, 0, block)
    assert selection.advance() == BAD and LIB.sp_last_error() == b"no sweep is pending"
    first = ctypes.c_size_t(0), ctypes.c_int64(1)
    assert LIB.sp_select_skip(selection.select, *first) == BAD and b"before anything else" in LIB.sp_last_error()
    fresh = CSelection(1, 100, [10, 10], [1])
    assert LIB.sp_select_skip(fresh.select, *first) == BAD and LIB.sp_last_error() == b"skipped twice"
    assert LIB.sp_select_skip(fresh.select, ctypes.c_size_t(2), first[1]) == BAD
    assert LIB.sp_select_skip(fresh.select, ctypes.c_size_t(1), ctypes.c_int64(-1)) == BAD
    fresh.close()
    count = ctypes.c_size_t()
    windows = made("sp_window", 6)
    assert LIB.sp_select_windows(selection.select, ctypes.c_size_t(1), windows, ctypes.byref(count)) == BAD
    key, left = ctypes.c_uint32(), ctypes.c_int64()
    tally = [ctypes.c_size_t(0), ctypes.c_size_t(1), ctypes.byref(key), ctypes.byref(left)]
    assert LIB.sp_select_tally(selection.select, *tally) == OK and key.value > 0 and left.value > 0
    selection.close()


# --- fix files over callbacks


@contextmanager
def fix_of(data: bytes) -> Iterator[Fix]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "fix.safetensors"
        path.write_bytes(data)
        with open_fix(path) as fix:
            yield fix


class Fixed:
    """A checkpoint of two shards in memory, the same with its fix, and the fix, opened."""

    def __init__(self, **fails: str) -> None:
        with TemporaryDirectory() as folder:
            root = Path(folder)
            rng = np.random.default_rng(12)
            shards = [[(name, self._tensor(rng, name)) for name in names] for names in (("b", "a::gap"), ("é", "F8"))]
            save_shards(root / "base", [dict(shard) for shard in shards])
            save_shards(root / "merged", [{name: self._changed(rng, of) for name, of in shard} for shard in shards])
            self.base, self.merged = (
                [path.read_bytes() for path in sorted((root / side).glob("*.safetensors"))]
                for side in ("base", "merged")
            )
            build_between(root / "base", root / "merged", root / "fix.safetensors")
            self.bytes = (root / "fix.safetensors").read_bytes()
        self.file = Memory(self.bytes)
        self.memories = [Memory(data, **fails) for data in self.base]
        self.shards = made("sp_io", 2)
        for i, memory in enumerate(self.memories):
            self.shards[i] = memory.io
        self.fix = ctypes.c_void_p()
        assert LIB.sp_fix_open(ctypes.byref(self.file.io), ctypes.byref(self.fix)) == OK, LIB.sp_last_error()

    @staticmethod
    def _tensor(rng: np.random.Generator, name: str) -> Tensor:
        dtype, width = {"b": ("BF16", 2), "a::gap": ("F32", 4), "é": ("I64", 8), "F8": ("F8_E4M3", 1)}[name]
        n = 70_000 if name == "b" else 99
        return Tensor(dtype, (n,), rng.integers(0, 256, n * width, np.uint8).tobytes())

    @staticmethod
    def _changed(rng: np.random.Generator, old: Tensor) -> Tensor:
        if old.dtype == "I64":
            return old
        flips = rng.integers(0, 4, len(old.data)) * (rng.random(len(old.data)) < 0.1)
        return old._replace(data=(np.frombuffer(old.data, np.uint8) ^ flips.astype(np.uint8)).tobytes())

    @property
    def data(self) -> list[bytes]:
        return [bytes(memory.data) for memory in self.memories]

    def call(self, name: str, *resume: int) -> tuple[int, int, int]:
        """Status, and how many old and new entries were found."""
        sides = made("sp_fix_sides")
        given = self.fix, self.shards, ctypes.c_size_t(2), *resume, ctypes.byref(sides)
        return int(getattr(LIB, name)(*given)), sides.old_count, sides.new_count

    def close(self) -> None:
        LIB.sp_fix_close(self.fix)


def test_a_fix_file_is_checked_applied_and_reverted_over_callbacks() -> None:
    fixed = Fixed()
    _, changes, new = fixed.call("sp_fix_check")
    assert changes > 10_000 and new == 0 and fixed.data == fixed.base
    with fix_of(fixed.bytes) as opened:
        assert LIB.sp_fix_id(fixed.fix).decode() == opened.id and opened.changes == changes
    assert fixed.call("sp_fix_apply", 0) == (OK, changes, 0) and fixed.data == fixed.merged
    assert all(memory.synced == 1 for memory in fixed.memories)
    assert fixed.call("sp_fix_apply", 0)[0] == DATA and b"already" in LIB.sp_last_error()
    assert fixed.call("sp_fix_apply", 1)[0] == OK and fixed.data == fixed.merged
    assert fixed.call("sp_fix_revert", 0) == (OK, 0, changes) and fixed.data == fixed.base
    assert fixed.call("sp_fix_revert", 0)[0] == DATA and b"nothing to take out" in LIB.sp_last_error()
    fixed.memories[0].data[:] = fixed.merged[0]
    assert fixed.call("sp_fix_apply", 0)[0] == DATA and b"a mixture" in LIB.sp_last_error()
    assert fixed.call("sp_fix_revert", 1)[0] == OK and fixed.data == fixed.base
    fixed.close()
    assert LIB.sp_fix_id(None) == b""
    LIB.sp_fix_close(None)


@pytest.mark.parametrize("fails", ["read_at", "write_at", "sync", "length"])
def test_a_callback_that_fails_ends_the_call(fails: str) -> None:
    fixed = Fixed(fails=fails)
    assert fixed.call("sp_fix_apply", 0)[0] == FAILED and LIB.sp_strerror(FAILED) == b"reading or writing failed"
    assert fails in ("write_at", "sync") or fixed.data == fixed.base
    fixed.close()


def test_what_is_not_the_fixs_base_is_left_alone() -> None:
    fixed = Fixed()
    data = fixed.memories[1].data
    for i in range(8 + int.from_bytes(data[:8], "little"), len(data)):
        data[i] ^= 0x40
    there = fixed.data
    assert fixed.call("sp_fix_apply", 0)[0] == DATA and fixed.data == there
    assert b"another base, an edit, or another fix" in LIB.sp_last_error()
    one = made("sp_fix_sides")
    given = fixed.fix, fixed.shards, ctypes.c_size_t(1), ctypes.byref(one)
    assert LIB.sp_fix_check(*given) == DATA and b"another table" in LIB.sp_last_error()
    twice = made("sp_io", 2)
    twice[0] = twice[1] = fixed.memories[0].io
    assert LIB.sp_fix_check(fixed.fix, twice, ctypes.c_size_t(2), given[3]) == DATA
    assert b"in two shards" in LIB.sp_last_error()
    read_only = made("sp_io", 2)
    for i in range(2):
        read_only[i] = fixed.memories[i].io
        read_only[i].write_at = type(read_only[i].write_at)()
    assert LIB.sp_fix_check(fixed.fix, read_only, ctypes.c_size_t(2), given[3]) in (OK, DATA)
    assert LIB.sp_fix_apply(fixed.fix, read_only, ctypes.c_size_t(2), 0, given[3]) == BAD
    fixed.close()


def test_a_broken_file_is_an_answer() -> None:
    """Bytes that are changed, lost or doubled, in a fix or in a shard: no call succeeds with a wrong result."""
    fixed, rng = Fixed(), np.random.default_rng(13)
    header = 8 + int.from_bytes(fixed.bytes[:8], "little")
    seen = set()
    for _ in range(400):
        data = bytearray(fixed.bytes)
        at = int(rng.integers(header + 200 if rng.random() < 0.7 else len(data)))
        how = int(rng.integers(4))
        if how == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif how == 1:
            del data[at : at + int(rng.integers(1, 50))]
        elif how == 2:
            data[at:at] = data[at : at + int(rng.integers(1, 50))]
        else:
            data[at : at + 8] = rng.integers(0, 256, 8, np.uint8).tobytes()
        broken, fix = Memory(bytes(data)), ctypes.c_void_p()
        status = LIB.sp_fix_open(ctypes.byref(broken.io), ctypes.byref(fix))
        if status == OK:
            whole, fixed.fix = fixed.fix, fix
            status = fixed.call("sp_fix_apply", 1)[0]
            assert fixed.data == (fixed.merged if status == OK else fixed.base)
            for memory, base in zip(fixed.memories, fixed.base, strict=True):
                memory.data[:] = base
            fixed.close()
            fixed.fix = whole
        assert status in (OK, DATA, FAILED)
        seen.add(status)
    assert DATA in seen
    fixed.close()


# --- bad arguments


def ones_of(n: int) -> Any:
    return (ctypes.c_int64 * n)(*[1] * n)


def valid_calls() -> tuple[dict[str, list[Any]], list[Any]]:
    """For every call that returns a status, arguments with which it succeeds; and what they point to."""
    engine, block = CEngine(1), CBlock(block_of(np.random.default_rng(6), 70, "smooth"))
    out, numbers = np.zeros(70, np.uint32), (ctypes.c_int64 * 400)()
    open_, done = CSelection(1, 70, [5, 6]), CSelection(1, 70, [0, 70])
    codes, rows = (ctypes.c_uint8 * 400)(), (ctypes.c_uint64 * 4)(0, 0, 2, 2)
    found = ctypes.c_void_p()
    changes = made(
        "sp_fix_changes", **dict.fromkeys(("counts", "at", "side", "old_entries"), ctypes.addressof(numbers))
    )
    changes.new_entries = ctypes.addressof(codes)
    changes.planes[:] = [ctypes.addressof(codes)] * 4
    run = made("sp_fix_run", width=1, gap_width=1, entries=70, blocks=1, gap_count=2, side_count=1, changes=2)
    run.rows, run.gap, run.side = (ctypes.addressof(a) for a in (rows, codes, numbers))
    ones = (ctypes.c_uint8 * 70)(*[1] * 70)
    run.planes[0] = ctypes.addressof(ones)
    tally, key = made("sp_fix_tally"), ctypes.c_uint32()
    c, report, data = ctypes.byref(block.c), ctypes.byref(block.report), ctypes.c_void_p(out.ctypes.data)
    size, at, text = ctypes.c_size_t, ctypes.byref(numbers), [b"one", b"two"]
    cuts, windows, zero = made("sp_cut", 2), made("sp_window", 12), size(0)
    notes, least = ctypes.c_void_p(), made("sp_cut", 2)
    least[0].key = least[1].key = 1
    assert LIB.sp_notes_take(engine.engine, c, ones_of(2), ctypes.byref(notes)) == OK and notes
    fixed = Fixed()
    shards, sides = (fixed.shards, size(len(fixed.shards))), ctypes.byref(made("sp_fix_sides"))
    calls: dict[str, list[Any]] = {
        "sp_engine_open": [1, None, ctypes.byref(found)],
        "sp_histogram": [engine.engine, c, made("sp_window", 1), size(1), report],
        "sp_count_equal": [engine.engine, c, (ctypes.c_uint32 * 2)(), at],
        "sp_apply": [engine.engine, c, cuts, data, report],
        "sp_merge": [engine.engine, c, (ctypes.c_int64 * 2)(), data, cuts, report],
        "sp_notes_take": [engine.engine, c, ones_of(2), ctypes.byref(found)],
        "sp_notes_count": [engine.engine, c, made("sp_window", 1), size(1), report, ctypes.byref(found)],
        "sp_notes_merge": [notes, engine.engine, c, ones_of(2), data, cuts, report],
        "sp_notes_apply": [notes, engine.engine, c, least, data, report],
        "sp_random_key": [ctypes.c_uint64(1), *text, at],
        "sp_keep": [ctypes.c_double(0.5), at],
        "sp_quota": [ctypes.c_double(0.5), ctypes.c_int64(8), at],
        "sp_select_open": [size(1), ctypes.c_int64(8), (ctypes.c_int64 * 2)(), size(2), ctypes.byref(found)],
        "sp_select_skip": [CSelection(1, 70, [5, 6]).select, zero, ctypes.c_int64(2)],
        "sp_select_guess": [CSelection(1, 70, [5, 6]).select, engine.engine, c, size(1)],
        "sp_select_windows": [open_.select, zero, windows, at],
        "sp_select_advance": [open_.select],
        "sp_select_tally": [done.select, zero, zero, ctypes.byref(key), at],
        "sp_select_cuts": [done.select, engine.engine, zero, c, cuts],
        "sp_selftest": [],
        "sp_fix_find": [
            1,
            codes,
            (ctypes.c_uint8 * 400)(),
            ctypes.c_int64(8),
            ctypes.c_int64(0),
            ctypes.byref(changes),
            at,
        ],
        "sp_fix_open": [ctypes.byref(fixed.file.io), ctypes.byref(found)],
        "sp_fix_check": [fixed.fix, *shards, sides],
        "sp_fix_apply": [fixed.fix, *shards, 1, sides],
        "sp_fix_revert": [fixed.fix, *shards, 1, sides],
        "sp_fix_gaps": [(ctypes.c_uint16 * 4)(), (ctypes.c_int64 * 1)(1), size(1), 1, None, at],
        "sp_fix_settle": [ctypes.byref(run), ones, 0, codes, (ctypes.c_uint8 * 70)(), ctypes.byref(tally)],
    }
    return calls, [engine, block, out, codes, rows, ones, numbers, open_, done, fixed]


# Bytes up to the last field that every version of a struct has had, where later ones have more.
FIRST = {name: ctypes.sizeof(kind) for name, kind in STRUCTS.items() if issubclass(kind, ctypes.Structure)}
FIRST |= {"sp_patch": 128, "sp_block": 88, "sp_cut": 24, "sp_report": 48}
# Where NULL is allowed: it says so in the header.
OPTIONAL = {("sp_engine_open", "isa"), ("sp_fix_gaps", "codes")}


def test_null_and_wrong_sizes_are_answered() -> None:
    declared = dict(re.findall(r"^SP_API sp_status (\w+)\(([^;]*)\);", PLAIN, re.M | re.S))
    calls, _kept = valid_calls()
    assert set(calls) == set(declared), "a call without a test of its arguments"
    tried = 0
    for name, arguments in calls.items():
        assert getattr(LIB, name)(*arguments) == OK, (name, LIB.sp_last_error())
        names = [part.split()[-1].lstrip("*") for part in declared[name].split(",")]
        pointers = [i for i, part in enumerate(declared[name].split(",")) if "*" in part]
        for i in pointers:
            if (name, names[i]) not in OPTIONAL:
                given = [None if i == j else argument for j, argument in enumerate(arguments)]
                assert getattr(LIB, name)(*given) == BAD and LIB.sp_last_error(), (name, names[i])
                tried += 1
    assert tried > 40


def test_a_struct_that_does_not_say_its_size_is_refused() -> None:
    calls, _kept = valid_calls()
    kinds = tuple(STRUCTS.values())
    for name, arguments in calls.items():
        for argument in arguments:
            struct = getattr(argument, "_obj", argument)
            struct = (
                struct[0] if isinstance(struct, ctypes.Array) and isinstance(struct[0], ctypes.Structure) else struct
            )
            if isinstance(struct, ctypes.Structure) and isinstance(struct, kinds):
                right = struct.size
                for wrong in (0, FIRST[type(struct).__name__] - 8, right + 4, 1 << 20):
                    struct.size = wrong
                    assert getattr(LIB, name)(*arguments) == BAD, (name, type(struct), wrong)
                struct.size = right


# --- codes


def coded_block() -> tuple[Block, Any]:
    """A block that is stored as codes, and these."""
    stored = Stored(E2M1, "groups", seed=2)
    patches = [stored.patch("delta", f32(stored.deltas())), stored.patch("scores", f32(stored.deltas()))]
    coded, loaded = told(stored, Quantized(), stored.data.copy())
    block = whole(stored, patches, Rule(Acts.ALL, Join.SUM))
    return replace(block, codes=loaded.told(coded)), stored.data


def test_codes_change_as_they_do_from_python(engine: CEngine) -> None:
    block, data = coded_block()
    assert block.codes is not None
    quotas = [len(block) // 2, len(block) // 3]
    expected = CpuBackend(1).merge(block, quotas, block.codes.data)[1]
    assert isinstance(expected, CodesReport)
    changed = block.codes.data.copy()
    block.codes.data[:] = data
    c = CBlock(block)
    assert engine.merge(c, quotas, block.codes.data)[0] == OK, LIB.sp_last_error()
    assert np.array_equal(block.codes.data, changed) and not np.array_equal(changed, data)
    for p, kept in enumerate(expected.kept):
        sums = [int.from_bytes(bytes(of), "little", signed=True) for of in (c.kept[p].along, c.kept[p].asked)]
        assert (c.kept[p].acted, c.kept[p].changed, *sums) == (kept.acted, kept.changed, kept.along, kept.asked)
    found = c.report.bad_scale, c.report.saturated
    assert [(of.count, of.first) for of in found] == [
        (of.count, of.first) for of in (expected.bad_scale, expected.saturated)
    ]


def test_codes_that_could_lead_out_of_their_arrays_are_refused(engine: CEngine) -> None:
    block, _ = coded_block()
    assert block.codes is not None
    n, table = len(block), block.codes.scales
    wrong: dict[str, list[Any]] = {
        "size": [0, 8, ctypes.sizeof(STRUCTS["sp_codes"]) - 16],
        "grid": [-1, 4],
        "flip": [-1, 256],
        "data": [None],
        "first": [-1, 1, 2, 1 << 62],
        "entries": [-1, 0, n - 2, (1 << 63) - 1],
        "rows": [0, -1, 1 << 62],
        "cols": [0, -1, 3, 1 << 62],
        "block_rows": [0, -1],
        "block_cols": [0, -1, 1 << 63 - 1],
        "scales": [None, block.codes.scales.values.ctypes.data + 1],
        "scale_first": [-1, 1, 1 << 62],
        "scale_rows": [-1, 0, len(table.values) - 1],
        "turned": [-1, 2],
        "handed": [-1, 3],
        "rounding": [-1, 2],
        "reserved": [1],
    }
    for field, values in wrong.items():
        for value in values:
            c = CBlock(block)
            setattr(c.codes, field, value)
            assert engine.apply(c, made("sp_cut", 2), block.codes.data) == BAD, (field, value)
    gradients = CBlock(block)
    gradients.patches[1].importance = numbers(Importance)["gradients"]
    elsewhere, no_room = CBlock(block), CBlock(block)
    no_room.report.kept = None
    assert engine.apply(gradients, made("sp_cut", 2), block.codes.data) == OK  # with deltas
    gradients.patches[1].weight = numbers(Weight)["base"]
    assert engine.apply(gradients, made("sp_cut", 2), block.codes.data) == BAD
    assert engine.apply(no_room, made("sp_cut", 2), block.codes.data) == BAD
    assert engine.apply(elsewhere, made("sp_cut", 2), block.codes.data.copy()) == BAD


def test_null_handles_are_answered() -> None:
    assert LIB.sp_engine_isa(None) == b"none" and LIB.sp_engine_threads(None) == 0
    assert LIB.sp_scratch(None, ctypes.c_int64(5), ctypes.c_size_t(1)) == 0
    assert LIB.sp_select_pending(None) == 0 and LIB.sp_isa_usable(None) == 0
    assert LIB.sp_notes_bytes(None) == 0
    LIB.sp_notes_close(None)
    LIB.sp_select_close(None)
    LIB.sp_engine_close(None)
    assert LIB.sp_strerror(99) == b"unknown status"


# --- progress


def test_progress_is_told_and_can_stop() -> None:
    engine = CEngine(1)  # with more, the calling thread may find nothing left to do
    block = block_of(np.random.default_rng(5), 400_000, "smooth")
    c, out, seen = CBlock(block), np.zeros(400_000, np.uint32), list[tuple[int, int]]()

    def tell(user: int, done: int, total: int) -> int:
        seen.append((done, total))
        return int(user == 1 and len(seen) > 2)

    callback = Progress(tell)
    c.c.progress = callback
    assert engine.merge(c, [50, 60], out)[0] == OK
    calm = out.copy()
    assert seen and all(0 < done <= total == 400_000 for done, total in seen)
    seen.clear()
    c.c.user = 1
    assert engine.merge(c, [50, 60], out)[0] == STOPPED and len(seen) == 3
    assert LIB.sp_last_error() == b"stopped by the caller" == LIB.sp_strerror(STOPPED)
    c.c.user = 0
    assert engine.merge(c, [50, 60], out)[0] == OK and np.array_equal(out, calm)
    engine.close()


# --- the self-test

CASE = re.compile(r"\{SP_(\w+), \{(\d), (\d)\}, \{(\d), (\d)\}, (\d), SP_(\w+), SP_(\w+), (\d), (\d+), (\w+)\}")
KINDS: list[Any] = ["checkpoint", "delta", "lora"]
IMPORTANCES: list[Any] = ["magnitude", "scores", "gradients"]
WEIGHTS: list[Any] = ["patched", "base", "delta"]
ORDERS: list[Any] = ["retain-first", "select-first"]


def words(case: int, stream: int, n: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    x = np.arange(1, n + 1, dtype=np.uint64) + np.uint64((case * 16 + stream) << 32)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def numbers_of(case: int, stream: int, n: int, dtype: Any, signed: bool = True) -> Bits:
    x = words(case, stream, n)
    small = (x >> np.uint64(40)) % np.uint64(64) == 0
    scale = np.where(small, 0, (x >> np.uint64(48)) % np.uint64(12) + np.uint64(1)).astype(np.uint32)
    sign, digits = (x >> np.uint64(63)).astype(np.uint32) * signed, x.astype(np.uint32)
    wide: Any = np.where(small, 0, scale + 118).astype(np.uint32)
    if dtype == "F32":
        return Bits(sign << 31 | wide << 23 | digits & 0x7FFFFF, "F32")
    raw = sign << 15 | wide << 7 | digits & 0x70 if dtype == "BF16" else sign << 15 | scale << 10 | digits & 0x380
    return Bits(raw.astype(np.uint16), dtype)


def reference_digest(case: int, row: tuple[str, ...]) -> int:
    dtype, *kinds_and, weight, acts, join, order, entries_text, _ = row
    kinds, importances, entries = kinds_and[:2], kinds_and[2:], int(entries_text)
    rank, cols, patches = 3, 50, []
    for p in range(2):
        importance = IMPORTANCES[int(importances[p])]
        a, b = (numbers_of(case, 5 * p + s, rank * n, "F32") for s, n in ((3, cols), (4, (entries + 3) // cols + 1)))
        factors = Lora(a.data.view(np.float32).reshape(rank, -1), b.data.view(np.float32).reshape(-1, rank), 0.75)
        values = numbers_of(case, 5 * p + 1, entries, dtype)
        scores = numbers_of(case, 5 * p + 2, entries, dtype, importance != "scores")
        patches.append(
            PatchData(
                KINDS[int(kinds[p])],
                factors if kinds[p] == "2" else values,
                importance,
                None if importance == "magnitude" else scores,
                WEIGHTS[int(weight)],
                random_key(7, ("one", "two")[p], "tensor"),
                keep_threshold((0.3, 0.9)[p]),
                float(np.float32((0.7, -1.3)[p])),
            )
        )
    rule = Rule(Acts[acts], Join[join])
    block = Block(numbers_of(case, 0, entries, dtype), 3, cols, tuple(patches), rule, ORDERS[int(order)])
    out = np.empty_like(block.base.data)
    cuts, report = ReferenceBackend().merge(block, [entries // 7, entries // 3], out)
    found = [*out.tolist()]
    for of, cut in zip(report.patches, cuts, strict=True):
        found += [of.eligible, of.selected, of.applied, of.negative.count, cut.key, cut.before]
    digest = 0xCBF29CE484222325
    for number in [*found, report.acted, report.changed]:
        digest = (digest ^ number) * 0x100000001B3 % 2**64
    return digest


def test_the_self_test_knows_the_reference_engines_results() -> None:
    source = Path(__file__).parents[1] / "csrc/selftest.cpp"
    if not source.is_file():
        pytest.skip("needs the sources")
    rows = CASE.findall(source.read_text())
    assert len(rows) >= 6
    for case, row in enumerate(rows):
        assert int(row[-1], 0) == reference_digest(case, row), (case, hex(reference_digest(case, row)))


def test_the_self_test_passes() -> None:
    assert LIB.sp_selftest() == OK, LIB.sp_last_error()
