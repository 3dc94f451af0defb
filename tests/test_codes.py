"""Codes that the C++ engine rewrites, beside the numpy that other engines' codes are rewritten with: every bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safepatch_core import _engine
from safepatch_core.backends.codes import CodesReport
from safepatch_core.backends.contract import SELECT_NONE, Bits, Block, Cut, Lora, PatchData, Report
from safepatch_core.backends.cpu import CpuBackend
from safepatch_core.backends.reference import ReferenceBackend, from_float32, to_float32
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.quantised.grids import E2M1, E4M3, E8M0, INT4, INT8, Grid
from safepatch_core.merging.quantised.layouts.contract import CodedWeight
from safepatch_core.merging.quantised.layouts.fp4 import Scaled
from safepatch_core.merging.quantised.layouts.fp8 import Fp8
from safepatch_core.merging.quantised.layouts.packed import Packed, Turned, TurnedScales
from safepatch_core.merging.quantised.layouts.scales import Blocks, BlockScales
from safepatch_core.merging.quantised.values import DTYPES, rounded
from safepatch_core.merging.quantised.writing import UNTOUCHED, Coded, Loaded, apart, rewrite
from safepatch_core.merging.recipe import Quantized
from safepatch_core.spec import KEEP_ALL, Acts, Join, Rule

REFERENCE = ReferenceBackend()
ISAS = [isa for isa in ("scalar", "avx2", "avx512", "neon") if _engine.isa_usable(isa)]
GRIDS = {"E4M3": E4M3, "E2M1": E2M1, "INT8": INT8, "INT4": INT4}
# Of matrices: how many, rows, columns, and rows and columns that share a scale.
SHAPES = {
    "blocks": (1, 200, 130, (128, 128)),
    "ragged blocks of several": (3, 40, 70, (32, 32)),
    "channels": (1, 90, 102, (1, 102)),
    "groups": (2, 30, 96, (1, 16)),
    "whole": (1, 60, 100, (60, 100)),
}
ODD_SCALES = [0.0, -1.0, np.nan, np.inf, 2.0**-101, 2.0**-100, float(E8M0[0]), float(E8M0[254]), 3e38, 1.0, 0.0078125]


class Stored:
    """A weight in memory: codes at random, NaN and both zeros among them, and scales of which some are odd."""

    def __init__(
        self, grid: Grid, shape: str, seed: int, *, turned: bool = False, two: str = "", odd: bool = True
    ) -> None:
        batch, rows, cols, block = SHAPES[shape]
        self.rng = np.random.default_rng(seed)
        self.grid, self.entries = grid, batch * rows * cols
        dims = (batch, rows, cols)
        entry = TensorEntry("t", "U8", dims, Path("t"), "t", 0, self.entries * grid.bits // 8)
        self.blocks = Blocks(entry, rows, cols, block)
        down, across = self.blocks.table
        values = np.exp2(self.rng.uniform(-12, 2, (batch * down, across))).astype(np.float32)
        values[self.rng.random(values.shape) < 0.3] = 0.25  # ties are common with powers of two
        if odd:
            places = self.rng.random(values.shape) < 0.2
            values[places] = self.rng.choice(np.array(ODD_SCALES, np.float32), int(places.sum()))
        self.scales: Any = BlockScales(self.blocks, 0, values)
        flip = 0x80 if grid is INT8 else 0
        packed = Packed("t", dims, "", entry, grid, self.blocks, flip)
        self.weight: CodedWeight = Fp8(entry, self.blocks) if grid is E4M3 else packed
        if two:
            self.scales = Scaled(self.scales, np.array([0.37], np.float32), two == "divides")
        if turned:
            self.weight = Turned(packed, self.blocks)
            self.scales = TurnedScales(self.weight, self.scales)
        self.data = self.rng.integers(0, 256, self.entries * grid.bits // 8, np.uint8)

    @property
    def values(self) -> Any:
        """v, float32."""
        with np.errstate(all="ignore"):
            return self.grid.decode(self.weight.unpack(self.data)) * self.scales.run(0, self.entries)

    def deltas(self) -> Any:
        """Parts of a step of the grid, whole and half ones, none, and some that go beyond it."""
        with np.errstate(all="ignore"):
            s = np.nan_to_num(np.abs(self.scales.run(0, self.entries)), posinf=1)
            kinds = [self.rng.normal(0, 0.3, self.entries), self.rng.integers(-6, 7, self.entries) / 4]
            kinds += [np.zeros(self.entries), self.rng.normal(0, 2000, self.entries)]
            chosen = np.choose(self.rng.choice(4, self.entries, p=[0.5, 0.3, 0.1, 0.1]), kinds)
            return (chosen * np.minimum(s, np.float32(2.0**100))).astype(np.float32)

    def patch(self, kind: str, values: Any, keep: int = KEEP_ALL, scale: float = 1.0) -> PatchData:
        scores = np.abs(self.rng.normal(0, 1, self.entries)).astype(np.float32).view(np.uint32)
        importance: Any = "scores" if kind == "scores" else "magnitude"
        given: Any = "delta" if kind == "scores" else kind
        key = int(self.rng.integers(1 << 62))
        return PatchData(given, values, importance, Bits(scores, "F32"), "delta", key, keep, scale)


def f32(values: Any) -> Bits:
    return Bits(np.ascontiguousarray(values).view(np.uint32), "F32")


def whole(stored: Stored, patches: Sequence[PatchData], rule: Rule, lambda_: float = 1.0) -> Block:
    base = Bits(np.broadcast_to(UNTOUCHED, stored.entries), "F32")
    return Block(base, 0, stored.weight.shape[-1], tuple(patches), rule, "retain-first", lambda_)


def told(stored: Stored, rule: Quantized, data: Any, original: Bits | None = None) -> tuple[Coded, Loaded]:
    coded = Coded(stored.weight, None, 0x1234_5678_9ABC_DEF0, rule, True)
    return coded, Loaded(0, stored.entries, data, stored.scales, [], original)


def by_numpy(
    stored: Stored, block: Block, quotas: Sequence[int], rule: Quantized, original: Bits | None
) -> tuple[Any, Report]:
    data = stored.data.copy()
    coded, loaded = told(stored, rule, data, original)
    with np.errstate(all="ignore"):
        w = stored.values if original is None else to_float32(original)
        handed = rounded(w.astype(np.float32), DTYPES[rule.reference_dtype])

        def measured(p: Any) -> Any:
            return (
                p if p.kind != "checkpoint" else replace(p, kind="delta", values=f32(to_float32(p.values) - handed))
            )

        patches = list(map(measured, block.patches))
    loaded.tiles = [np.full(stored.entries, UNTOUCHED) for _ in patches]
    block = replace(block, patches=tuple(patches))
    reports = [REFERENCE.merge(alone, quotas[of], alone.base.data)[1] for of, alone in apart(block, loaded)]
    return data, rewrite(block, coded, loaded, reports)


def by_engine(
    engine: CpuBackend, stored: Stored, block: Block, quotas: Sequence[int], rule: Quantized, original: Bits | None
) -> tuple[Any, Report, list[Cut]]:
    data = stored.data.copy()
    coded, loaded = told(stored, rule, data, original)
    cuts, report = engine.merge(replace(block, codes=loaded.told(coded)), quotas, data)
    return data, report, cuts


def same(found: Report, expected: Report) -> None:
    assert isinstance(found, CodesReport) and isinstance(expected, CodesReport)
    assert found == expected


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_code_under_every_scale(grid: str, shape: str, rounding: Any, isa: str) -> None:
    stored = Stored(GRIDS[grid], shape, seed=len(grid + shape))
    rule = Quantized(rounding=rounding, reference="x" if rounding == "nearest" else "dequantised")
    patches = [stored.patch("delta", f32(stored.deltas())), stored.patch("delta", f32(stored.deltas()), scale=-1.5)]
    block = whole(stored, patches, Rule(Acts.ALL, Join.SUM))
    quotas = [stored.entries, stored.entries // 3]
    data, report = by_numpy(stored, block, quotas, rule, None)
    assert report.changed > 100
    for threads in (1, 2):
        found = by_engine(CpuBackend(threads, isa), stored, block, quotas, rule, None)
        assert np.array_equal(found[0], data)
        same(found[1], report)


@pytest.mark.parametrize("join", Join)
@pytest.mark.parametrize("acts", Acts)
@pytest.mark.parametrize("isa", ISAS)
def test_every_rule(isa: str, acts: Acts, join: Join) -> None:
    stored = Stored(E4M3, "ragged blocks of several", seed=int(acts) * 8 + int(join))
    patches = [
        stored.patch("delta", f32(stored.deltas())),
        stored.patch("scores", Bits(from_float32(stored.deltas(), "BF16"), "BF16"), keep=1 << 31, scale=0.7),
        stored.patch("delta", f32(stored.deltas()), scale=-2.0),
    ]
    block = whole(stored, patches, Rule(acts, join), lambda_=0.6)
    quotas = [stored.entries // 2, stored.entries // 4, stored.entries]
    data, report = by_numpy(stored, block, quotas, Quantized(), None)
    found = by_engine(CpuBackend(2, isa), stored, block, quotas, Quantized(), None)
    assert np.array_equal(found[0], data)
    same(found[1], report)
    assert report.changed > 100 and sum(of.asked for of in report.kept) > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("handed", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("original", [None, "F32", "BF16", "F16"])
@pytest.mark.parametrize("layout", ["fp8", "turned", "divides", "times"])
def test_checkpoints_are_measured_from_what_a_trainer_was_handed(layout: str, original: Any, handed: Any) -> None:
    turned, two = layout == "turned", layout if layout in ("divides", "times") else ""
    grid = E4M3 if layout == "fp8" else E2M1
    stored = Stored(grid, "groups", seed=5, turned=turned, two=two, odd=False)
    w = stored.values
    if original is not None:
        with np.errstate(all="ignore"):
            w = w + stored.deltas() / 8
            float_model = Bits(from_float32(np.nan_to_num(w), original), original)
            w = to_float32(float_model)
    with np.errstate(all="ignore"):
        patched = Bits(from_float32(w + stored.deltas(), "BF16"), "BF16")
    cols = stored.weight.shape[-1]
    a, b = (stored.rng.normal(0, 0.1, of).astype(np.float32) for of in ((2, cols), (stored.entries // cols, 2)))
    lora = Lora(a, b, 0.5)
    patches = [stored.patch("checkpoint", patched), stored.patch("lora", lora)]
    block = whole(stored, patches, Rule(Acts.ALONE, Join.SUM))
    quotas = [stored.entries // 3, stored.entries // 5]
    given = None if original is None else float_model
    rule = Quantized(reference_dtype=handed, reference="dequantised" if original is None else "x")
    data, report = by_numpy(stored, block, quotas, rule, given)
    for threads in (1, 2):
        found = by_engine(CpuBackend(threads), stored, block, quotas, rule, given)
        assert np.array_equal(found[0], data)
        same(found[1], report)


def test_no_cut_shows() -> None:
    """Codes of a whole run, of which a block is any part: as thresholds of a tensor in chunks are applied."""
    stored = Stored(E2M1, "groups", seed=9, odd=False)
    a, b = f32(stored.deltas()), f32(stored.deltas())
    patches = [stored.patch("delta", a, keep=3 << 30), stored.patch("scores", b)]
    block = whole(stored, patches, Rule(Acts.ELECTED, Join.MEAN))
    engine = CpuBackend(2)
    data, report, cuts = by_engine(engine, stored, block, [stored.entries // 2] * 2, Quantized(), None)
    again = stored.data.copy()
    coded, loaded = told(stored, Quantized(), again)
    given = replace(block, codes=loaded.told(coded))
    edges = [0, 1, 2, 37, 1024, 1025, 5000, stored.entries]
    parts = [engine.apply(given.slice(lo, hi), cuts, again) for lo, hi in zip(edges, edges[1:], strict=False)]
    assert np.array_equal(again, data)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    same(total, report)


def test_codes_that_lie_beyond_what_is_given_are_refused() -> None:
    stored = Stored(E4M3, "groups", seed=1, odd=False)
    block = whole(stored, [stored.patch("delta", f32(stored.deltas()))], Rule(Acts.ALL, Join.SUM))
    coded, loaded = told(stored, Quantized(), stored.data)
    codes = loaded.told(coded)
    assert codes is not None
    engine, cuts = CpuBackend(1), [SELECT_NONE]
    for wrong in (
        replace(codes, entries=stored.entries - 1, data=stored.data[:-1]),
        replace(codes, first=1),
        replace(codes, scales=codes.scales._replace(first=1)),
        replace(codes, scales=codes.scales._replace(values=codes.scales.values[:-1])),
        replace(codes, scales=codes.scales._replace(values=codes.scales.values[:, :-1])),
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"codes|scales|beyond|shape"):
            engine.apply(replace(block, codes=wrong), cuts, wrong.data)
    with pytest.raises(ValueError, match="their own data"):
        engine.apply(replace(block, codes=codes), cuts, stored.data.copy())
