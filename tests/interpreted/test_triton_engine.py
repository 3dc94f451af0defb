"""The Triton engine as a whole against the reference, as `Backend` promises it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from safepatch_core.backends.contract import SELECT_ALL, SELECT_NONE, Bits, Block, Cut, Report, Window
from safepatch_core.backends.reference import ReferenceBackend
from safepatch_core.backends.selftest import (
    CHECKS,
    FLAVOURS,
    Setting,
    Shape,
    check_random,
    check_settings,
    compare,
    make_block,
    settings,
)
from safepatch_core.backends.triton import TritonBackend
from safepatch_core.errors import UsageError
from safepatch_core.kernels.launch import BLOCK
from safepatch_core.spec import COMBINE, Acts, Join, Rule

TWO = Setting("BF16", (Shape("checkpoint", "scores"), Shape("checkpoint")), COMBINE["difference"], "retain-first")


@pytest.fixture(scope="module")
def engine() -> TritonBackend:
    return TritonBackend(vram_limit=64 << 20)


@pytest.mark.parametrize("setting", range(len(settings())))
def test_every_source_importance_combination_and_order(engine: TritonBackend, setting: int) -> None:
    rng = np.random.default_rng(setting)
    for flavour in (FLAVOURS[setting % 5], FLAVOURS[(setting + 2) % 5]):
        block = make_block(rng, settings()[setting], flavour, 901, int(rng.integers(0, 4000)))
        assert compare(engine, block, rng) is None


@pytest.mark.parametrize(
    "rule", list(map(Rule._make, product(Acts, Join))), ids=lambda r: f"{r.acts.name}-{r.join.name}"
)
def test_every_rule_that_the_axes_allow(engine: TritonBackend, rule: Rule) -> None:
    rng = np.random.default_rng(0)
    shapes = (Shape("delta"), None, Shape("checkpoint", values="F32"), Shape("delta", values="F16", retain=False))
    for flavour in ("tied", "edges"):
        block = make_block(rng, Setting("F32", shapes, rule, "select-first"), flavour, 801, 3)
        assert compare(engine, block, rng) is None


@pytest.mark.parametrize("name", [n for n, c in CHECKS.items() if c not in (check_settings, check_random)])
def test_what_the_selftest_checks(engine: TritonBackend, name: str) -> None:
    assert not any(CHECKS[name](engine, np.random.default_rng(1), 700))


def test_a_block_that_no_patch_has_keeps_its_bits(engine: TritonBackend) -> None:
    setting = Setting("F16", (None, None), COMBINE["difference"], "retain-first")
    block = make_block(np.random.default_rng(0), setting, "bits", 1234)
    assert compare(engine, block, np.random.default_rng(0)) is None
    out = np.zeros_like(block.base.data)
    cuts, report = engine.merge(block, [10, 10], out)
    assert cuts == [SELECT_NONE] * 2 and np.array_equal(out, block.base.data)


def test_thirty_three_patches(engine: TritonBackend) -> None:
    """More than one bit of an integer each, whichever way they are combined."""
    for rule in map(Rule._make, product(Acts, Join)):
        setting = Setting("BF16", (Shape("delta"),) * 33, rule, "retain-first")
        block = make_block(np.random.default_rng(4), setting, "tied", 333)
        out, expected = np.empty_like(block.base.data), np.empty_like(block.base.data)
        cuts = [Cut(0x3B000000, 100)] * 33
        assert engine.apply(block, cuts, out) == ReferenceBackend().apply(block, cuts, expected)
        assert np.array_equal(out, expected)


def test_the_cut_falls_into_any_segment_of_a_tie(engine: TritonBackend) -> None:
    """All keys are equal and none is dropped: the quota says where the cut lies."""
    n = 3 * BLOCK
    base = np.zeros(n, dtype=np.uint16)
    block = make_block(
        np.random.default_rng(0),
        Setting("BF16", (Shape("delta", retain=False),), COMBINE["sum"], "retain-first"),
        "tied",
        n,
        5,
    )
    patch = block.patches[0]
    assert patch is not None
    block = replace(block, base=Bits(base, "BF16"), patches=(replace(patch, values=Bits(base + 0x3C00, "BF16")),))
    out = np.empty_like(base)
    for k in (1, BLOCK - 6, BLOCK - 5, BLOCK - 4, BLOCK, 2 * BLOCK + 1, n - 1, n):
        cuts, report = engine.merge(block, [k], out)
        assert cuts == [SELECT_ALL if k == n else Cut(0x3C000000, 5 + k)]
        assert report.patches[0].applied == k and np.count_nonzero(out) == k and out[k - 1]


def test_faults_are_counted_by_kind_with_their_first_index_at_any_place(engine: TritonBackend) -> None:
    setting = Setting(
        "F32", (Shape("delta", "scores", values="F32", scores="F32", retain=False),), COMBINE["sum"], "retain-first"
    )
    start, n = (1 << 33) + 7, 2 * BLOCK + 100
    block = make_block(np.random.default_rng(0), setting, "model", n, start)
    patch = block.patches[0]
    assert patch is not None and patch.scores is not None
    assert isinstance(patch.values, Bits)
    base, values, scores = (b.data.view(np.float32) for b in (block.base, patch.values, patch.scores))
    base[:] = 0
    values[[BLOCK + 3, BLOCK + 900]] = np.nan, np.inf
    scores[[n - 1, BLOCK + 3]] = np.nan  # the second has a bad delta already
    scores[[0, 9, 2 * BLOCK]] = -1.0
    scores[17] = -0.0
    report = engine.histogram(block, [[]])
    assert report == ReferenceBackend().histogram(block, [[]])
    found = report.patches[0]
    assert (found.bad_delta.count, found.bad_delta.first) == (2, start + BLOCK + 3)
    assert (found.bad_score.count, found.bad_score.first) == (1, start + n - 1)
    assert (found.negative.count, found.negative.first) == (3, start)
    values[[40, BLOCK + 40]] = 3e38
    block = replace(block, patches=(replace(patch, scale=2.0),))
    out = np.empty_like(block.base.data)
    overflow = engine.apply(block, [SELECT_ALL], out).overflow
    assert (overflow.count, overflow.first) == (2, start + 40) and out[40] == out[BLOCK + 40] == 0


def test_windows_add_to_what_they_hold_and_may_be_of_any_number_and_size(engine: TritonBackend) -> None:
    block = make_block(np.random.default_rng(8), TWO, "tied", 5000, 3)

    def windows() -> list[list[Window]]:
        sizes = ((0, 15, 65536), (0x3B000000, 0, 3), (0x7F7FFFFF, 0, 1), (1, 31, 1), (0xFFFFFFFF, 0, 5), (0, 20, 700))
        many = [Window(lo, shift, np.ones(bins, dtype=np.int64)) for lo, shift, bins in sizes]
        return [many, []]

    found, expected = windows(), windows()
    assert engine.histogram(block, found) == ReferenceBackend().histogram(block, expected)
    for one, other in zip(found[0], expected[0], strict=True):
        assert np.array_equal(one.counts, other.counts)


def test_inputs_may_be_read_only_and_outputs_the_base(engine: TritonBackend) -> None:
    block = make_block(np.random.default_rng(2), TWO, "model", 4000, 9)
    expected = np.empty_like(block.base.data)
    wanted = ReferenceBackend().merge(block, [100, 200], expected)
    for patch in block.patches:
        assert patch is not None and isinstance(patch.values, Bits)
        patch.values.data.flags.writeable = False
    assert engine.merge(block, [100, 200], block.base.data) == wanted
    assert np.array_equal(block.base.data, expected)


def test_calls_from_several_threads_take_turns(engine: TritonBackend) -> None:
    blocks = [make_block(np.random.default_rng(i), TWO, "tied", 2000 + i, i) for i in range(4)]
    found: list[Any] = [None] * 4

    def work(i: int) -> None:
        out = np.empty_like(blocks[i].base.data)
        found[i] = (engine.merge(blocks[i], [50, 60], out), out)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for block, (result, out) in zip(blocks, found, strict=True):
        expected = np.empty_like(out)
        assert ReferenceBackend().merge(block, [50, 60], expected) == result and np.array_equal(out, expected)


def test_host_memory_is_aligned_and_scratch_bounds_what_merge_allocates(engine: TritonBackend) -> None:
    import tracemalloc

    for nbytes in (0, 1, 1000, 1 << 20):
        memory = engine.allocate(nbytes)
        assert memory.nbytes == nbytes and memory.ctypes.data % 256 == 0 and memory.flags.writeable
    block = make_block(np.random.default_rng(2), TWO, "tied", 1000)
    out = np.empty_like(block.base.data)
    engine.merge(block, [30, 20], out)
    tracemalloc.start()
    try:
        engine.merge(block, [30, 20], out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The interpreter's own arrays are as long as a program; a GPU doesn't have them.
    assert peak <= engine.scratch(1000, 2) + 100 * 8 * BLOCK


def test_a_small_limit_gives_the_same_bytes() -> None:
    small = TritonBackend(vram_limit=12 << 20)
    block = make_block(np.random.default_rng(3), TWO, "tied", 8 * BLOCK + 11, 21)
    one, other = np.empty_like(block.base.data), np.empty_like(block.base.data)
    quotas = [len(block) // 20, len(block) // 9]
    assert small.merge(block, quotas, one) == ReferenceBackend().merge(block, quotas, other)
    assert np.array_equal(one, other)


def test_devices_are_named_in_refusals(engine: TritonBackend) -> None:
    with pytest.raises(UsageError, match="TRITON_INTERPRET=1 runs on the CPU only: found cuda:0"):
        TritonBackend("cuda:0")
    assert TritonBackend("cpu", 1 << 20).describe().startswith("triton ")
    assert "interpreter" in engine.describe()


@pytest.mark.parametrize("spoil", ["random_key", "cut", "scale", "keep"])
def test_a_wrong_number_in_the_table_shows(engine: TritonBackend, spoil: str) -> None:
    """`compare` can fail: the reference is given what the engine isn't."""
    block = make_block(np.random.default_rng(6), TWO, "model", 3000)
    patch = block.patches[0]
    assert patch is not None
    patch = replace(patch, keep=1 << 31)
    block = replace(block, patches=(patch, block.patches[1]))
    changes: dict[str, Any] = {
        "random_key": patch.random_key ^ 1,
        "scale": -patch.scale,
        "keep": patch.keep + (1 << 28),
    }
    spoiled = (
        block
        if spoil == "cut"
        else replace(block, patches=(replace(patch, **{spoil: changes[spoil]}), block.patches[1]))
    )

    class Wrong(TritonBackend):
        def __init__(self) -> None: ...

        def __getattribute__(self, name: str) -> Any:
            method: Callable[..., Any] = getattr(engine, name)

            def call(_: Block, *args: Any) -> Report:
                if spoil == "cut" and name == "apply":
                    args = ([Cut(c.key + 1, c.before) for c in args[0]], *args[1:])
                return method(spoiled, *args)  # type: ignore[no-any-return]

            return call

    assert compare(engine, block, np.random.default_rng(1)) is None
    assert compare(Wrong(), block, np.random.default_rng(1)) is not None
