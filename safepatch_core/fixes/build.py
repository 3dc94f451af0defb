"""Make a fix file: from a recipe, streamed as a merge is but without output, or from two checkpoints of one table."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from safepatch_core.backends.contract import Report
from safepatch_core.errors import Busy, InputError, OutputError, Stopped, UsageError
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint, require_same_table
from safepatch_core.files.disk import failures_named, replacing, staged_name, sync_directory
from safepatch_core.files.filenames import MANIFEST
from safepatch_core.files.parsing import read_json
from safepatch_core.files.reading import TensorEntry
from safepatch_core.fixes import format
from safepatch_core.fixes.format import WIDTH
from safepatch_core.fixes.reading import WINDOW
from safepatch_core.fixes.writing import Encoder, Writer
from safepatch_core.memory import page_aligned
from safepatch_core.merging import pipeline
from safepatch_core.merging.api import plan
from safepatch_core.merging.effect import require_deltas, require_eligible, require_survival
from safepatch_core.merging.engine import EngineOptions
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.layout import OutputPart
from safepatch_core.merging.pipeline import Region, Ring, align, room
from safepatch_core.merging.plan import DEFAULT_LIMIT, SMALLEST_LIMIT, Plan
from safepatch_core.merging.recipe import Recipe
from safepatch_core.merging.stream import Merge, Work
from safepatch_core.merging.work import Unit
from safepatch_core.ranks import Ranks, first, ranks_of_this_run
from safepatch_core.sizes import size

Progress = Callable[[int, int], None]
AGAIN = "run it again"


@dataclass(frozen=True)
class BuildResult:
    """What a build gave."""

    out: Path
    id: str
    tensors: int  # touched
    entries: int  # of the touched tensors
    changes: int
    size: int  # bytes of the file
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what the recipe's patches bring beside the targets


def build(
    recipe: str | os.PathLike[str] | Recipe | Plan,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
    **engine: Unpack[EngineOptions],
) -> BuildResult:
    """Write what a recipe's merge changes to a fix file. The merged checkpoint itself is never written.

    Under torchrun every rank calls it with the same arguments.

    Args:
        recipe: a recipe file, a `Recipe`, or what `plan` made of one.
        out: the file to create; it appears complete or not at all.
        force: replace an existing file.
        progress: called with (bytes done, bytes in all) as inputs are read.
        **engine: see `EngineOptions`. Half of the memory limit is for the merge, the rest for the base's entries
            beside the new ones; a `Plan` has its engine and its limit.

    Raises:
        UsageError: the recipe or an option is wrong.
        InputError: an input breaks a rule, nothing changes, or the output may not be replaced.
        OutputError: the output can't be created.
        IOFailure: reading or writing failed.
        Busy: another run writes this output.
    """
    if not isinstance(recipe, Plan):
        limit = size(engine.get("memory_limit")) or DEFAULT_LIMIT
        if limit < 2 * SMALLEST_LIMIT:
            raise UsageError("--memory-limit is too small", found=f"{limit} bytes", expected="at least 32MiB")
        engine["memory_limit"] = limit // 2
        recipe = plan(recipe, **engine)
    require_deltas(recipe)
    inputs = [shard.path for checkpoint in recipe.inputs for shard in checkpoint.shards]
    total = sum(target.bytes_of(target.entry.entries) for target in recipe.targets.values())
    with (
        closing(ranks_of_this_run()) as ranks,
        _output(Path(out), inputs, force, ranks) as path,
        Writer(path.parent, _share_of(path, ranks)) as writer,
    ):
        recorder = _Recorder(recipe, writer)
        job = Merge(recipe, recipe.engine, _counted(progress, total), ranks=ranks, around=recorder.around)
        counts = job.run(recorder)
        found = {name: report for of in ranks.gather(counts) for name, report in of.items()}
        require_eligible(recipe, found)
        require_survival(recipe, found)
        writer.join(ranks)
        result = _finish(path, recipe.base, writer, recipe.resolved_recipe(), ranks)
        return replace(result, warnings=recipe.warnings, notes=recipe.notes)


def build_between(
    base: str | os.PathLike[str],
    merged: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> BuildResult:
    """Write what turns one checkpoint into another of the same table to a fix file.

    Args:
        base: where the fix will apply.
        merged: what it will give. The recipe is told by its manifest, if it has one.
        out: the file to create, as for `build`.
        force: as for `build`.
        progress: as for `build`.

    Raises:
        InputError: the two differ in more than values, in nothing, or in entries that aren't 1, 2 or 4 bytes wide; or
            the output may not be replaced.
        OutputError, IOFailure, Busy: as for `build`.
    """
    old, new = open_checkpoint(base), open_checkpoint(merged)
    require_same_table(old, new)
    inputs = [shard.path for checkpoint in (old, new) for shard in checkpoint.shards]
    advance = _counted(progress, sum(entry.nbytes for entry in old.tensors.values()))
    with closing(ranks_of_this_run()) as ranks, _output(Path(out), inputs, force, ranks) as path:
        if ranks.size > 1:
            raise UsageError("two checkpoints are compared by one process", found=f"{ranks.size} ranks")
        with Writer(path.parent) as writer:
            _Comparison(writer, old, new, advance).run()
            return _finish(path, old, writer, _recipe_of(new), ranks)


@contextlib.contextmanager
def _output(out: Path, inputs: Sequence[Path], force: bool, ranks: Ranks) -> Iterator[Path]:
    """Where the file may be written, held for this run until it is."""
    path = Path(os.path.abspath(out))
    lock = -1
    try:
        lock = first(ranks, lambda: _claim(path, inputs, force))
        with failures_named(path, go_on=AGAIN):
            yield path
    except BaseException as error:
        if ranks.rank == 0 and lock >= 0:
            with contextlib.suppress(OSError):
                staged_name(path).unlink(missing_ok=True)
        if isinstance(error, Stopped):
            raise Stopped(f"stopped; {AGAIN}") from None
        raise
    finally:
        if ranks.rank == 0 and lock >= 0:
            os.close(lock)


def _claim(path: Path, inputs: Sequence[Path], force: bool) -> int:
    """A descriptor that locks the name under which the file is made."""
    if path.is_symlink():
        raise InputError("the output is a symlink and is never written through", file=path)
    if path.is_dir():
        raise InputError("the output is a directory", file=path, expected="a file name")
    if path.exists() and any(os.path.samefile(path, known) for known in inputs):
        raise InputError("the output is an input", file=path)
    if path.exists() and not force:
        raise InputError("the output exists; --force replaces it", file=path)
    with failures_named(path, what="cannot create the output", kind=OutputError, go_on=AGAIN):
        made = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in made:
            sync_directory(parent.parent)
        lock = os.open(staged_name(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise Busy("another run is writing this output", file=path) from None
    return lock


def _share_of(path: Path, ranks: Ranks) -> Path | None:
    """The temporary file of a rank that tells the first one what it found."""
    return path.with_name(f".safepatch-{path.name}-{ranks.rank}") if ranks.size > 1 else None


def _counted(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    return advance


class _Recorder:
    """Sees the targets of a merge before and after; a `stream.Sink` that keeps no output.

    A unit's old bytes are copied before the engine patches it, and compared by the writer's thread while the next
    unit is patched: there is room for two, or for what the half of the limit that the merge does not have holds.
    """

    def __init__(self, plan: Plan, writer: Writer) -> None:
        self.writer, self._plan = writer, plan
        sizes = [
            align(t.stored_bytes(t.entry.entries if t.whole else min(plan.chunk_entries(t), t.entry.entries)))
            for t in plan.targets.values()
        ]
        largest = max(sizes, default=0)
        self._room = Ring(np.empty(max(largest, min(2 * largest, plan.memory_limit)), np.uint8))
        self._patched: deque[tuple[Unit, Region]] = deque()
        self._encoder: Encoder | None = None

    def around(self, apply: Callable[[Work], None]) -> Callable[[Work], None]:
        def work(unit: Work) -> None:
            old = self._room.take(align(len(unit.base)))
            old.memory[: len(unit.base)] = unit.base
            apply(unit)
            self._patched.append((unit.unit, old))

        return work

    def _record(self, unit: Unit, old: Any, new: Any) -> None:
        assert unit.target is not None
        stored = unit.target.stored
        width = WIDTH[stored.dtype]
        if unit.lo == 0:
            self._encoder = self.writer.encoder(stored.entries, width)
        assert self._encoder is not None
        self._encoder.add(old.view(f"u{width}"), new.view(f"u{width}"), unit.target.stored_bytes(unit.lo) // width)
        if unit.hi == unit.entry.entries:
            self.writer.add(stored.name, self._encoder)

    def begin(self, part: OutputPart, counts: dict[str, Report]) -> OutputPart | None:
        targets = tuple(entry for entry in part.tensors if entry.name in self._plan.by_stored)
        return OutputPart(part.output, targets, part.lo, part.hi)

    def write(self, data: memoryview, source: object = None) -> None:
        if not self._patched:
            return  # the file's header
        unit, old = self._patched.popleft()
        try:
            self._record(unit, old.memory[: len(data)], np.frombuffer(data, np.uint8))
        except BaseException:
            self._room.cancel()
            raise
        self._room.give(old)

    def end(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Window:
    """Entries [lo, hi) of a tensor of two checkpoints."""

    old: TensorEntry
    new: TensorEntry
    lo: int
    hi: int

    @property
    def width(self) -> int:
        return WIDTH.get(self.old.dtype, 1)

    @property
    def nbytes(self) -> int:
        return self.width * (self.hi - self.lo)


class _Comparison:
    """Reads two checkpoints of one table and encodes what differs, at once."""

    def __init__(self, writer: Writer, old: Checkpoint, new: Checkpoint, advance: Callable[[int], None]) -> None:
        self._writer, self._checkpoints, self._advance = writer, (old, new), advance
        self._encoder: Encoder | None = None

    def run(self) -> None:
        """Raises InputError for differences in entries that can't be fixed."""
        with closing(Inputs(self._checkpoints)) as files:
            # Two pairs of windows: one is read while the other is encoded.
            ring = Ring(page_aligned(4 * room(WINDOW)))
            read = partial(self._read, files)
            pipeline.run(self._windows(), lambda window: 2 * room(window.nbytes), read, self._encode, None, ring)
            files.check_unchanged()

    def _windows(self) -> Iterator[_Window]:
        base, merged = self._checkpoints
        for old in (old for shard in base.shards for old in shard.tensors):
            width = WIDTH.get(old.dtype, 1)
            entries, step = old.nbytes // width, WINDOW // width
            for lo in range(0, entries, step):
                yield _Window(old, merged.tensors[old.name], lo, min(lo + step, entries))

    @staticmethod
    def _read(files: Inputs, window: _Window, region: Region) -> tuple[_Window, list[Any]]:
        half, (lo, hi) = room(window.nbytes), (window.lo * window.width, window.hi * window.width)
        halves = region.memory[:half], region.memory[half:]
        for entry in (window.old, window.new):
            files.prefetch(entry, hi, min(hi + WINDOW, entry.nbytes), straight=True)
        sides = [files.load(e, lo, hi, of) for e, of in zip((window.old, window.new), halves, strict=True)]
        return window, [side.view(f"<u{window.width}") for side in sides]

    def _encode(self, loaded: tuple[_Window, list[Any]]) -> None:
        window, (old, new) = loaded
        entries = window.old.nbytes // window.width
        if window.lo == 0:
            self._encoder = self._writer.encoder(entries, window.width)
        assert self._encoder is not None
        self._encoder.add(old, new, window.lo)
        if self._encoder.changes and window.old.dtype not in WIDTH:
            raise InputError(
                "differs, and entries of this type can't be fixed",
                file=window.new.path,
                tensor=window.new.name,
                found=window.new.dtype,
                expected="entries of 1, 2 or 4 bytes",
            )
        if window.hi == entries:
            self._writer.add(window.old.name, self._encoder)
        self._advance(window.nbytes)


def _recipe_of(checkpoint: Checkpoint) -> Any:
    """The recipe that the manifest of a merged checkpoint tells, if any."""
    path = None if checkpoint.root is None else checkpoint.root / MANIFEST
    if path is None or not path.is_file():
        return None
    manifest = read_json(path, within=checkpoint.root)
    return manifest.get("recipe") if isinstance(manifest, dict) else None


def _finish(path: Path, base: Checkpoint, writer: Writer, recipe: Any, ranks: Ranks) -> BuildResult:
    facts = writer.facts
    if not facts:
        raise InputError("nothing changes: there is nothing to fix", file=base.ref)
    about = format.metadata(format.table_hash(base.tensors), facts, recipe)
    if ranks.rank == 0:
        with replacing(path, "wb", AGAIN) as file:
            writer.write(file, about)
    ranks.gather(None)
    return BuildResult(
        path,
        about["id"],
        len(facts),
        sum(of.entries for of in facts.values()),
        sum(of.changes for of in facts.values()),
        path.stat().st_size,
    )
