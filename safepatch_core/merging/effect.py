"""Does every patch change anything? A merge that succeeds without an effect is the failure nobody notices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Bits, Lora, Report
from safepatch_core.backends.reference import to_float32
from safepatch_core.errors import InputError
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.plan import Plan
from safepatch_core.merging.quantised.survival import in_all
from safepatch_core.merging.sources.contract import load_alone
from safepatch_core.merging.sources.dense import Dense
from safepatch_core.merging.work import Target

PIECE = 1 << 18  # entries that are looked at together


def require_deltas(plan: Plan) -> None:
    """Raises InputError for a patch whose deltas are all zero, before anything is merged.

    Deltas that are not finite stop the merge by a rule of their own, or count as zero where they are skipped. A piece
    of each target is looked at first, so that for most patches the first one tells; only one that changes nothing is
    read to its end.
    """
    inputs = Inputs(plan.inputs)
    try:
        skip = plan.recipe.nonfinite == "skip"
        for p, name in enumerate(plan.patch_names):
            # Of targets stored as codes a checkpoint's deltas are asked for, which some engines measure themselves.
            pieces = _pieces([plan.ungated[name] for name, target in plan.targets.items() if target.patches[p]])
            if not plan.is_shut(p) and not any(_moves(inputs, target, p, lo, hi, skip) for target, lo, hi in pieces):
                raise InputError(
                    f"the patch '{name}' changes nothing: every delta of a target is zero",
                    file=plan.sources[p].ref,
                    expected="a patch that differs from the base",
                )
    finally:
        inputs.close()


def _pieces(targets: list[Target]) -> Iterator[tuple[Target, int, int]]:
    """All entries of the targets, the first ones of each before the others."""
    for begin, end in ((0, PIECE), (PIECE, None)):
        for target in targets:
            size = target.entry.entries
            for lo in range(begin, size if end is None else min(end, size), PIECE):
                yield target, lo, min(lo + PIECE, size)


def _moves(inputs: Inputs, target: Target, p: int, lo: int, hi: int, skip: bool) -> bool:
    """Whether a delta among the entries [lo, hi) is not zero (with `skip`, and finite)."""
    patch = target.patches[p]
    assert patch is not None
    values = load_alone(patch.delta, inputs, lo, hi)
    with np.errstate(all="ignore"):
        if isinstance(values, Lora):
            return lo == 0 and _factors_move(values, skip)
        if patch.delta.form == "delta":
            return _some(to_float32(values), skip)
        base = load_alone(Dense(target.entry, "checkpoint"), inputs, lo, hi)
        assert isinstance(base, Bits)
        same = base.dtype == values.dtype and np.array_equal(base.data, values.data)
        return not same and _some(to_float32(values) - to_float32(base), skip)


def _factors_move(lora: Lora, skip: bool) -> bool:
    """A row at a time, in the contract's order: the first row tells, unless a factor is zero."""
    if not lora.a.any() or not lora.b.any():
        return False
    for row in lora.b:
        total = np.zeros(lora.a.shape[1], np.float32)
        for b, a in zip(row, lora.a, strict=True):
            total = total + b * a
        if _some(np.float32(lora.scale) * total, skip):
            return True
    return False


def _some(d: NDArray[np.float32], skip: bool) -> bool:
    return bool(np.any((d != 0) & np.isfinite(d) if skip else d != 0))


def require_eligible(plan: Plan, counts: Mapping[str, Report]) -> None:
    """Raises InputError for a patch of which no entry could be chosen, unless the recipe asks for nothing of it."""
    for p, spec in enumerate(plan.recipe.patches):
        if not plan.asks_nothing(p) and not any(report.patches[p].eligible for report in counts.values()):
            raise InputError(
                f"the patch '{spec.name}' changes nothing: no entry of a target is eligible",
                file=plan.sources[p].ref,
                expected="scores above zero, on entries that are retained",
            )


def require_survival(plan: Plan, counts: Mapping[str, Report]) -> None:
    """Raises InputError for a patch of which rounding to the base's codes left less, or more, than is allowed."""
    rule, found = plan.recipe.quantized, in_all(plan.patch_names, counts)
    if rule is None or found is None:
        return
    low, high = rule.survival
    for name, kept in found.items():
        if kept.survival is not None and not low <= kept.survival <= high:
            raise InputError(
                f"rounding to the base's codes does not keep the patch '{name}'",
                file=plan.base.ref,
                found=f"survival {kept.survival:.4g} ({kept.changed} of {kept.acted} codes changed)",
                expected=f"{low} to {high} (or another range: `survival` in `quantized:`)",
            )
