"""Combine rules: all engines on all values of their axes, by brute force; the header's numbers are spec.py's."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from safepatch_core.backends.contract import SELECT_ALL, Backend, Bits, Block, GridName, PatchData, Rounding
from safepatch_core.backends.selftest import DTYPES, to_bits
from safepatch_core.spec import COMBINE, KEEP_ALL, Acts, Dtype, Importance, Join, Kind, Order, Rule, Weight
from tests import oracle
from tests.test_survival import engines

HEADER = Path(__file__).parents[1] / "csrc/include/safepatch.h"
RULES = list(map(Rule._make, product(Acts, Join)))
SCALES = (1.0, -0.5, 3e38, -3e38)
VALUES = (0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.1, -3.5, 65504.0, -65504.0, 1e-40, 1e30, -1e30)


def block_of(rng: np.random.Generator, dtype: Dtype, rule: Rule, patches: int) -> Block:
    """Deltas of all sizes, which meet in all combinations, on bases that may be infinite or NaN."""

    def draw(values: tuple[float, ...]) -> np.ndarray:
        return rng.choice(np.array(values, np.float32), 3000)

    given = tuple(
        PatchData("delta", to_bits(draw(VALUES), "F32"), "magnitude", None, "patched", 0, KEEP_ALL, float(scale))
        for scale in rng.choice(np.array(SCALES, np.float32), patches)
    )
    base = to_bits(draw((*VALUES, np.inf, np.nan)), dtype)
    return Block(base, 0, 1, given, rule, "retain-first", float(np.float32(rng.choice((1.0, 0.3, -2.0)))))


def expected(block: Block) -> tuple[np.ndarray, list[int], list[int]]:
    """Bits, entries that each patch acts on, and entries that overflow, as the oracle has them."""
    base = oracle.Tensor(block.base.dtype, (len(block),), block.base.data.tobytes())
    w = oracle.to_f32(base)
    deltas = [p.values.data.view(np.float32) for p in block.patches if p and isinstance(p.values, Bits)]
    with np.errstate(all="ignore"):
        scales = [np.float32(p.scale) for p in block.patches if p]
        steps = [np.float32(p.scale) * d for p, d in zip(block.patches, deltas, strict=True) if p]
        acts, join = (axis.name.lower() for axis in block.rule)
        held = [d != 0 for d in deltas]
        acc, acting = oracle.combine(acts, join, w, held, steps, scales, np.float32(block.lambda_))
        bits = oracle.from_f32(acc, base.dtype)
    finite = np.isfinite(oracle.to_f32(oracle.Tensor(base.dtype, base.shape, bits)))
    touched = np.any(acting, axis=0) & np.isfinite(w)
    out = np.where(touched & finite, np.frombuffer(bits, block.base.data.dtype), block.base.data)
    return out, [int(a.sum()) for a in acting], np.flatnonzero(touched & ~finite).tolist()


@pytest.mark.parametrize("engine", engines(), ids=lambda engine: engine.describe())
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(axis.name.lower() for axis in rule))
def test_every_rule_that_the_axes_allow(rule: Rule, engine: Backend) -> None:
    rng = np.random.default_rng([*rule])
    for dtype, patches in product(DTYPES, (1, 2, 3)):
        block = block_of(rng, dtype, rule, patches)
        out, applied, overflow = expected(block)
        found = np.empty_like(out)
        report = engine.apply(block, [SELECT_ALL] * patches, found)
        np.testing.assert_array_equal(found, out)
        assert [p.applied for p in report.patches] == applied
        assert (report.overflow.count, report.overflow.first) == (len(overflow), min(overflow, default=-1))
        # Below its size the quota makes the C++ engine write from lists where the rule allows it.
        for quota in (len(block), 2999):
            cuts, merged = engine.merge(block, [quota] * patches, found)
            np.testing.assert_array_equal(found, out)
            assert cuts == [SELECT_ALL] * patches and merged == report


def test_the_oracle_and_the_engines_have_the_same_rules() -> None:
    assert {name: tuple(axis.name.lower() for axis in rule) for name, rule in COMBINE.items()} == oracle.RULES


def names_in_header() -> dict[str, list[str]]:
    """Per field its values in order: of the field weight, `SP_WEIGHT_BASE` is BASE."""
    found = {}
    for values, field in re.findall(r"^enum \{ (.*) \};\s*/\* (\w+) \*/$", HEADER.read_text(), flags=re.M):
        pairs = [value.removeprefix("SP_").split(" = ") for value in values.split(", ")]
        assert [number for _, number in pairs] == [str(i) for i in range(len(pairs))]
        found[field] = [name.removeprefix(f"{field.upper()}_") for name, _ in pairs]
    return found


def test_the_header_numbers_names_as_the_contract_does() -> None:
    def names(values: Any) -> list[str]:
        listed = [v.name for v in values] if values in (Acts, Join) else get_args(values)
        return [name.upper().replace("-", "_") for name in listed]

    fields: dict[str, Any] = {"dtype": Dtype, "kind": Kind, "importance": Importance, "weight": Weight}
    fields |= {"acts": Acts, "join": Join, "order": Order, "grid": GridName, "rounding": Rounding}
    assert names_in_header() == {field: names(values) for field, values in fields.items()}
    for axis in (Acts, Join):
        assert list(axis) == list(range(len(axis)))
