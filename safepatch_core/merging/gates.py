"""Gates: whether a patch has a tensor, by the cosine of its delta and another patch's.

The one thing of a merge that is found in the data before the plan is made. Sums are added up in a fixed order,
whatever reads them: lane i mod 4096 of 4096 adds entry i, in order, and then the upper half of the lanes is added to
the lower one until one is left. All of it is float64, in which the product of two float32 numbers is exact.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.rates import GATE_THREADS
from safepatch_core.merging.recipe import Recipe
from safepatch_core.merging.sources.computed import as_delta, values_of
from safepatch_core.merging.sources.contract import PatchTensor
from safepatch_core.merging.sources.decoding import PIECE, F32Array
from safepatch_core.merging.work import Target
from safepatch_core.spec import LANES, NonFinite
from safepatch_core.threads import room_for_a_thread

Pair = tuple[int, int]  # of patches, by their places in the recipe, the lower one first


@dataclass(slots=True)
class Sum:
    """A sum of float64 in the contract's order. Every addition but the last is of a multiple of `LANES` terms."""

    lanes: NDArray[np.float64] = field(default_factory=lambda: np.zeros(LANES))

    def add(self, terms: NDArray[np.float64]) -> None:
        whole = len(terms) // LANES * LANES
        for row in terms[:whole].reshape(-1, LANES):
            self.lanes += row
        self.lanes[: len(terms) - whole] += terms[whole:]

    @property
    def total(self) -> float:
        lanes = self.lanes
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = lanes[:half] + lanes[half:]
        return float(lanes[0])


@dataclass(frozen=True, slots=True)
class Angle:
    """Of two patches' deltas of one tensor: the sums of their product and of their squares."""

    product: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)

    @property
    def cosine(self) -> float:
        """0 where either is nothing."""
        first, second = self.squares
        return self.product / math.sqrt(first * second) if first and second else 0.0


Angles = Mapping[Pair, Mapping[str, Angle]]  # by pair of patches, of every target


def pairs_of(recipe: Recipe) -> list[Pair]:
    """Those that a gate of the recipe asks for."""
    numbers = {name: p for p, name in enumerate(recipe.names)}
    found = {pair_of(p, numbers[of.gate.patch]) for p, of in enumerate(recipe.patches) if of.gate}
    return sorted(found)


def pair_of(p: int, q: int) -> Pair:
    """The two patches as a pair."""
    return min(p, q), max(p, q)


def measure(
    targets: Mapping[str, Target], pairs: Sequence[Pair], checkpoints: Sequence[Checkpoint], nonfinite: NonFinite
) -> Angles:
    """The angles of so many pairs of patches; several threads, each on a tensor of its own.

    Raises:
        InputError: a delta is NaN or infinite, and `nonfinite` is error.
        IOFailure: reading failed.
    """
    if not pairs:
        return {}
    room_for_a_thread()
    with ThreadPoolExecutor(min(os.cpu_count() or 1, GATE_THREADS)) as pool:
        try:
            found = {
                pair: pool.map(partial(_angle, checkpoints, pair, nonfinite), targets.values()) for pair in pairs
            }
            return {pair: dict(zip(targets, of, strict=True)) for pair, of in found.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def bytes_of(targets: Mapping[str, Target], pairs: Sequence[Pair]) -> int:
    """How much `measure` reads."""
    deltas = [
        (target.entry, as_delta(of.delta, target.entry))
        for pair in pairs
        for target in targets.values()
        for of in (target.patches[p] for p in pair)
        if of is not None
    ]
    return sum(math.ceil(entry.entries * of.entry_bytes) + of.once_bytes for entry, of in deltas if entry.entries)


def _angle(checkpoints: Sequence[Checkpoint], pair: Pair, nonfinite: NonFinite, target: Target) -> Angle:
    with closing(Inputs(checkpoints)) as inputs:
        angle = _summed(inputs, pair, nonfinite, target)
        inputs.check_unchanged()
    return angle


def _summed(inputs: Inputs, pair: Pair, nonfinite: NonFinite, target: Target) -> Angle:
    patches = [target.patches[p] for p in pair]
    deltas = [None if of is None else as_delta(of.delta, target.entry) for of in patches]
    product, squares, faults = Sum(), (Sum(), Sum()), (_Fault(), _Fault())
    for lo, values in _pieces(inputs, target, deltas):
        a, b = (fault.told(of, lo) for fault, of in zip(faults, values, strict=True))
        product.add(a * b)
        for sum_, of in zip(squares, (a, b), strict=True):
            sum_.add(of * of)
    for fault, delta in zip(faults, deltas, strict=True):
        if fault.count and delta is not None and nonfinite == "error":
            raise InputError(
                "the delta is NaN or infinite",
                file=delta.path,
                tensor=target.entry.name,
                found=f"{fault.count} entries, the first at index {fault.first}",
                expected="finite values (or nonfinite: skip)",
            )
    return Angle(product.total, (squares[0].total, squares[1].total))


def _pieces(
    inputs: Inputs, target: Target, deltas: Sequence[PatchTensor | None]
) -> Iterator[tuple[int, list[F32Array]]]:
    """The first position and the deltas of so many entries at a time; zeros of a patch that has nothing for them."""
    entry = target.entry
    held = [None if of is None else of.hold(inputs, np.empty(of.held_bytes, np.uint8)) for of in deltas]
    memory = [np.zeros(PIECE if of is None else int(of.ring_bytes * PIECE), np.uint8) for of in deltas]
    cols = entry.shape[-1] if entry.shape else 1
    for lo in range(0, entry.entries if any(held) else 0, PIECE):
        hi = min(lo + PIECE, entry.entries)
        yield (
            lo,
            [
                np.zeros(hi - lo, np.float32)
                if of is None
                else values_of(of.load(inputs, lo, hi, room), lo, hi, cols)
                for of, room in zip(held, memory, strict=True)
            ],
        )


@dataclass(slots=True)
class _Fault:
    """Entries that are not finite."""

    count: int = 0
    first: int = -1

    def told(self, values: F32Array, lo: int) -> NDArray[np.float64]:
        """The values from position `lo` on, with zeros for what is not finite."""
        bad = ~np.isfinite(values)
        if bad.any():
            self.first = self.first if self.count else lo + int(np.argmax(bad))
            self.count += int(np.count_nonzero(bad))
            values = np.where(bad, np.float32(0), values)
        return values.astype(np.float64)


def gated(recipe: Recipe, targets: Mapping[str, Target], angles: Angles) -> dict[str, Target]:
    """The targets without the patches whose gates are shut there, or that have no delta there that is not zero."""
    if not angles:
        return dict(targets)
    shut: dict[int, set[str]] = {}
    for p, spec in enumerate(recipe.patches):
        if spec.gate is not None:
            q = recipe.names.index(spec.gate.patch)
            of = angles[pair_of(p, q)]
            moves = {name for name, angle in of.items() if angle.squares[p > q]}
            # Where nothing moves at all, another rule stops the merge.
            shut[p] = {n for n, angle in of.items() if moves and not (n in moves and spec.gate.opens(angle.cosine))}
    return {
        name: replace(
            target,
            patches=tuple(None if name in shut.get(p, ()) else patch for p, patch in enumerate(target.patches)),
        )
        for name, target in targets.items()
    }


def open_gates(recipe: Recipe, targets: Mapping[str, Target]) -> dict[str, int]:
    """By patch that has a gate, of how many targets it is open."""
    return {
        spec.name: sum(target.patches[p] is not None for target in targets.values())
        for p, spec in enumerate(recipe.patches)
        if spec.gate is not None
    }
