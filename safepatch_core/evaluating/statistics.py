"""The 95 % intervals and the one test of the report. Pure numbers, numpy only.

- A rate: Wilson's score interval.
- A mean or a ratio of sums over units (prompts, windows): percentile bootstrap over the units, seeded.
- A score that comes with its standard error: the normal interval.
- The difference of two rates on the same prompts: Newcombe's square-and-add interval with the correlation of the
  pairs (his method 10), and McNemar's exact test.
- Agreement of two judges beyond chance: Cohen's kappa.
- The difference of two means or perplexities on the same units: percentile bootstrap over the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054  # the normal quantile of 0.975
DRAWS = 2000

CHUNK = 1 << 21  # unit indices drawn at once

# Of selections of units, by index: [..., units] → [...]
Statistic = Callable[[NDArray[np.int64]], NDArray[np.float64]]


class Interval(NamedTuple):
    """The ends of a 95 % interval."""

    low: float
    high: float


def wilson(successes: int, n: int) -> Interval:
    """Of a rate `successes` / `n`, n > 0."""
    rate = successes / n
    centre = rate + Z * Z / (2 * n)
    spread = Z * math.sqrt(rate * (1 - rate) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    low, high = (centre - spread) / scale, (centre + spread) / scale
    # The ends are exact where rounding would leave a trace.
    return Interval(0.0 if successes == 0 else low, 1.0 if successes == n else high)


def normal(value: float, error: float | None, share: bool) -> Interval | None:
    """Of a value with that standard error; a share stays within 0 and 1. None without an error."""
    if error is None:
        return None
    low, high = value - Z * error, value + Z * error
    return Interval(max(0.0, low), min(1.0, high)) if share else Interval(low, high)


def bootstrap(units: int, statistic: Statistic, seed: int) -> Interval | None:
    """Of `statistic` over resampled unit indices; None for fewer than two units."""
    if units < 2:
        return None
    random = np.random.default_rng(seed)
    step = max(1, CHUNK // units)
    sizes = (min(step, DRAWS - done) for done in range(0, DRAWS, step))
    values = np.concatenate([statistic(random.integers(0, units, (size, units))) for size in sizes])
    low, high = np.quantile(values, (0.025, 0.975))
    return Interval(float(low), float(high))


class Pairs(NamedTuple):
    """Two verdicts on each prompt, counted: yes of both, of the first alone, of the second alone, of neither."""

    both: int
    first: int
    second: int
    neither: int

    @property
    def n(self) -> int:
        return sum(self)


def pair(first: Sequence[bool], second: Sequence[bool]) -> Pairs:
    """Count the verdicts of two models on the same prompts."""
    pairs = list(zip(first, second, strict=True))
    return Pairs(*(pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))))


def difference_of_rates(pairs: Pairs) -> Interval:
    """Of the first rate minus the second, on the same prompts."""
    both, first, second, neither = pairs
    n = pairs.n
    p, q = (both + first) / n, (both + second) / n
    (p_low, p_high), (q_low, q_high) = wilson(both + first, n), wilson(both + second, n)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    cross = float(both * neither - first * second)
    if cross > 0:
        cross = max(cross - n / 2, 0.0)
    phi = cross / math.sqrt(margins) if margins else 0.0

    def side(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    return Interval(p - q - side(p - p_low, q_high - q), p - q + side(p_high - p, q - q_low))


def mcnemar(pairs: Pairs) -> float:
    """The two-sided exact p-value of "neither model says yes more often"."""
    n, k = pairs.first + pairs.second, min(pairs.first, pairs.second)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, float(Fraction(2 * tail, 2**n)))


def kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Cohen's: 1 where two judges always agree, 0 where as often as chance; None where both say one thing alone."""
    pairs = pair(first, second)
    n = pairs.n
    yes = (pairs.both + pairs.first) * (pairs.both + pairs.second)
    no = (pairs.second + pairs.neither) * (pairs.first + pairs.neither)
    if yes + no == n * n:
        return None
    chance = Fraction(yes + no, n * n)
    return float((Fraction(pairs.both + pairs.neither, n) - chance) / (1 - chance))
