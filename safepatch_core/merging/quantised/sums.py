"""What of a change is left after both sides were quantised: sums over the entries of a matrix, format by format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safepatch_core.merging.quantised.formats import Format
from safepatch_core.merging.quantised.grids import F32
from safepatch_core.spec import Dtype

# Entries that are quantised together, and the bytes of all arrays that this takes.
PIECE = 1 << 15
PIECE_BYTES = 192 * PIECE

Owners = NDArray[np.uint8]


@dataclass(slots=True)
class Survival:
    """How much of a change a quantisation leaves, over the entries that the change is made of.

    Attributes:
        entries: those whose stored bits the merge changed.
        changed: those of them whose code stands for another number than the base's.
        asked, moved, along: sums of Δ², (v′ - v)² and Δ·(v′ - v), where Δ is the change, and v′ and v are the values
            that the codes of the merged model and of the base stand for.
    """

    entries: int = 0
    changed: int = 0
    asked: float = 0.0
    moved: float = 0.0
    along: float = 0.0

    @property
    def survival(self) -> float | None:
        """The share of the change that is left along its own direction: 1 all, 0 nothing. None without a change."""
        return self.along / self.asked if self.asked else None

    @property
    def cosine(self) -> float | None:
        """Between what is left and the change; small where what is left is drowned in rounding noise."""
        if not self.asked:
            return None
        return self.along / float(np.sqrt(self.asked) * np.sqrt(self.moved)) if self.moved else 0.0

    def __iadd__(self, other: Survival) -> Survival:
        for name in ("entries", "changed", "asked", "moved", "along"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: getattr(self, name) for name in ("entries", "changed", "survival", "cosine")}


@dataclass(slots=True)
class Found:
    """Of one matrix in one format: all of the change, each patch's share, and codes that moved beside it."""

    patches: list[Survival]
    whole: Survival = field(default_factory=Survival)
    elsewhere: int = 0

    def __iadd__(self, other: Found) -> Found:
        self.whole += other.whole
        for mine, theirs in zip(self.patches, other.patches, strict=True):
            mine += theirs
        self.elsewhere += other.elsewhere
        return self


def nothing(patches: int) -> Found:
    """To add to."""
    return Found([Survival() for _ in range(patches)])


@dataclass(slots=True)
class Stripe:
    """Whole rows of a matrix, before and after.

    Attributes:
        old, new: float32 [rows, cols], finite; the first row begins a block of every format.
        sizes: their absolute values.
        differs: [rows, cols], where the stored bits differ.
        dtype: of the checkpoint.
        highest: per side, the largest size in the whole matrix.
        owners: of the entries that differ, in their order, the number of the patch that they belong to; None where
            that is not known.
    """

    old: F32
    new: F32
    sizes: tuple[F32, F32]
    differs: NDArray[np.bool_]
    dtype: Dtype
    highest: tuple[float, float]
    owners: Owners | None = None


def measure(stripe: Stripe, patches: int, format: Format) -> Found:
    """What the format leaves of a stripe's change.

    A code can only move where its entry changed or its block's scale did; no other is looked at.

    Args:
        stripe: rows of a matrix.
        patches: how many may own an entry.
        format: one that takes the matrix.
    """
    old, new = (
        format.scales(format.maxima(of), stripe.dtype, highest)
        for of, highest in zip(stripe.sizes, stripe.highest, strict=True)
    )
    look = stripe.differs
    if not np.array_equal(old, new):
        look = look | _spread(old != new, format, look.shape)
    found = nothing(patches)
    seen = 0
    for at, row, col in _pieces(look):
        place = (row // format.rows, np.zeros_like(col) if format.cols is None else col // format.cols)
        changed = stripe.differs.ravel()[at]
        before, after = stripe.old.ravel()[at], stripe.new.ravel()[at]
        scale, later = old[place], new[place]
        codes, moved_to = format.grid.round(before / scale), format.grid.round(after / later)
        moves = codes != moved_to
        found.elsewhere += int(np.count_nonzero(moves & ~changed))
        delta = (after.astype(np.float64) - before)[changed]
        left = ((moved_to * later).astype(np.float64) - codes * scale)[changed]
        moves = moves[changed]
        found.whole += _sums(delta, left, moves)
        if stripe.owners is not None:
            owners = stripe.owners[seen : seen + len(delta)]
            for p, share in enumerate(found.patches):
                mine = owners == p
                share += _sums(delta[mine], left[mine], moves[mine])
        seen += len(delta)
    return found


def _sums(delta: NDArray[np.float64], left: NDArray[np.float64], moves: NDArray[np.bool_]) -> Survival:
    # Not as dot products, whose library would wake threads of its own in each of ours.
    asked, moved, along = (float((a * b).sum()) for a, b in ((delta, delta), (left, left), (delta, left)))
    return Survival(len(delta), int(np.count_nonzero(moves)), asked, moved, along)


def _spread(blocks: NDArray[np.bool_], format: Format, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """A value per block as one per entry."""
    cols = shape[1] if format.cols is None else format.cols
    rows = np.repeat(blocks, format.rows, axis=0)[: shape[0]]
    spread: NDArray[np.bool_] = np.repeat(rows, cols, axis=1)[:, : shape[1]]
    return spread


def _pieces(look: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]]:
    """Where to look, piece by piece: flat places, rows and columns."""
    places = np.flatnonzero(look)
    for lo in range(0, len(places), PIECE):
        at = places[lo : lo + PIECE]
        yield at, *np.divmod(at, look.shape[1])
