"""What of each patch is left after its entries were rounded to codes, in sums that no cut, thread or rank changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.codes import CodesReport, Kept
from safepatch_core.backends.contract import Report

F64 = NDArray[np.float64]

_MANTISSA = 53
_HALF = 27  # bits of a mantissa's lower part: float64 adds up 2^26 terms of either part exactly
# Sums count in units of 2^-360: products of two differences of float32 numbers end at 2^-298, and 53 bits lie above.
_SHIFT = 360


def exact_sum(terms: F64) -> int:
    """The sum of at most 2^26 terms of ordinary size, without any rounding: in units of 2^-360.

    A term that is not finite counts as nothing: a code may stand for a number beyond float32.
    """
    terms = terms[np.isfinite(terms)]
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


def in_all(names: Iterable[str], counts: Mapping[str, Report]) -> dict[str, Kept] | None:
    """Per patch, over all targets that are stored as codes; None where there are none."""
    reports = [report for report in counts.values() if isinstance(report, CodesReport)]
    if not reports:
        return None
    return {name: sum((report.kept[p] for report in reports), Kept()) for p, name in enumerate(names)}
