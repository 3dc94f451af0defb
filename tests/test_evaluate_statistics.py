"""Intervals and the paired test, against published and hand-made values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from safepatch_core.evaluating import statistics
from safepatch_core.evaluating.statistics import Pairs, bootstrap, difference_of_rates, mcnemar, normal, pair, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe, Two-sided confidence intervals for the single proportion (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_ends_exactly_at_the_border() -> None:
    assert wilson(0, 7).low == 0.0 and wilson(7, 7).high == 1.0


@pytest.mark.parametrize(
    ("pairs", "p"),
    [
        (Pairs(5, 0, 0, 5), 1.0),
        (Pairs(0, 1, 9, 0), 2 * 11 / 1024),
        (Pairs(3, 9, 1, 4), 2 * 11 / 1024),
        (Pairs(0, 4, 4, 0), 1.0),
        (Pairs(0, 0, 6, 10), 2 / 64),
        (Pairs(0, 3000, 0, 0), 0.0),
    ],
)
def test_mcnemar(pairs: Pairs, p: float) -> None:
    assert mcnemar(pairs) == pytest.approx(p)


def test_pairs_are_counted_by_who_said_yes() -> None:
    assert pair([True, True, False, False, True], [True, False, True, False, False]) == Pairs(1, 2, 1, 1)


def test_difference_of_rates_is_antisymmetric_and_holds_the_difference() -> None:
    for pairs in (Pairs(10, 5, 2, 3), Pairs(0, 20, 0, 0), Pairs(20, 0, 0, 0), Pairs(7, 0, 6, 7)):
        low, high = difference_of_rates(pairs)
        value = (pairs.first - pairs.second) / pairs.n
        assert -1 <= low <= value <= high <= 1
        swapped = difference_of_rates(Pairs(pairs.both, pairs.second, pairs.first, pairs.neither))
        assert swapped == pytest.approx((-high, -low))


def test_difference_of_rates_without_correlation_is_square_and_add() -> None:
    """10/20 against 10/20 with independent verdicts: each side is √2 times that of one rate."""
    low, high = difference_of_rates(Pairs(5, 5, 5, 5))
    side = math.sqrt(2) * (wilson(10, 20).high - 0.5)
    assert (low, high) == pytest.approx((-side, side))


def test_difference_of_rates_covers_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    shares = (0.35, 0.25, 0.1, 0.3)
    covered = 0
    for counts in random.multinomial(40, shares, size=2000):
        low, high = difference_of_rates(Pairs(*map(int, counts)))
        covered += low <= shares[1] - shares[2] <= high
    assert 0.93 <= covered / 2000 <= 0.98


def test_normal_interval_of_a_share_stays_a_share() -> None:
    assert normal(0.5, 0.1, True) == pytest.approx((0.304, 0.696), abs=1e-4)
    assert normal(0.99, 0.1, True) == pytest.approx((0.794, 1.0), abs=1e-4)
    assert normal(3.0, 0.5, False) == pytest.approx((2.02, 3.98), abs=1e-3)
    assert normal(0.5, None, True) is None


def test_bootstrap_of_a_mean_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(2).normal(3.0, 2.0, 400)
    interval = bootstrap(len(values), lambda units: values[units].mean(-1), seed=0)
    assert interval is not None
    error = 1.96 * values.std(ddof=1) / 20
    assert interval == pytest.approx((values.mean() - error, values.mean() + error), abs=0.03)


def test_bootstrap_repeats_with_its_seed_and_needs_two_units() -> None:
    values = np.arange(12.0) ** 2

    def mean(units: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(values[units].mean(-1))

    assert bootstrap(12, mean, 5) == bootstrap(12, mean, 5)
    assert bootstrap(12, mean, 5) != bootstrap(12, mean, 6)
    assert bootstrap(1, mean, 5) is None


def test_bootstrap_does_not_show_how_it_was_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(12.0) ** 2
    whole = bootstrap(12, lambda units: values[units].mean(-1), 5)
    monkeypatch.setattr(statistics, "CHUNK", 100)
    assert bootstrap(12, lambda units: values[units].mean(-1), 5) == whole
