"""What a merge did, for people."""

from __future__ import annotations

from collections.abc import Mapping


def count_table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Entries per patch: of all targets, eligible, selected, applied."""
    width = max([5, *map(len, counts)])
    lines = [f"{'patch':{width}}  {'entries':>15}  {'eligible':>15}  {'selected':>15}  {'applied':>15}"]
    for name, of in counts.items():
        numbers = "  ".join(f"{of[key]:15,d}" for key in ("entries", "eligible", "selected", "applied"))
        lines.append(f"{name:{width}}  {numbers}")
    return "\n".join(lines)


def codes_line(patch: str, kept: Mapping[str, float | None]) -> str:
    """What rounding to the codes of a quantised base left of one patch."""
    survival, cosine = (_number(kept[key]) for key in ("survival", "cosine"))
    return (
        f"patch {patch}: {kept['changed']:,d} of {kept['acted']:,d} codes changed, {kept['saturated']:,d} saturated, "
        f"survival {survival}, cosine {cosine}"
    )


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
