"""What a merge did, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safepatch_core.merging.quantised.comparison import FormatResult, SurviveResult
    from safepatch_core.merging.quantised.sums import Survival


def count_table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Entries per patch: of all targets, eligible, selected, applied."""
    width = max([5, *map(len, counts)])
    lines = [f"{'patch':{width}}  {'entries':>15}  {'eligible':>15}  {'selected':>15}  {'applied':>15}"]
    for name, of in counts.items():
        numbers = "  ".join(f"{of[key]:15,d}" for key in ("entries", "eligible", "selected", "applied"))
        lines.append(f"{name:{width}}  {numbers}")
    return "\n".join(lines)


def survival_lines(result: SurviveResult, *, tensors: bool = False) -> list[str]:
    """What later quantisations leave of a merge: a row per format and patch, on request one per tensor, and notes.

    Elsewhere: codes that change where the merge changed nothing, because the scale of their block does.
    """
    rows: list[tuple[str, ...]] = [("format", "of", "entries", "codes changed", "elsewhere", "survival", "cosine")]
    for name, of in result.formats.items():
        rows += [(name if i == 0 else "", *row) for i, row in enumerate(_survivals(of, tensors))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip() for row in rows
    ]
    for name, of in result.formats.items():
        if of.unfit:
            lines.append(f"{name}: does not take {_first(of.unfit)}, whose rows are no multiple of its groups")
    if result.floats:
        lines.append(f"kept as floats, with all of their change: {_first(result.floats)}")
    return lines + result.notes


def _survivals(of: FormatResult, tensors: bool) -> Iterator[tuple[str, ...]]:
    for name, share in (("the change", of.whole), *of.patches.items()):
        yield _survival(name, share.total, f"{of.elsewhere:,d}" if share is of.whole else "")
        for tensor, found in share.tensors.items() if tensors else ():
            yield _survival(f"  {tensor}", found, "")


def _survival(name: str, of: Survival, elsewhere: str) -> tuple[str, ...]:
    changed = f"{of.changed:,d} ({of.changed / of.entries:.2%})" if of.entries else "0"
    rates = ("-" if rate is None else f"{rate:.4f}" for rate in (of.survival, of.cosine))
    return (name, f"{of.entries:,d}", changed, elsewhere, *rates)


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"'{names[0]}'{more}"


def codes_line(patch: str, kept: Mapping[str, float | None]) -> str:
    """What rounding to the codes of a quantised base left of one patch."""
    survival, cosine = (_number(kept[key]) for key in ("survival", "cosine"))
    return (
        f"patch {patch}: {kept['changed']:,d} of {kept['acted']:,d} codes changed, {kept['saturated']:,d} saturated, "
        f"survival {survival}, cosine {cosine}"
    )


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
