"""The contract in plain numpy: slow, short, and meant to be read beside SPEC.md, in its order.

Every line is one IEEE float32 operation or an integer one; numpy never fuses two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import (
    SELECT_ALL,
    SELECT_NONE,
    Bits,
    Block,
    Cut,
    Fault,
    Lora,
    PatchData,
    PatchReport,
    Report,
    Window,
)
from safepatch_core.memory import page_aligned
from safepatch_core.spec import EVERY, KEEP_ALL, Acts, Dtype, Join

F32 = NDArray[np.float32]
U32 = NDArray[np.uint32]
Mask = NDArray[np.bool_]


def to_float32(bits: Bits) -> F32:
    """The exact float32 value of each entry."""
    if bits.dtype == "F32":
        return bits.data.view(np.float32)
    if bits.dtype == "F16":
        return bits.data.view(np.float16).astype(np.float32)
    return (bits.data.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_float32(values: F32, dtype: Dtype) -> NDArray[np.unsignedinteger]:
    """Round to nearest even into `dtype`; the caller never passes NaN."""
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + half) >> np.uint32(16)).astype(np.uint16)


def delta(block: Block, patch: PatchData, w: F32) -> F32:
    """d of each entry."""
    if isinstance(patch.values, Bits):
        values = to_float32(patch.values)
        return np.subtract(values, w) if patch.kind == "checkpoint" else values
    lora: Lora = patch.values
    i = block.start + np.arange(len(block), dtype=np.int64)
    row, col = i // block.cols, i % block.cols
    total = np.zeros(len(block), dtype=np.float32)
    for r in range(lora.a.shape[0]):
        total = total + lora.b[row, r] * lora.a[r, col]
    scaled: F32 = np.float32(lora.scale) * total
    return scaled


def philox(key: int, blocks: NDArray[np.uint64]) -> U32:
    """Philox4x32-10 of counters (low, high, 0, 0): uint32 [len(blocks), 4]."""
    low32 = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c = [blocks & low32, blocks >> half, np.zeros_like(blocks), np.zeros_like(blocks)]
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (p1 >> half) ^ c[1] ^ np.uint64(k0),
            p1 & low32,
            (p0 >> half) ^ c[3] ^ np.uint64(k1),
            p0 & low32,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=-1).astype(np.uint32)


def retained(patch: PatchData, start: int, n: int) -> Mask:
    """r: which of the entries [start, start + n) survive random retention."""
    if patch.keep >= KEEP_ALL:
        return np.ones(n, dtype=bool)
    first = start // 4
    blocks = np.arange(first, (start + n + 3) // 4, dtype=np.uint64)
    lanes = philox(patch.random_key, blocks).ravel()[start - 4 * first :][:n]
    return lanes < np.uint32(patch.keep)


def score(patch: PatchData, w: F32, d: F32) -> F32:
    """s of each entry; NaN, infinite and negative ones are found by the caller."""
    if patch.importance == "magnitude":
        return cast(F32, np.abs(d))
    assert patch.scores is not None
    scores = to_float32(patch.scores)
    if patch.importance == "scores":
        return scores
    if patch.weight == "base":
        x = w
    elif patch.weight == "delta":
        x = d
    elif patch.kind == "checkpoint":
        x = to_float32(cast(Bits, patch.values))
    else:
        x = w + d
    return cast(F32, np.abs(x * scores))


def fault(mask: Mask, start: int) -> Fault:
    count = int(np.count_nonzero(mask))
    return Fault(count, start + int(np.argmax(mask)) if count else -1)


class Scored:
    """What one patch says about a block of n entries; all arrays are [n]."""

    d: F32  # delta
    key: U32  # bits of |s|: where eligible, ordered like s
    retained: Mask
    eligible: Mask

    def __init__(self, block: Block, patch: PatchData, w: F32, report: PatchReport) -> None:
        self.d = delta(block, patch, w)
        s = score(patch, w, self.d)
        good_delta, good_score = np.isfinite(self.d), np.isfinite(s)
        negative = good_delta & good_score & (s < 0)
        self.retained = retained(patch, block.start, len(block))
        self.eligible = good_delta & good_score & (s > 0)
        if block.order == "retain-first":
            self.eligible &= self.retained
        self.key = np.abs(s).view(np.uint32)
        report.eligible = int(np.count_nonzero(self.eligible))
        report.bad_delta = fault(~good_delta, block.start)
        report.bad_score = fault(good_delta & ~good_score, block.start)
        report.negative = fault(negative, block.start)

    def selected(self, block: Block, cut: Cut) -> Mask:
        """T: the entries above the cut, and those at it that lie before its position; less those that it skips."""
        key, position = self.key.astype(np.int64), block.start + np.arange(len(block), dtype=np.int64)
        found: Mask = self.eligible & ((key > cut.key) | ((key == cut.key) & (position < cut.before)))
        if cut.skip_key:
            found &= ~((key > cut.skip_key) | ((key == cut.skip_key) & (position < cut.skip_before)))
        return found & self.retained if block.order == "select-first" else found


def cut_of(key: U32, eligible: Mask, k: int, start: int) -> Cut:
    """The k eligible entries of largest key, ties to the lower position, by sorting: the definition."""
    where = np.flatnonzero(eligible)
    if k == 0:
        return SELECT_NONE
    if k >= len(where):
        return SELECT_ALL
    order = where[np.lexsort((where, -key[where].astype(np.int64)))]
    threshold = int(key[order[k - 1]])
    left_over = int(key[order[k]]) == threshold
    return Cut(threshold, start + int(order[k - 1]) + 1 if left_over else EVERY)


def acting(acts: Acts, selected: Sequence[Mask], steps: Sequence[F32]) -> list[Mask]:
    """On which of its entries each patch acts: selected and steps (c·d) hold an array per patch, [n]."""
    if acts == Acts.ALL:
        return list(selected)
    if acts == Acts.ALONE:
        alone = np.sum(selected, axis=0) == 1
        return [mine & alone for mine in selected]
    total = np.zeros(selected[0].shape if selected else 0, dtype=np.float32)
    for mine, step in zip(selected, steps, strict=True):
        total = np.where(mine, total + step, total)
    up = total >= 0 if acts == Acts.ELECTED_UP else total > 0
    lost = np.isnan(total)  # infinite both ways: no sign, so all act, and what they make is not finite either
    return [
        mine & (((step > 0) & up) | ((step < 0) & (total < 0)) | lost)
        for mine, step in zip(selected, steps, strict=True)
    ]


def joined(
    join: Join, acts: Sequence[Mask], steps: Sequence[F32], scales: Sequence[float], w: F32, lambda_: float
) -> F32:
    """What the acting steps make of w, before it is rounded into the base's dtype; scales: each patch's c; [n]."""
    total = w if join == Join.SUM else np.zeros_like(w)
    divisor = np.zeros_like(w)
    for act, step, scale in zip(acts, steps, scales, strict=True):
        total = np.where(act, total + step, total)
        divisor = np.where(act, divisor + np.float32(scale if join == Join.WEIGHTED else 1), divisor)
    if join in (Join.MEAN, Join.WEIGHTED):
        total = np.divide(total, np.where(divisor == 0, np.float32(1), divisor), dtype=np.float32)
    return total if join == Join.SUM else w + np.float32(lambda_) * total


def stored(acc: F32, dtype: Dtype) -> tuple[NDArray[np.unsignedinteger], Mask]:
    """acc rounded into the base's dtype, and where it is still finite there; [n] each."""
    finite = np.isfinite(acc)
    rounded = from_float32(np.where(finite, acc, np.float32(0)), dtype)
    return rounded, finite & np.isfinite(to_float32(Bits(rounded, dtype)))


class ReferenceBackend:
    """The engine that the others are compared with. Its methods are documented on `Backend`."""

    takes_turns = True  # nothing is kept between calls

    def describe(self) -> str:
        return f"reference (numpy {np.__version__})"

    def allocate(self, nbytes: int) -> NDArray[np.uint8]:
        return page_aligned(nbytes)

    def scratch(self, entries: int, patches: int) -> int:
        """Bytes that `merge` may allocate on top of the block: plain numpy temporaries."""
        return entries * (40 + 40 * patches)

    @staticmethod
    def _score(block: Block) -> tuple[F32, list[Scored | None], Report]:
        report = Report([PatchReport() for _ in block.patches])
        w = to_float32(block.base)
        with np.errstate(all="ignore"):
            scored = [
                None if p is None else Scored(block, p, w, found)
                for p, found in zip(block.patches, report.patches, strict=True)
            ]
        return w, scored, report

    def histogram(self, block: Block, windows: Sequence[Sequence[Window]]) -> Report:
        _, scored, report = self._score(block)
        for patch, wanted in zip(scored, windows, strict=True):
            if patch is None:
                continue
            keys = patch.key[patch.eligible].astype(np.int64)
            for lo, shift, counts in wanted:
                bins = (keys - lo) >> shift
                inside = bins[(keys >= lo) & (bins < len(counts))]
                counts += np.bincount(inside, minlength=len(counts))
        return report

    def count_equal(self, block: Block, keys: Sequence[int]) -> list[int]:
        _, scored, _ = self._score(block)
        return [
            0 if p is None else int(np.count_nonzero(p.eligible & (p.key == np.uint32(key))))
            for p, key in zip(scored, keys, strict=True)
        ]

    def apply(self, block: Block, cuts: Sequence[Cut], out: NDArray[np.unsignedinteger]) -> Report:
        w, scored, report = self._score(block)
        nothing, still = np.zeros(len(block), dtype=bool), np.zeros(len(block), dtype=np.float32)
        with np.errstate(all="ignore"):
            selected = [nothing if s is None else s.selected(block, cut) for s, cut in zip(scored, cuts, strict=True)]
            steps = [
                still if s is None or p is None else np.float32(p.scale) * s.d
                for s, p in zip(scored, block.patches, strict=True)
            ]
            acts = acting(block.rule.acts, selected, steps)
            scales = [0.0 if p is None else p.scale for p in block.patches]
            acc = joined(block.rule.join, acts, steps, scales, w, block.lambda_)
            rounded, fits = stored(acc, block.base.dtype)
        acted = np.any([nothing, *acts], axis=0)
        touched = acted & np.isfinite(w)
        written = np.where(touched & fits, rounded, block.base.data)
        for found, mine, act in zip(report.patches, selected, acts, strict=True):
            found.selected, found.applied = int(np.count_nonzero(mine)), int(np.count_nonzero(act))
        report.overflow = fault(touched & ~fits, block.start)
        report.acted = int(np.count_nonzero(acted))
        report.changed = int(np.count_nonzero(written != block.base.data))
        out[:] = written
        return report

    def merge(
        self, block: Block, quotas: Sequence[int], out: NDArray[np.unsignedinteger], skips: Sequence[int] = ()
    ) -> tuple[list[Cut], Report]:
        _, scored, _ = self._score(block)

        def cut(s: Scored | None, k: int) -> Cut:
            return SELECT_NONE if s is None else cut_of(s.key, s.eligible, k, block.start)

        cuts = [
            cut(s, k).without(cut(s, skip))
            for s, k, skip in zip(scored, quotas, skips or [0] * len(quotas), strict=True)
        ]
        return cuts, self.apply(block, cuts, out)


def open_engine(*, threads: int | None, device: str | None, vram_limit: int | None) -> ReferenceBackend:
    """A `contract.Opener`."""
    return ReferenceBackend()
