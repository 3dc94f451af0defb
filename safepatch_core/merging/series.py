"""Merges of recipes that are alike, one after another, into folders that are read once and removed.

What one finds of a tensor (the lists that its selection was made from) serves the next, where that differs in scale,
top, skip or combine alone; nothing is synced, hashed or remembered for a run that goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from safepatch_core.backends.contract import Block, Notes, Noting
from safepatch_core.files.disk import Extent, failures_named
from safepatch_core.merging.api import identity, totals
from safepatch_core.merging.api import plan as make_plan
from safepatch_core.merging.effect import require_deltas, require_eligible, require_survival
from safepatch_core.merging.engine import EngineOptions, open_engine
from safepatch_core.merging.layout import OutputPart
from safepatch_core.merging.plan import Plan
from safepatch_core.merging.recipe import PatchSpec, Recipe
from safepatch_core.merging.stream import Counts, Merge
from safepatch_core.merging.work import Target

# What may differ between recipes that find the same lists: only those of a patch, and only those of a recipe.
FREE_OF_A_PATCH = ("top", "skip", "scale", "rescale")
FREE = ("combine", "accumulate", "lambda", "elect", "quota", "max_shard_size")
# Lists are at most an eighth of a tensor long (see `sp_notes_take`) and hold a little more than is asked for.
LISTED_SHARE = 0.1


def listing(recipe: Recipe) -> str:
    """What of a recipe decides which lists it makes; equal for recipes that can share them."""
    data = {key: value for key, value in recipe.written().items() if key not in FREE}
    data["patches"] = [_listed(patch) for patch in data["patches"]]
    return json.dumps(data)


def _listed(patch: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in patch.items() if key not in (*FREE_OF_A_PATCH, "overrides")}
    retained = [(of["names"], of.get("retain")) for of in patch.get("overrides", ())]
    # The first that names a tensor counts, so one without `retain` hides a later one with it.
    return kept | {"overrides": retained if any(share is not None for _, share in retained) else []}


@dataclass(slots=True)
class _Page:
    """Notes of one target: what they were taken of, up to which quotas, and which merge used them last."""

    look: tuple[Any, ...]
    quotas: Sequence[int]
    notes: Notes
    used: int


class Notebook:
    """The notes of a series, within what the memory limit leaves beside the merge itself.

    recipes: all of the series, so that notes are taken for the largest quotas of them. `found` counts the targets of
    this merge that needed no look at their patches, `held` the bytes of all notes.
    """

    def __init__(self, engine: Noting, recipes: Iterable[Recipe]) -> None:
        self._engine = engine
        asking = {repr((r.quota, [_asked(p) for p in r.patches])): r for r in recipes}
        self._asking = list(asking.values())
        self._pages: dict[str, tuple[_Page, ...]] = {}  # tuples, because reader and engine look at the same time
        self._merge, self._room, self.found, self.held = 0, 0, 0, 0
        self._inputs: tuple[str, str] = ("", "")

    def begin(self, plan: Plan) -> None:
        """The next merge is that of `plan`."""
        self._merge += 1
        self._room = plan.room_beside
        self._inputs = (identity(plan).parts["input"], plan.recipe.order)
        self.found = 0

    def find(self, target: Target) -> Notes | None:
        """Notes that do for this merge of the target."""
        if not target.whole or target.coded is not None:
            return None
        for page in self._pages.get(target.entry.name, ()):
            reach = zip(target.quotas, page.quotas, target.patches, strict=True)
            if all(p is None or asked <= most for asked, most, p in reach) and page.look == self._look(target):
                page.used = self._merge
                self.found += 1
                return page.notes
        return None

    def take(self, target: Target, block: Block) -> Notes | None:
        """Notes of a target's block, kept if there is room; None where there is none, or where none can be taken."""
        quotas = self._reach(target)
        if any(p and asked > most for p, asked, most in zip(target.patches, target.quotas, quotas, strict=True)):
            return None
        # A key and its place take six bytes; lists are a little longer than what is asked for.
        if not self._make_room(8 * sum(quotas)) or (notes := self._engine.take_notes(block, quotas)) is None:
            return None
        if self._make_room(notes.nbytes):
            self.held += notes.nbytes
            page = _Page(self._look(target), quotas, notes, self._merge)
            self._pages[target.entry.name] = (*self._pages.get(target.entry.name, ()), page)
        return notes

    def _look(self, target: Target) -> tuple[Any, ...]:
        patches = [p and (p.delta, p.importance, p.random_key, p.keep) for p in target.patches]
        return (*self._inputs, target.entry, patches)

    def _reach(self, target: Target) -> list[int]:
        """Per patch the largest quota of the series that a list can serve."""
        entries, name = target.entry.entries, target.entry.name
        most = [0] * len(target.patches)
        for recipe in self._asking:
            for p, spec in enumerate(recipe.patches):
                quota = spec.at(name).quotas(entries, recipe.quota)[0]
                if quota <= LISTED_SHARE * entries:
                    most[p] = max(most[p], quota)
        return most

    def _make_room(self, nbytes: int) -> bool:
        """Whether so many bytes fit; notes that this merge does not use are given up for them, the oldest first."""
        idle = [(page.used, name, page) for name, pages in self._pages.items() for page in pages]
        for used, name, page in sorted(idle, key=lambda of: of[0]):
            if self.held + nbytes <= self._room or used == self._merge:
                break
            self._pages[name] = tuple(other for other in self._pages[name] if other is not page)
            self.held -= page.notes.nbytes
        return self.held + nbytes <= self._room


def _asked(patch: PatchSpec) -> tuple[Any, ...]:
    return patch.top, patch.skip, [(of.names, of.top, of.skip) for of in patch.overrides]


class FolderSink:
    """Writes shards into a folder as they are; a `stream.Sink`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._fd, self._at, self._sparse = folder, -1, 0, False
        self.counts: Counts = {}

    def begin(self, part: OutputPart, counts: Counts) -> OutputPart:
        self._path, self._counts = self._folder / part.output.name, counts
        self._at, self._sparse = 0, part.output.sparse
        with failures_named(self._path):
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            os.ftruncate(self._fd, part.output.size)
        return part

    def write(self, data: memoryview, source: Extent | None = None) -> None:
        left = data.cast("B")
        if self._sparse and not np.frombuffer(left, np.uint8).any():  # stays a hole
            self._at += len(left)
            return
        with failures_named(self._path):
            while left:
                written = os.pwrite(self._fd, left, self._at)
                left, self._at = left[written:], self._at + written

    def end(self) -> None:
        self.counts.update(self._counts)
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True)
class Made:
    """What one merge of a series did."""

    counts: Mapping[str, Mapping[str, int]]  # as `MergeResult.counts`
    targets: int
    found: int  # those of them that an earlier merge's lists were enough for
    bytes_read: int


class Series:
    """Merges some of `recipes`, in any order, with one engine.

    Its outputs load like those of `merge` and have the same weights; manifest, sums and card are left out.
    """

    def __init__(self, recipes: Iterable[Recipe], **engine: Unpack[EngineOptions]) -> None:
        opened, limit = open_engine(engine)
        self._engine: EngineOptions = {"backend": opened, "memory_limit": limit}
        if (chunk := engine.get("chunk_entries")) is not None:
            self._engine["chunk_entries"] = chunk
        self._notebook = Notebook(opened, recipes) if isinstance(opened, Noting) else None

    @property
    def held(self) -> int:
        """Bytes of what is remembered."""
        return 0 if self._notebook is None else self._notebook.held

    def merge(self, recipe: Recipe, out: Path) -> Made:
        """Merge into the new folder `out`. Raises as `merge` does."""
        plan = make_plan(recipe, **self._engine)
        require_deltas(plan)
        if self._notebook is not None:
            self._notebook.begin(plan)
        with failures_named(out):
            out.mkdir()
        with closing(FolderSink(out)) as sink:
            job = Merge(plan, plan.engine, notebook=self._notebook)
            job.run(sink)
        require_eligible(plan, sink.counts)
        require_survival(plan, sink.counts)
        for name, data in _small_files(plan):
            with failures_named(out / name):
                (out / name).write_bytes(data)
        found = 0 if self._notebook is None else self._notebook.found
        return Made(totals(plan, sink.counts), len(plan.targets), found, job.bytes_read)


def _small_files(plan: Plan) -> Iterator[tuple[str, bytes]]:
    if plan.index is not None:
        yield plan.index.name, plan.index.data
    for path in plan.companions:
        yield path.name, path.read_bytes()
