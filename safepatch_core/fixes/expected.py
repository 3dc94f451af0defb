"""How large the fix of a recipe will be, from its plan alone. Imports little: `safepatch plan` tells it each time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safepatch_core.fixes.format import WIDTH, blocks

if TYPE_CHECKING:
    from safepatch_core.merging.plan import Plan
    from safepatch_core.merging.work import Target

# Bytes of XOR per change: a patch moves a bfloat16 entry a little, so that one high byte in twenty differs.
_XOR_BYTES = {"BF16": 1.25, "F16": 2, "F32": 4}
_HEADER = 900  # bytes of the header per touched tensor


@dataclass(frozen=True)
class ExpectedFix:
    """How large the fix of a recipe will be."""

    changes: int  # entries at most: all that patches select, none twice, none that rounding takes back
    size: int  # bytes, for so many


def expected_fix(plan: Plan) -> ExpectedFix:
    """The fix that `build` makes of a recipe, from what the recipe asks for alone."""
    changes, size = 0.0, 0.0
    for target in plan.targets.values():
        entries, dtype, n = target.entry.entries, target.entry.dtype, _selected(plan, target)
        changes += n
        if n:
            size += _HEADER + 16 * (blocks(entries) + 1) + _gap_bytes(n, entries)
            size += n * (1 / 8 + _XOR_BYTES.get(dtype, WIDTH[dtype]))
    return ExpectedFix(round(changes), round(size))


def _selected(plan: Plan, target: Target) -> float:
    """Entries of a target on which patches act, at most; in the mean, where it is drawn."""
    entries, total = target.entry.entries, 0.0
    for p, spec in enumerate(spec.at(target.entry.name) for spec in plan.recipe.patches):
        k: float = target.quotas[p] - target.skips[p]
        if plan.whole_model:
            k = (plan.model_quotas[p] - plan.model_skips[p]) * entries / plan.total_entries
        if target.patches[p] is not None:
            retain = min(spec.retain, 1)
            total += min(k, retain * entries) if plan.recipe.order == "retain-first" else retain * k
    return min(total, entries)


def _gap_bytes(n: float, entries: int) -> float:
    """Of `n` changes at random places: a code each, and one for every 255 places between two."""
    share = n / entries
    skips = (1 - share) ** 255
    return min(n / max(1 - skips, 1e-9), 2 * n + entries / 65536)
