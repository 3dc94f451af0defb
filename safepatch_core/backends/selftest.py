"""`safepatch selftest`: an engine against the reference, bit for bit, on the machine that it will run on."""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends import open_backend
from safepatch_core.backends.contract import Backend, Bits, Block, Cut, Lora, PatchData, Window
from safepatch_core.backends.device import interpreted
from safepatch_core.backends.reference import ReferenceBackend
from safepatch_core.spec import (
    COMBINE,
    KEEP_ALL,
    NO_KEY,
    SPEC_VERSION,
    Acts,
    Dtype,
    Importance,
    Join,
    Kind,
    Order,
    Rule,
    Weight,
)

FLAVOURS = ("bits", "model", "tied", "tiny", "edges")
EDGES = (
    0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 65504.0, -65504.0, 65520.0, 3.3895e38, -3.3895e38, 1e-40, -1e-45,
    6e-8, 2.98e-8,
)  # fmt: skip
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


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
    rule: Rule
    order: Order
    skip: bool = False  # whether the best are left out


def settings() -> list[Setting]:
    """Every kind with every importance, every dtype in every place, every combination and order."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    scored: list[tuple[Importance, Weight]] = [
        ("magnitude", "patched"), ("scores", "patched"),
        ("gradients", "patched"), ("gradients", "base"), ("gradients", "delta"),
    ]  # fmt: skip
    shapes = [
        Shape(kind, importance, weight, DTYPES[i % 3], DTYPES[(i // 3) % 3], retain=i % 4 != 3)
        for i, (kind, (importance, weight)) in enumerate(itertools.product(kinds, scored))
    ]
    rules, alone = list(COMBINE.values()), COMBINE["difference"]
    orders: tuple[Order, ...] = get_args(Order)
    found = [
        Setting(DTYPES[i % 3], (shapes[i], shapes[-1 - i]), rules[(i // 2) % len(rules)], orders[i % 2])
        for i in range(len(shapes) // 2 + 1)
    ]
    found += [
        Setting("BF16", (shapes[1],), alone, "retain-first"),
        Setting("F16", (shapes[0], None, shapes[6], shapes[1]), COMBINE["ties"], "select-first"),
        Setting("F32", (shapes[5], shapes[2], shapes[1], shapes[3], shapes[0]), alone, "retain-first"),
    ]
    found += [
        Setting("BF16", (shapes[0], shapes[6]), COMBINE["sum"], "retain-first", skip=True),
        Setting("F32", (shapes[7], shapes[4], None), Rule(Acts.ELECTED_UP, Join.WEIGHTED), "select-first", skip=True),
        Setting("F16", (shapes[11],), Rule(Acts.ALL, Join.TOTAL), "retain-first", skip=True),
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

    bits: any pattern; model: small changes of weights around 0.02; tied: changes of few sizes; tiny: subnormals and
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
        if self._flavour == "tied":
            return rng.choice(np.array([0, 0.0, 2**-9, -(2**-9), 2**-8, 1.5 * 2**-8], dtype=np.float32), n)
        return self._weights()


def make_block(
    rng: np.random.Generator, setting: Setting, flavour: str, n: int, start: int = 0, cols: int = 0
) -> Block:
    """A block of n entries from index `start` of a tensor with rows of `cols` entries (0: chosen at random).

    LoRA factors are those of the whole tensor, so where there are any, a far start asks for many columns.
    """
    entries = Entries(rng, flavour, n)
    scales = [1.0, -0.5, 3e38, -3e38] if flavour == "edges" else [1.0, -0.5, 0.3, 2.0]
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
            random_key=int(rng.integers(0, 1 << 64, dtype=np.uint64)),
            keep=int(rng.integers(0, KEEP_ALL)) if shape.retain else KEEP_ALL,
            scale=float(np.float32(rng.choice(scales))),
        )

    patches = tuple(map(patch, setting.patches))
    lambda_ = float(np.float32(rng.choice([1.0, 0.7, -1.3])))
    return Block(entries.base(setting.dtype), start, cols, patches, setting.rule, setting.order, lambda_)


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


def compare(engine: Backend, block: Block, rng: np.random.Generator, skip: bool = False) -> str | None:
    """All passes of the engine on one block against the reference's: what differs first, or None."""
    truth = ReferenceBackend()
    patches = len(block.patches)

    def windows() -> list[list[Window]]:
        return [
            [Window(0, 15, np.zeros(1 << 16, dtype=np.int64)), Window(0x3A000000, 3, np.zeros(777, dtype=np.int64))]
            for _ in range(patches)
        ]

    cuts = [random_cut(rng, block, p) for p in range(patches)]
    if skip:
        cuts = [cut.without(random_cut(rng, block, p)) for p, cut in enumerate(cuts)]
    quotas = [int(rng.integers(0, len(block) + 2)) if rng.random() < 0.5 else len(block) // 20 for _ in cuts]
    skips = [int(rng.integers(0, k + 1)) for k in quotas] if skip else []
    wanted, found = windows(), windows()
    if (a := truth.histogram(block, wanted)) != (b := engine.histogram(block, found)):
        return f"histogram: found {b}, expected {a}"
    for p, (one, other) in enumerate(zip(wanted, found, strict=True)):
        for w, v in zip(one, other, strict=True):
            if not np.array_equal(w.counts, v.counts):
                bin = int(np.flatnonzero(w.counts != v.counts)[0])
                return f"histogram of patch {p}: bin {bin} of {w.lo}: found {v.counts[bin]}, expected {w.counts[bin]}"
    keys = [cut.key for cut in cuts]
    if (s := truth.count_equal(block, keys)) != (t := engine.count_equal(block, keys)):
        return f"count_equal: found {t}, expected {s}"
    left, right = np.empty_like(block.base.data), np.empty_like(block.base.data)
    if (a := truth.apply(block, cuts, left)) != (b := engine.apply(block, cuts, right)):
        return f"apply: found {b}, expected {a}"
    if difference := _difference(right, left):
        return f"apply: {difference}"
    one_cuts, a = truth.merge(block, quotas, left, skips)
    other_cuts, b = engine.merge(block, quotas, right, skips)
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


FAR = (1 << 32) + 5  # past what 32 bits count
WIDE = 1 << 16  # columns with which a LoRA tensor reaches FAR


def check_patterns(engine: Backend, rng: np.random.Generator, entries: int) -> Iterator[str | None]:
    """Every 16-bit pattern as base, value and score; float32 sums at every step where 16-bit types round."""
    every = np.arange(1 << 16, dtype=np.uint32)
    steps = np.concatenate([(every << 16) + np.uint32(d) for d in (0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001)])
    for dtype in DTYPES:
        shapes = (Shape("delta", values="F32", retain=False), Shape("delta", "scores", values="F16", scores="BF16"))
        n = len(steps) if entries > 1 << 16 else 1 << 14
        block = make_block(rng, Setting(dtype, shapes, COMBINE["sum"], "retain-first"), "bits", n)
        sums, halves = block.patches
        assert sums is not None and halves is not None
        base = (
            block.base
            if dtype == "F32"
            else Bits(rng.permutation(every)[np.arange(n) % len(every)].astype(np.uint16), dtype)
        )
        base.data[::2] = 0
        patterns = [np.resize(rng.permutation(every), n).astype(np.uint16) for _ in range(2)]
        patches = (
            replace(sums, values=Bits(rng.permutation(steps)[:n], "F32"), scale=1.0),
            replace(halves, values=Bits(patterns[0], "F16"), scores=Bits(patterns[1], "BF16")),
        )
        yield compare(engine, replace(block, base=base, patches=patches), rng)


def check_settings(engine: Backend, rng: np.random.Generator, entries: int) -> Iterator[str | None]:
    """Every source, importance, weight, combination, order and dtype, on every flavour of entries."""
    for setting, flavour in itertools.product(settings(), FLAVOURS):
        block = make_block(rng, setting, flavour, entries, int(rng.integers(0, entries)))
        yield compare(engine, block, rng, setting.skip)


def check_sizes(engine: Backend, rng: np.random.Generator, entries: int) -> Iterator[str | None]:
    """No entry, one, odd numbers, around powers of two, at starts on and off the grid."""
    known = settings()[-6:]
    for i, n in enumerate((0, 0, 1, 1, 7, 255, 256, 1023, 1025, 16383, 16385)):
        setting = known[i % len(known)]
        yield compare(engine, make_block(rng, setting, "tied", n, int(rng.integers(0, 40))), rng, setting.skip)


def check_far(engine: Backend, rng: np.random.Generator, entries: int) -> Iterator[str | None]:
    """Positions at and past 2^32, where random numbers take the counter's second word and ties are far out."""
    for setting in settings()[::3]:
        lora = any(s is not None and s.kind == "lora" for s in setting.patches)
        for start in ((1 << 32) - 3, FAR if lora else (1 << 45) + 11):
            block = make_block(rng, setting, "tied", entries // 2, start, WIDE)
            yield compare(engine, block, rng, setting.skip)


def check_cuts(engine: Backend, rng: np.random.Generator, entries: int) -> Iterator[str | None]:
    """A tensor in pieces of any size gives the bytes, counts and faults that it gives at once."""
    for setting, flavour in itertools.product(settings()[-6:-3], ("tied", "edges")):
        block = make_block(rng, setting, flavour, entries, FAR, WIDE)
        cuts = [random_cut(rng, block, p) for p in range(len(block.patches))]
        whole, pieces = np.empty_like(block.base.data), np.empty_like(block.base.data)
        expected = engine.apply(block, cuts, whole)
        edges = [0, *sorted(rng.integers(0, entries, 4).tolist()), entries]
        counted = [engine.apply(block.slice(lo, hi), cuts, pieces[lo:hi]) for lo, hi in itertools.pairwise(edges)]
        problem = _difference(pieces, whole)
        for p, wanted in enumerate(expected.patches):
            found = [report.patches[p] for report in counted]
            sums = [sum(getattr(r, name) for r in found) for name in ("eligible", "selected", "applied")]
            if sums != [wanted.eligible, wanted.selected, wanted.applied]:
                problem = problem or f"patch {p}: found {sums} in pieces, expected {wanted}"
        yield problem


def check_long(engine: Backend, rng: np.random.Generator, entries: int) -> Iterator[str | None]:
    """Tensors that engines take in several pieces, in place."""
    for setting in (settings()[-6], settings()[-4], settings()[-2]):
        block = make_block(rng, setting, "tied", 40 * entries + 3, 1, 4096)
        quotas = [len(block) // 30] * len(block.patches)
        skips = [len(block) // 100 if setting.skip else 0] * len(block.patches)
        expected = np.empty_like(block.base.data)
        wanted = ReferenceBackend().merge(block, quotas, expected, skips)
        found = engine.merge(block, quotas, block.base.data, skips)
        yield (
            f"merge: found {found}, expected {wanted}" if found != wanted else _difference(block.base.data, expected)
        )


def check_random(engine: Backend, rng: np.random.Generator, entries: int) -> Iterator[str | None]:
    """Anything else, for as long as there is time."""
    known = settings()
    while True:
        setting = known[int(rng.integers(len(known)))]
        n, start = int(rng.integers(0, entries)), int(rng.integers(0, 1 << 20))
        block = make_block(rng, setting, str(rng.choice(FLAVOURS)), n, start, 512)
        yield compare(engine, block, rng, setting.skip)


CHECKS: dict[str, Callable[[Backend, np.random.Generator, int], Iterator[str | None]]] = {
    "every 16-bit pattern and rounding step": check_patterns,
    "every source, importance, combination and dtype": check_settings,
    "every size": check_sizes,
    "positions past 2^32": check_far,
    "any cut into pieces": check_cuts,
    "long tensors, in place": check_long,
    "random blocks": check_random,
}


def examine(
    engine: Backend, seconds: float, entries: int = 20_000, seed: int = 0, say: Callable[[str], object] = print
) -> list[Check]:
    """Run all checks on an open engine, and random blocks for what is left of the time.

    entries: of a typical block. A check ends at its first failure.
    """
    began = time.monotonic()
    checks = []
    for name, cases in CHECKS.items():
        check = Check(name)
        started = time.monotonic()
        for failure in cases(engine, np.random.default_rng(seed), entries):
            check.cases += 1
            check.failure = failure
            if failure or (cases is check_random and time.monotonic() - began > seconds):
                break
        check.seconds = time.monotonic() - started
        checks.append(check)
        say(f"{'FAILED' if check.failure else 'ok':6}  {name}: {check.cases} cases, {check.seconds:.1f} s")
        if check.failure:
            say(f"        {check.failure}")
    return checks


def selftest(
    backend: str = "auto", device: str | None = None, seconds: float = 60.0, say: Callable[[str], object] = print
) -> list[Check]:
    """Compare an engine with the reference, telling `say` the card, the versions, each check and the verdict.

    seconds: about how long; compiling comes on top. Raises UsageError if the engine can't run here.
    """
    engine = open_backend(backend, device=device)
    say(f"engine   {engine.describe()}")
    say(f"system   {platform.system()} {platform.machine()}, {_versions()}, SPEC {SPEC_VERSION}")
    checks = examine(engine, seconds, 1_000 if interpreted() else 20_000, say=say)
    cases, failed = sum(check.cases for check in checks), sum(check.failure is not None for check in checks)
    if failed:
        say(f"verdict  {failed} of {len(checks)} checks FAILED: do not merge on this engine")
    else:
        say(f"verdict  all bits equal the reference's, {cases} cases")
    return checks


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in ("safepatch", "numpy", "torch", "triton"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
