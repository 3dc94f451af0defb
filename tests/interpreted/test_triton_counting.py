"""Sweeps that count: histograms stay on the device, no unit waits for another, and the counts are the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safepatch_core import merge
from safepatch_core.backends.ahead import Asked, Job
from safepatch_core.backends.contract import SELECT_NONE, Backend, Block, Report, Window
from safepatch_core.backends.counting import Sweep, nbytes_of
from safepatch_core.backends.passes import line
from safepatch_core.backends.reference import ReferenceBackend
from safepatch_core.backends.select import COARSE, counting
from safepatch_core.backends.selftest import Setting, Shape, make_block
from safepatch_core.backends.triton import TritonBackend
from safepatch_core.bench import models
from safepatch_core.spec import COMBINE, KEY_BITS
from tests.interpreted.fake_device import FakeDevice, Race
from tests.interpreted.test_triton_ahead import LARGE, PLENTY, blocks_of
from tests.test_quantised_packed import given
from tests.twins import Twin

Windows = list[list[Window]]


def search_of(tensors: int, coarse: int = COARSE) -> list[Windows]:
    """Windows as a search of two patches has them: for all tensors, for a guessed bin, and for each tensor alone."""
    shared = [np.zeros(coarse, np.int64) for _ in range(2)], [np.zeros(1 << 10, np.int64) for _ in range(2)]
    return [
        [
            [
                Window(0, KEY_BITS + 1 - coarse.bit_length(), shared[0][p]),
                Window(0x3A000000, 16, shared[1][p]),
                Window(0x38000000, 17, np.zeros(777, np.int64)),
            ]
            for p in range(2)
        ]
        for _ in range(tensors)
    ]


def copied(windows: Sequence[Windows]) -> list[Windows]:
    """The same, empty, with as many of them shared."""
    fresh: dict[int, Any] = {}

    def of(window: Window) -> Window:
        return window._replace(counts=fresh.setdefault(id(window.counts), np.zeros_like(window.counts)))

    return [[[of(window) for window in patch] for patch in tensor] for tensor in windows]


def swept(engine: Backend, units: Sequence[tuple[Block, Windows]]) -> list[Report]:
    sweep = counting(engine)
    begun = [sweep.begin(block, windows) for block, windows in units]
    found = [later.result() for later in begun]
    sweep.end()
    return found


def check(engine: Backend, blocks: Sequence[Block], owners: Sequence[int], windows: Sequence[Windows]) -> None:
    """The engine counts what the reference counts; `owners` says whose windows a block is counted in."""
    expected = copied(windows)
    truth = swept(ReferenceBackend(), [(b, expected[t]) for b, t in zip(blocks, owners, strict=True)])
    assert swept(engine, [(b, windows[t]) for b, t in zip(blocks, owners, strict=True)]) == truth
    for mine, others in zip(windows, expected, strict=True):
        require_same(mine, others)


def require_same(mine: Windows, others: Windows, times: int = 1) -> None:
    assert any(window.counts.any() for window in sum(mine, []))
    for window, other in zip(sum(mine, []), sum(others, []), strict=True):
        assert np.array_equal(window.counts, times * other.counts)


@pytest.mark.parametrize("seed", range(2))
def test_nobody_waits_between_units_and_counts_are_brought_once(seed: int) -> None:
    device = FakeDevice(PLENTY, seed)
    engine = TritonBackend(device, PLENTY)
    sweep, windows = engine.counting(), search_of(2)
    blocks = blocks_of(device, (LARGE, LARGE + 5, 900, LARGE))
    begun = [sweep.begin(block, windows[t]) for t, block in zip((0, 0, 0, 1), blocks, strict=True)]
    assert (device.synchronized, device.finished) == (0, 0) and not begun[0].done()
    up = engine._streams.up.index
    assert all(set(o.needs) <= {up} for o in device.history if o.kind == "upload"), "uploads wait for nothing"
    assert device.kinds.count("download") == 4 + 2, "tallies, and what is counted of one tensor alone"
    sweep.end()
    assert not device.synchronized and device.idle
    assert device.kinds.count("download") == 4 + 2 * (2 + 2), "and at the end what is counted of both"
    assert device.kinds.count("fold_kernel") == 2 * (2 + 2)
    expected = copied(search_of(2))
    for t, block, later in zip((0, 0, 0, 1), blocks, begun, strict=True):
        assert later.result() == ReferenceBackend().histogram(block, expected[t])
    for mine, others in zip(windows, expected, strict=True):
        require_same(mine, others)


def test_small_units_with_the_same_windows_go_together() -> None:
    device = FakeDevice(PLENTY)
    check(TritonBackend(device, PLENTY), blocks_of(device, (500, 77, 1, 4000)), [0] * 4, search_of(1))
    assert device.kinds.count("upload") == device.kinds.count("histogram_kernel") == 1


@pytest.mark.parametrize(
    "setting",
    [
        Setting("F32", (Shape("delta", "gradients"), None), COMBINE["sum"], "select-first"),
        Setting("F16", (None, Shape("lora", retain=False)), COMBINE["sum"], "retain-first"),
    ],
    ids=("an absent patch", "factors"),
)
def test_patches_that_lack_the_tensor_keep_their_place(setting: Setting) -> None:
    engine = TritonBackend(vram_limit=PLENTY)
    windows, expected = search_of(1), search_of(1)
    block = make_block(np.random.default_rng(0), setting, "tied", 3000, 5)
    assert swept(engine, [(block, windows[0])]) == swept(ReferenceBackend(), [(block, expected[0])])
    require_same(windows[0], expected[0])


def test_counts_are_exact_where_windows_come_and_go() -> None:
    """Back to a tensor that was left, other windows, none, and a second sweep between the units of the first."""
    device = FakeDevice(PLENTY)
    engine = TritonBackend(device, PLENTY)
    blocks = blocks_of(device, (LARGE, 300, LARGE, 400, 500))
    check(engine, blocks, [0, 1, 0, 2, 1], [*search_of(2), search_of(1, COARSE // 2)[0]])
    windows, others = search_of(1), search_of(1)
    sweep, other = engine.counting(), engine.counting()
    for _ in range(2):
        sweep.begin(blocks[0], windows[0])
        other.begin(blocks[1], others[0])
        assert engine.count_equal(blocks[1], [1, 2]) == [0, 0]
        sweep.begin(blocks[1], [[], []])
    other.end()
    sweep.end()
    for found, block in ((windows, blocks[0]), (others, blocks[1])):
        once = search_of(1)[0]
        ReferenceBackend().histogram(block, once)
        require_same(found[0], once, times=2)


def test_memory_for_one_unit_is_waited_for_by_its_event_and_less_is_counted_at_once() -> None:
    windows = search_of(1, 512)
    blocks = blocks_of(FakeDevice(PLENTY), (LARGE,) * 4)
    asked = Asked(blocks[0], blocks[0].base.data, cuts=[SELECT_NONE] * 2, windows=windows[0], sweep=Sweep())
    limit = Job([asked]).device_bytes + line(nbytes_of(sum(windows[0], [])))
    for nbytes, synchronized in ((limit, 0), (limit - 256, 8)):
        device = FakeDevice(nbytes)
        check(TritonBackend(device, nbytes), blocks_of(device, (LARGE,) * 4), [0] * 4, search_of(1, 512))
        assert device.synchronized == synchronized


@pytest.mark.parametrize("wait", [0, 1])
def test_the_fake_device_notices_each_missing_wait(wait: int) -> None:
    """Use after upload, download after use."""
    device = FakeDevice(PLENTY, deaf_to=wait)
    with pytest.raises(Race):
        check(TritonBackend(device, PLENTY), blocks_of(device, (LARGE,)), [0], search_of(1))


def test_lost_counts_are_told_to_their_sweep_alone() -> None:
    """Another call fails, and takes with it what the device has counted."""
    device = FakeDevice(PLENTY)
    engine = TritonBackend(device, PLENTY)
    blocks = blocks_of(device, (LARGE, LARGE))
    sweep = engine.counting()
    sweep.begin(blocks[0], search_of(1)[0]).result()
    device.fail_at = device.issued + 3
    with pytest.raises(RuntimeError, match="failed"):
        engine.count_equal(blocks[1], [1, 2])
    with pytest.raises(RuntimeError, match="failed"):
        sweep.begin(blocks[0], search_of(1)[0])
        sweep.end()
    check(engine, blocks, [0, 0], search_of(1))


def merged_alike(recipe: Path, folder: Path, **options: Any) -> FakeDevice:
    """The device on which a merge wrote the bytes of the C++ engine; it was never waited for but to count ties."""
    device = FakeDevice(PLENTY)
    merge(recipe, folder / "gpu", backend=TritonBackend(device, PLENTY), **options)
    merge(recipe, folder / "cpu", backend="cpu", threads=1, **options)
    for path in (folder / "cpu").iterdir():
        assert path.read_bytes() == (folder / "gpu" / path.name).read_bytes()
    assert device.synchronized <= device.kinds.count("count_equal_kernel")
    return device


def test_a_whole_model_in_chunks(tmp_path: Path) -> None:
    models.write_set(tmp_path, models.SHAPES["tiny"])
    recipe = models.write_recipe(tmp_path / "recipe.yaml", scope="model", targets={"include": ["*layers.0.*"]})
    device = merged_alike(recipe, tmp_path, chunk_entries=5000)
    assert device.synchronized and device.kinds.count("apply_kernel") > 1, "ties are shared out"


def test_a_tensor_in_chunks(tmp_path: Path) -> None:
    """One that the host's memory is too small to hold whole."""
    models.write_set(tmp_path, replace(models.SHAPES["tiny"], vocab=4096))
    recipe = models.write_recipe(tmp_path / "recipe.yaml", targets={"include": ["lm_head*"]})
    device = merged_alike(recipe, tmp_path, memory_limit="16MiB", chunk_entries=100_000)
    assert device.kinds.count("apply_kernel") == 3 and device.synchronized


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("name", ["fp8", "int8 per channel", "int4 in groups"])
def test_codes(tmp_path: Path, name: str, scope: str) -> None:
    """Done whole, and in chunks."""
    base = Twin(tmp_path, seed=2) if name == "fp8" else given(tmp_path, name, 5)
    patches = base.patch("a", top=0.3, retain=0.5), base.patch("b", "checkpoint", top=0.2)
    recipe = base.recipe(*patches, scope=scope)
    for chunk in (None, 1000):
        (tmp_path / str(chunk)).mkdir()
        merged_alike(recipe, tmp_path / str(chunk), chunk_entries=chunk)
