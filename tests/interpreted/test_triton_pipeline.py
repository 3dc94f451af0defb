"""The GPU pipeline without a GPU: its order of events, its memory and its failures, on a device that checks them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from safepatch_core.backends import passes
from safepatch_core.backends.contract import SELECT_ALL, Bits, Block, Cut, Window
from safepatch_core.backends.passes import LINE, cut_up
from safepatch_core.backends.reference import ReferenceBackend
from safepatch_core.backends.select import COARSE
from safepatch_core.backends.selftest import Setting, Shape, compare, make_block
from safepatch_core.backends.triton import TritonBackend
from safepatch_core.errors import UsageError
from safepatch_core.kernels.launch import ALIGN, BLOCK, HISTOGRAMS, padded
from safepatch_core.spec import COMBINE
from tests.interpreted.fake_device import FakeDevice, Race

SETTING = Setting("BF16", (Shape("checkpoint", "scores"), Shape("checkpoint")), COMBINE["difference"], "retain-first")
ROW = 5 * 2  # bytes per entry of SETTING: base, two patches, one's scores, output
PARTS = 5
TABLES = 16 << 10
HISTOGRAMS_OF_MERGE = TABLES + 2 * (HISTOGRAMS + 1) * 8 * COARSE + 2 * 4 * BLOCK  # and keys of one segment


def pinned(device: FakeDevice, block: Block) -> Block:
    """The block with all its entries in memory that copies reach while the host goes on."""
    from dataclasses import replace

    def move(bits: Bits) -> Bits:
        memory = device.pinned(bits.data.nbytes).view(bits.data.dtype)
        memory[:] = bits.data
        return Bits(memory, bits.dtype)

    def patch(p: Any) -> Any:
        values = move(p.values) if isinstance(p.values, Bits) else p.values
        return replace(p, values=values, scores=p.scores and move(p.scores))

    return replace(block, base=move(block.base), patches=tuple(p and patch(p) for p in block.patches))


def open_fake(slots: int, seed: int = 0, tables: int = TABLES, **options: Any) -> tuple[TritonBackend, FakeDevice]:
    """An engine with room for so many slots of BLOCK entries."""
    limit = tables + slots * BLOCK * ROW
    device = FakeDevice(limit, seed, **options)
    return TritonBackend(device, limit), device


def quota_without_ties(block: Block, p: int) -> int:
    """A quota at which no tie is left over: how many keys of a patch lie above some bound in their middle."""
    keys = np.zeros(1 << 16, dtype=np.int64)
    windows = [[Window(0x30000000, 12, keys)] if q == p else [] for q in range(2)]
    ReferenceBackend().histogram(block, windows)
    tails = np.cumsum(keys[::-1])
    return int(tails[np.searchsorted(tails, tails[-1] // 2)])


def block_of(device: FakeDevice, entries: int, start: int = 0, flavour: str = "tied") -> Block:
    return pinned(device, make_block(np.random.default_rng(entries), SETTING, flavour, entries, start))


@pytest.mark.parametrize("seed", range(3))
def test_a_ring_of_three_slots_gives_the_reference_bits_in_any_order_of_events(seed: int) -> None:
    engine, device = open_fake(3, seed)
    block = block_of(device, PARTS * BLOCK - 77, start=(1 << 32) + 5)
    cuts = [Cut(0x3B000000, block.start + 2 * BLOCK + 9), SELECT_ALL]
    out = device.pinned(block.base.data.nbytes).view(np.uint16)
    expected = np.empty_like(out)
    assert engine.apply(block, cuts, out) == ReferenceBackend().apply(block, cuts, expected)
    assert np.array_equal(out, expected)
    assert device.kinds.count("download") == PARTS + 1  # and the tally
    assert device.idle


def test_output_over_the_base_is_written_only_after_the_base_has_been_read() -> None:
    engine, device = open_fake(3)
    block = block_of(device, PARTS * BLOCK)
    expected = np.empty_like(block.base.data)
    ReferenceBackend().apply(block, [SELECT_ALL] * 2, expected)
    engine.apply(block, [SELECT_ALL] * 2, block.base.data)
    assert np.array_equal(block.base.data, expected)


@pytest.mark.parametrize("wait", range(4))
def test_the_fake_device_notices_each_missing_wait(wait: int) -> None:
    """Upload after use, use after upload, use after the last output has left, download after use."""
    engine, device = open_fake(3, deaf_to=wait)
    block = block_of(device, 2 * PARTS * BLOCK)
    out = device.pinned(block.base.data.nbytes).view(np.uint16)
    with pytest.raises(Race):
        engine.apply(block, [SELECT_ALL] * 2, out)


def test_uploads_run_ahead_of_kernels_by_the_ring() -> None:
    engine, device = open_fake(3)
    block = block_of(device, PARTS * BLOCK)
    out = device.pinned(block.base.data.nbytes).view(np.uint16)
    engine.apply(block, [SELECT_ALL] * 2, out)
    up, work = engine._streams.up.index, engine._streams.work.index
    ahead = [o.needs.get(work, 0) for o in device.history if o.kind == "upload" and o.stream == up]
    kernels = [o.position for o in device.history if o.kind == "faults_kernel"]
    assert ahead == [0] * 12 + [kernels[0]] * 4 + [kernels[1]] * 4


def test_sweeps_send_only_what_the_slots_have_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sweeps: two histograms and the apply. The keys' ties are all taken, so they aren't counted."""
    monkeypatch.setattr(passes, "PIECE", BLOCK)
    slots, sent = 3, PARTS + 2 * (PARTS - 3)
    engine, device = open_fake(slots, tables=HISTOGRAMS_OF_MERGE)
    block = block_of(device, PARTS * BLOCK, flavour="model")
    out = device.pinned(block.base.data.nbytes).view(np.uint16)
    expected = np.empty_like(out)
    quotas = [quota_without_ties(block, p) for p in range(2)]
    assert engine.merge(block, quotas, out) == ReferenceBackend().merge(block, quotas, expected)
    assert np.array_equal(out, expected)
    assert device.kinds.count("histogram_kernel") == 2 * PARTS
    assert device.kinds.count("count_equal_kernel") == 0
    assert 0 <= device.uploaded - sent * BLOCK * (ROW - 2) < 4096


@pytest.mark.parametrize("start", [0, 3])
def test_a_tensor_longer_than_the_ring_is_sent_again_and_merges_alike(start: int) -> None:
    tables = HISTOGRAMS_OF_MERGE + 2 * 9 * 8 * 777  # the windows of `compare`
    engine, device = open_fake(3, tables=tables)
    block = block_of(device, PARTS * BLOCK - 1, start)
    assert compare(engine, block, np.random.default_rng(start)) is None
    assert device.allocated == device.limit


def test_memory_is_taken_once_and_never_beyond_the_limit() -> None:
    engine, device = open_fake(3)
    for entries in (1, BLOCK, PARTS * BLOCK):
        block = block_of(device, entries)
        engine.apply(block, [SELECT_ALL] * 2, np.empty_like(block.base.data))
    assert device.allocated == device.limit


def test_a_limit_below_three_slots_is_refused_with_what_it_takes() -> None:
    engine, device = open_fake(2)
    block = block_of(device, PARTS * BLOCK)
    with pytest.raises(UsageError, match=r"--vram-limit is too small .*found \d+ bytes, expected \d+ or more"):
        engine.apply(block, [SELECT_ALL] * 2, np.empty_like(block.base.data))
    with pytest.raises(UsageError, match="not enough GPU memory"):
        TritonBackend(FakeDevice(LINE), 2 * LINE)


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8, 13, 21, 30])
def test_a_failure_at_any_operation_drains_and_is_reported(at: int) -> None:
    engine, device = open_fake(3, fail_at=at)
    block = block_of(device, PARTS * BLOCK)
    out = device.pinned(block.base.data.nbytes).view(np.uint16)
    with pytest.raises(RuntimeError, match="failed"):
        engine.apply(block, [SELECT_ALL] * 2, out)
    assert device.idle and device.synchronized
    expected = np.empty_like(out)
    assert engine.apply(block, [SELECT_ALL] * 2, out) == ReferenceBackend().apply(block, [SELECT_ALL] * 2, expected)
    assert np.array_equal(out, expected)


def test_parts_cover_the_block_and_start_on_the_grid() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        start, entries = int(rng.integers(0, 1 << 40)), int(rng.integers(0, 10 * BLOCK))
        capacity = padded(int(rng.integers(1, 4 * BLOCK)))
        parts = cut_up(start, entries, capacity)
        assert [p.lo for p in parts] == [0, *(p.hi for p in parts[:-1])][: len(parts)]
        assert sum(p.hi - p.lo for p in parts) == entries
        for part in parts:
            assert part.first % ALIGN == 0 and part.first + part.head == start + part.lo
            assert 0 < part.hi - part.lo <= capacity - part.head
