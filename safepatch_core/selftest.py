"""`safepatch selftest`: an engine against the reference, bit for bit, on the machine that it will run on."""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends import (
    Backend,
    Bits,
    Block,
    Cut,
    Lora,
    PatchData,
    Window,
    open_backend,
)
from safepatch_core.backends.reference import ReferenceBackend
from safepatch_core.spec import KEEP_ALL, NO_KEY, Combine, Dtype, Importance, Kind, Order, Weight

FLAVOURS = ("bits", "model", "ties", "tiny", "edges")
EDGES = (0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 65504.0, 65520.0, 3.3895e38, 1e-40, -1e-45, 6e-8, 2.98e-8)
DTYPES: tuple[Dtype, ...] = ("F32", "F16", "BF16")


@dataclass
class Check:
    """One property: how many cases were tried, and what was wrong with the first that failed."""

    name: str
    cases: int = 0
    failure: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Shape:
    """What one patch's code depends on."""

    kind: Kind
    importance: Importance = "magnitude"
    weight: Weight = "patched"
    values: Dtype = "BF16"
    scores: Dtype = "BF16"
    retain: bool = True


@dataclass(frozen=True)
class Setting:
    """What the code of a pass depends on: engines that compile do so once per setting."""

    dtype: Dtype
    patches: tuple[Shape | None, ...]
    combine: Combine
    order: Order


def settings() -> list[Setting]:
    """Every kind with every importance, every dtype in every place, every combination and order."""
    kinds: tuple[Kind, ...] = ("checkpoint", "delta", "lora")
    scored: list[tuple[Importance, Weight]] = [
        ("magnitude", "patched"), ("scores", "patched"),
        ("gradients", "patched"), ("gradients", "base"), ("gradients", "delta"),
    ]  # fmt: skip
    shapes = [
        Shape(kind, importance, weight, DTYPES[i % 3], DTYPES[(i // 3) % 3], retain=i % 4 != 3)
        for i, (kind, (importance, weight)) in enumerate(itertools.product(kinds, scored))
    ]
    combines: tuple[Combine, ...] = ("difference", "sum", "ties")
    orders: tuple[Order, ...] = ("retain-first", "select-first")
    found = [
        Setting(DTYPES[i % 3], (shapes[i], shapes[-1 - i]), combines[(i // 2) % 3], orders[i % 2])
        for i in range(len(shapes) // 2 + 1)
    ]
    found += [
        Setting("BF16", (shapes[1],), "difference", "retain-first"),
        Setting("F16", (shapes[0], None, shapes[6], shapes[1]), "ties", "select-first"),
        Setting("F32", (shapes[5], shapes[2], shapes[1], shapes[3], shapes[0]), "difference", "retain-first"),
    ]
    return found


def to_bits(values: NDArray[np.float32], dtype: Dtype) -> Bits:
    """float32 values as entries; bfloat16 by truncation, which keeps NaN a NaN and is as good as any here."""
    with np.errstate(all="ignore"):
        if dtype == "F16":
            return Bits(values.astype(np.float16).view(np.uint16), dtype)
    bits = values.view(np.uint32)
    return Bits(bits if dtype == "F32" else (bits >> np.uint32(16)).astype(np.uint16), dtype)


class Entries:
    """Random entries of one flavour.

    bits: any pattern; model: small changes of weights around 0.02; ties: changes of few sizes; tiny: subnormals and
    zeros; edges: special values and neighbours of rounding steps.
    """

    def __init__(self, rng: np.random.Generator, flavour: str, n: int) -> None:
        self._rng, self._flavour, self._n = rng, flavour, n
        self._base = self._weights()

    def _weights(self) -> NDArray[np.float32]:
        rng, n = self._rng, self._n
        if self._flavour == "bits":
            return rng.integers(0, 1 << 32, n, dtype=np.uint32).view(np.float32)
        if self._flavour == "tiny":
            return (rng.integers(0, 1 << 12, n, dtype=np.uint32) | rng.integers(0, 2, n, dtype=np.uint32) << 31).view(
                np.float32
            ) * np.float32(rng.choice([1.0, 3e4]))
        if self._flavour == "edges":
            return rng.choice(np.array(EDGES, dtype=np.float32), n)
        return rng.normal(0, 0.02, n).astype(np.float32)

    def base(self, dtype: Dtype) -> Bits:
        return to_bits(self._base, dtype)

    def delta(self, dtype: Dtype) -> Bits:
        return to_bits(self._change(), dtype)

    def patched(self, dtype: Dtype) -> Bits:
        with np.errstate(all="ignore"):
            return to_bits(self._base + self._change(), dtype)

    def scores(self, dtype: Dtype) -> Bits:
        if self._flavour == "bits":
            return to_bits(self._weights(), dtype)
        return to_bits(np.abs(self._change()), dtype)

    def _change(self) -> NDArray[np.float32]:
        rng, n = self._rng, self._n
        if self._flavour == "model":
            return rng.normal(0, 1e-3, n).astype(np.float32)
        if self._flavour == "ties":
            return rng.choice(np.array([0, 0.0, 2**-9, -(2**-9), 2**-8, 1.5 * 2**-8], dtype=np.float32), n)
        return self._weights()


def make_block(
    rng: np.random.Generator, setting: Setting, flavour: str, n: int, start: int = 0, cols: int = 0, nonfinite: Any = "skip"
) -> Block:
    """A block of n entries from index `start` of a tensor with rows of `cols` entries (0: chosen at random).

    LoRA factors are those of the whole tensor, so where there are any, a far start asks for long rows.
    """
    entries = Entries(rng, flavour, n)
    cols = cols or int(rng.integers(1, 300))
    rows = (start + n) // cols + 1

    def patch(shape: Shape | None) -> PatchData | None:
        if shape is None:
            return None
        if shape.kind == "lora":
            rank = int(rng.integers(0, 6))
            a, b = (rng.normal(0, 0.05, size).astype(np.float32) for size in ((rank, cols), (rows, rank)))
            values: Bits | Lora = Lora(a, b, float(np.float32(rng.uniform(0.1, 3))))
        else:
            values = (entries.patched if shape.kind == "checkpoint" else entries.delta)(shape.values)
        return PatchData(
            kind=shape.kind,
            values=values,
            importance=shape.importance,
            scores=None if shape.importance == "magnitude" else entries.scores(shape.scores),
            weight=shape.weight,
            key=int(rng.integers(0, 1 << 64, dtype=np.uint64)),
            keep=int(rng.integers(0, KEEP_ALL)) if shape.retain else KEEP_ALL,
            scale=float(np.float32(rng.choice([1.0, -0.5, 0.3, 3e38 if flavour == "edges" else 2.0]))),
        )

    patches = tuple(map(patch, setting.patches))
    return Block(entries.base(setting.dtype), start, cols, patches, setting.combine, setting.order, nonfinite)


def random_cut(rng: np.random.Generator, block: Block, p: int) -> Cut:
    """A cut of which some keys of the block's patch lie above, some at, some below; sometimes all or none."""
    keys = np.zeros(1 << 16, dtype=np.int64)
    ReferenceBackend().histogram(block, [[Window(0, 15, keys)] if i == p else [] for i in range(len(block.patches))])
    found = np.flatnonzero(keys)
    kind = rng.integers(0, 6)
    if kind == 0 or not len(found):
        return Cut(int(rng.choice([0, NO_KEY])), int(rng.choice([0, 1 << 62])))
    low = int(rng.choice(found)) << 15
    fine = np.zeros(1 << 15, dtype=np.int64)
    ReferenceBackend().histogram(block, [[Window(low, 0, fine)] if i == p else [] for i in range(len(block.patches))])
    return Cut(low + int(rng.choice(np.flatnonzero(fine))), block.start + int(rng.integers(0, len(block) + 1)))


def compare(engine: Backend, block: Block, rng: np.random.Generator) -> str | None:
    """All passes of the engine on one block against the reference's: what differs first, or None."""
    truth = ReferenceBackend()
    patches = len(block.patches)

    def windows() -> list[list[Window]]:
        return [
            [Window(0, 15, np.zeros(1 << 16, dtype=np.int64)), Window(0x3A000000, 3, np.zeros(777, dtype=np.int64))]
            for _ in range(patches)
        ]

    cuts = [random_cut(rng, block, p) for p in range(patches)]
    quotas = [int(rng.integers(0, len(block) + 2)) if rng.random() < 0.5 else len(block) // 20 for _ in cuts]
    wanted, found = windows(), windows()
    if (a := truth.histogram(block, wanted)) != (b := engine.histogram(block, found)):
        return f"histogram: found {b}, expected {a}"
    for p, (one, other) in enumerate(zip(wanted, found, strict=True)):
        for w, v in zip(one, other, strict=True):
            if not np.array_equal(w.counts, v.counts):
                bin = int(np.flatnonzero(w.counts != v.counts)[0])
                return f"histogram of patch {p}: bin {bin} of {w.lo}: found {v.counts[bin]}, expected {w.counts[bin]}"
    keys = [cut.key for cut in cuts]
    if (s := truth.ties(block, keys)) != (t := engine.ties(block, keys)):
        return f"ties: found {t}, expected {s}"
    left, right = np.empty_like(block.base.data), np.empty_like(block.base.data)
    if (a := truth.apply(block, cuts, left)) != (b := engine.apply(block, cuts, right)):
        return f"apply: found {b}, expected {a}"
    if difference := _difference(right, left):
        return f"apply: {difference}"
    one_cuts, a = truth.merge(block, quotas, left)
    other_cuts, b = engine.merge(block, quotas, right)
    if one_cuts != other_cuts:
        return f"merge: found {other_cuts}, expected {one_cuts}"
    if a != b:
        return f"merge: found {b}, expected {a}"
    if difference := _difference(right, left):
        return f"merge: {difference}"
    return None


def _difference(found: NDArray[Any], expected: NDArray[Any]) -> str | None:
    wrong = np.flatnonzero(found != expected)
    if not len(wrong):
        return None
    i = int(wrong[0])
    return f"{len(wrong)} of {len(found)} entries differ, first {i}: found {found[i]:#x}, expected {expected[i]:#x}"
