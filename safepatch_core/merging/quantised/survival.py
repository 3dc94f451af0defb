"""What of each patch is left after its entries were rounded to codes, in sums that no cut, thread or rank changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Fault, Report

F64 = NDArray[np.float64]

_MANTISSA = 53
_HALF = 27  # bits of a mantissa's lower part: float64 adds up 2^26 terms of either part exactly
# Sums count in units of 2^-360: products of two differences of float32 numbers end at 2^-298, and 53 bits lie above.
_SHIFT = 360


def exact_sum(terms: F64) -> int:
    """The sum of at most 2^26 terms, finite and of ordinary size, without any rounding: in units of 2^-360."""
    mantissas, exponents = np.frexp(terms)
    whole = np.ldexp(mantissas, _MANTISSA).astype(np.int64)
    if not len(terms):
        return 0
    least = int(exponents.min())
    bins = exponents - least
    high, low = whole >> _HALF, whole & ((1 << _HALF) - 1)
    total = 0
    for part, shift in ((high, _HALF), (low, 0)):
        for i, count in enumerate(np.bincount(bins, weights=part)):
            total += int(count) << (i + shift)
    return total << (least - _MANTISSA + _SHIFT)


@dataclass(frozen=True, slots=True)
class Kept:
    """What became of the entries on which one patch alone acts. Sums are exact, see `exact_sum`.

    With v and v' the values before and after, and D = acc - w what the patch asked for.
    """

    acted: int = 0
    changed: int = 0  # to another code
    saturated: int = 0  # beyond the grid's range
    along: int = 0  # sum of (v' - v) D
    asked: int = 0  # sum of D²
    moved: int = 0  # sum of (v' - v)²

    def __add__(self, other: Kept) -> Kept:
        return Kept(*(a + b for a, b in zip(self.numbers, other.numbers, strict=True)))

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.acted, self.changed, self.saturated, self.along, self.asked, self.moved

    @property
    def survival(self) -> float | None:
        """1 where the whole of the patch is left; None where it asks for nothing."""
        return self.along / self.asked if self.asked else None

    @property
    def cosine(self) -> float | None:
        """Between what was asked for and what was done; None where either is nothing."""
        if not self.asked or not self.moved:
            return None
        size = math.sqrt(self.along * self.along / (self.asked * self.moved))
        return size if self.along >= 0 else -size

    def facts(self) -> dict[str, Any]:
        """For manifests and people."""
        return {
            "acted": self.acted,
            "changed": self.changed,
            "saturated": self.saturated,
            "survival": self.survival,
            "cosine": self.cosine,
        }


@dataclass(slots=True)
class CodesReport(Report):
    """What a pass found in a target that is stored as codes; `kept` has an entry per patch."""

    kept: list[Kept] = field(default_factory=list)
    bad_scale: Fault = Fault()
    saturated: Fault = Fault()

    def __add__(self, other: Report) -> CodesReport:
        assert isinstance(other, CodesReport)
        return CodesReport(
            [a + b for a, b in zip(self.patches, other.patches, strict=True)],
            self.overflow + other.overflow,
            self.acted + other.acted,
            self.changed + other.changed,
            [a + b for a, b in zip(self.kept, other.kept, strict=True)],
            self.bad_scale + other.bad_scale,
            self.saturated + other.saturated,
        )


def in_all(names: Iterable[str], counts: Mapping[str, Report]) -> dict[str, Kept] | None:
    """Per patch, over all targets that are stored as codes; None where there are none."""
    reports = [report for report in counts.values() if isinstance(report, CodesReport)]
    if not reports:
        return None
    return {name: sum((report.kept[p] for report in reports), Kept()) for p, name in enumerate(names)}
