"""The engines' contract: arrays and numbers in, bits and counts out. Engines never see files or recipes.

A `Block` is a run of consecutive entries of one target tensor with what every patch says about them.
Blocks may be any size from one entry up and start anywhere in their tensor: results never depend on the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from safepatch_core.spec import (
    EVERY,
    NO_KEY,
    Dtype,
    Importance,
    Kind,
    Order,
    Rule,
    Weight,
)

T = TypeVar("T", covariant=True)
GridName = Literal["E4M3", "E2M1", "INT8", "INT4"]
Rounding = Literal["stochastic", "nearest"]


class Bits(NamedTuple):
    """Raw entries of a tensor: `data` is a 1-D array of uint16 (F16, BF16) or uint32 (F32) bit patterns."""

    data: NDArray[np.unsignedinteger]
    dtype: Dtype


class Lora(NamedTuple):
    """delta[row, col] = scale * (sum over r of b[row, r] * a[r, col], from 0, in order of r), all in float32.

    Factors are those of the whole tensor, C-contiguous: `a` float32 [rank, cols], `b` float32 [rows, rank].
    """

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    scale: float


def unread(kind: Kind) -> Bits | Lora:
    """Stands for the values of a patch, of that kind, which nobody will read."""
    nothing = np.empty((0, 0), np.float32)
    return Lora(nothing, nothing, 0.0) if kind == "lora" else Bits(np.empty(0, np.uint16), "BF16")


@dataclass(frozen=True, slots=True)
class PatchData:
    """One patch's share of a block."""

    kind: Kind
    values: Bits | Lora  # patched values (checkpoint), deltas (delta) or LoRA factors
    importance: Importance
    scores: Bits | None  # scores or gradients, as many entries as the block; None for magnitude
    weight: Weight  # which x the gradients multiply
    random_key: int  # 64 bits, of Philox
    keep: int  # retained iff random number < keep; spec.KEEP_ALL retains everything
    scale: float  # c, already rounded to float32


class ScaleTable(NamedTuple):
    """Scales of a weight whose matrices [rows, cols] are stored one below another."""

    values: NDArray[np.float32]  # [rows, columns] of the table
    first: int  # the row of the whole table that the first one is
    rows: int
    cols: int
    block: tuple[int, int]  # rows and columns of a matrix that share a scale
    turned: bool = False  # whether entries are counted in the transposes


@dataclass(frozen=True, slots=True)
class Codes:
    """Where the codes of a block lie, and how they are rewritten.

    Attributes:
        grid: what they stand for.
        data: uint8, those of `entries` entries of the tensor from `first` on: all of the block, or more.
        flip: bits of a stored code of 8 bits that are the other way round in the grid's.
        scales: of these entries.
        handed: what values were rounded to when checkpoints were trained on them: what their deltas are from.
        rounding, random_key: of new codes.
        original: the same entries of the float model, which are then what is patched.
    """

    grid: GridName
    data: NDArray[np.uint8]
    flip: int
    first: int
    entries: int
    scales: ScaleTable
    handed: Dtype
    rounding: Rounding
    random_key: int
    original: Bits | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive entries [start, start + len) of one tensor; a patch that lacks the tensor is None."""

    base: Bits
    start: int  # flat row-major index of the first entry within its tensor
    cols: int  # length of the tensor's last dimension; only LoRA reads it
    patches: tuple[PatchData | None, ...]
    rule: Rule
    order: Order
    lambda_: float = 1.0  # what Join.MEAN, TOTAL and WEIGHTED multiply before they add to w; rounded to float32
    codes: Codes | None = None  # how the tensor is stored, for engines that take it so; `base` only tells its length

    def __len__(self) -> int:
        return len(self.base.data)

    def slice(self, lo: int, hi: int) -> Block:
        """The entries [lo, hi) of this block, without copying."""

        def part(bits: Bits) -> Bits:
            return Bits(bits.data[lo:hi], bits.dtype)

        patches = tuple(
            None
            if p is None
            else replace(
                p,
                values=p.values if isinstance(p.values, Lora) else part(p.values),
                scores=None if p.scores is None else part(p.scores),
            )
            for p in self.patches
        )
        return replace(self, base=part(self.base), start=self.start + lo, patches=patches)


class Window(NamedTuple):
    """A histogram: counts[(key - lo) >> shift] += 1 for eligible keys from `lo` to the last bin's end."""

    lo: int
    shift: int
    counts: NDArray[np.int64]  # added to, in place


class Cut(NamedTuple):
    """T = eligible entries with key > `key`, or key == `key` and index in the tensor < `before`.

    With a `skip_key` above 0, those that a cut of it and `skip_before` would select are left out again.
    """

    key: int
    before: int
    skip_key: int = 0
    skip_before: int = 0

    def without(self, best: Cut) -> Cut:
        """This cut less what `best`, which selects no other entries, selects."""
        if SELECT_NONE in (self, best):
            return self
        return SELECT_NONE if best == SELECT_ALL else self._replace(skip_key=best.key, skip_before=best.before)


SELECT_NONE = Cut(NO_KEY, 0)
SELECT_ALL = Cut(0, EVERY)  # eligible keys are > 0


@dataclass(frozen=True, slots=True)
class Fault:
    """Entries that break a rule: how many, and the lowest index in the tensor (-1 where there is none)."""

    count: int = 0
    first: int = -1

    def __add__(self, other: Fault) -> Fault:
        firsts = [f.first for f in (self, other) if f.count]
        return Fault(self.count + other.count, min(firsts, default=-1))


@dataclass(slots=True)
class PatchReport:
    """What a pass found for one patch. `bad_score` counts only entries whose delta is finite.

    `negative` counts finite scores below zero (-0 is not). Entries of the first two kinds are never eligible;
    whether they stop a merge is the caller's affair.
    """

    eligible: int = 0
    selected: int = 0  # |T|, after retention with order: select-first
    applied: int = 0
    bad_delta: Fault = Fault()
    bad_score: Fault = Fault()
    negative: Fault = Fault()

    def __add__(self, other: PatchReport) -> PatchReport:
        return PatchReport(
            self.eligible + other.eligible,
            self.selected + other.selected,
            self.applied + other.applied,
            self.bad_delta + other.bad_delta,
            self.bad_score + other.bad_score,
            self.negative + other.negative,
        )


@dataclass(slots=True)
class Report:
    """What a pass found: one entry per patch of the block, and overflows on rounding into the base dtype.

    acted: entries on which at least one patch acts; changed: those of them whose new bits are not the base's. The
    others' steps are lost in rounding (or the base isn't finite, or the sum overflows).
    """

    patches: list[PatchReport]
    overflow: Fault = Fault()
    acted: int = 0
    changed: int = 0

    def __add__(self, other: Report) -> Report:
        patches = [a + b for a, b in zip(self.patches, other.patches, strict=True)]
        return Report(patches, self.overflow + other.overflow, self.acted + other.acted, self.changed + other.changed)


class Backend(Protocol):
    """An engine. All calls are thread-safe."""

    def describe(self) -> str:
        """Name, instruction set or card, threads: for the log and the manifest-free summary."""

    def allocate(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory for the ring, aligned to 256 bytes (pinned where the engine moves it elsewhere).

        Aligned to 4096, it can be read into past the page cache.
        """

    def scratch(self, entries: int, patches: int) -> int:
        """Upper bound in bytes of what `merge` of so many entries allocates beyond its arguments."""

    def histogram(self, block: Block, windows: Sequence[Sequence[Window]]) -> Report:
        """Count eligible keys per patch into its windows; report eligible counts and faults.

        `windows[p]` belongs to `block.patches[p]` and may be empty. Faults and eligible counts are
        reported for every patch present, `selected` and `applied` stay 0.
        """

    def count_equal(self, block: Block, keys: Sequence[int]) -> list[int]:
        """Per patch, the number of eligible entries whose key equals `keys[p]`."""

    def apply(self, block: Block, cuts: Sequence[Cut], out: NDArray[np.unsignedinteger]) -> Report:
        """Write the block's new bits to `out` (which may be `block.base.data` itself); full report."""

    def merge(
        self, block: Block, quotas: Sequence[int], out: NDArray[np.unsignedinteger], skips: Sequence[int] = ()
    ) -> tuple[list[Cut], Report]:
        """A whole tensor at once: find each patch's cut for its quota k, then apply. `out` as in `apply`.

        `skips[p]` of the `quotas[p]` entries, the best ones, are not selected; none where it is left out.
        """


class Notes(Protocol):
    """What an engine found of a block, for further looks at it that read no patch again."""

    @property
    def nbytes(self) -> int:
        """Host memory that they take."""


def takes_turns(engine: Backend) -> bool:
    """Whether several threads may call the engine, one of which then waits for the other."""
    return getattr(engine, "takes_turns", False)


def threads_of(engine: Backend) -> int | None:
    """How many threads a call works with; None of an engine that doesn't say."""
    return getattr(engine, "threads", None)


@runtime_checkable
class Noting(Protocol):
    """What an engine has beside a `Backend` where it can go on from notes.

    Blocks with notes are those that the notes are of, but for scales, rule and lambda; what their patches say is not
    read (see `unread`).
    """

    def take_notes(self, block: Block, quotas: Sequence[int]) -> Notes | None:
        """Look at a whole tensor for `merge_noted` with quotas up to these; None where `merge` alone will do."""

    def merge_noted(
        self,
        notes: Notes,
        block: Block,
        quotas: Sequence[int],
        out: NDArray[np.unsignedinteger],
        skips: Sequence[int] = (),
    ) -> tuple[list[Cut], Report]:
        """As `merge`."""

    def note(self, block: Block, windows: Sequence[Sequence[Window]]) -> tuple[Report, Notes | None]:
        """As `histogram`, with notes of the keys from each patch's lowest window on; None where they can't be taken.

        Nothing is noted of a patch without windows.
        """

    def apply_noted(
        self, notes: Notes, block: Block, cuts: Sequence[Cut], out: NDArray[np.unsignedinteger]
    ) -> Report:
        """As `apply`, by cuts whose keys are not below those of the notes."""


class Later(Protocol[T]):
    """What a call will have found."""

    def done(self) -> bool:
        """Whether `result` returns at once."""

    def result(self) -> T:
        """Wait for it; raises what the call would have raised. Until then the call's arrays stay as they are."""


class Counting(Protocol):
    """One sweep over many blocks, whose windows have their counts at its end."""

    def begin(self, block: Block, windows: Sequence[Sequence[Window]]) -> Later[Report]:
        """As `histogram`, but that what the windows count is not read before `end`."""

    def end(self) -> None:
        """Wait until all windows have their counts."""


@runtime_checkable
class Ahead(Protocol):
    """What an engine has beside a `Backend` where it can go on to the next tensor before one is done."""

    def counting(self) -> Counting:
        """A sweep that counts."""

    def begin_apply(self, block: Block, cuts: Sequence[Cut], out: NDArray[np.unsignedinteger]) -> Later[Report]:
        """As `apply`."""

    def begin_merge(
        self, block: Block, quotas: Sequence[int], out: NDArray[np.unsignedinteger], skips: Sequence[int] = ()
    ) -> Later[tuple[list[Cut], Report]]:
        """As `merge`."""


class Opener(Protocol):
    """Opens an engine; each takes what concerns it, None being its own choice. Raises UsageError if it can't run."""

    def __call__(self, *, threads: int | None, device: str | None, vram_limit: int | None) -> Backend: ...
