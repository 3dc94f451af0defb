"""Two checkpoints of one table, tensor after tensor: what each format would leave of their difference.

A few whole rows of both sides are in memory at once, as many as the limit allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Bits
from safepatch_core.backends.reference import to_float32
from safepatch_core.errors import InputError, UsageError
from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.quantised.formats import Format
from safepatch_core.merging.quantised.sums import PIECE_BYTES, Found, Owners, Stripe, Survival, measure, nothing
from safepatch_core.merging.recipe import NOT_LINEAR
from safepatch_core.spec import ITEMSIZE, Dtype

# Bytes per entry of a stripe: both sides as stored, in float32 and as sizes; and in each thread, where to look.
STRIPE_BYTES, THREAD_BYTES = 34, 10
# Bytes of tensors that are compared and not quantised.
PLAIN_BYTES = 1 << 20
Progress = Callable[[int, int], None]


@dataclass
class Share:
    """What one format leaves of the whole change, or of one patch: in all, and of each tensor that it changes."""

    total: Survival = field(default_factory=Survival)
    tensors: dict[str, Survival] = field(default_factory=dict)

    def add(self, tensor: str, found: Survival) -> None:
        if found.entries:
            self.total += found
            self.tensors[tensor] = found

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**self.total.facts(), "tensors": {name: of.facts() for name, of in self.tensors.items()}}


@dataclass
class FormatResult:
    """What one format leaves.

    Attributes:
        whole: of the whole change.
        patches: of each patch, over the entries that it alone selected; empty where patches aren't told apart.
        elsewhere: codes that change where the merge left the entry alone, since the scale of its block does.
        unfit: tensors that the merge changed and the format doesn't take: their rows don't come out even in groups.
    """

    whole: Share
    patches: dict[str, Share]
    elsewhere: int = 0
    unfit: list[str] = field(default_factory=list)

    def add(self, tensor: str, found: Found) -> None:
        self.whole.add(tensor, found.whole)
        for share, of in zip(self.patches.values(), found.patches, strict=True):
            share.add(tensor, of)
        self.elsewhere += found.elsewhere

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        patches = {name: share.facts() for name, share in self.patches.items()}
        return {"whole": self.whole.facts(), "patches": patches, "elsewhere": self.elsewhere, "unfit": self.unfit}


@dataclass
class SurviveResult:
    """What later quantisations would leave of a merge.

    Attributes:
        formats: by name.
        floats: tensors that the merge changed and a quantisation leaves alone: embeddings, the head, norms, biases.
        notes: what is worth a line.
    """

    formats: dict[str, FormatResult]
    floats: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        formats = {name: of.facts() for name, of in self.formats.items()}
        return {"formats": formats, "floats": self.floats, "notes": self.notes}


class Comparison:
    """Takes tensors in any order; `result` has them in the base's."""

    def __init__(
        self,
        old: Checkpoint,
        new: Checkpoint,
        formats: dict[str, Format],
        patches: Sequence[str],
        *,
        files: Inputs,
        pool: ThreadPoolExecutor,
        threads: int,
        room: int,
        progress: Progress | None,
    ) -> None:
        self._old, self._new, self._formats, self._patches = old, new, formats, patches
        self._files, self._pool, self._threads, self._room, self._progress = files, pool, threads, room, progress
        self._total, self._done = sum(entry.nbytes for entry in old.tensors.values()), 0
        self._found: dict[str, dict[str, Found]] = {}
        self._differing: set[str] = set()  # tensors that differ, of those that not every format takes

    def result(self) -> SurviveResult:
        """Raises InputError where the two don't differ."""
        shares = {name: {patch: Share() for patch in self._patches} for name in self._formats}
        result = SurviveResult({name: FormatResult(Share(), shares[name]) for name in self._formats})
        for name, entry in self._old.tensors.items():
            found = self._found.get(name, {})
            for format, leaves in found.items():
                result.formats[format].add(name, leaves)
            if name in self._differing:
                unfit = [of.unfit for format, of in result.formats.items() if format not in found]
                for names in unfit if _is_quantised(entry) else [result.floats]:
                    names.append(name)
        if not self._differing and not any(of.whole.tensors for of in result.formats.values()):
            raise InputError("the two do not differ: there is no change to lose", file=self._new.ref)
        return result

    def add(self, entry: TensorEntry, owners: Owners | None = None) -> None:
        """Compare one tensor.

        Args:
            entry: the base's.
            owners: of the entries that differ, in their order, which patch they belong to. Where there is one patch,
                all are its own; else they are nobody's by default.
        """
        takes = {n: f for n, f in self._formats.items() if _is_quantised(entry) and f.takes(entry.shape[-1])}
        if takes:
            self._found[entry.name] = self._measured(entry, takes, owners)
        if len(takes) < len(self._formats) and self._differs(entry):
            self._differing.add(entry.name)
        self._done += entry.nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _measured(self, entry: TensorEntry, formats: dict[str, Format], owners: Owners | None) -> dict[str, Found]:
        """What each format leaves: matrix by matrix, as experts may be stacked, and stripe by stripe."""
        rows, cols = entry.shape[-2:]
        step = cols * self._rows(entry, min(rows, max(format.rows for format in formats.values())))
        found = {name: nothing(len(self._patches)) for name in formats}
        for at in range(0, entry.entries, rows * cols):
            ranges = [(at + lo, at + hi) for lo, hi in _ranges(rows * cols, step)]
            whole = any(format.of_the_whole for format in formats.values())
            highest = self._highest(entry, ranges) if whole else (0.0, 0.0)
            for lo, hi in ranges:
                owners = self._measure(self._stripe(entry, lo, hi, highest), owners, formats, found)
        return found

    def _measure(
        self, stripe: Stripe, owners: Owners | None, formats: dict[str, Format], found: dict[str, Found]
    ) -> Owners | None:
        """Add one stripe to what was found; the owners that are left for the next."""
        count = int(np.count_nonzero(stripe.differs))
        if len(self._patches) == 1:
            stripe.owners = np.zeros(count, np.uint8)
        elif owners is not None:
            stripe.owners, owners = owners[:count], owners[count:]
        if count or stripe.highest[0] != stripe.highest[1]:
            of_each = partial(measure, stripe, len(self._patches))
            for total, left in zip(found.values(), self._pool.map(of_each, formats.values()), strict=True):
                total += left
        return owners

    def _rows(self, entry: TensorEntry, unit: int) -> int:
        """How many rows are read together: a multiple of `unit`, where a block begins in every format."""
        bytes_of_unit = unit * entry.shape[-1] * (STRIPE_BYTES + THREAD_BYTES * self._threads)
        room = self._room - self._threads * PIECE_BYTES
        if room < bytes_of_unit:
            raise UsageError(
                f"--memory-limit is too small for {unit} rows of '{entry.name}'",
                expected=f"{-(-(bytes_of_unit - room) // (1 << 20))} MiB more, or fewer --threads",
            )
        return int(room // bytes_of_unit * unit)

    def _stripe(self, entry: TensorEntry, lo: int, hi: int, highest: tuple[float, float]) -> Stripe:
        width, cols = ITEMSIZE[entry.dtype], entry.shape[-1]
        sides = [self._read(of, lo * width, hi * width).view(f"<u{width}") for of in self._both(entry)]
        old, new = (to_float32(Bits(side, _dtype(entry))).reshape(-1, cols) for side in sides)
        sizes = (np.abs(old), np.abs(new))
        for of, size in zip(self._both(entry), sizes, strict=True):
            if not np.isfinite(size.max()):
                raise InputError("holds NaN or infinity, which have no code", file=of.path, tensor=of.name)
        return Stripe(old, new, sizes, (sides[0] != sides[1]).reshape(-1, cols), _dtype(entry), highest)

    def _highest(self, entry: TensorEntry, ranges: Sequence[tuple[int, int]]) -> tuple[float, float]:
        """The largest size on each side."""
        found = [0.0, 0.0]
        for lo, hi in ranges:
            sizes = self._stripe(entry, lo, hi, (0.0, 0.0)).sizes
            found = [max(top, float(size.max())) for top, size in zip(found, sizes, strict=True)]
        return found[0], found[1]

    def _differs(self, entry: TensorEntry) -> bool:
        old, new = self._both(entry)
        return any(
            not np.array_equal(self._read(old, lo, hi), self._read(new, lo, hi))
            for lo, hi in _ranges(entry.nbytes, PLAIN_BYTES)
        )

    def _both(self, entry: TensorEntry) -> tuple[TensorEntry, TensorEntry]:
        return entry, self._new.tensors[entry.name]

    def _read(self, entry: TensorEntry, lo: int, hi: int) -> NDArray[np.uint8]:
        data = np.empty(hi - lo, np.uint8)
        self._files.read(entry, lo, data)
        return data


def _is_quantised(entry: TensorEntry) -> bool:
    """Whether quantisation takes a tensor: the weight of a linear layer, or of several that are stacked."""
    named_apart = any(part in entry.name for part in NOT_LINEAR)
    return entry.dtype in ITEMSIZE and len(entry.shape) >= 2 and entry.entries > 0 and not named_apart


def _dtype(entry: TensorEntry) -> Dtype:
    return cast(Dtype, entry.dtype)


def _ranges(size: int, step: int) -> Iterator[tuple[int, int]]:
    return ((lo, min(lo + step, size)) for lo in range(0, size, step))
