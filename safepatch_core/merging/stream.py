"""The only loop: units of the plan are read, worked on by the engine, and handed to a sink."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.codes import CodesReport
from safepatch_core.backends.contract import (
    Ahead,
    Backend,
    Bits,
    Block,
    Counting,
    Cut,
    Fault,
    Later,
    Lora,
    Notes,
    Noting,
    PatchData,
    PatchReport,
    Report,
    unread,
)
from safepatch_core.backends.select import Selection, Tally, TieCounter, counting
from safepatch_core.errors import InputError
from safepatch_core.files.disk import Extent
from safepatch_core.merging import pipeline
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.layout import OutputPart
from safepatch_core.merging.lists import Lists
from safepatch_core.merging.pipeline import Begun, Region, Ring, align, room
from safepatch_core.merging.plan import Plan
from safepatch_core.merging.quantised.writing import SCALES, Coded, Loaded, apart, load, rewrite
from safepatch_core.merging.sources.contract import Held, PatchTensor, Range
from safepatch_core.merging.sources.dense import Dense
from safepatch_core.merging.work import Target, Unit
from safepatch_core.ranks import Alone, Ranks
from safepatch_core.spec import ITEMSIZE

Counts = dict[str, Report]
Shared = dict[PatchTensor, Held]


class Sink(Protocol):
    """Takes the output in order, file by file, byte by byte."""

    def begin(self, part: OutputPart, counts: Counts) -> OutputPart | None:
        """A part of a file starts; what of it is left to write, or None if the file is complete already.

        `counts` has those of each tensor when its last byte is written.
        """

    def write(self, data: memoryview, source: Extent | None = None) -> Future[None] | None:
        """The next bytes of the part, which also lie at `source` if they are a plain copy.

        `data` is read until the future is done, if one is returned; otherwise it is not kept.
        """

    def end(self) -> None:
        """The part is complete."""


@dataclass(slots=True)
class Work:
    """A unit whose inputs are in memory. `block` is None for bytes that are only copied, from `source`.

    `cuts` are those that the patches of a target of floats were applied with.
    """

    unit: Unit
    base: NDArray[np.uint8]  # what is written
    block: Block | None
    source: Extent | None = None
    codes: Loaded | None = None  # of a target that is stored as codes, where it is about to be written
    cuts: Sequence[Cut] = ()
    notes: Notes | None = None  # an earlier look's, by which the patches were not read

    @property
    def codes_of_floats(self) -> tuple[Coded, Loaded] | None:
        """How codes are stored, and these, where the engine patches floats alone."""
        coded = None if self.unit.target is None else self.unit.target.coded
        return None if coded is None or self.codes is None or coded.direct else (coded, self.codes)


class Notebook(Protocol):
    """What a series of merges knows of targets that are done whole (see `series`), `held` bytes of it."""

    held: int

    def find(self, target: Target) -> Notes | None:
        """Notes that do for this merge of the target."""

    def take(self, target: Target, block: Block) -> Notes | None:
        """Notes of the target's block, if they can be taken; the next merge may find them."""


class Merge:
    """One merge, or one rank's share of it: the plan, an engine, and the ring they share.

    `advance` is told the bytes of each unit as it is read, `trace` when each stage began and ended a unit; `around`
    may wrap the step that patches a unit's base in place, to see it before and after. A `notebook` spares targets the
    look at their patches; and so do lists of a whole model, the second look, if not `thorough`.
    """

    def __init__(
        self,
        plan: Plan,
        engine: Backend,
        advance: Callable[[int], None] = lambda n: None,
        *,
        ranks: Ranks | None = None,
        trace: pipeline.Trace | None = None,
        around: Callable[[Callable[[Work], None]], Callable[[Work], None]] | None = None,
        notebook: Notebook | None = None,
        thorough: bool = False,
    ) -> None:
        self._around, self._notebook = around, notebook
        self._lists: Lists | None = None
        if plan.lists and not thorough and isinstance(engine, Noting):
            self._lists = Lists(engine, plan.room_for_lists - (0 if notebook is None else notebook.held))
        self.plan, self._engine, self._advance, self._trace = plan, engine, advance, trace
        self._ranks = ranks or Alone()
        self._inputs = Inputs(plan.inputs, drop_behind=plan.larger_than_memory)
        self._memory = engine.allocate(plan.ring_bytes)
        self._held = self._fresh_held()
        self._tallies: dict[str, list[Tally]] = {}

    @property
    def bytes_read(self) -> int:
        return self._inputs.bytes_read

    def run(self, sink: Sink, parts: Iterable[OutputPart] | None = None) -> Counts:
        """Everything, in the order of the output, or these parts of it.

        Raises InputError for data that breaks a rule.
        """
        counts: Counts = {}
        try:
            if self.plan.whole_model:
                quotas, skips = self.plan.model_quotas, self.plan.model_skips
                self._select(list(self.plan.targets.values()), quotas, skips, self._ranks)
            for part in self.plan.parts(self._ranks.rank, self._ranks.size) if parts is None else parts:
                written: Counts = {}
                left = sink.begin(part, written)
                if left is not None:
                    self._write(left, sink, written)
                    end = sink.end if self._trace is None else pipeline.traced("sync", sink.end, self._trace)
                    end()
                    counts.update(written)
            self._inputs.check_unchanged()
        finally:
            self._inputs.close()
        return counts

    def _write(self, part: OutputPart, sink: Sink, counts: Counts) -> None:
        """Apply the patches to one part of a file. A tensor done in chunks has its thresholds found just before."""
        for name in (t.name for t in part.tensors if t.name in self.plan.by_stored and not t.entries):
            counts[name] = Report([PatchReport() for _ in self.plan.recipe.patches])
        if part.lo == 0:
            sink.write(memoryview(part.output.header))
        units: list[Unit] = []
        seen = ""

        def flush() -> None:
            apply = _Apply(self.plan, self._engine, self._tallies, counts, self._notebook)
            work = apply.begin if self._around is None else self._around(apply)
            self._sweep(units, work, lambda work: sink.write(work.base.data, work.source))
            units.clear()

        for unit in self.plan.units_in(part):
            target = unit.target
            if target and not target.whole and not self.plan.whole_model and target.entry.name != seen:
                flush()
                seen = target.entry.name
                self._select([target], target.quotas, target.skips, Alone())
            units.append(unit)
        flush()

    def _select(self, targets: Sequence[Target], quotas: Sequence[int], skips: Sequence[int], ranks: Ranks) -> None:
        """Find the thresholds of one scope by sweeping its inputs, each rank those of its own tensors."""
        owner = self.plan.owners(ranks.size)
        mine = [t for t in targets if ranks.size == 1 or owner[t.stored.name] == ranks.rank]
        names = [t.entry.name for t in targets]
        selection = Selection(names, quotas, sum(t.entry.entries for t in targets), skips)
        if selection.pending:
            selection.guess(self._engine, self._sample(targets))
        lists = self._lists
        while selection.pending:
            sweep = _Count(self.plan, counting(self._engine), selection, lists)
            self._sweep([u for t in mine for u in self.plan.units_of(t)], sweep.begin, None)
            sweep.counting.end()
            selection.combine(ranks)
            selection.advance()
            lists = None
        self._tallies.update(selection.tallies())

    def _sample(self, targets: Sequence[Target]) -> list[Block]:
        """Blocks spread evenly over the scope. They lie in the ring's memory, which is idle before a sweep."""
        self._held = self._fresh_held()
        self._inputs.again = True
        blocks, used = [], 0
        for unit in self.plan.sample_units(targets):
            block = self._load(unit, self._memory[used : used + unit.ring_bytes], selecting=True).block
            assert block is not None
            blocks.append(block)
            used += unit.ring_bytes
        return blocks

    def _sweep(
        self,
        units: Sequence[Unit],
        work: Callable[[Work], Begun | None],
        write: Callable[[Work], Future[None] | None] | None,
    ) -> None:
        ring = Ring(self._memory)
        selecting = self._inputs.again = write is None
        self._held = self._fresh_held()

        def noted(unit: Unit) -> tuple[Unit, Notes | None]:
            return unit, None if selecting else self._find_notes(unit)

        ahead = map(noted, units)
        coming = next(ahead, None)

        def read(unit: Unit, region: Region) -> Work:
            nonlocal coming
            assert coming is not None
            notes, coming = coming[1], next(ahead, None)
            if coming is not None:
                for needed, straight in _ranges(*coming, selecting):
                    self._inputs.prefetch(*needed, straight=straight)
            loaded = self._load(unit, region.memory, selecting, notes)
            if not selecting:
                for done, _ in _ranges(unit, notes):
                    self._inputs.drop(*done)
            entries = unit.hi - unit.lo
            self._advance(unit.target.bytes_of(entries, selecting) if unit.target else entries)
            return loaded

        pipeline.run(units, lambda unit: unit.ring_bytes, read, work, write, ring, self._trace)

    def _find_notes(self, unit: Unit) -> Notes | None:
        """What an earlier look found, if it does for writing the unit."""
        if unit.target is None:
            return None
        if unit.target.whole:
            return None if self._notebook is None else self._notebook.find(unit.target)
        return None if self._lists is None else self._lists.take(unit, self._tallies[unit.entry.name])

    def _load(
        self, unit: Unit, memory: NDArray[np.uint8], selecting: bool = False, notes: Notes | None = None
    ) -> Work:
        """Read a unit's inputs into `memory`, one aligned buffer after another; with notes the base alone."""
        if unit.target is None:
            base = self._inputs.load(unit.entry, unit.lo, unit.hi, memory)
            return Work(unit, base, None, Extent(self._inputs.fd(unit.entry), unit.entry.start + unit.lo))
        target, n, used = unit.target, unit.hi - unit.lo, 0

        def fetch(tensor: PatchTensor) -> Bits | Lora:
            nonlocal used
            if target.whole:
                held = tensor.hold(self._inputs, memory[used : used + tensor.held_bytes])
                used += align(tensor.held_bytes)
            else:
                held = self._held.get(target.entry.name)[tensor]
            begin, used = used, used + room(tensor.ring_bytes * n)
            return held.load(self._inputs, unit.lo, unit.hi, memory[begin:used])

        codes = None
        if target.coded is None:
            used = room(ITEMSIZE[target.entry.dtype] * n)
            bits = Dense(target.entry, "checkpoint").load(self._inputs, unit.lo, unit.hi, memory[:used])
            written = bits.data.view(np.uint8)
        else:
            codes, used = load(
                target.coded, target.present, self._inputs, (unit.lo, unit.hi), memory, selecting=selecting
            )
            bits, written = Bits(codes.tiles[0], "F32"), codes.data
            if target.coded.original is not None and codes.scales is not None:
                codes.original = cast(Bits, fetch(target.coded.original))
        recipe = self.plan.recipe
        patches: list[PatchData | None] = []
        for spec, given in zip(recipe.patches, target.patches, strict=True):
            if given is None:
                patches.append(None)
                continue
            patches.append(
                PatchData(
                    kind=given.delta.form,
                    values=unread(given.delta.form) if notes else fetch(given.delta),
                    importance=given.importance,
                    scores=None if given.scores is None or notes else cast(Bits, fetch(given.scores)),
                    weight=spec.weight,
                    random_key=given.random_key,
                    keep=given.keep,
                    scale=given.scale,
                )
            )
        block = Block(
            base=bits,
            start=unit.lo,
            cols=target.entry.shape[-1] if target.entry.shape else 1,
            patches=tuple(patches),
            rule=recipe.rule,
            order=recipe.order,
            lambda_=recipe.lambda_,
            codes=None if codes is None or target.coded is None else codes.told(target.coded),
        )
        return Work(unit, written, block, codes=codes, notes=notes)

    def _fresh_held(self) -> pipeline.Once[Shared]:
        # Not a method of self: that cycle would keep the ring and the engine until the garbage collector comes by.
        return pipeline.Once(partial(_load_held, self.plan, self._inputs))


def _ranges(unit: Unit, notes: Notes | None, selecting: bool = False) -> Iterator[tuple[Range, bool]]:
    """The bytes of each tensor that a unit reads, and whether they go straight into the ring (`Inputs.load`)."""
    if unit.target is None:
        yield (unit.entry, unit.lo, unit.hi), True
        return
    for tensor in [unit.target.base] if notes else unit.target.tensors(selecting):
        ranges = tensor.ranges(unit.lo, unit.hi)
        for needed in ranges:
            yield needed, needed[0] is unit.target.stored or (isinstance(tensor, Dense) and len(ranges) == 1)


def _load_held(plan: Plan, inputs: Inputs, name: str) -> Shared:
    """What all chunks of a target share."""
    given = plan.targets[name].given
    return {tensor: tensor.hold(inputs, np.empty(tensor.held_bytes, np.uint8)) for tensor in given}


class _Count:
    """The only stage of a target whose keys are counted."""

    def __init__(self, plan: Plan, counting: Counting, selection: Selection, lists: Lists | None) -> None:
        self._plan, self._selection, self._lists = plan, selection, lists
        self.counting = counting
        self._counts: Counts = {}

    def begin(self, work: Work) -> Begun | None:
        assert work.block is not None
        windows = self._selection.windows(work.unit.entry.name)
        report = None if self._lists is None else self._lists.count(work.unit, work.block, windows)
        if report is None:
            return _Begun(self.counting.begin(work.block, windows), partial(self._keep, work.unit))
        self._keep(work.unit, report)
        return None

    def _keep(self, unit: Unit, report: Report) -> None:
        _collect(self._plan, unit, report, self._counts)


class _Apply:
    """The last stage of a target: patch the unit's base in place and count.

    Calling it does all of that; `begin` leaves the rest to be waited for where the engine can go on meanwhile.
    """

    def __init__(
        self,
        plan: Plan,
        engine: Backend,
        tallies: dict[str, list[Tally]],
        counts: Counts,
        notebook: Notebook | None,
    ) -> None:
        self._plan, self._engine, self._counts, self._notebook = plan, engine, counts, notebook
        self._ties = pipeline.Once(lambda name: TieCounter(tallies[name]))
        self._ahead = isinstance(engine, Ahead) and notebook is None

    def begin(self, work: Work) -> Begun | None:
        block, target = work.block, work.unit.target
        if not self._ahead or block is None or target is None:
            self(work)
            return None
        engine, codes = cast(Ahead, self._engine), work.codes_of_floats
        cuts = () if target.whole else self._ties.get(work.unit.entry.name).cuts(self._engine, block)

        def begin(block: Block, of: slice) -> Later[Any]:
            if target.whole:
                return engine.begin_merge(block, target.quotas[of], _output(block), target.skips[of])
            return engine.begin_apply(block, cuts[of], _output(block))

        def keep(found: Sequence[Any]) -> None:
            reports: list[Report] = [one[1] if target.whole else one for one in found]
            report = reports[0] if codes is None else rewrite(block, *codes, reports)
            _collect(self._plan, work.unit, report, self._counts)

        parts = [(slice(None), block)] if codes is None else apart(block, codes[1])
        return _Begun(_All([begin(part, of) for of, part in parts]), keep)

    def __call__(self, work: Work) -> None:
        block, unit = work.block, work.unit
        if block is None or unit.target is None:
            return
        engine, target = self._engine, unit.target
        if target.whole:

            def patch(block: Block, of: slice) -> Report:
                work.cuts, report = self._merge(work, block, target, of)
                return report

        else:
            work.cuts = cuts = self._ties.get(unit.entry.name).cuts(engine, block)

            def patch(block: Block, of: slice) -> Report:
                if work.notes is not None:
                    return cast(Noting, engine).apply_noted(work.notes, block, cuts[of], _output(block))
                return engine.apply(block, cuts[of], _output(block))

        codes = work.codes_of_floats
        if codes is None:
            report = patch(block, slice(None))
        else:
            report = rewrite(block, *codes, [patch(alone, of) for of, alone in apart(block, codes[1])])
        _collect(self._plan, unit, report, self._counts)

    def _merge(self, work: Work, block: Block, target: Target, of: slice) -> tuple[list[Cut], Report]:
        """A target that is done whole, by notes where there are any."""
        notes, asked = work.notes, (target.quotas[of], _output(block), target.skips[of])
        if notes is None and self._notebook is not None and target.coded is None:
            notes = self._notebook.take(target, block)
        if notes is None:
            return self._engine.merge(block, *asked)
        return cast(Noting, self._engine).merge_noted(notes, block, *asked)


@dataclass(frozen=True)
class _Begun:
    """A call of the engine that was begun, and what is done with what it finds."""

    later: Later[Any]
    keep: Callable[[Any], None]

    def done(self) -> bool:
        return self.later.done()

    def result(self) -> None:
        self.keep(self.later.result())


@dataclass(frozen=True)
class _All:
    """A `Later` of several calls."""

    parts: Sequence[Later[Any]]

    def done(self) -> bool:
        return all(part.done() for part in self.parts)

    def result(self) -> list[Any]:
        return [part.result() for part in self.parts]


def _output(block: Block) -> NDArray[np.unsignedinteger]:
    """What a block is written over."""
    return block.base.data if block.codes is None else block.codes.data


def _collect(plan: Plan, unit: Unit, report: Report, counts: Counts) -> None:
    """Add a unit's counts to its tensor's; once the tensor is complete, a fault stops the merge."""
    entry, target = unit.entry, unit.target
    assert target is not None
    name = target.stored.name
    found = counts[name] + report if name in counts else report
    counts[name] = found
    if unit.hi < entry.entries:
        return

    def refuse(what: str, file: Path, fault: Fault, expected: str) -> None:
        if fault.count:
            raise InputError(
                what,
                file=file,
                tensor=entry.name,
                found=f"{fault.count} entries, the first at index {fault.first}",
                expected=expected,
            )

    for given, of in zip(target.patches, found.patches, strict=True):
        if given is None:
            continue
        delta = given.delta.path
        scores = given.scores.path if given.scores else delta
        if plan.recipe.nonfinite == "error":
            refuse("the delta is NaN or infinite", delta, of.bad_delta, "finite values (or nonfinite: skip)")
            refuse("the score is NaN or infinite", scores, of.bad_score, "finite values (or nonfinite: skip)")
        refuse("the score is negative", scores, of.negative, "scores of at least 0")
    refuse("patched entries overflow the base's dtype", entry.path, found.overflow, f"finite {entry.dtype}")
    if isinstance(found, CodesReport) and target.coded is not None:
        scales = target.coded.weight.companions[0].path
        refuse("scales that can't be divided by, under patched entries", scales, found.bad_scale, SCALES)
        if target.coded.rule.saturate == "error":
            refuse("patched entries lie beyond the codes", entry.path, found.saturated, "saturate: clamp, or less")
