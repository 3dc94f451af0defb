"""Each kernel against plain numpy, bit for bit, with its buffers' margins full of anything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from safepatch_core.backends import passes
from safepatch_core.backends.contract import Bits, Block, Cut, PatchReport
from safepatch_core.backends.device import InterpretedDevice
from safepatch_core.backends.reference import ReferenceBackend, Scored, philox, to_float32
from safepatch_core.backends.selftest import DTYPES, FLAVOURS, Setting, Shape, make_block, settings, to_bits
from safepatch_core.kernels.importance import accumulate
from safepatch_core.kernels.launch import BLOCK, INTERPRETED
from safepatch_core.spec import COMBINE, KEEP_ALL

SIZES = (0, 1, 7, 1001, BLOCK, 2 * BLOCK + 5)
STARTS = (0, 1, 13, (1 << 32) - 3, (1 << 45) + 11)
FAR = 1 << 16  # columns of a LoRA tensor that reaches far without large factors


class Work(passes.Call):
    """A call on a device whose memory begins with noise."""

    def __init__(self, block: Block, windows: int = 0, bins: int = 0) -> None:
        device = InterpretedDevice()
        arena = passes.Arena(device.allocate(64 << 20))
        arena._memory.copy_(torch.from_numpy(np.random.default_rng(5).integers(0, 256, 64 << 20, dtype=np.uint8)))
        super().__init__(device, arena, passes.Streams(None, None, None), block, windows, bins, select=True)


def scored(block: Block) -> list[Scored | None]:
    w = to_float32(block.base)
    with np.errstate(all="ignore"):
        return [None if p is None else Scored(block, p, w, PatchReport()) for p in block.patches]


def blocks(setting: Setting) -> list[Block]:
    """Every flavour, and every size at every start."""
    rng = np.random.default_rng(len(setting.patches))
    found = [make_block(rng, setting, flavour, 777, 3) for flavour in FLAVOURS]
    far = any(s and s.kind == "lora" for s in setting.patches)
    for i, n in enumerate(SIZES):
        start = STARTS[i % len(STARTS)] if not far else min(STARTS[i % len(STARTS)], 1 << 33)
        found.append(make_block(rng, setting, "tied", n, start, FAR if far and start > 1 << 20 else 0))
    return found


def test_the_kernels_are_interpreted() -> None:
    assert INTERPRETED


@pytest.mark.parametrize("setting", settings()[::3])
def test_score_gives_the_keys_of_eligible_entries(setting: Setting) -> None:
    for block in blocks(setting):
        work = Work(block)
        work.prepare([Cut(0, 0)] * len(block.patches))
        expected = [np.where(s.eligible, s.key, 0) if s else np.zeros(len(block)) for s in scored(block)]
        for segment in range((block.start % 16 + len(block) + BLOCK - 1) // BLOCK if len(block) else 0):
            first = block.start - block.start % 16 + segment * BLOCK - block.start
            lo, hi = max(first, 0), min(first + BLOCK, len(block))
            found = work.keys(segment)
            for keys, truth in zip(found, expected, strict=True):
                assert np.array_equal(keys[lo - first : hi - first], truth[lo:hi])
                assert not keys[: lo - first].any() and not keys[hi - first :].any()


@pytest.mark.parametrize("setting", settings()[1::3])
def test_ties_are_counted_by_segment(setting: Setting) -> None:
    for block in blocks(setting):
        truth = scored(block)
        keys = [int(np.median(s.key[s.eligible])) if s and s.eligible.any() else 1 for s in truth]
        work = Work(block)
        work.prepare([Cut(key, 0) for key in keys])
        segment = (np.arange(len(block)) + block.start % 16) // BLOCK
        for counts, s, key in zip(work.count_equal(), truth, keys, strict=True):
            if s is not None:
                expected = np.bincount(segment[s.eligible & (s.key == key)], minlength=len(counts))
                assert np.array_equal(counts, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_survives_and_every_sum_is_rounded_to_nearest_even(dtype: Any) -> None:
    """All 16-bit patterns as base, delta and score, and float32 sums around every rounding step of 16-bit types."""
    rng = np.random.default_rng(3)
    width: Any = np.uint32 if dtype == "F32" else np.uint16
    every = np.arange(1 << 16, dtype=np.uint32)
    steps = np.concatenate([(every << 16) + d for d in (0x7FFF, 0x8000, 0x8001, 0x1000, 0x0FFF, 0x1001, 0x3000)])
    delta = rng.permutation(np.concatenate([steps, rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint32)]))
    base: NDArray[Any] = np.resize(every, len(delta)).astype(width)
    if dtype == "F32":
        base = rng.integers(0, 1 << 32, len(delta), dtype=np.uint32)
    base[::2] = 0
    setting = Setting(dtype, (Shape("delta", values="F32", retain=False),), COMBINE["sum"], "retain-first")
    block = make_block(rng, setting, "bits", len(delta))
    patch = block.patches[0]
    assert patch is not None and patch.keep == KEEP_ALL
    block = replace(block, base=Bits(base, dtype), patches=(replace(patch, values=Bits(delta, "F32"), scale=1.0),))
    found, expected = np.empty_like(base), np.empty_like(base)
    work = Work(block)
    work.prepare([Cut(0, 1 << 62)])
    work.apply(found)
    report = ReferenceBackend().apply(block, [Cut(0, 1 << 62)], expected)
    assert np.array_equal(found, expected)
    assert work.report() == report and report.overflow.count and report.patches[0].bad_delta.count


def test_random_numbers_are_those_of_the_contract() -> None:
    """Random123's known answer, by way of retention: an entry with u < keep is the only kind that is eligible."""
    answer = philox(0, np.zeros(1, dtype=np.uint64))[0]
    assert [hex(u) for u in answer] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    setting = Setting("F32", (Shape("delta", values="F32"),), COMBINE["sum"], "retain-first")
    block = make_block(np.random.default_rng(0), setting, "model", 4)
    for lane, u in enumerate(answer):
        for keep, eligible in ((int(u), False), (int(u) + 1, True)):
            patch = block.patches[0]
            assert patch is not None
            work = Work(replace(block, patches=(replace(patch, random_key=0, keep=keep),)))
            work.prepare([Cut(0, 0)])
            assert bool(work.keys(0)[0][lane]) is eligible


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("gradients", DTYPES)
def test_importance_adds_the_product_in_place(weights: Any, gradients: Any) -> None:
    rng = np.random.default_rng(11)
    floats = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for n in (0, 1, 999, BLOCK + 3, 1 << 16):
        w = to_bits(rng.integers(0, 1 << 32, n, dtype=np.uint32).view(np.float32), weights)
        g = to_bits(rng.normal(0, 1e-3, n).astype(np.float32), gradients)
        if n == 1 << 16 and weights != "F32":
            w = Bits(np.arange(n, dtype=np.uint16), weights)
        before = rng.normal(0, 1, n).astype(np.float32)
        total = torch.from_numpy(before.copy())
        accumulate(
            total,
            torch.from_numpy(w.data.copy()).view(floats[weights]),
            torch.from_numpy(g.data.copy()).view(floats[gradients]),
        ).run()
        with np.errstate(all="ignore"):
            expected = before + np.abs(to_float32(w) * to_float32(g))
        found = total.numpy()
        real = ~np.isnan(expected)
        assert np.array_equal(found[real].view(np.uint32), expected[real].view(np.uint32))
        assert np.isnan(found[~real]).all()


def test_importance_refuses_what_it_would_misread() -> None:
    total, weight = torch.zeros(4, 6), torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"gradient: found torch.float32 \(6, 4\)"):
        accumulate(total, weight, torch.zeros(6, 4))
    with pytest.raises(ValueError, match="weight: found strided"):
        accumulate(total, torch.zeros(6, 4).T, weight)
    with pytest.raises(ValueError, match="total: found torch.float16"):
        accumulate(total.half(), weight, weight)
    with pytest.raises(ValueError, match="gradient: found torch.int64"):
        accumulate(total, weight, weight.long())
