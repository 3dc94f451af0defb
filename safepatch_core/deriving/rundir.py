"""The run directory on disk: its lock, its record, and how a finished step takes its place."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from safepatch_core.errors import InputError, UsageError
from safepatch_core.files.disk import failures_named, hold, removed_on_failure, replacing, staged_name, sync_directory
from safepatch_core.files.records import RunIdentity, read_record
from safepatch_core.ranks import Alone, Ranks, first
from safepatch_core.version import __version__

RECORD = "derive.json"


class RunDirectory:
    """RUN, held by this run alone while the context lasts.

    A run that is refused before a step is done leaves nothing. Of several ranks, which all make the same calls, the
    first holds the directory, makes what is in it and writes the record, of which the others have a copy.

    Args:
        path: The directory.
        settings: With `inputs`, what a resumed run must share with the run it goes on with.
        inputs: As `settings`.
        resume: Goes on with the run that is there.
        ranks: None for one process.

    Attributes:
        record: The content of RUN/derive.json. A step counts as done once the record names it, and whatever else
            lies there is done again.

    Raises:
        OutputError: The directory can't be created.
        InputError: It isn't empty without `resume`, or `resume` meets a run with other settings or inputs.
        Busy: Another run holds it.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Any],
        *,
        resume: bool,
        ranks: Ranks | None = None,
    ) -> None:
        self.path, self._resume, self.ranks = path, resume, ranks or Alone()
        self._lock: int | None = None
        self._written: set[str] = set()
        self.record: dict[str, Any] = {
            "safepatch": __version__,
            "config": dict(settings),
            "inputs": dict(inputs),
            "nll": {},
            "patches": {},
            "importance": {},
            "done": [],
        }

    def __enter__(self) -> RunDirectory:
        self.record = first(self.ranks, self._open)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._lock is None:
            return
        try:
            if isinstance(error, InputError | UsageError) and not self.record["done"]:
                self._leave_nothing()
        finally:
            os.close(self._lock)

    def step(self, name: str, work: Callable[[], None]) -> None:
        """Runs `work`, which publishes RUN/name, unless the record says that it is done; then records it."""
        if first(self.ranks, lambda: name in self.record["done"] and (self.path / name).exists()):
            return
        work()
        if name not in self.record["done"]:
            self.record["done"].append(name)
        first(self.ranks, self._write_record)

    @contextlib.contextmanager
    def new_file(self, name: str, mode: Literal["w", "wb"] = "w") -> Iterator[Any]:
        """A file that takes its place as RUN/name, by one rename, when the block ends well; what other ranks than
        the first write is dropped."""
        if self.ranks.rank > 0:
            yield io.StringIO()
            return
        with replacing(self.path / name, mode) as file:
            yield file
        self._written.add(name)

    @contextlib.contextmanager
    def new_folder(self, name: str) -> Iterator[Path]:
        """A directory of files that takes its place as RUN/name, by one rename, when the block ends well."""
        target = self.path / name
        staging = staged_name(target)
        with failures_named(target), removed_on_failure(staging):
            first(self.ranks, partial(_make_empty, staging))
            yield staging
            self.ranks.gather(None)
            first(self.ranks, partial(self._put_in_place, staging, target))

    @contextlib.contextmanager
    def scratch_folder(self, name: str) -> Iterator[Path]:
        """A directory beside RUN/name that is gone when the block ends."""
        staging = staged_name(self.path / name)
        with failures_named(staging):
            first(self.ranks, partial(_make_empty, staging))
            try:
                yield staging
            finally:
                self.ranks.gather(None)
                first(self.ranks, partial(shutil.rmtree, staging, ignore_errors=True))

    def remove_folder(self, name: str) -> None:
        """Removes RUN/name, if it is there, so that it is never seen in part under its name."""
        if self.ranks.rank > 0:
            return
        target = self.path / name
        doomed = staged_name(target)
        with failures_named(target):
            shutil.rmtree(doomed, ignore_errors=True)
            if target.exists():
                os.rename(target, doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _put_in_place(self, staging: Path, target: Path) -> None:
        # safetensors makes files that only their owner can read; they get what the umask allows.
        mode = staging.stat().st_mode & 0o666
        for folder, _, files in os.walk(staging, topdown=False):
            for path in (Path(folder, name) for name in files):
                path.chmod(mode)
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            sync_directory(Path(folder))
        shutil.rmtree(target, ignore_errors=True)  # left by a run that stopped before its record
        os.rename(staging, target)
        sync_directory(target.parent)
        if target.parent != self.path:
            sync_directory(self.path)

    def _leave_nothing(self) -> None:
        """Undoes a run that was refused before its first step was done."""
        for checkpoints in self.path.glob("checkpoint-*"):
            shutil.rmtree(checkpoints, ignore_errors=True)
        with contextlib.suppress(OSError):
            for name in self._written:
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()

    def _open(self) -> dict[str, Any]:
        self._lock = hold(self.path, "run directory")
        try:
            self._start_or_go_on()
        except BaseException:
            os.close(self._lock)
            raise
        return self.record

    def _start_or_go_on(self) -> None:
        file = self.path / RECORD
        if {*self.path.iterdir()} <= {staged_name(file)}:  # which a run may have left that was killed at once
            self._write_record()
            return
        if not self._resume or not file.is_file():
            hint = "; --resume goes on with it" if file.is_file() else ""
            raise InputError(f"the run directory exists and is not empty{hint}", file=self.path)
        known, before = read_record(file, "derive run", _identity)
        RunIdentity(_identity(self.record)).require(before, self.path, shown=True)
        self.record = known

    def _write_record(self) -> None:
        with self.new_file(RECORD) as file:
            json.dump(self.record, file, indent=2, sort_keys=True, ensure_ascii=False)
            file.write("\n")


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs must share, by dotted key."""
    flat = {"safepatch version": record["safepatch"]}
    for prefix, tree in (("", record["config"]), ("inputs.", record["inputs"])):
        for key, value in tree.items():
            nested = value.items() if isinstance(value, dict) else ()
            flat |= {f"{prefix}{key}.{inner}": v for inner, v in nested} or {f"{prefix}{key}": value}
    return flat
