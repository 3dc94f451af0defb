"""Exact selection from streams: which keys, and which of the equal ones, belong to the k largest.

Nothing is ever sorted. A first sweep counts the keys' upper 16 bits; the bin that holds the k-th key is then
counted by its lower 15 bits, which gives the threshold; equal keys go to the lower positions. A sampled guess
lets the first sweep count that bin as well, so that one sweep is the normal case, and leave out the keys that lie far
below. Guesses are only believed where exact counts confirm them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import (
    SELECT_ALL,
    SELECT_NONE,
    Ahead,
    Backend,
    Block,
    Counting,
    Cut,
    Later,
    Report,
    Window,
)
from safepatch_core.ranks import Ranks
from safepatch_core.spec import EVERY, KEY_BITS, NO_KEY

LOW_BITS = 15
COARSE = 1 << (KEY_BITS - LOW_BITS)
FINE = 1 << LOW_BITS
# A guess covers the sampled rank plus and minus five standard errors, at most so many coarse bins (256 KiB each).
GUESS_BINS = 4
GUESS_SIGMAS = 5.0
# Below so many the sample is trusted that the threshold doesn't lie, and nothing is counted: blocks of a sample hold
# neighbours, which are alike. A tenth more keys than are asked for are looked at, of a model of 1.1 B and top 0.03.
FLOOR_SIGMAS = 20.0
TIE_BINS = 1024


def counting(engine: Backend) -> Counting:
    """A sweep that counts: the engine's own where it goes on to the next block before one is done."""
    return engine.counting() if isinstance(engine, Ahead) else _AtOnce(engine)


@dataclass(frozen=True, slots=True)
class _AtOnce:
    """A `Counting` that has counted each block before the next."""

    engine: Backend

    def begin(self, block: Block, windows: Sequence[Sequence[Window]]) -> Later[Report]:
        return _Counted(self.engine.histogram(block, windows))

    def end(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Counted:
    report: Report

    def done(self) -> bool:
        return True

    def result(self) -> Report:
        return self.report


@dataclass(frozen=True, slots=True)
class Tally:
    """Ties that a tensor may still take: entries with this key are selected up to `left`, by position.

    `skip` is the same of the best ones, which are left out again.
    """

    key: int
    left: int
    skip: Tally | None = None


NOTHING = Tally(NO_KEY, 0)


class TieCounter:
    """Turns a tensor's tie allowances into cuts, block by block in order of position."""

    def __init__(self, tallies: Sequence[Tally]) -> None:
        self._keys = [t.key for t in tallies]
        self._left = [t.left for t in tallies]
        skipped = [t.skip or NOTHING for t in tallies]
        self._skipped = TieCounter(skipped) if any(t.skip for t in tallies) else None

    def cuts(self, engine: Backend, block: Block) -> list[Cut]:
        """The cuts of the next block of the tensor."""
        cuts = self._cuts(engine, block)
        if self._skipped is None:
            return cuts
        return [cut.without(best) for cut, best in zip(cuts, self._skipped.cuts(engine, block), strict=True)]

    def _cuts(self, engine: Backend, block: Block) -> list[Cut]:
        open_ = [0 < left < EVERY for left in self._left]
        counts = engine.count_equal(block, self._keys) if any(open_) else [0] * len(self._keys)
        cuts = []
        for p, (key, left) in enumerate(zip(self._keys, self._left, strict=True)):
            if not open_[p]:
                cuts.append(Cut(key, EVERY if left else 0))
            elif counts[p] <= left:
                cuts.append(Cut(key, EVERY))
                self._left[p] -= counts[p]
            else:
                cuts.append(Cut(key, self._position(engine, block, p, left)))
                self._left[p] = 0
        return cuts

    def _position(self, engine: Backend, block: Block, p: int, left: int) -> int:
        """One past the tensor index of the block's `left`-th tie of patch p, by halving."""
        lo, hi = 0, len(block)
        while hi - lo > 1:
            middle = (lo + hi) // 2
            before = engine.count_equal(block.slice(lo, middle), self._keys)[p]
            if before >= left:
                hi = middle
            else:
                lo, left = middle, left - before
        return block.start + hi


class _Search:
    """One patch's search over one scope. `phase` says what the next sweep counts.

    keys: the coarse bins, and finely those of the guess; bin: the bin that holds the k-th key;
    ties: the threshold's ties in each tensor; done: nothing.
    """

    def __init__(self, k: int, entries: int, per_tensor: bool) -> None:
        self.k, self.share, self._per_tensor = k, k / entries if entries else 0.0, per_tensor
        self.phase: Literal["keys", "bin", "ties", "done"] = "keys" if 0 < k < entries else "done"
        self.cut = SELECT_NONE if k == 0 else SELECT_ALL  # the threshold, once done
        self.need = EVERY if k else 0  # its ties to take
        self._coarse_lo = 0  # the lowest coarse bin that is counted
        self._coarse = np.zeros(COARSE if self.phase == "keys" else 0, dtype=np.int64)
        self._fine_lo = 0
        self._fine = np.zeros(0, dtype=np.int64)
        self._tie_lo, self._tie_shift, self._tie_bins = 0, 0, 0
        self._ties: dict[str, NDArray[np.int64]] = {}

    def guess(self, coarse: NDArray[np.int64], sampled: int) -> Window | None:
        """Choose the coarse bins to count finely from a sample's; returns a window to count the sample in."""
        low, high = self._span(_tails(coarse), sampled)
        if self.phase == "done" or not coarse.any():
            return None
        self._coarse_lo, _ = self._span(_tails(coarse), sampled, FLOOR_SIGMAS)
        self._coarse = np.zeros(COARSE - self._coarse_lo, dtype=np.int64)
        if high - low >= GUESS_BINS:
            middle = _bin_of(_tails(coarse), max(self.share * sampled, 1))
            low = max(middle - GUESS_BINS // 2, 0)
            high = min(low + GUESS_BINS, COARSE) - 1
        self._fine_lo = low << LOW_BITS
        self._fine = np.zeros((high - low + 1) * FINE, dtype=np.int64)
        return Window(self._fine_lo, 0, np.zeros_like(self._fine))

    def guess_ties(self, coarse: NDArray[np.int64], fine: NDArray[np.int64], sampled: int) -> None:
        """Choose the range of keys to count in each tensor from the sample's fine counts."""
        above = int(coarse[(self._fine_lo >> LOW_BITS) + len(fine) // FINE :].sum())
        low, high = self._span(_tails(fine) + above, sampled)
        self._tie_lo, self._tie_bins = self._fine_lo + low, TIE_BINS
        while (high - low) >> self._tie_shift >= TIE_BINS:
            self._tie_shift += 1

    def _span(self, tails: NDArray[np.int64], sampled: int, sigmas: float = GUESS_SIGMAS) -> tuple[int, int]:
        """The bins that hold the sampled rank plus and minus its margin."""
        rank = self.share * sampled
        margin = sigmas * (rank * (1 - self.share)) ** 0.5 + 1
        return _bin_of(tails, rank + margin), _bin_of(tails, max(rank - margin, 1))

    def windows(self, tensor: str) -> list[Window]:
        """What to count in a block of this tensor during the present sweep."""
        wanted = [Window(self._coarse_lo << LOW_BITS, LOW_BITS, self._coarse)] if self.phase == "keys" else []
        if self.phase in ("keys", "bin") and len(self._fine):
            wanted.append(Window(self._fine_lo, 0, self._fine))
        if self.phase in ("keys", "ties") and self._tie_bins:
            counts = self._ties.setdefault(tensor, np.zeros(self._tie_bins, dtype=np.int64))
            wanted.append(Window(self._tie_lo, self._tie_shift, counts))
        return wanted

    def combine(self, ranks: Ranks) -> None:
        if self.phase == "keys":
            ranks.total(self._coarse)
        if self.phase in ("keys", "bin"):
            ranks.total(self._fine)
        if self.phase in ("keys", "ties"):
            self._ties = {name: counts for of in ranks.gather(self._ties) for name, counts in of.items()}

    def advance(self) -> None:
        """A sweep has ended."""
        if self.phase == "keys":
            tails = _tails(self._coarse)
            if tails[0] < self.k and self._coarse_lo:
                self._look_everywhere()
                return
            if tails[0] <= self.k and not self._coarse_lo:
                self.cut, self.need, self.phase = SELECT_ALL, EVERY, "done"
                return
            lo = self._coarse_lo + _bin_of(tails, self.k) << LOW_BITS
            if self._fine_lo <= lo < self._fine_lo + len(self._fine):
                self._settle(lo)
            else:
                self._fine_lo, self._fine, self.phase = lo, np.zeros(FINE, dtype=np.int64), "bin"
        elif self.phase == "bin":
            self._settle(self._fine_lo)
        elif self.phase == "ties":
            self.phase = "done"

    def _look_everywhere(self) -> None:
        """Start again without a guess, which was too high."""
        self._coarse_lo, self._coarse = 0, np.zeros(COARSE, dtype=np.int64)
        self._fine_lo, self._fine = 0, np.zeros(0, dtype=np.int64)
        self._ties, self._tie_bins = {}, 0

    def _settle(self, lo: int) -> None:
        """The bin starting at `lo` holds the k-th key and its fine counts are complete."""
        counts = self._fine[lo - self._fine_lo :][:FINE]
        over = int(self._coarse[(lo >> LOW_BITS) + 1 - self._coarse_lo :].sum())
        tails = _tails(counts) + over
        key = _bin_of(tails, self.k)
        ties = int(counts[key])
        self.cut = Cut(lo + key, EVERY)
        self.need = self.k - (int(tails[key]) - ties)
        self.phase = "done"
        if self.need == ties:
            self.need = EVERY
        elif self._per_tensor and self._ties_of_threshold() != ties:
            self._ties, self._tie_lo, self._tie_shift, self._tie_bins = {}, lo + key, 0, 1
            self.phase = "ties"

    def _ties_of_threshold(self) -> int:
        """What the tensors counted in the threshold's bin: its ties, if no other key fell into it."""
        place = (self.cut.key - self._tie_lo) >> self._tie_shift
        inside = 0 <= place < self._tie_bins
        return sum(int(c[place]) for c in self._ties.values()) if inside else -1

    def shares(self, tensors: Sequence[str]) -> list[Tally]:
        """The ties that each tensor may take; `tensors` in order of position."""
        if self.need in (0, EVERY) or not self._per_tensor:
            return [Tally(self.cut.key, self.need)] * len(tensors)
        place, left, shares = (self.cut.key - self._tie_lo) >> self._tie_shift, self.need, []
        for name in tensors:
            here = int(self._ties[name][place]) if name in self._ties else 0
            shares.append(Tally(self.cut.key, EVERY if here <= left else left))
            left = max(left - here, 0)
        return shares


def _count(engine: Backend, blocks: Sequence[Block], windows: Sequence[Sequence[Window]]) -> None:
    """Count the keys of all blocks in the same windows."""
    sweep = counting(engine)
    for block in blocks:
        sweep.begin(block, windows)
    sweep.end()


def _tails(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many keys lie in each bin or a higher one."""
    tails: NDArray[np.int64] = np.cumsum(counts[::-1])[::-1]
    return tails


def _bin_of(tails: NDArray[np.int64], rank: float) -> int:
    """The highest bin whose tail count reaches `rank`; 0 where none does. Tails fall from left to right."""
    return max(int(np.searchsorted(-tails, -rank, side="right")) - 1, 0)


class Selection:
    """The thresholds of all patches over one scope: one tensor, or all targets in bytewise order of names.

    Sweep while `pending`: hand `windows(tensor)` to the engine with each block, then call `advance()`.
    """

    def __init__(
        self, tensors: Sequence[str], quotas: Sequence[int], entries: int, skips: Sequence[int] = ()
    ) -> None:
        self._tensors = list(tensors)
        self._patches = len(quotas)
        # Each belongs to a patch; that of what a patch skips comes behind all others.
        wanted = [*enumerate(quotas), *((p, skip) for p, skip in enumerate(skips) if skip)]
        self._owners = [p for p, _ in wanted]
        self._searches = [_Search(k, entries, len(self._tensors) > 1) for _, k in wanted]

    @property
    def pending(self) -> bool:
        return any(s.phase != "done" for s in self._searches)

    def guess(self, engine: Backend, sample: Sequence[Block]) -> None:
        """Choose what the first sweep counts finely, from blocks that stand for the whole scope."""
        sampled = sum(len(b) for b in sample)
        coarse = [np.zeros(COARSE, dtype=np.int64) for _ in range(self._patches)]
        _count(engine, sample, [[Window(0, LOW_BITS, c)] for c in coarse])
        fine = [s.guess(coarse[p], sampled) for p, s in zip(self._owners, self._searches, strict=True)]
        if len(self._tensors) == 1:
            return
        _count(engine, sample, self._by_patch([[] if w is None else [w] for w in fine]))
        for p, search, window in zip(self._owners, self._searches, fine, strict=True):
            if window is not None:
                search.guess_ties(coarse[p], window.counts, sampled)

    def windows(self, tensor: str) -> list[list[Window]]:
        """Per patch, what to count in a block of this tensor during the present sweep."""
        return self._by_patch([s.windows(tensor) for s in self._searches])

    def _by_patch(self, windows: Sequence[Sequence[Window]]) -> list[list[Window]]:
        """What the searches want, put together."""
        found: list[list[Window]] = [[] for _ in range(self._patches)]
        for p, wanted in zip(self._owners, windows, strict=True):
            found[p] += wanted
        return found

    def combine(self, ranks: Ranks) -> None:
        """Add up what the ranks counted, each over its own tensors, so that all go on from the same counts."""
        for search in self._searches:
            search.combine(ranks)

    def advance(self) -> None:
        """A sweep over the whole scope has ended."""
        for search in self._searches:
            search.advance()

    def tallies(self) -> dict[str, list[Tally]]:
        """Per tensor and patch, the threshold and the ties that may be taken."""
        shares = [s.shares(self._tensors) for s in self._searches]
        for p, skipped in zip(self._owners[self._patches :], shares[self._patches :], strict=True):
            shares[p] = [replace(of, skip=skip) for of, skip in zip(shares[p], skipped, strict=True)]
        return {name: [of[i] for of in shares[: self._patches]] for i, name in enumerate(self._tensors)}
