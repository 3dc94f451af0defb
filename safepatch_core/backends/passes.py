"""How a block goes through a GPU: an arena carved into tables and slots, and sweeps over the block's parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from dataclasses import replace as change
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from safepatch_core.backends.contract import (
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
from safepatch_core.backends.device import Device
from safepatch_core.errors import UsageError
from safepatch_core.kernels import score as columns
from safepatch_core.kernels.apply import apply
from safepatch_core.kernels.faults import faults
from safepatch_core.kernels.launch import ALIGN, BLOCK, COPIES, HISTOGRAMS, Launch, padded
from safepatch_core.kernels.score import Form, Piece, Variant, score_keys
from safepatch_core.kernels.select import WINDOW_FIELDS, count_equal, fold, histogram
from safepatch_core.spec import EVERY, KEEP_ALL, NO_KEY

LINE = 256  # bytes; device copies are fastest between multiples of it
PIECE = 1 << 21  # entries; copying 4 MB takes many times what it costs to start a copy
TYPES = {"F32": torch.uint32, "F16": torch.uint16, "BF16": torch.uint16}
FIELDS, COUNTS, ENDING = columns.FIELDS.value, columns.COUNTS.value, columns.ENDING.value

Launches = Callable[[Piece, torch.Tensor], Iterable[Launch]]


def line(nbytes: int) -> int:
    """So many bytes, filled up to LINE."""
    return -(-nbytes // LINE) * LINE


class Arena:
    """Memory, allocated once: taken from the front, given back all at once. `room` of it is an arena of its own."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._used = 0

    def room(self, start: int, nbytes: int) -> Arena:
        return Arena(self._memory[start : start + nbytes])

    @property
    def nbytes(self) -> int:
        return len(self._memory)

    @property
    def left(self) -> int:
        return len(self._memory) - self._used

    @property
    def taken(self) -> torch.Tensor:
        return self._memory[: self._used]

    def reset(self) -> None:
        self._used = 0

    def take(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """An uninitialised tensor, aligned to LINE. Raises UsageError where the limit doesn't allow it."""
        start = self._used
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self._used += line(nbytes)
        if self._used > len(self._memory):
            raise UsageError(
                "--vram-limit is too small for this merge",
                found=f"{len(self._memory)} bytes",
                expected=f"{self._used} or more",
            )
        return self._memory[start : start + nbytes].view(dtype).view(shape)


@dataclass(frozen=True)
class Part:
    """Entries [lo, hi) of a block. Buffers begin `head` entries before them, at index `first` of the tensor."""

    lo: int
    hi: int
    first: int
    head: int


def cut_up(start: int, entries: int, capacity: int) -> list[Part]:
    """Parts whose buffers hold `capacity` entries, a multiple of ALIGN, and begin at multiples of ALIGN."""
    end = start + entries if entries else 0
    return [
        Part(max(first, start) - start, min(first + capacity, end) - start, first, max(first, start) - first)
        for first in range(start - start % ALIGN, end, capacity)
    ]


@dataclass
class Slot:
    """Room for one part on the device: its inputs, its output, and the events that guard them."""

    base: torch.Tensor
    values: tuple[Any, ...]  # per patch: entries, or the LoRA factors, which all slots share
    scores: tuple[torch.Tensor | None, ...]
    out: torch.Tensor
    loaded: Any  # the inputs are there
    used: Any  # the kernels are done with the inputs, and the output is there
    drained: Any  # the output has left
    holds: int | None = None  # the part whose inputs are here


@dataclass(frozen=True)
class Streams:
    """Uploads, kernels and downloads each have a queue of their own."""

    up: Any
    work: Any
    down: Any


class Call:
    """One call's share of the device, and the sweeps over its block.

    windows, bins: what one sweep counts at most; select: whether ties and keys will be asked for; piece: entries of a
    slot where not PIECE; skips: of which patches cuts leave the best out.

    At least three slots are made (unless the block is shorter), and as many more as fit: sweeps
    after the first send only what the slots don't hold any more. Every other sweep runs backwards, where it finds the
    most of it.
    """

    def __init__(
        self,
        device: Device,
        arena: Arena,
        streams: Streams,
        block: Block,
        windows: int,
        bins: int,
        select: bool,
        piece: int | None = None,
        skips: Sequence[bool] = (),
    ) -> None:
        self._device, self._streams, self._block = device, streams, block
        self._longest = piece or PIECE
        self._present = present(block)
        self._plan = variant_of(block, skips)
        patches = len(self._present)
        self._aligned: int = block.start - block.start % ALIGN
        blocks = padded(block.start - self._aligned + len(block)) // BLOCK if len(block) else 0

        arena.reset()
        self._table = arena.take(torch.int64, patches, FIELDS)
        self._tally = arena.take(torch.int64, COPIES, patches * COUNTS + ENDING)
        self._windows = arena.take(torch.int64, windows, WINDOW_FIELDS.value)
        self._copies = arena.take(torch.int64, HISTOGRAMS, bins)
        self._counts = arena.take(torch.int64, bins)
        self._ties = arena.take(torch.int32, patches, blocks if select else 0)
        self._keys = arena.take(torch.uint32, patches, BLOCK if select else 0)
        factors = [self._factors(arena, patch.values) for _, patch in self._present]
        self._slots, capacity = self._make_slots(arena, factors, blocks)
        self._parts = cut_up(block.start, len(block), capacity) if self._present else []
        self._backwards = False

    def _factors(self, arena: Arena, values: Bits | Lora) -> tuple[torch.Tensor, torch.Tensor] | None:
        if isinstance(values, Bits):
            return None
        a, b = arena.take(torch.float32, *values.a.shape), arena.take(torch.float32, *values.b.shape)
        self._upload(self._streams.work, a, values.a)
        self._upload(self._streams.work, b, values.b)
        return a, b

    def _make_slots(self, arena: Arena, factors: Sequence[Any], blocks: int) -> tuple[list[Slot], int]:
        """A ring for a block of so many times BLOCK entries, and the entries of one slot."""
        base = TYPES[self._plan.dtype]
        values = [TYPES[form.values] if form.values else None for form in self._plan.patches]
        scores = [TYPES[form.scores] if form.scores else None for form in self._plan.patches]
        row = BLOCK * sum(t.itemsize for t in (base, base, *values, *scores) if t is not None)
        if row * min(blocks, 3) > arena.left:
            arena.take(torch.uint8, row * min(blocks, 3))
        fit = arena.left // row
        length = max(min(self._longest // BLOCK, blocks), 1)
        if length * min(-(-blocks // length), 3) > fit:
            length = fit // 3
        event = self._device.event

        def take(dtype: torch.dtype | None) -> torch.Tensor | None:
            return None if dtype is None else arena.take(dtype, length * BLOCK)

        def slot() -> Slot:
            inputs = [f or take(t) for f, t in zip(factors, values, strict=True)]
            out = arena.take(base, length * BLOCK)
            return Slot(
                arena.take(base, length * BLOCK), tuple(inputs), tuple(map(take, scores)), out,
                event(), event(), event(),
            )  # fmt: skip

        return [slot() for _ in range(min(-(-blocks // length), fit // length))], length * BLOCK

    def _upload(self, stream: Any, target: torch.Tensor, source: NDArray[Any]) -> None:
        if source.nbytes:
            self._device.upload(stream, target.view(-1).view(torch.uint8), source)

    def _fetch(self, source: torch.Tensor) -> NDArray[Any]:
        """What the kernels have left in a tensor, once all of them are done."""
        found = np.empty(tuple(source.shape), dtype=str(source.dtype).removeprefix("torch."))
        if found.nbytes:
            self._device.download(self._streams.work, found, source.view(-1).view(torch.uint8))
        self._device.synchronize()
        return found

    def prepare(self, cuts: Sequence[Cut]) -> None:
        """Set what the next sweeps know of each patch of the block, and forget what was counted."""
        self._upload(self._streams.work, self._table, table_of(self._block, cuts))
        self._device.clear(self._streams.work, self._tally)

    def sweep(
        self,
        launches: Launches,
        out: NDArray[np.unsignedinteger] | None = None,
        only: Sequence[int] | None = None,
    ) -> None:
        """Take the block's parts (or only those) through the slots; `launches` says what to run on each."""
        device, streams = self._device, self._streams
        order = range(len(self._parts)) if only is None else only
        for index in reversed(order) if self._backwards else order:
            part, slot = self._parts[index], self._slots[index % len(self._slots)]
            if slot.holds != index:
                device.wait(streams.up, slot.used)
                self._load(part, slot)
                device.record(slot.loaded, streams.up)
                slot.holds = index
            device.wait(streams.work, slot.loaded)
            device.wait(streams.work, slot.drained)
            for launch in launches(self._piece(part, slot), slot.out):
                device.launch(streams.work, launch)
            device.record(slot.used, streams.work)
            if out is not None:
                device.wait(streams.down, slot.used)
                left = slot.out[part.head : part.head + part.hi - part.lo]
                device.download(streams.down, out[part.lo : part.hi], left.view(torch.uint8))
                device.record(slot.drained, streams.down)
        self._backwards = not self._backwards

    def _load(self, part: Part, slot: Slot) -> None:
        def load(target: torch.Tensor | None, bits: Bits | None) -> None:
            if target is not None and bits is not None:
                piece = target[part.head : part.head + part.hi - part.lo]
                self._upload(self._streams.up, piece, bits.data[part.lo : part.hi])

        load(slot.base, self._block.base)
        for (_, patch), values, scores in zip(self._present, slot.values, slot.scores, strict=True):
            if isinstance(patch.values, Bits):
                load(values, patch.values)
            load(scores, patch.scores)

    def _piece(self, part: Part, slot: Slot) -> Piece:
        return Piece(
            plan=self._plan,
            base=slot.base,
            values=slot.values,
            scores=slot.scores,
            table=self._table,
            tally=self._tally,
            first=part.first,
            head=part.head,
            count=part.hi - part.lo,
            cols=self._block.cols,
        )

    def histogram(self, windows: Sequence[Sequence[Window]], *, tell: bool = True) -> None:
        """Add to the counts of the windows: `windows[p]` are those of the block's patch p. `tell` faults apart."""
        flat = [(i, window) for i, (p, _) in enumerate(self._present) for window in windows[p]]
        owners = tuple(i for i, _ in flat)
        ends = np.cumsum([len(window.counts) for _, window in flat], dtype=np.int64)
        rows = [
            (window.lo, window.shift, len(window.counts), end - len(window.counts))
            for (_, window), end in zip(flat, ends, strict=True)
        ]
        bins = int(ends[-1]) if flat else 0
        table = self._windows[: len(flat)]
        copies, counts = self._copies.view(-1)[: HISTOGRAMS * bins].view(HISTOGRAMS, bins), self._counts[:bins]
        self._upload(self._streams.work, table, np.array(rows, dtype=np.int64).reshape(-1, 4))
        self._device.clear(self._streams.work, copies)

        def launches(piece: Piece, _: torch.Tensor) -> Iterable[Launch]:
            yield histogram(piece, table, owners, copies)
            if tell:
                yield faults(piece)

        self.sweep(launches)
        if flat:
            self._device.launch(self._streams.work, fold(copies, counts))
            for (_, window), part in zip(flat, np.split(self._fetch(counts), ends[:-1]), strict=True):
                window.counts[:] += part

    def count_equal(self) -> list[NDArray[np.int32]]:
        """Per patch of the block and segment of BLOCK entries, how many have the key of the patch's cut."""

        def launches(piece: Piece, _: torch.Tensor) -> Iterable[Launch]:
            yield count_equal(piece, self._ties[:, (piece.first - self._aligned) // BLOCK :])

        self.sweep(launches)
        return self._by_patch(self._fetch(self._ties))

    def start_of(self, segment: int) -> int:
        """The index in the tensor of a segment's first entry; the block may begin after it."""
        return self._aligned + segment * int(BLOCK)

    def keys(self, segment: int) -> list[NDArray[np.uint32]]:
        """Per patch of the block, the keys of one segment of BLOCK entries, 0 where not eligible or outside."""
        first = self.start_of(segment)
        part = next(i for i, part in enumerate(self._parts) if part.first + part.head + part.hi - part.lo > first)

        def launches(piece: Piece, _: torch.Tensor) -> Iterable[Launch]:
            yield score_keys(_segment(piece, first - piece.first), self._keys)

        self.sweep(launches, only=[part])
        return self._by_patch(self._fetch(self._keys))

    def _by_patch(self, rows: NDArray[Any]) -> list[NDArray[Any]]:
        """A row per patch of the block from rows of those present; zeros for the others."""
        found = [np.zeros(rows.shape[1:], dtype=rows.dtype) for _ in self._block.patches]
        for (p, _), row in zip(self._present, rows, strict=True):
            found[p] = row
        return found

    def apply(self, out: NDArray[np.unsignedinteger]) -> None:
        """Write the block's new bits."""
        if not self._present:
            out[:] = self._block.base.data
        self.sweep(lambda piece, result: (apply(piece, result), faults(piece)), out)

    def report(self) -> Report:
        """What was counted since `prepare`."""
        return report_of(self._block, self._fetch(self._tally))


def present(block: Block) -> list[tuple[int, PatchData]]:
    """The patches that have something for a block, and their numbers: a row of every table is one of these."""
    return [(p, patch) for p, patch in enumerate(block.patches) if patch is not None]


def variant_of(block: Block, skips: Sequence[bool] = ()) -> Variant:
    """What the code for a block depends on; skips: of which patches cuts leave the best out."""
    forms = tuple(
        Form(
            patch.kind,
            patch.values.dtype if isinstance(patch.values, Bits) else "",
            patch.importance,
            "" if patch.scores is None or patch.importance == "magnitude" else patch.scores.dtype,
            patch.weight,
            patch.keep < KEEP_ALL,
            bool(skips) and skips[p],
        )
        for p, patch in present(block)
    )
    return Variant(block.base.dtype, forms, int(block.rule.acts), int(block.rule.join), block.order)


def table_of(block: Block, cuts: Sequence[Cut]) -> NDArray[np.int64]:
    """The patch table of a block."""
    rows = present(block)
    table = np.zeros((len(rows), FIELDS), dtype=np.int64)
    for row, (p, patch) in zip(table, rows, strict=True):
        row[columns.RANDOM_KEY.value] = np.uint64(patch.random_key).astype(np.int64)
        row[columns.KEEP.value] = patch.keep
        row[columns.SCALE.value] = np.float32(patch.scale).view(np.uint32)
        row[columns.CUT.value], row[columns.BEFORE.value] = cuts[p].key, cuts[p].before
        row[columns.SKIP.value] = cuts[p].skip_key or NO_KEY
        row[columns.SKIP_BEFORE.value] = cuts[p].skip_before
        row[columns.LAMBDA.value] = np.float32(block.lambda_).view(np.uint32)
        if isinstance(patch.values, Lora):
            row[columns.LORA_SCALE.value] = np.float32(patch.values.scale).view(np.uint32)
            row[columns.RANK.value] = len(patch.values.a)
    return table


def cuts_of(block: Block, table: NDArray[np.int64]) -> list[Cut]:
    """The cuts of a block's patch table."""
    cuts = [SELECT_NONE for _ in block.patches]
    for row, (p, _) in zip(table, present(block), strict=True):
        skip = int(row[columns.SKIP.value])
        found = (int(row[c.value]) for c in (columns.CUT, columns.BEFORE, columns.SKIP_BEFORE))
        key, before, skip_before = found
        cuts[p] = Cut(key, before, skip if skip != NO_KEY else 0, skip_before)
    return cuts


def report_of(block: Block, tally: NDArray[np.int64]) -> Report:
    """What the kernels have counted in a tally."""
    sums, latest = tally.sum(axis=0), tally.max(axis=0)

    def fault(count: int, after: int) -> Fault:
        return Fault(int(sums[count]), EVERY - int(latest[after])) if sums[count] else Fault()

    report = Report([PatchReport() for _ in block.patches])
    rows = present(block)
    for i, (p, _) in enumerate(rows):
        at = i * COUNTS
        eligible, selected, applied = (
            int(sums[at + c.value]) for c in (columns.ELIGIBLE, columns.SELECTED, columns.APPLIED)
        )
        bad = (
            fault(at + c.value, at + c.value + columns.FIRST.value)
            for c in (columns.BAD_DELTA, columns.BAD_SCORE, columns.NEGATIVE)
        )
        report.patches[p] = PatchReport(eligible, selected, applied, *bad)
    ending = len(rows) * COUNTS
    report.overflow = fault(ending + columns.OVERFLOW.value, ending + columns.OVERFLOW.value + 1)
    report.acted = int(sums[ending + columns.ACTED.value])
    report.changed = int(sums[ending + columns.CHANGED.value])
    return report


def _segment(piece: Piece, at: int) -> Piece:
    """The BLOCK entries of a piece's buffers from `at` on."""

    def cut(buffer: Any) -> Any:
        return buffer[at : at + BLOCK] if isinstance(buffer, torch.Tensor) else buffer

    head = max(piece.head - at, 0)
    return change(
        piece,
        base=cut(piece.base),
        values=tuple(map(cut, piece.values)),
        scores=tuple(map(cut, piece.scores)),
        first=piece.first + at,
        head=head,
        count=min(piece.head + piece.count - at, BLOCK) - head,
    )
