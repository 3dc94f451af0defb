"""What a pass finds in tensors that are stored as codes. Engines that take no codes are handed floats instead."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from safepatch_core.backends.contract import Backend, Fault, Report


def takes_codes(engine: Backend) -> bool:
    """Whether the engine's calls take blocks with `codes`, and change those where other blocks have an output."""
    return getattr(engine, "takes_codes", False)


@dataclass(frozen=True, slots=True)
class Kept:
    """What became of the entries on which one patch alone acts. Sums are exact, in units of 2^-360.

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
