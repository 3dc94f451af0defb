"""Tensors begun ahead: the order of events between them, their memory, their failures, and the reference's bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safepatch_core import merge
from safepatch_core.backends.ahead import BATCH, SMALL, Asked, Job, Rooms
from safepatch_core.backends.contract import SELECT_ALL, Ahead, Block, Cut
from safepatch_core.backends.reference import ReferenceBackend
from safepatch_core.backends.selftest import Setting, Shape, make_block
from safepatch_core.backends.triton import TritonBackend
from safepatch_core.bench import models
from safepatch_core.kernels.launch import BLOCK
from safepatch_core.spec import COMBINE
from tests.interpreted.fake_device import FakeDevice, Race
from tests.interpreted.test_triton_pipeline import SETTING, pinned

PLENTY = 64 << 20
LARGE = SMALL + 1


def blocks_of(device: FakeDevice, sizes: Sequence[int], setting: Setting = SETTING) -> list[Block]:
    flavours = ("tied", "model", "edges")
    return [
        pinned(device, make_block(np.random.default_rng(i), setting, flavours[i % 3], n, 3 * i))
        for i, n in enumerate(sizes)
    ]


def begin(engine: TritonBackend, blocks: Sequence[Block], skip: bool = False) -> list[Any]:
    """Each block with its output, what was asked of it, and the result that is to come."""
    found = []
    for block in blocks:
        out = np.empty_like(block.base.data)
        quotas = [len(block) // 5, len(block) // 3]
        skips = [len(block) // 50, 0] if skip else []
        found.append((block, out, (quotas, skips), engine.begin_merge(block, quotas, out, skips)))
    return found


def check(begun: Sequence[Any]) -> None:
    for block, out, (quotas, skips), later in begun:
        expected = np.empty_like(out)
        assert ReferenceBackend().merge(block, quotas, expected, skips) == later.result()
        assert np.array_equal(out, expected)


def pinned_outputs(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that copies reach while the host goes on."""
    monkeypatch.setattr(np, "empty_like", lambda a: device.pinned(a.nbytes).view(a.dtype))


@pytest.mark.parametrize("seed", range(2))
def test_nobody_waits_between_tensors(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(PLENTY, seed)
    engine = TritonBackend(device, PLENTY)
    blocks = blocks_of(device, (LARGE, 576, 2000, LARGE + 77))
    with monkeypatch.context() as patched:
        pinned_outputs(device, patched)
        begun = begin(engine, blocks, skip=bool(seed))
    assert (device.synchronized, device.finished) == (0, 0)
    assert device.kinds.count("apply_kernel") == 2 and not any(later.done() for *_, later in begun)
    up = engine._streams.up.index
    assert all(set(o.needs) <= {up} for o in device.history if o.kind == "upload"), "uploads wait for nothing"
    check(begun)
    assert (device.synchronized, device.finished) == (0, 3)
    assert all(later.done() for *_, later in begun) and device.idle


def test_small_tensors_share_an_upload_and_their_launches() -> None:
    device = FakeDevice(PLENTY)
    engine = TritonBackend(device, PLENTY)
    begun = begin(engine, blocks_of(device, (576, 1, 100, 3000, 577)))
    assert not device.issued
    check(begun)
    assert device.kinds.count("upload") == 1 and device.kinds.count("download") == 3
    kernels = [kind for kind in device.kinds if kind.endswith("_kernel")]
    assert len(kernels) == 10 and kernels[-2:] == ["apply_kernel", "faults_kernel"]


@pytest.mark.parametrize(
    "setting",
    [
        Setting("F32", (Shape("delta", "gradients"), None, Shape("delta")), COMBINE["ties"], "select-first"),
        Setting("F16", (None, Shape("checkpoint", retain=False)), COMBINE["sum"], "retain-first"),
    ],
    ids=("three patches", "one"),
)
def test_a_batch_of_other_kinds(setting: Setting) -> None:
    engine = TritonBackend(vram_limit=64 << 20)
    rng = np.random.default_rng(1)
    patches = len(setting.patches)
    begun = []
    for n in (5, 801, 17000):
        block = make_block(rng, setting, "tied", n, 5)
        out, quotas, skips = np.empty_like(block.base.data), [n // 3, n, n // 9][:patches], [n // 7, 0, 1][:patches]
        begun.append((block, out, (quotas, skips), engine.begin_merge(block, quotas, out, skips)))
    check(begun)


def test_memory_that_holds_one_tensor_is_waited_for_by_its_event() -> None:
    sizes = (LARGE, LARGE + 5, 100, LARGE + 9)
    block = make_block(np.random.default_rng(0), SETTING, "tied", LARGE + 9, 15)
    limit = Job([Asked(block, block.base.data, [5, 5], [0, 0])]).device_bytes
    device = FakeDevice(limit)
    engine = TritonBackend(device, limit)
    begun = begin(engine, blocks_of(device, sizes))
    assert device.finished == 2 and begun[1][3].done() and not begun[3][3].done()
    check(begun)
    assert device.allocated == limit and not device.synchronized


def test_a_batch_ends_where_it_is_long_where_the_kind_changes_and_where_others_pass_it() -> None:
    device = FakeDevice(PLENTY)
    engine = TritonBackend(device, PLENTY)
    ahead = engine._ahead
    full = BATCH // BLOCK
    small = blocks_of(device, [10] * (full + 1))
    begin(engine, small)
    assert len(ahead._open) == 1 and len(ahead._jobs[-1].asked) < full + 1
    other = make_block(np.random.default_rng(0), replace(SETTING, dtype="F32"), "tied", 9)
    begin(engine, [other])
    assert [len(one.block) for one in ahead._open] == [9]
    jobs = len(ahead._jobs)
    for passed in range(3):
        assert ahead._open and len(ahead._jobs) == jobs + passed
        begin(engine, blocks_of(device, (LARGE,)))
    assert not ahead._open


@pytest.mark.parametrize("wait", [0, 2])
def test_the_fake_device_notices_each_missing_wait(wait: int) -> None:
    """Use after upload, download after use. (In between, `apply` waits for what the histogram has waited for.)"""
    device = FakeDevice(PLENTY, deaf_to=wait)
    engine = TritonBackend(device, PLENTY)
    with pytest.raises(Race):
        check(begin(engine, blocks_of(device, (LARGE,))))


@pytest.mark.parametrize("at", [2, 31])
def test_a_failure_ends_all_that_was_begun_and_nothing_else(at: int) -> None:
    device = FakeDevice(PLENTY, fail_at=at)
    engine = TritonBackend(device, PLENTY)
    blocks = blocks_of(device, (LARGE, 50, 60))
    with pytest.raises(RuntimeError, match="failed"):
        begun = begin(engine, blocks)
        begun[1][3].result()
    assert device.idle and device.synchronized
    check(begin(engine, blocks[1:]))


def test_a_failure_that_is_told_again_ends_nothing_new() -> None:
    device = FakeDevice(PLENTY, fail_at=5)
    engine = TritonBackend(device, PLENTY)
    blocks = blocks_of(device, (50, 60))
    begun = begin(engine, blocks)
    for _, _, _, later in begun:
        with pytest.raises(RuntimeError, match="failed"):
            later.result()
    fresh = begin(engine, blocks[:1])
    with pytest.raises(RuntimeError, match="failed"):
        begun[1][3].result()
    check(fresh)


def test_apply_is_begun_too_and_other_calls_wait_for_what_was() -> None:
    device = FakeDevice(PLENTY)
    engine = TritonBackend(device, PLENTY)
    assert isinstance(engine, Ahead)
    blocks = blocks_of(device, (300, LARGE))
    cuts = [Cut(0x3B000000, 200, 0x3C000000, 9), SELECT_ALL]
    outs = [np.empty_like(block.base.data) for block in blocks]
    later = [engine.begin_apply(block, cuts, out) for block, out in zip(blocks, outs, strict=True)]
    assert engine.count_equal(blocks[0], [1, 2]) == ReferenceBackend().count_equal(blocks[0], [1, 2])
    assert all(one.done() for one in later)
    for block, out, one in zip(blocks, outs, later, strict=True):
        expected = np.empty_like(out)
        assert one.result() == ReferenceBackend().apply(block, cuts, expected) and np.array_equal(out, expected)


def test_a_whole_merge_never_synchronises(tmp_path: Path) -> None:
    models.write_set(tmp_path, models.SHAPES["tiny"])
    recipe = models.write_recipe(tmp_path / "recipe.yaml")
    device = FakeDevice(PLENTY)
    merge(recipe, tmp_path / "cpu", backend="cpu", threads=1)
    merge(recipe, tmp_path / "gpu", backend=TritonBackend(device, PLENTY))
    assert not device.synchronized and device.kinds.count("apply_kernel") >= 1
    for path in (tmp_path / "cpu").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "gpu" / path.name).read_bytes()


def test_rooms_never_overlap_and_all_come_back() -> None:
    rng = np.random.default_rng(0)
    rooms, live = Rooms(1000), list[tuple[int, int]]()
    for _ in range(2000):
        wanted = int(rng.integers(1, 400))
        while (start := rooms.place(wanted)) is None:
            live.pop(0)
            rooms.give()
        assert start + wanted <= 1000 and all(start + wanted <= a or b <= start for a, b in live)
        rooms.take(start, wanted)
        live.append((start, start + wanted))
    for _ in live:
        rooms.give()
    assert rooms.place(1000) == 0 and rooms.place(1001) is None
