"""Which trials are worth a look, and which one is taken. Numbers alone: a trial is its metrics by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Values = Mapping[str, float]  # metric → value


def costs(values: Values, higher: frozenset[str], metrics: Sequence[str]) -> tuple[float, ...]:
    """The values of some metrics, signed so that lower is better; `higher` are those that should be high."""
    return tuple(-values[name] if name in higher else values[name] for name in metrics)


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether `one` is nowhere worse than `other` and somewhere better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def pareto_front(points: Mapping[int, Sequence[float]]) -> list[int]:
    """The keys of the points that no other point dominates, in order."""
    return [key for key in sorted(points) if not any(dominates(p, points[key]) for p in points.values())]


def meets(values: Values, backbone: Values, constraints: Values, higher: frozenset[str]) -> bool:
    """Whether no constrained metric is worse than the backbone's by more than its share of the backbone's value."""
    worse = ((costs(values, higher, [n])[0] - costs(backbone, higher, [n])[0], n) for n in constraints)
    return all(by <= constraints[name] * abs(backbone[name]) for by, name in worse)


def choose(trials: Mapping[int, Values], objectives: Values, constraints: Values, higher: frozenset[str]) -> int:
    """The trial, of one or more that meet the constraints, with the smallest weighted sum of the objectives.

    Of equal ones, that with the better constrained metrics; then the earlier.
    """

    def rank(number: int) -> tuple[float, ...]:
        weighted = zip(objectives.values(), costs(trials[number], higher, list(objectives)), strict=True)
        # Rounded, so that 0.1 + 0.2 and 0.3 + 0.0 are equal.
        total = round(sum(weight * cost for weight, cost in weighted), 9)
        return (total, *costs(trials[number], higher, list(constraints)), number)

    return min(trials, key=rank)
