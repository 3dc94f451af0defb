"""The C++ engine against the reference, bit for bit: bytes, cuts, counts and faults."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from safepatch_core.backends import open_backend
from safepatch_core.backends.contract import (
    SELECT_ALL,
    SELECT_NONE,
    Bits,
    Block,
    Cut,
    Fault,
    Lora,
    PatchData,
    Report,
    Window,
    unread,
)
from safepatch_core.backends.cpu import CpuBackend
from safepatch_core.backends.reference import ReferenceBackend
from safepatch_core.errors import UsageError
from safepatch_core.library import get_library_dir
from safepatch_core.spec import COMBINE, EVERY, KEEP_ALL, Acts, Dtype, Importance, Join, Kind, Order, Rule, Weight

_engine = pytest.importorskip("safepatch_core._engine", reason="the extension isn't built")

ISAS = [isa for isa in ("scalar", "avx2", "avx512") if _engine.isa_usable(isa)]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
REFERENCE = ReferenceBackend()
Rng = np.random.Generator


@cache
def engine(isa: str, threads: int) -> CpuBackend:
    return CpuBackend(threads, isa)


def as_bits(numbers: NDArray[np.floating[Any]], dtype: Dtype) -> Bits:
    """Numbers as entries of `dtype`; BF16 by truncation, which is as good as any rounding here."""
    values = np.ascontiguousarray(numbers, np.float32)
    if dtype == "F32":
        return Bits(values.view(np.uint32), dtype)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return Bits(values.astype(np.float16).view(np.uint16), dtype)
    return Bits((values.view(np.uint32) >> np.uint32(16)).astype(np.uint16), dtype)


EDGES = np.array(
    [0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 5.9e-8, 65504, 65520, -65536, 3.4028235e38, np.inf, -np.inf, np.nan],
    np.float32,
)


def entries(rng: Rng, n: int, dtype: Dtype, style: str) -> Bits:
    """Entries in a style: any bit pattern, edge values, a coarse grid (heavy ties), normal or positive numbers."""
    if style == "any":
        patterns = rng.integers(0, 1 << 32, n, dtype=np.uint32)
        return Bits(patterns if dtype == "F32" else (patterns >> np.uint32(16)).astype(np.uint16), dtype)
    if style == "edges":
        return as_bits(rng.choice(EDGES, n), dtype)
    if style == "grid":
        return as_bits(rng.integers(-6, 7, n) / np.float32(8), dtype)
    normal = rng.standard_normal(n).astype(np.float32)
    return as_bits(np.abs(normal) if style == "positive" else normal, dtype)


def random_patch(rng: Rng, n: int, start: int, cols: int, style: str) -> PatchData:
    kind: Kind = rng.choice(get_args(Kind))
    rows = (start + n + cols - 1) // cols
    if kind == "lora" and rows > 100_000:
        kind = "delta"
    values: Bits | Lora
    if kind == "lora":
        rank = int(rng.integers(0, 6))
        a = rng.standard_normal((rank, cols)).astype(np.float32)
        b = rng.standard_normal((rows, rank)).astype(np.float32)
        values = Lora(a, b, float(np.float32(rng.standard_normal())))
    else:
        values = entries(rng, n, rng.choice(DTYPES), style)
    importance: Importance = rng.choice(get_args(Importance))
    scores = None
    if importance != "magnitude":
        scores = entries(rng, n, rng.choice(DTYPES), rng.choice([style, "positive"]))
    return PatchData(
        kind=kind,
        values=values,
        importance=importance,
        scores=scores,
        weight=rng.choice(get_args(Weight)),
        random_key=int(rng.integers(0, 1 << 64, dtype=np.uint64)),
        keep=int(rng.choice([KEEP_ALL, 0, 1, 1 << 31, (1 << 32) * 3 // 10])),
        scale=float(np.float32(rng.choice([1.0, 0.5, -1.3, 1e38, 0.0]))),
    )


STARTS = (0, 1, 2, 3, 5, 1000, (1 << 32) - 7, (1 << 34) - 50, (1 << 34) + 3, (1 << 60) + 1)


def random_block(rng: Rng, n: int) -> Block:
    style = str(rng.choice(["any", "edges", "grid", "normal"]))
    start, cols = int(rng.choice(STARTS)), int(rng.choice([1, 3, 7, 64, 100, 1000]))
    absent = rng.random(int(rng.choice([0, 1, 2, 2, 2, 3, 5]))) < 0.1
    patches = tuple(None if none else random_patch(rng, n, start, cols, style) for none in absent)
    rule = Rule(rng.choice(list(Acts)), rng.choice(list(Join)))
    order: Order = rng.choice(get_args(Order))
    lambda_ = float(np.float32(rng.choice([1.0, 1.0, 0.3, -1.7])))
    return Block(entries(rng, n, rng.choice(DTYPES), style), start, cols, patches, rule, order, lambda_)


def random_quotas(rng: Rng, block: Block) -> list[int]:
    n = len(block)
    return [int(rng.choice([0, 1, n // 20, n // 2, n, n + 1])) for _ in block.patches]


def random_skips(rng: Rng, quotas: Sequence[int]) -> list[int]:
    """Nothing, or part of each quota."""
    return [] if rng.random() < 0.5 else [int(rng.choice([0, k // 50, k // 2, k])) for k in quotas]


def merged(
    backend: Any, block: Block, quotas: Sequence[int], skips: Sequence[int] = ()
) -> tuple[list[Cut], Report, NDArray[Any]]:
    out = np.full_like(block.base.data, 0x5555)
    cuts, report = backend.merge(block, quotas, out, skips)
    return cuts, report, out


def assert_same_merge(
    block: Block, quotas: Sequence[int], backend: CpuBackend, skips: Sequence[int] = ()
) -> tuple[list[Cut], Report]:
    cuts, report, out = merged(REFERENCE, block, quotas, skips)
    found_cuts, found_report, found_out = merged(backend, block, quotas, skips)
    assert found_cuts == cuts
    assert found_report == report
    np.testing.assert_array_equal(found_out, out)
    return cuts, report


def assert_same(rng: Rng, block: Block, backend: CpuBackend) -> None:
    """All four operations, the cuts of the merge among them, and others."""
    quotas = random_quotas(rng, block)
    cuts, _ = assert_same_merge(block, quotas, backend, random_skips(rng, quotas))

    def moved(cut: Cut) -> Cut:
        before, skip_before = (block.start + int(rng.integers(0, len(block) + 2)) for _ in range(2))
        return cut if rng.random() < 0.5 else cut._replace(before=before, skip_before=skip_before)

    cuts = [moved(cut) for cut in cuts]
    out = np.empty_like(block.base.data)
    report = REFERENCE.apply(block, cuts, out)
    in_place = block.base.data.copy()
    assert backend.apply(replace(block, base=Bits(in_place, block.base.dtype)), cuts, in_place) == report
    np.testing.assert_array_equal(in_place, out)

    keys = [min(c.key, 0x7FFF_FFFF) for c in cuts]
    assert backend.count_equal(block, keys) == REFERENCE.count_equal(block, keys)

    windows = [
        [Window(0, 20, np.ones(2048, np.int64))] * int(rng.integers(2))
        + [
            Window(
                int(rng.integers(0, 1 << 31)), int(rng.integers(0, 24)), np.zeros(int(rng.integers(1, 999)), np.int64)
            )
            for _ in range(rng.integers(0, 3))
        ]
        for _ in block.patches
    ]
    copies = [[w._replace(counts=w.counts.copy()) for w in of_patch] for of_patch in windows]
    assert backend.histogram(block, copies) == REFERENCE.histogram(block, windows)
    for mine, theirs in zip(copies, windows, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(one.counts, other.counts)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("isa", ISAS)
def test_random_blocks(isa: str, threads: int) -> None:
    rng = np.random.default_rng([threads, ISAS.index(isa)])
    for n in [0, 1, 2, 3, 5, 63, 64, 65, 1023, 1024, 1025, 5000] * 30 + [32768, 32769, 40001]:
        assert_same(rng, random_block(rng, n), engine(isa, threads))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_notes_merge_to_the_same_bits_whatever_else_changes(isa: str, threads: int) -> None:
    """Quotas, skips, scales, rule and lambda vary; what patches say is gone by then."""
    rng, backend, taken = np.random.default_rng([7, threads]), engine(isa, threads), 0
    for n in [1, 2, 65, 1025, 5000] * 12 + [40001, 70000, 200_000]:
        block = random_block(rng, n)
        block = replace(block, patches=tuple(p and replace(p, importance="magnitude") for p in block.patches))
        most = [int(rng.choice([1, n // 20 + 1, n // 3 + 1])) for _ in block.patches]
        notes = backend.take_notes(block, most)
        if notes is None:
            continue
        taken += 1
        for _ in range(3):
            quotas = [int(rng.choice([0, k // 3, k])) for k in most]
            skips = random_skips(rng, quotas)
            rule = Rule(rng.choice(list(Acts)), rng.choice(list(Join)))
            scales = [float(np.float32(rng.choice([0.5, -2.0, 1e38]))) for _ in most]
            patches = [p and replace(p, scale=c) for p, c in zip(block.patches, scales, strict=True)]
            asked = replace(block, patches=tuple(patches), rule=rule, lambda_=0.7)
            cuts, report, out = merged(REFERENCE, asked, quotas, skips)
            bare = [p and replace(p, values=unread(p.kind)) for p in patches]
            in_place = block.base.data.copy()
            left = replace(asked, base=Bits(in_place, block.base.dtype), patches=tuple(bare))
            assert backend.merge_noted(notes, left, quotas, in_place, skips) == (cuts, report)
            np.testing.assert_array_equal(in_place, out)
        assert notes.nbytes > 0
    assert taken > 30


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_what_was_counted_is_applied_from_notes(isa: str, threads: int) -> None:
    """Counts, bytes and reports are those of the whole block, which is gone by the time that cuts are known."""
    rng, backend, taken = np.random.default_rng([9, threads]), engine(isa, threads), 0
    for n in [1, 2, 65, 1025, 5000] * 12 + [40001, 200_000]:
        block = random_block(rng, n)
        block = replace(block, patches=tuple(p and replace(p, importance="magnitude") for p in block.patches))
        chosen, _, _ = merged(REFERENCE, block, random_quotas(rng, block))
        cuts = [
            cut._replace(before=block.start + int(rng.integers(n + 1)), skip_key=cut.key + 1 if skip else 0)
            for cut, skip in zip(chosen, rng.integers(2, size=len(chosen)), strict=True)
        ]
        windows = [
            [Window(min(cut.key, 1 << 30), 12, np.zeros(5000, np.int64)), Window(1 << 30, 3, np.zeros(7, np.int64))]
            for cut in cuts
        ]
        copies = [[w._replace(counts=w.counts.copy()) for w in of_patch] for of_patch in windows]
        told, notes = backend.note(block, copies)
        assert told == REFERENCE.histogram(block, windows)
        assert all(
            np.array_equal(a.counts, b.counts)
            for of in zip(copies, windows, strict=True)
            for a, b in zip(*of, strict=True)
        )
        if notes is None:
            continue
        taken += 1
        cuts = [SELECT_NONE if cut.key >= 1 << 30 else cut for cut in cuts]
        out, in_place = np.empty_like(block.base.data), block.base.data.copy()
        report = REFERENCE.apply(block, cuts, out)
        bare = [p and replace(p, values=unread(p.kind)) for p in block.patches]
        left = replace(block, base=Bits(in_place, block.base.dtype), patches=tuple(bare))
        assert backend.apply_noted(notes, left, cuts, in_place) == report
        np.testing.assert_array_equal(in_place, out)
    assert taken > 20


def test_notes_of_what_was_counted_hold_nothing_below_the_windows() -> None:
    block = checkpoint_pair(np.random.default_rng(8), 5000)
    backend, floor = engine(ISAS[-1], 1), 0x3C000000
    windows = [[Window(floor, 0, np.zeros(9, np.int64))], []]
    notes = backend.note(block, windows)[1]
    assert notes is not None
    out = block.base.data.copy()
    backend.apply_noted(notes, block, [Cut(floor, 0), SELECT_NONE], out)
    changed = out.copy()
    for cuts in ([Cut(floor - 1, 0), SELECT_NONE], [SELECT_ALL, SELECT_NONE], [SELECT_NONE, Cut(floor, 0)]):
        with pytest.raises(RuntimeError, match="below the notes"):
            backend.apply_noted(notes, block, cuts, out)
    np.testing.assert_array_equal(out, changed)
    patches = (p and replace(p, importance="scores", scores=cast(Bits, p.values)) for p in block.patches)
    scored = replace(block, patches=tuple(patches))
    assert backend.note(scored, windows)[1] is None
    assert backend.note(block, [[Window(0, 20, np.zeros(9, np.int64))], []])[1] is None


def test_notes_are_refused_for_what_they_are_not_of() -> None:
    n = 600_000
    block = checkpoint_pair(np.random.default_rng(8), n)
    backend = engine(ISAS[-1], 1)
    notes = backend.take_notes(block, [900, 900])
    assert notes is not None
    out = block.base.data.copy()
    retained = replace(block, patches=tuple(p and replace(p, keep=1 << 30) for p in block.patches))
    for other, quotas in ((block, [900, 901]), (retained, [900, 900]), (block.slice(0, 80_000), [9, 9])):
        with pytest.raises(RuntimeError, match="another block than the notes are of|beyond the notes"):
            backend.merge_noted(notes, other, quotas, out[: len(other)])
    with pytest.raises(RuntimeError, match="skip beyond the notes"):
        backend.merge_noted(notes, block, [900, 900], out, [0, 901])
    np.testing.assert_array_equal(out, block.base.data)
    assert not any(backend.take_notes(block, [900, k]) for k in (n // 2, 0, n))  # too long a list, none, all


def checkpoint_pair(rng: Rng, n: int, spread: float = 1.0) -> Block:
    """Two bf16 checkpoints near a bf16 base: few distinct deltas, heavy ties."""
    base = as_bits(rng.standard_normal(n), "BF16")
    w = (base.data.astype(np.uint32) << np.uint32(16)).view(np.float32)

    def patch(key: int) -> PatchData:
        values = as_bits(w + rng.standard_normal(n).astype(np.float32) * np.float32(spread / 64), "BF16")
        return PatchData("checkpoint", values, "magnitude", None, "patched", key, (1 << 32) * 3 // 10, 1.0)

    return Block(base, 0, 100, (patch(12345), patch(1 << 63)), COMBINE["difference"], "retain-first")


@pytest.mark.parametrize("isa", ISAS)
def test_tensors_large_enough_for_a_guess(isa: str) -> None:
    rng = np.random.default_rng(7)
    block = checkpoint_pair(rng, 300_001)
    n = len(block)
    scored = entries(rng, n, "F16", "positive")
    everything = tuple(p and replace(p, keep=KEEP_ALL) for p in block.patches)
    for variant, quotas in [
        (block, [n * 3 // 100, n // 50]),
        (replace(block, start=(1 << 34) - 1001), [n // 10, 5]),
        (replace(block, rule=COMBINE["sum"]), [n // 50, n // 50]),
        (replace(block, rule=COMBINE["ties"], patches=everything), [n // 2, n // 3]),
        (replace(block, order="select-first"), [n // 30, 1]),
        (replace(block, patches=everything), [n // 4, n - 1]),
        (
            replace(block, patches=tuple(p and replace(p, importance="scores", scores=scored) for p in everything)),
            [n // 30, n // 3],
        ),
    ]:
        assert_same_merge(variant, quotas, engine(isa, 2))
        for skips in ([k // 10 for k in quotas], [quotas[0], 0], [quotas[0] // 2, quotas[1] - 1]):
            assert_same_merge(variant, quotas, engine(isa, 2), skips)
        assert_same_merge(variant, [n, n], engine(isa, 2), [n // 50, n // 2])


def sampled(n: int) -> NDArray[np.int64]:
    """The entries that the engine's guess looks at (csrc/merge.cpp)."""
    runs = min(256, n // 2048)
    stride = (n - 64) // runs
    i = np.arange(runs, dtype=np.uint32) * np.uint32(0x9E3779B9)
    i ^= i >> np.uint32(16)
    i *= np.uint32(0x85EBCA6B)
    i ^= i >> np.uint32(13)
    begins = np.arange(runs) * stride + (i % np.uint32(stride - 63)).astype(np.int64)
    return (begins[:, None] + np.arange(64)).ravel()


@pytest.mark.parametrize("sample_is", [0.0, 1e-6, 1e6])
@pytest.mark.parametrize("share", [0.01, 0.5])
def test_a_misled_guess_costs_time_only(sample_is: float, share: float) -> None:
    rng = np.random.default_rng(3)
    n = 200_000
    d = rng.integers(1, 40, n).astype(np.float32)
    d[sampled(n)] *= np.float32(sample_is)
    patch = PatchData("delta", as_bits(d, "F32"), "magnitude", None, "patched", 1, KEEP_ALL, 1.0)
    block = Block(as_bits(np.zeros(n), "F32"), 0, 1, (patch,), COMBINE["difference"], "retain-first")
    for isa in ISAS:
        assert_same_merge(block, [int(share * n)], engine(isa, 2))
        assert_same_merge(block, [n if share > 0.1 else n // 20], engine(isa, 2), [int(share * n)])


@pytest.mark.parametrize("isa", ISAS)
def test_lora_rows_and_columns(isa: str) -> None:
    """Blocks of whole rows, parts of rows, and rows longer than a chunk."""
    rng = np.random.default_rng(11)
    for rows, cols, start, rank in [(30, 200, 0, 3), (9, 130, 71, 4), (3, 40_000, 5, 2), (70, 2, 1, 1), (5, 1, 0, 0)]:
        n = rows * cols - start
        lora = Lora(
            rng.standard_normal((rank, cols)).astype(np.float32),
            rng.standard_normal((rows, rank)).astype(np.float32),
            -0.75,
        )
        patch = PatchData("lora", lora, "magnitude", None, "patched", 5, KEEP_ALL, 1.0)
        scored = replace(patch, importance="scores", scores=entries(rng, n, "BF16", "positive"))
        pair = (patch, scored)
        block = Block(entries(rng, n, "F16", "normal"), start, cols, pair, COMBINE["difference"], "retain-first")
        assert_same_merge(block, [n // 3, n // 9], engine(isa, 2))


def test_results_do_not_depend_on_the_cut_into_blocks() -> None:
    rng = np.random.default_rng(5)
    block = replace(checkpoint_pair(rng, 3000), start=(1 << 32) + 1)
    quotas = [300, 200]
    cuts, report, out = merged(REFERENCE, block, quotas)
    for isa in ISAS:
        for step in (1, 7, 500):
            lows = range(0, 200 if step == 1 else 3000, step)
            pieces = [block.slice(low, min(low + step, 3000)) for low in lows]
            total = [0, 0]
            for low, piece in zip(lows, pieces, strict=True):
                part = np.empty_like(piece.base.data)
                found = engine(isa, 2).apply(piece, cuts, part)
                np.testing.assert_array_equal(part, out[low : low + step])
                total = [t + p.applied for t, p in zip(total, found.patches, strict=True)]
            if step > 1:
                assert total == [p.applied for p in report.patches]


def retained_at(backend: CpuBackend, index: int, key: int, keep: int) -> bool:
    one = as_bits(np.ones(1), "F32")
    patch = PatchData("delta", one, "magnitude", None, "patched", key, keep, 1.0)
    block = Block(one, index, 1, (patch,), COMBINE["sum"], "retain-first")
    return backend.histogram(block, [[]]).patches[0].eligible == 1


@pytest.mark.parametrize("isa", ISAS)
def test_philox_known_answer(isa: str) -> None:
    """Random123's vector for key 0 and counter 0, found by asking on both sides of each number."""
    for lane, number in enumerate([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]):
        assert not retained_at(engine(isa, 1), lane, 0, number)
        assert retained_at(engine(isa, 1), lane, 0, number + 1)


def test_faults_are_counted_with_their_first_index() -> None:
    d = as_bits(np.array([1, np.nan, 2, np.inf, 3, -np.inf, 4], np.float32), "F32")
    s = as_bits(np.array([1, 1, np.nan, np.nan, -1, -np.inf, -0.0], np.float32), "F32")
    patch = PatchData("delta", d, "scores", s, "patched", 0, KEEP_ALL, 3e38)
    block = Block(as_bits(np.full(7, 3e38), "F32"), 100, 1, (patch,), COMBINE["sum"], "retain-first")
    for isa in ISAS:
        out = np.empty(7, np.uint32)
        report = engine(isa, 1).apply(block, [SELECT_ALL], out)
        found = report.patches[0]
        assert (found.eligible, found.selected, found.applied) == (1, 1, 1)
        assert found.bad_delta == Fault(3, 101)
        assert found.bad_score == Fault(1, 102)
        assert found.negative == Fault(1, 104)
        assert report.overflow == Fault(1, 100)
        np.testing.assert_array_equal(out, block.base.data)


def test_more_patches_than_a_byte_counts() -> None:
    one = as_bits(np.ones(100), "BF16")
    patch = PatchData("delta", one, "magnitude", None, "patched", 0, KEEP_ALL, 1.0)
    block = Block(one, 0, 1, (patch,) * 257, COMBINE["difference"], "retain-first")
    assert_same_merge(block, [99] * 257, engine(ISAS[-1], 1))


def test_cuts_of_empty_and_absent() -> None:
    rng = np.random.default_rng(0)
    block = replace(checkpoint_pair(rng, 10), patches=(None, None))
    for isa in ISAS:
        cuts, report, out = merged(engine(isa, 2), block, [0, 5])
        assert cuts == [SELECT_NONE, SELECT_NONE]
        np.testing.assert_array_equal(out, block.base.data)
        assert report == merged(REFERENCE, block, [0, 5])[1]
    pair = checkpoint_pair(rng, 10)
    all_kept = replace(pair, patches=tuple(p and replace(p, keep=KEEP_ALL) for p in pair.patches))
    assert merged(engine(ISAS[0], 1), all_kept, [10, 0])[0] == [Cut(0, EVERY), SELECT_NONE]
    assert merged(engine(ISAS[0], 1), all_kept, [10, 5], [10, 9])[0][0] == SELECT_NONE


def test_threads_may_share_an_engine() -> None:
    block = checkpoint_pair(np.random.default_rng(1), 50_000)
    expected = merged(REFERENCE, block, [1500, 1000])
    backend = CpuBackend(2)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(5):
            cuts, report, out = merged(backend, block, [1500, 1000])
            if cuts != expected[0] or report != expected[1] or not np.array_equal(out, expected[2]):
                wrong.append("differs")

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


FORKED = """
import os, numpy as np
from safepatch_core.backends.contract import Bits, Block
from safepatch_core.backends.cpu import CpuBackend
from safepatch_core.spec import COMBINE
base = np.arange(200000, dtype=np.uint32)
block = Block(Bits(base, "F32"), 0, 1, (), COMBINE["sum"], "retain-first")
backend = CpuBackend(3)
def same():
    out = np.zeros_like(base)
    backend.merge(block, [], out)
    return bool((out == base).all())
assert same()
child = os.fork()
if child == 0:
    ok = same()
    del backend
    raise SystemExit(0 if ok else 1)
assert os.waitpid(child, 0)[1] == 0 and same()
"""


def test_a_forked_child_goes_on_alone() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=True, timeout=20)


MEASURED = """
import numpy as np
from safepatch_core.backends.contract import Bits, Block, PatchData
from safepatch_core.backends.cpu import CpuBackend
from safepatch_core.spec import COMBINE
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
n = 4_000_000
rng = np.random.default_rng(0)
base = np.zeros(n, np.uint16)
def patch(keep):
    values = Bits(rng.integers(0x3000, 0x4000, n).astype(np.uint16), "BF16")
    return PatchData("delta", values, "magnitude", None, "patched", 9, keep, 1.0)
block = Block(Bits(base, "BF16"), 0, 1, (patch(1 << 32), patch(1 << 31)), COMBINE["sum"], "retain-first")
backend = CpuBackend(2)
for quotas in ([n // 30, n // 50], [n // 3, n // 4]):
    before = resident()
    backend.merge(block, quotas, base)
    print(resident() - before, end=" ")
print(backend.scratch(n, 2))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_scratch_bounds_what_a_merge_holds() -> None:
    run = subprocess.run([sys.executable, "-c", MEASURED], check=True, capture_output=True, text=True)
    listed, marked, bound = map(int, run.stdout.split())
    assert 0 < listed + marked < bound + (1 << 20)
    assert bound < 2 * 4_000_000 * 0.8 + (4 << 20)


def test_the_environment_forces_an_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in ISAS:
        monkeypatch.setenv("SAFEPATCH_FORCE_ISA", isa)
        backend = open_backend("cpu", threads=1)
        assert backend.describe() == f"cpu ({isa}, 1 thread)"
    monkeypatch.setenv("SAFEPATCH_FORCE_ISA", "sse9")
    with pytest.raises(UsageError, match="SAFEPATCH_FORCE_ISA: found 'sse9', expected avx512, avx2, neon or scalar"):
        open_backend("cpu", threads=1)
    monkeypatch.delenv("SAFEPATCH_FORCE_ISA")
    assert CpuBackend(1).isa == ISAS[-1]


@pytest.mark.skipif(len(ISAS) == 3, reason="this machine has all of them")
def test_a_missing_instruction_set_is_an_error() -> None:
    with pytest.raises(UsageError, match="this machine has no avx512"):
        CpuBackend(1, "avx512")


def test_a_lack_of_threads_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(threads: int, isa: str | None) -> None:
        raise MemoryError("no thread can be started")

    monkeypatch.setattr(_engine, "Engine", full)
    with pytest.raises(
        UsageError, match="the cpu engine can't be opened: no thread can be started: found 900 threads"
    ):
        CpuBackend(900)


def test_threads_below_one_are_an_error() -> None:
    with pytest.raises(UsageError, match="threads"):
        CpuBackend(0)


def test_ring_memory() -> None:
    backend = engine(ISAS[-1], 1)
    for nbytes in (0, 1, 5 << 20):
        memory = backend.allocate(nbytes)
        assert memory.shape == (nbytes,)
        assert memory.flags.writeable
        assert memory.ctypes.data % 256 == 0
        memory[:] = 1


def test_wrong_calls_are_refused() -> None:
    block = checkpoint_pair(np.random.default_rng(2), 64)
    backend = engine(ISAS[-1], 1)
    data = block.base.data
    out = np.empty_like(data)
    patch = block.patches[0]
    assert patch is not None
    lora = Lora(np.ones((2, 100), np.float32), np.ones((1, 2), np.float32), 1.0)
    short = Bits(data[:-1], "BF16")
    with pytest.raises(ValueError, match=r"quotas: found 1, expected one per patch, 2"):
        backend.merge(block, [1], out)
    with pytest.raises(ValueError, match=r"output: found shape \(63,\)"):
        backend.apply(block, [SELECT_ALL] * 2, out[:-1])
    with pytest.raises(ValueError, match="output: overlaps"):
        values = patch.values
        assert isinstance(values, Bits)
        backend.apply(block, [SELECT_ALL] * 2, values.data)
    with pytest.raises(ValueError, match="output: overlaps"):
        longer = np.zeros(65, np.uint16)
        backend.apply(replace(block, base=Bits(longer[1:], "BF16")), [SELECT_ALL] * 2, longer[:-1])
    with pytest.raises(ValueError, match="base: found uint16, expected a contiguous, aligned array of uint32"):
        backend.count_equal(replace(block, base=Bits(data, "F32")), [0, 0])
    for broken, message in [
        (replace(patch, values=short), "patch values: found shape"),
        (replace(patch, values=Bits(np.zeros(128, np.uint16)[::2], "BF16")), "patch values: found uint16"),
        (replace(patch, importance="scores"), "no scores"),
        (replace(patch, importance="scores", scores=short), "patch scores: found shape"),
        (replace(patch, kind="lora"), "found Bits for kind lora"),
        (replace(patch, values=lora), "found Lora for kind checkpoint"),
    ]:
        with pytest.raises(ValueError, match=message):
            backend.count_equal(replace(block, patches=(broken,)), [0])
    beyond = replace(block, start=80, patches=(replace(patch, kind="lora", values=lora),))
    with pytest.raises(RuntimeError, match="the block ends beyond their product"):
        backend.count_equal(beyond, [0])
    with pytest.raises(ValueError, match="window counts"):
        backend.histogram(replace(block, patches=(patch,)), [[Window(0, 0, np.zeros(4, np.int32))]])


@pytest.fixture(scope="module")
def machine_code() -> dict[str, str]:
    """Disassembly of the library by function."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump isn't installed")
    if os.uname().machine != "x86_64":
        pytest.skip("the vector code is x86-64's")
    library = Path(get_library_dir()) / f"libsafepatch.so.{_engine.abi_version()}"
    run = subprocess.run(["objdump", "-d", "--no-show-raw-insn", library], check=True, capture_output=True, text=True)
    parts = re.split(r"^[0-9a-f]+ <(.*)>:$", run.stdout, flags=re.M)
    functions = dict(zip(parts[1::2], parts[2::2], strict=True))
    if not any("avx512" in name for name in functions):
        pytest.skip("the library is stripped, or built by another compiler than GCC")
    return functions


def test_nothing_is_fused(machine_code: dict[str, str]) -> None:
    for name, code in machine_code.items():
        assert not re.search(r"\bvf[n]?m(add|sub)", code), name


def test_vector_code_stays_in_its_place(machine_code: dict[str, str]) -> None:
    for name, code in machine_code.items():
        if "avx512" not in name:
            assert "%zmm" not in code, name
            if "avx2" not in name:
                assert "%ymm" not in code, name


# The functions of codes.inl. The compiler makes vectors of their loops, and plain code of the entries at their ends.
OF_CODES = re.compile(r"rewrite|find_(numbers|values)|(fill|settle|join|divide)_batch")


def test_loops_over_codes_are_vectors(machine_code: dict[str, str]) -> None:
    for isa, register in (("avx2", "%ymm"), ("avx512", "%zmm")):
        for function, instruction in (
            ("divide_batch", "vdivps"),
            ("join_batch", "vaddps"),
            ("draw_batch", "vpmul(udq|lq)"),
            ("rewriteILi0", "vdivps"),
            ("find_values", "vmulps"),
        ):
            code = [text for name, text in machine_code.items() if isa in name and function in name]
            assert any(re.search(rf"\b{instruction}\b.*{register}", text) for text in code), (isa, function)


def test_hot_loops_are_vectors(machine_code: dict[str, str]) -> None:
    for isa, register in (("avx2", "%ymm"), ("avx512", "%zmm")):
        code = "".join(text for name, text in machine_code.items() if isa in name and not OF_CODES.search(name))
        for instruction in ("vpmuludq", "vmulps", "vaddps", "vsubps", "vdivps", "vcvtph2ps"):
            assert re.search(rf"\b{instruction}\b.*{register}", code), (isa, instruction)
            assert not re.search(rf"\b{instruction.replace('ps', 'ss')}\b", code) or instruction == "vpmuludq"
