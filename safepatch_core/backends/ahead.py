"""Tensors begun ahead: all that one takes is queued at once, the next one's behind it, and nobody waits between.

A tensor whose entries fit the device's memory is decided there (`kernels/decide.py`): uploads, sweeps, decisions,
`apply` and downloads follow each other by streams and events, and what the host is told (cuts, counts) comes with the
bits. Small tensors go together, as one upload, one launch per kernel and one download of the bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from safepatch_core.backends.contract import SELECT_ALL, SELECT_NONE, Bits, Block, Cut, Lora, Report, Window
from safepatch_core.backends.counting import Sweep, Told, Windows, flat, nbytes_of, starts
from safepatch_core.backends.device import Device, as_tensor
from safepatch_core.backends.passes import (
    COUNTS,
    ENDING,
    FIELDS,
    LINE,
    PIECE,
    TYPES,
    Arena,
    Part,
    Streams,
    cut_up,
    cuts_of,
    line,
    present,
    report_of,
    table_of,
    variant_of,
)
from safepatch_core.backends.select import COARSE, FINE, LOW_BITS
from safepatch_core.kernels import score as columns
from safepatch_core.kernels.apply import apply
from safepatch_core.kernels.decide import SEARCH_FIELDS, WANTED, cut, narrow, settle, without
from safepatch_core.kernels.faults import faults
from safepatch_core.kernels.launch import ALIGN, BLOCK, COPIES, HISTOGRAMS, Launch, padded
from safepatch_core.kernels.score import Piece, Variant
from safepatch_core.kernels.select import WINDOW_FIELDS, count_equal, fold, histogram

SMALL = 1 << 16  # entries of a tensor that goes with others: copying 128 KB takes little more than starting a copy
BATCH = 1 << 18  # entries of all of them, filled up to whole segments
STAGE = 8 << 20  # bytes of pinned memory for the tables, and for the small tensors' entries
PATIENCE = 3  # larger tensors that a batch lets pass before it is begun: what follows it is written after it

Found = tuple[list[Cut], Report]
Size = tuple[torch.dtype, tuple[int, ...]]
Sizes = dict[str, Size]


@dataclass(eq=False)
class Asked:
    """One tensor to be merged, by quotas or by cuts that are known, or to be counted in the windows of a sweep.

    It is `found` or `failed` in the end.
    """

    block: Block
    out: NDArray[np.unsignedinteger]  # nothing is written where it is counted
    wanted: Sequence[int] = ()  # at most as many as there are entries
    skipped: Sequence[int] = ()
    cuts: Sequence[Cut] | None = None
    windows: Windows = ()
    sweep: Sweep | None = None
    job: Job | None = None
    found: Found | None = None
    failed: BaseException | None = None

    @property
    def searching(self) -> bool:
        """Whether there is a cut that only its entries tell."""
        return self.cuts is None and any(0 < k < len(self.block) for k in (*self.wanted, *self.skipped))

    @property
    def known(self) -> Sequence[Cut]:
        """The cuts where nothing is searched."""
        if self.cuts is not None:
            return self.cuts
        return [_plain(k).without(_plain(skip)) for k, skip in zip(self.wanted, self.skipped, strict=True)]

    @cached_property
    def plan(self) -> Variant:
        skips = [k > 0 for k in self.skipped] if self.cuts is None else [c.skip_key > 0 for c in self.cuts]
        return variant_of(self.block, skips)

    @property
    def kind(self) -> object:
        """What those of one job have in common."""
        return self.plan, self.cuts is None, self.sweep, [id(window.counts) for window in flat(self.windows)]

    @property
    def head(self) -> int:
        return self.block.start % ALIGN

    @property
    def segments(self) -> int:
        return padded(self.head + len(self.block)) // BLOCK

    @property
    def small(self) -> bool:
        return self.segments * BLOCK <= SMALL and all(isinstance(p.values, Bits) for _, p in present(self.block))


def _plain(k: int) -> Cut:
    """The cut of a quota that asks for nothing, or for everything."""
    return SELECT_NONE if k == 0 else SELECT_ALL


def _nbytes(sizes: Sizes) -> int:
    return sum(line(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize) for dtype, shape in sizes.values())


def _taken(arena: Arena, sizes: Sizes) -> dict[str, torch.Tensor]:
    return {name: arena.take(dtype, *shape) for name, (dtype, shape) in sizes.items()}


class Job:
    """Tensors of one plan that are worked on together: one, or several small ones."""

    def __init__(self, asked: Sequence[Asked]) -> None:
        self.asked = asked
        first = asked[0]
        self._plan, self._searching = first.plan, any(one.searching for one in asked)
        self.sweep, self.windows = first.sweep, flat(first.windows)
        at = iter(starts(self.windows))
        rows = [[(w.lo, w.shift, len(w.counts), next(at)) for w in of] for of in first.windows]
        self._counted = [(i, row) for i, (p, _) in enumerate(present(first.block)) if rows for row in rows[p]]
        self._batched = first.small
        self._roles = 2 if self._searching and any(form.skip for form in self._plan.patches) else 1
        self._ends = np.cumsum([one.segments for one in asked]).tolist()
        self.segments: int = self._ends[-1]

    @cached_property
    def _sent(self) -> Sizes:
        """What is sent at once, laid out alike on both sides."""
        tensors, patches, integer = len(self.asked), len(self._plan.patches), torch.int64
        searches = tensors * self._roles * patches if self._searching else 0
        sizes: Sizes = {
            "table": (integer, (self._roles, tensors, patches, FIELDS)),
            "searches": (integer, (searches, SEARCH_FIELDS.value)),
            "coarse": (integer, (tensors * patches if searches else 0, WINDOW_FIELDS.value)),
            "fine": (integer, (searches, WINDOW_FIELDS.value)),
            "extents": (integer, (tensors, 2)),
            "windows": (integer, (tensors * len(self._counted), WINDOW_FIELDS.value)),
            "batch": (integer, (self.segments if self._batched else 0, columns.BATCH_FIELDS.value)),
        }
        return sizes | (self._entries if self._batched else {})

    @cached_property
    def _entries(self) -> Sizes:
        room = (self.segments * BLOCK,)
        sizes: Sizes = {"base": (TYPES[self._plan.dtype], room)}
        for p, form in enumerate(self._plan.patches):
            sizes |= {f"values {p}": (TYPES[form.values], room)} if form.values else {}
            sizes |= {f"scores {p}": (TYPES[form.scores], room)} if form.scores else {}
        return sizes

    @cached_property
    def _told(self) -> Sizes:
        """What the host is told: the tables have the cuts; a batch's bits are told apart there."""
        tensors, patches = len(self.asked), len(self._plan.patches)
        sizes: Sizes = {"tally": (torch.int64, (tensors, COPIES, patches * COUNTS + ENDING))}
        return sizes | (self._written if self._batched else {})

    @property
    def _written(self) -> Sizes:
        return {} if self.sweep else {"out": (TYPES[self._plan.dtype], (self.segments * BLOCK,))}

    @cached_property
    def _kept(self) -> Sizes:
        """What is on the device alone. Copies of histograms are for many programs at one bin."""
        tensors, patches = len(self.asked), len(self._plan.patches)
        sizes: Sizes = {} if self._batched else self._written | self._entries
        for p, (_, patch) in enumerate(present(self.asked[0].block)):
            if isinstance(patch.values, Lora):
                sizes[f"a {p}"] = torch.float32, patch.values.a.shape
                sizes[f"b {p}"] = torch.float32, patch.values.b.shape
        if self._searching:
            bins = tensors * patches * max(COARSE, self._roles * FINE)
            copies = 1 if self._batched else HISTOGRAMS + 1
            sizes["counts"] = torch.int64, (copies * bins,)
            sizes["sums"] = torch.int64, (bins // BLOCK,)
            sizes["ties"] = torch.int32, (self._roles, patches, self.segments)
        return sizes

    @property
    def device_bytes(self) -> int:
        return _nbytes(self._sent) + _nbytes(self._told) + _nbytes(self._kept)

    @property
    def host_bytes(self) -> int:
        return _nbytes(self._sent) + _nbytes(self._told | {"cuts": self._cuts})

    @property
    def _cuts(self) -> Size:
        """The tables of the first role, which end up with the cuts."""
        dtype, shape = self._sent["table"]
        return dtype, shape[1:]

    def start(self, device: Device, streams: Streams, room: Arena, stage: Arena) -> None:
        """Queue all of it."""
        self._device, self._streams = device, streams
        self.done = device.event()
        self._host, self._on = _taken(stage, self._sent), _taken(room, self._sent)
        self._fill()
        device.upload(streams.up, room.taken, stage.taken.numpy())
        self._host |= _taken(stage, self._told | {"cuts": self._cuts})
        self._on |= _taken(room, self._told | self._kept)
        parts = self._load()
        if self.sweep is not None:
            self._count(parts, self.sweep)
            return
        if self._searching:
            self._search(parts)
        self._finish(parts)

    def _fill(self) -> None:
        """Write what is sent into the stage."""
        host = {name: tensor.numpy() for name, tensor in self._host.items()}
        if self._counted:
            host["windows"][:] = [row for _ in self.asked for _, row in self._counted]
        for t, one in enumerate(self.asked):
            n, begin = len(one.block), self._ends[t] - one.segments
            cuts = [Cut(0, 0)] * len(one.block.patches) if self._searching else one.known
            host["table"][:, t] = table_of(one.block, cuts)
            host["extents"][t] = begin, one.segments
            if self._searching:
                self._ask(host, t)
            if self._batched:
                at = np.arange(one.segments) * BLOCK
                places = np.full_like(at, t), one.block.start - one.head + at, one.head - at, one.head + n - at
                host["batch"][begin : self._ends[t]] = np.stack(places, axis=1)
                for name, bits in self._inputs(one):
                    host[name][begin * BLOCK + one.head :][:n] = bits.data

    def _ask(self, host: dict[str, NDArray[Any]], t: int) -> None:
        """Write what is searched for in a tensor."""
        one, patches = self.asked[t], len(self._plan.patches)
        n, rows = len(one.block), np.arange(t * patches, (t + 1) * patches)
        asked = [[k[p] for p, _ in present(one.block)] for k in (one.wanted, one.skipped)[: self._roles]]
        bins = np.any([[0 < k < n for k in role] for role in asked], axis=0) * COARSE
        host["coarse"][rows] = [(0, LOW_BITS, of, row * COARSE) for row, of in zip(rows, bins, strict=True)]
        searches = np.arange(t * self._roles * patches, (t + 1) * self._roles * patches)
        host["searches"][searches] = 0
        host["searches"][searches, WANTED.value] = np.ravel(asked)
        host["fine"][searches] = [(0, 0, 0, search * FINE) for search in searches]

    def _inputs(self, one: Asked) -> list[tuple[str, Bits]]:
        found = [("base", one.block.base)]
        for i, (form, (_, patch)) in enumerate(zip(self._plan.patches, present(one.block), strict=True)):
            found += [(f"values {i}", patch.values)] if isinstance(patch.values, Bits) else []
            found += [(f"scores {i}", patch.scores)] if form.scores and patch.scores else []
        return found

    def _load(self) -> list[tuple[Part, Any]]:
        """Send the entries, part by part; with each, the event that it is there."""
        device, up = self._device, self._streams.up
        one = self.asked[0]
        n = len(one.block)
        if self._batched:
            loaded = device.event()
            device.record(loaded, up)
            return [(Part(0, self.segments * BLOCK, 0, 0), loaded)]
        for i, (_, patch) in enumerate(present(one.block)):
            if isinstance(patch.values, Lora):
                self._upload(self._on[f"a {i}"], patch.values.a)
                self._upload(self._on[f"b {i}"], patch.values.b)
        parts = []
        for part in cut_up(one.block.start, n, max(PIECE // BLOCK, 1) * BLOCK):
            for name, bits in self._inputs(one):
                self._upload(self._on[name][one.head + part.lo : one.head + part.hi], bits.data[part.lo : part.hi])
            loaded = device.event()
            device.record(loaded, up)
            parts.append((part, loaded))
        return parts

    def _upload(self, target: torch.Tensor, source: NDArray[Any]) -> None:
        if source.nbytes:
            self._device.upload(self._streams.up, target.view(-1).view(torch.uint8), source)

    def _piece(self, part: Part | None = None, role: int = 0) -> Piece:
        """A part of the entries, by default all of them, with the tables of a role."""
        one = self.asked[0]
        first, head, count = one.block.start - one.head, one.head, len(one.block)
        if self._batched:
            first, head, count = 0, 0, self.segments * BLOCK
        elif part is not None:
            first, head, count = part.first, part.head, part.hi - part.lo
        at = 0 if part is None or self._batched else part.first - (one.block.start - one.head)

        def entries(name: str) -> Any:
            return self._on[name][at : at + padded(head + count)] if name in self._on else None

        values = [
            entries(f"values {p}") if form.values else (self._on[f"a {p}"], self._on[f"b {p}"])
            for p, form in enumerate(self._plan.patches)
        ]
        return Piece(
            plan=self._plan,
            base=entries("base"),
            values=tuple(values),
            scores=tuple(entries(f"scores {p}") for p in range(len(values))),
            table=self._on["table"][role],
            tally=self._on["tally"],
            first=first,
            head=head,
            count=count,
            cols=one.block.cols,
            batch=self._on["batch"] if self._batched else None,
        )

    def _launch(self, launch: Launch) -> None:
        self._device.launch(self._streams.work, launch)

    def _histograms(self, bins: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies for so many bins, empty, and their sums; a single copy is its own sum."""
        memory = self._on["counts"]
        copies = memory[: bins * (1 if self._batched else HISTOGRAMS)].view(-1, bins)
        self._device.clear(self._streams.work, copies)
        return copies, memory[-bins:] if not self._batched else copies[0]

    def _search(self, parts: Sequence[tuple[Part, Any]]) -> None:
        """Find the cuts, and leave them in the table."""
        on, roles, tensors, patches = self._on, self._roles, len(self.asked), len(self._plan.patches)
        copies, total = self._histograms(tensors * patches * COARSE)
        self._device.clear(self._streams.work, on["tally"])
        for part, loaded in parts:
            self._device.wait(self._streams.work, loaded)
            self._launch(histogram(self._piece(part), on["coarse"], tuple(range(patches)), copies))
        self._launch(fold(copies, total, on["sums"]))
        self._launch(narrow(total, on["sums"], on["searches"], on["fine"], patches, roles))
        copies, total = self._histograms(tensors * roles * patches * FINE)
        self._launch(histogram(self._piece(), on["fine"], tuple(range(patches)) * roles, copies))
        self._launch(fold(copies, total, on["sums"]))
        self._launch(settle(total, on["sums"], on["searches"], on["fine"], on["table"]))
        for role in range(roles):
            self._launch(count_equal(self._piece(role=role), on["ties"][role]))
        self._launch(cut(self._piece(), on["searches"], on["ties"], on["extents"], on["table"]))
        if roles > 1:
            self._launch(without(on["table"]))

    def _count(self, parts: Sequence[tuple[Part, Any]], sweep: Sweep) -> None:
        """Count the keys among those of the sweep, and bring what else was found."""
        device, work, owners = self._device, self._streams.work, tuple(i for i, _ in self._counted)
        for memory in (self._on["tally"], *sweep.fresh):
            device.clear(work, memory)
        for part, loaded in parts:
            device.wait(work, loaded)
            piece = self._piece(part)
            self._launch(histogram(piece, self._on["windows"], owners, sweep.copies))
            self._launch(faults(piece))
        self._download_after_kernels()
        self._tell({"tally": self._on["tally"]})

    def _finish(self, parts: Sequence[tuple[Part, Any]]) -> None:
        """Write the new bits and bring them, then what was counted and decided."""
        device, work, down = self._device, self._streams.work, self._streams.down
        one = self.asked[0]
        device.clear(work, self._on["tally"])
        for part, loaded in parts:
            device.wait(work, loaded)
            piece = self._piece(part)
            at = 0 if self._batched else part.first - (one.block.start - one.head)
            out = self._on["out"][at : at + padded(piece.head + piece.count)]
            self._launch(apply(piece, out))
            self._launch(faults(piece))
            self._download_after_kernels()
            if not self._batched:
                left = out[part.head : part.head + part.hi - part.lo]
                device.download(down, one.out[part.lo : part.hi], left.view(torch.uint8))
        self._tell({"cuts": self._on["table"][0], **{name: self._on[name] for name in self._told}})

    def _download_after_kernels(self) -> None:
        used = self._device.event()
        self._device.record(used, self._streams.work)
        self._device.wait(self._streams.down, used)

    def _tell(self, found: dict[str, torch.Tensor]) -> None:
        for name, source in found.items():
            self._device.download(self._streams.down, self._host[name].numpy(), source.view(-1).view(torch.uint8))
        self._device.record(self.done, self._streams.down)

    def collect(self) -> None:
        """Wait until it is done, and tell."""
        self._device.finish(self.done)
        host = {name: self._host[name].numpy() for name in ("cuts", *self._told)}
        for t, one in enumerate(self.asked):
            if self._batched and self.sweep is None:
                begin = (self._ends[t] - one.segments) * BLOCK + one.head
                one.out[:] = host["out"][begin : begin + len(one.block)]
            cuts = cuts_of(one.block, host["cuts"][t]) if self.sweep is None else []
            one.found = cuts, report_of(one.block, host["tally"][t])

    @property
    def happened(self) -> bool:
        return self._device.happened(self.done)


class Rooms:
    """Places in a memory that is used round and round: taken and given back in order."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._live: deque[tuple[int, int]] = deque()

    def place(self, nbytes: int) -> int | None:
        """Where so many bytes may lie now; None where something must be given back before."""
        if not self._live:
            return 0 if nbytes <= self.nbytes else None
        oldest, tail = self._live[0][0], self._live[-1][1]
        if self._live[-1][0] < oldest:
            return tail if oldest - tail >= nbytes else None
        if self.nbytes - tail >= nbytes:
            return tail
        return 0 if oldest >= nbytes else None

    def take(self, start: int, nbytes: int) -> None:
        self._live.append((start, start + nbytes))

    def give(self) -> None:
        self._live.popleft()


class Ahead:
    """The jobs under way, in order, the batch that is being put together, and the sweep whose counts the device has.

    These lie at the memory's end; jobs have the rest.
    """

    def __init__(self, device: Device, arena: Arena, streams: Streams) -> None:
        self._device, self._arena, self._streams = device, arena, streams
        self._pinned = device.pinned(STAGE)
        self._rooms, self._stages = Rooms(arena.nbytes), Rooms(STAGE)
        self._jobs: deque[Job | Told] = deque()
        self._open: list[Asked] = []
        self._passed = 0  # larger tensors since the batch was opened
        self._sweep: Sweep | None = None

    def begin(self, asked: Asked) -> bool:
        """Queue a tensor; False where it doesn't fit the device's memory."""
        if asked.sweep is not None and not self._open_sweep(asked.sweep, flat(asked.windows)):
            return False
        alone = Job([asked])
        if alone.device_bytes > self._rooms.nbytes or alone.host_bytes > STAGE:
            return False
        if not asked.small:
            if asked.sweep is not None:
                self.flush()  # a tensor's windows come and go once
            self._start(alone)
            self._passed += bool(self._open)
            if self._passed >= PATIENCE:
                self.flush()
            return True
        if self._open and not self._goes_with(asked):
            self.flush()
        self._open.append(asked)
        return True

    def _open_sweep(self, sweep: Sweep, windows: Sequence[Window]) -> bool:
        """Have room for the counts of these windows; False where there is none."""
        wanted = line(nbytes_of(windows))
        if sweep is self._sweep and sweep.copies.nbytes >= wanted:
            return True
        self.drain()
        left = (self._arena.nbytes - wanted) // LINE * LINE
        if left < 0 or max((w.counts.nbytes for w in windows), default=0) > min(left, STAGE):
            return False
        self._sweep, self._rooms = sweep, Rooms(left)
        sweep.take(self._arena.room(left, wanted))
        return True

    def _tell(self, sweep: Sweep, windows: Sequence[Window] = ()) -> None:
        """Go on with these windows; begin to bring the counts of the others."""
        for told in sweep.go_on(windows):
            self._queue(told)

    def _goes_with(self, asked: Asked) -> bool:
        """Whether a tensor has room in the open batch: a third of what there is, so that others are under way."""
        if self._open[0].kind != asked.kind:
            return False
        more = Job([*self._open, asked])
        fits = more.device_bytes <= self._rooms.nbytes // 3 and more.host_bytes <= STAGE // 3
        return fits and more.segments * BLOCK <= BATCH

    def flush(self) -> None:
        """Begin the batch that is open."""
        asked, self._open, self._passed = self._open, [], 0
        if asked:
            self._start(Job(asked))

    def _start(self, job: Job) -> None:
        if job.sweep is not None:
            self._tell(job.sweep, job.windows)
        self._queue(job)
        for one in job.asked:
            one.job = job

    def _queue(self, job: Job | Told) -> None:
        room, stage = self._place(self._rooms, job.device_bytes), self._place(self._stages, job.host_bytes)
        self._rooms.take(room, job.device_bytes)
        self._stages.take(stage, job.host_bytes)
        self._jobs.append(job)
        memory = Arena(as_tensor(self._pinned[stage : stage + job.host_bytes]))
        job.start(self._device, self._streams, self._arena.room(room, job.device_bytes), memory)

    def _place(self, rooms: Rooms, nbytes: int) -> int:
        while (start := rooms.place(nbytes)) is None:
            self._collect()
        return start

    def _collect(self) -> None:
        """Wait for the oldest job."""
        self._jobs[0].collect()
        self._jobs.popleft()
        self._rooms.give()
        self._stages.give()

    def wait(self, asked: Asked) -> None:
        """Wait until a tensor is found, or was given up."""
        if asked in self._open:
            self.flush()
        while asked.found is None and asked.failed is None:
            self._collect()

    def drain(self) -> None:
        """Wait for all that was begun, and for what was counted."""
        self.flush()
        if self._sweep is not None:
            self._tell(self._sweep)
        while self._jobs:
            self._collect()
        self._sweep, self._rooms = None, Rooms(self._arena.nbytes)

    def abandon(self, error: BaseException) -> None:
        """Give up what was begun; the device has been waited for."""
        for asked in (*self._open, *(one for job in self._jobs for one in job.asked)):
            asked.failed = error
        if self._sweep is not None:
            self._sweep.failed = error
        self._open, self._passed, self._sweep = [], 0, None
        self._jobs.clear()
        self._rooms, self._stages = Rooms(self._arena.nbytes), Rooms(STAGE)
