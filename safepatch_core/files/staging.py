"""The write protocol: everything is staged beside the output and appears by one rename, or not at all.

Lock, stage, reserve, write, hash, sync, rename, journal, and in the end publish by one rename (an exchange where
an older output is replaced) and sync the parent. The journal also marks how far a large file is. A run that was
stopped leaves its stage and its journal for `--resume`; a run that was refused leaves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from safepatch_core.errors import Busy, InputError, IOFailure, OutputError, SafepatchError, Stopped, UsageError
from safepatch_core.files.disk import (
    HashedFile,
    exchange,
    failures_named,
    hash_file,
    is_file_of,
    remove,
    sync_directory,
)
from safepatch_core.files.filenames import SUMS
from safepatch_core.files.records import IDENTITY, RunIdentity
from safepatch_core.ranks import Alone, Ranks

Facts = Mapping[str, Any]


class Journal:
    """Checksummed lines; reading stops at the first that is torn or damaged."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, Lock()

    def read(self) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return lines
        for line in raw.split(b"\n")[:-1]:
            crc, _, text = line.partition(b" ")
            if crc != b"%08x" % zlib.crc32(text):
                break
            lines.append(json.loads(text))
        return lines

    def rewrite(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Replace all lines, in one step: a full disk must not cost what is remembered."""
        part = self.path.with_name(f"{self.path.name}.part")
        with open(part, "wb") as file:
            file.write(b"".join(map(self._line, lines)))
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, self.path)
        sync_directory(self.path.parent)

    def append(self, *lines: Mapping[str, Any]) -> None:
        with self._lock, open(self.path, "ab") as file:  # shards that are written at once end when they will
            file.write(b"".join(map(self._line, lines)))
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _line(data: Mapping[str, Any]) -> bytes:
        text = json.dumps(data, separators=(",", ":")).encode()
        return b"%08x %s\n" % (zlib.crc32(text), text)


class Staging:
    """A directory being written: use as a context manager, then `publish`.

    Who writes a file may give `facts` about it, plain JSON by name that is returned to a run that goes on.

    Args:
        out: where the directory shall appear.
        inputs: files and directories that are read; the output may not touch them.
        identity: a resumed run must agree in all of it.
        needed: bytes of the whole output.
        force: replace an older output, in one step.
        resume: go on with what an interrupted run of the same identity left.
        ranks: the processes that write together; the first checks, locks and publishes.

    Raises:
        InputError: the output may not be replaced, or `resume` meets a different run.
        OutputError: it can't be created.
        Busy: another run holds it.
    """

    def __init__(
        self,
        out: Path,
        inputs: Sequence[Path],
        identity: RunIdentity,
        *,
        needed: int,
        force: bool = False,
        resume: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self.stage = self.out.parent / f".{self.out.name}.safepatch"
        self._ranks = ranks or Alone()
        self._journals = f".{self.out.name}.safepatch-journal-"
        self._journal = Journal(self.out.parent / f"{self._journals}{self._ranks.rank}")
        self._lock_path = self.out.parent / f".{self.out.name}.safepatch-lock"
        self._lock = -1
        self.needed, self._force = needed, force
        self._published = False  # the run that is resumed had got as far as the rename
        self.files: dict[str, dict[str, Any]] = {}  # name → size, sha256
        self.finished: dict[str, dict[str, Any]] = {}  # journal lines of complete files
        self._marks: dict[str, list[dict[str, Any]]] = {}  # journal lines of incomplete files, from front to back
        self._parts: dict[str, Facts] = {}  # files written in part by this rank
        self._kept: set[str] = set()  # files that are not to be published
        refusal: SafepatchError | None = None
        try:
            if self._ranks.rank == 0:
                self._open(inputs, identity, resume)
        except SafepatchError as error:
            refusal = error
        try:
            refusal, self.finished = self._ranks.gather((refusal, self.finished))[0]
            if refusal is not None:
                raise refusal
            self._head = {IDENTITY: dict(identity.parts)}
            known = itertools.chain(self.finished.values(), *self._marks.values())
            with failures_named(self.out, needed):
                self._journal.rewrite([self._head, *(known if self._ranks.rank == 0 else ())])
                if self._lock >= 0 and os.fstat(self._lock).st_size:
                    os.ftruncate(self._lock, 0)
        except BaseException:
            self._release()
            raise

    def _open(self, inputs: Sequence[Path], identity: RunIdentity, resume: bool) -> None:
        try:
            left = "go on with --resume" if self._journal_files() else ""
            with failures_named(self.out, self.needed, "cannot create the output", OutputError, go_on=left):
                self._may_be_replaced(inputs)
                self._acquire()
                self._prepare(identity, resume)
                self._room()
        except BaseException:
            self._release()
            raise

    def _may_be_replaced(self, inputs: Sequence[Path]) -> None:
        if not self.out.name:
            raise InputError("the output can't be the root directory", file=self.out)
        if self.out.is_symlink():
            raise InputError("the output is a symlink and is never written through", file=self.out)
        real = self.out.parent.resolve() / self.out.name
        for path in inputs:
            known = path.resolve()
            if known == real or known in real.parents or real in known.parents:
                raise InputError("the output overlaps an input", file=self.out, found=str(path))
        if not os.path.lexists(self.out):
            return
        if not self.out.is_dir():
            raise InputError("the output exists and is not a directory", file=self.out)
        linked = {(info.st_dev, info.st_ino) for info in map(os.stat, inputs)}
        with os.scandir(self.out) as entries:
            for entry in entries:
                info = entry.stat(follow_symlinks=False)
                if (info.st_dev, info.st_ino) in linked:
                    raise InputError("a file of the output is hard-linked to an input", file=Path(entry.path))

    def _acquire(self) -> None:
        parent = self.out.parent
        missing = [path for path in (parent, *parent.parents) if not path.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        for path in missing:
            sync_directory(path.parent)
        while True:
            self._lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                self._lock = -1
                raise Busy("another run is writing this output", file=self.out) from None
            # The holder before us may have removed the file between our open and our lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._lock), os.stat(self._lock_path)):
                    return
            os.close(self._lock)

    def _release(self) -> None:
        if self._lock >= 0:
            # A lock file that stays is no lock. A signal that comes now comes after all that it could stop.
            with contextlib.suppress(OSError, Stopped):
                self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1

    def _journal_files(self) -> list[Path]:
        return sorted(self.out.parent.glob(glob.escape(self._journals) + "*"))

    def _prepare(self, identity: RunIdentity, resume: bool) -> None:
        journals = []
        if resume:
            paths = [path for path in self._journal_files() if path.suffix != ".part"]
            journals = [lines for path in paths if (lines := Journal(path).read())]
            # Where no journal is left, this run may have ended while it tidied up, see `publish`.
            done = Journal(self._lock_path).read()
            if not journals and done and not identity.differing(done[0][IDENTITY]):
                journals = [done]
        for lines in journals:
            identity.require(lines[0][IDENTITY], self.out)
        written = {line["file"]: line for lines in journals for line in lines[1:] if "file" in line}
        self._published = bool(written) and self._holds(written)
        if self._published:
            self.finished = written
            return
        if not self._force and self.out.is_dir() and any(os.scandir(self.out)):
            raise InputError("the output exists and is not empty; --force replaces it", file=self.out)
        if journals and self.stage.is_dir():
            # Believe the journal where the file has its size and its hash.
            self.finished = {
                n: line for n, line in written.items() if is_file_of(self.stage / n, line["size"], line["sha256"])
            }
            if self._ranks.size == 1:
                for line in (line for lines in journals for line in lines[1:] if "part" in line):
                    if line["part"] not in self.finished:
                        self._marks.setdefault(line["part"], []).append(line)
            for marks in self._marks.values():
                marks.sort(key=lambda line: int(line["end"]))
            kept = {*self.finished, *(f"{name}.part" for name in self._marks)}
            for path in self.stage.iterdir():
                if path.name in self._marks:  # it had got its name, but not its line
                    path.rename(path.with_name(f"{path.name}.part"))
                elif path.name not in kept:
                    remove(path)
        else:
            self.discard()
            self.stage.mkdir()

    def _holds(self, written: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether the output is what these journal lines say, and complete."""
        try:
            sums = (self.out / SUMS).read_text().splitlines()
        except (OSError, ValueError):
            return False
        listed = {line for line in sums if line.endswith(".safetensors")}
        return listed == {f"{line['sha256']}  {name}" for name, line in written.items()} and all(
            is_file_of(self.out / name, line["size"], line["sha256"]) for name, line in written.items()
        )

    def _room(self) -> None:
        if self._published:
            return
        kept = [self.stage / f"{name}.part" for name in self._marks]
        needed = self.needed - sum(line["size"] for line in self.finished.values())
        needed -= sum(path.stat().st_blocks * 512 for path in kept if path.exists())
        free = shutil.disk_usage(self.stage).free
        if free < needed:
            if not self.finished:
                self.discard()
            raise IOFailure("no space for the output", file=self.out, found=f"{free} bytes", expected=f"{needed}")

    def add(self, name: str, data: bytes) -> None:
        """A small file of the output."""
        if self._published:
            self.files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            with failures_named(self.out / name, what="reading failed"):
                if not is_file_of(self.out / name, **self.files[name]):
                    raise InputError(
                        "differs from what the interrupted run published; --force replaces it", file=self.out / name
                    )
            return
        file = self.open(name, len(data))
        try:
            file.write(memoryview(data))
            self.finish(file)
        finally:
            file.close()

    def open(
        self, name: str, size: int, lo: int = 0, hi: int | None = None, *, sparse: bool = False, drop: bool = False
    ) -> HashedFile:
        """Start a file of known size under a temporary name; only bytes [lo, hi) of it will be written here.

        It starts at `file.at`: behind `lo` where an interrupted run has left the beginning.
        """
        with failures_named(self.out / name, self.needed):
            part, hi = self.stage / f"{name}.part", size if hi is None else hi
            marks = self._marks.get(name, ())
            return HashedFile(part, size, lo, hi, self.out / name, self.needed, sparse=sparse, drop=drop, marks=marks)

    def mark(self, file: HashedFile, facts: Facts) -> None:
        """Make what is written of a file durable, and remember it, with the facts since the last mark."""
        name, digest = file.shown.name, file.sync_beginning()
        with failures_named(file.shown, self.needed):
            sync_directory(self.stage)
            self._journal.append({"part": name, "end": file.at, "sha256": digest, "facts": facts})

    def facts_before(self, name: str, at: int) -> dict[str, Any]:
        """The facts that an interrupted run remembered about the first `at` bytes of a file."""
        lines = [line for line in self._marks.get(name, ()) if line["end"] <= at]
        return {n: fact for line in lines for n, fact in line["facts"].items()}

    def finish(self, file: HashedFile, facts: Facts | None = None) -> None:
        """Sync a file. If it is whole it gets its name, and with `facts` the journal remembers it."""
        file.sync()
        if file.whole:
            self._complete(file.shown.name, file.size, file.hexdigest(), facts)
        else:
            self._parts[file.shown.name] = facts or {}

    def _complete(self, name: str, size: int, digest: str, facts: Facts | None) -> None:
        with failures_named(self.out / name, self.needed):
            os.rename(self.stage / f"{name}.part", self.stage / name)
            sync_directory(self.stage)
            self.files[name] = {"size": size, "sha256": digest}
            if facts is not None:
                self._journal.append({"file": name, **self.files[name], "facts": facts})

    def beside(self, make: Callable[[Path], None]) -> None:
        """Let `make` put more into the stage, which no sum will list; it syncs what it makes."""
        if not self._published:
            with failures_named(self.out, self.needed):
                make(self.stage)
                sync_directory(self.stage)

    def keep(self, name: str, data: bytes) -> None:
        """A file for `recall` alone: a run that goes on finds it, and what is published lacks it."""
        file = self.open(name, len(data))
        try:
            file.write(memoryview(data))
            self.finish(file, {})
        finally:
            file.close()
        self._kept.add(name)

    def recall(self, name: str) -> bytes | None:
        """What `keep` has kept under this name, in this run or in the one that it goes on with."""
        if name not in self.finished and name not in self._kept:
            return None
        self._kept.add(name)
        return (self.stage / name).read_bytes()

    def join(self, facts: Facts) -> dict[str, Any]:
        """Finish the files that several ranks wrote; returns the facts of all ranks. Every rank calls it."""
        if self._ranks.size == 1:
            return dict(facts)
        shared: dict[str, dict[str, Any]] = {}
        for parts in self._ranks.gather(self._parts):
            for name, of in parts.items():
                shared.setdefault(name, {}).update(of)
        for i, name in enumerate(sorted(shared)):
            if i % self._ranks.size == self._ranks.rank:
                part = self.stage / f"{name}.part"
                with failures_named(self.out / name):
                    self._complete(name, part.stat().st_size, hash_file(part), shared[name])
        everything: dict[str, Any] = {}
        for files, of in self._ranks.gather((self.files, dict(facts))):
            self.files.update(files)
            everything.update(of)
        return everything

    def publish(self) -> None:
        """Make the directory appear under its name, in one step."""
        for name in self._kept:
            (self.stage / name).unlink(missing_ok=True)
            self.files.pop(name, None)
        sums = "".join(f"{self.files[n]['sha256']}  {n}\n" for n in sorted(self.files))
        self.add(SUMS, sums.encode())
        if not self._published:
            with failures_named(self.out):
                self._appear()
        # What was replaced is removed only when the new output would survive a power cut. The lock file, which goes
        # last, takes the journals over: until then `--resume` can tell that this run is done.
        with failures_named(self.out, what="the output is complete, but cleaning up failed"):
            sync_directory(self.out.parent)
            lines = [line for path in self._journal_files() for line in Journal(path).read() if "file" in line]
            Journal(self._lock_path).append(self._head, *lines)
            self.discard()

    def _appear(self) -> None:
        if not (self._force and self.out.is_dir() and any(os.scandir(self.out))):
            os.rename(self.stage, self.out)
            return
        try:
            exchange(self.stage, self.out)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise
            raise IOFailure(
                "this filesystem can't exchange directories; remove the old output and go on with --resume",
                file=self.out,
            ) from None

    def discard(self) -> None:
        """Leave neither stage nor journal behind."""
        remove(self.stage)
        for path in self._journal_files():
            path.unlink(missing_ok=True)

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # A refused input can't be resumed; anything else can.
        if self._lock >= 0 and isinstance(error, InputError | UsageError | OutputError):
            with contextlib.suppress(OSError):
                self.discard()
        elif self._lock >= 0 and error is not None and os.fstat(self._lock).st_size:
            os.close(self._lock)  # the file stays: it tells `--resume` that all is done
            self._lock = -1
        self._release()
