"""The write protocol: everything is staged beside the output and appears by one rename, or not at all.

Lock, stage, reserve, write, hash, sync, rename, journal, and in the end publish by one rename (an exchange where
an older output is replaced) and sync the parent. The journal also marks how far a large file is. A run that was
stopped leaves its stage and its journal for `--resume`; a run that was refused leaves nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from safepatch_core.backends.contract import PatchReport, Report
from safepatch_core.errors import Busy, InputError, IOFailure, OutputError, SafepatchError, Stopped, UsageError
from safepatch_core.files.filenames import SUMS
from safepatch_core.merging.plan import OutputPart
from safepatch_core.ranks import Alone, Ranks
from safepatch_core.threads import room_for_a_thread


class Source(NamedTuple):
    """Where bytes that are copied lie: an open file and the offset in it."""

    fd: int
    offset: int


_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_SYNC_WAIT_BEFORE, _SYNC_WRITE, _SYNC_WAIT_AFTER = 1, 2, 4
# Written pages stay this long (bytes) before their writing is waited for, so that the disk is never idle.
_DROP_LAG = 256 << 20
# After so many bytes a file's beginning is made durable and marked in the journal, where a tensor ends: the most that
# a kill costs. A mark waited 0.1 to 0.5 s for the disk (2 cores, others at work); shards of ordinary size need none.
# Tests set less.
MARK_BYTES = 4 << 30
# Zeros are left out of sparse files in steps of this many bytes.
_HOLE = 64 << 10
_READ = 1 << 20  # bytes read at once where a file is hashed
_libc = ctypes.CDLL(None, use_errno=True)
_OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def failures_named(
    path: Path,
    needed: int | None = None,
    what: str = "writing failed",
    kind: type[SafepatchError] = IOFailure,
    go_on: str = "go on with --resume",
) -> Iterator[None]:
    """Turn an OSError into one line that names the file and says what to do, in the end to `go_on`."""
    try:
        yield
    except OSError as error:
        hint = go_on
        if error.errno == errno.EFBIG:
            hint = f"raise the limit on file sizes (ulimit -f) and {hint}"
        elif error.errno in _OUT_OF_ROOM:
            hint = f"{f'{needed} bytes are needed; ' if needed else ''}free some and {hint}"
        raise kind(f"{what}: {error.strerror or error}; {hint}", file=path) from None


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def hold(folder: Path, what: str) -> int:
    """Creates a directory, if need be, and locks it for this process: a descriptor, whose closing frees it.

    Raises OutputError, which calls it `what`, if it can't be created; Busy if another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise OutputError(f"cannot create the {what}: {error.strerror}", file=folder) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise Busy("another run is writing this directory", file=folder) from None
        raise
    return lock


@contextlib.contextmanager
def replacing(target: Path, mode: Literal["w", "wb"] = "w", go_on: str = "go on with --resume") -> Iterator[Any]:
    """A file that takes its place as `target`, by one rename once it is on the disk, when the block ends well."""
    staging = staged_name(target)
    with failures_named(target, go_on=go_on), removed_on_failure(staging):
        with open(staging, mode, encoding=None if mode == "wb" else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, target)
        sync_directory(target.parent)


def staged_name(target: Path) -> Path:
    """Where what will be `target` is made."""
    return target.with_name(f".safepatch-{target.name}")


@contextlib.contextmanager
def removed_on_failure(staging: Path) -> Iterator[None]:
    """Nothing half-written stays."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(staging)
        raise


def _sync_file_range(fd: int, at: int, nbytes: int, flags: int) -> None:
    """Start or wait for writing. An error that it reports is not reported again by the final fsync."""
    if _libc.sync_file_range(fd, ctypes.c_int64(at), ctypes.c_int64(nbytes), flags):
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.ESPIPE):  # not to be had here: fsync does it all
            raise OSError(code, os.strerror(code))


def _runs_of_data(data: memoryview) -> list[tuple[int, int]]:
    """The runs [lo, hi) of steps that are not all zero."""
    flat = np.frombuffer(data, dtype=np.uint8)
    steps = len(flat) // _HOLE
    full = np.bitwise_or.reduce(flat[: steps * _HOLE].view(np.uint64).reshape(steps, _HOLE // 8), axis=1) != 0
    edges = np.flatnonzero(np.diff(np.concatenate(([False], full, [False])).astype(np.int8))) * _HOLE
    runs = [(int(lo), int(hi)) for lo, hi in edges.reshape(-1, 2)]
    if flat[steps * _HOLE :].any():
        runs.append((steps * _HOLE, len(flat)))
    return runs


def _exchange(a: Path, b: Path) -> None:
    """Swap two directory entries in one step."""
    if _libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Journal:
    """Checksummed lines; reading stops at the first that is torn or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path

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
        with open(self.path, "ab") as file:
            file.write(b"".join(map(self._line, lines)))
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _line(data: Mapping[str, Any]) -> bytes:
        text = json.dumps(data, separators=(",", ":")).encode()
        return b"%08x %s\n" % (zlib.crc32(text), text)


class Staging:
    """A directory being written: use as a context manager, then `publish`.

    Parameters
    ----------
    out: where the directory shall appear.
    inputs: files and directories that are read; the output may not touch them.
    identity: what makes two runs the same run, by name; a resumed one must agree in all of it.
    needed: bytes of the whole output.
    ranks: the processes that write together; the first checks, locks and publishes.

    Raises InputError if the output may not be replaced or `resume` meets a different run, OutputError if it can't
    be created, Busy if another run holds it.
    """

    def __init__(
        self,
        out: Path,
        inputs: Sequence[Path],
        identity: Mapping[str, str],
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
        self._parts: dict[str, Mapping[str, Report]] = {}  # files written in part by this rank
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
            self._identity = {"identity": dict(identity)}
            known = itertools.chain(self.finished.values(), *self._marks.values())
            with failures_named(self.out, needed):
                self._journal.rewrite([self._identity, *(known if self._ranks.rank == 0 else ())])
                if self._lock >= 0 and os.fstat(self._lock).st_size:
                    os.ftruncate(self._lock, 0)
        except BaseException:
            self._release()
            raise

    def _open(self, inputs: Sequence[Path], identity: Mapping[str, str], resume: bool) -> None:
        try:
            with failures_named(self.out, self.needed, "cannot create the output", OutputError):
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

    def _prepare(self, identity: Mapping[str, str], resume: bool) -> None:
        journals = []
        if resume:
            paths = [path for path in self._journal_files() if path.suffix != ".part"]
            journals = [lines for path in paths if (lines := Journal(path).read())]
            # Where no journal is left, this run may have ended while it tidied up, see `publish`.
            done = Journal(self._lock_path).read()
            if not journals and done and done[0]["identity"] == identity:
                journals = [done]
        for lines in journals:
            known = lines[0]["identity"]
            differ = sorted(k for k in known.keys() | identity.keys() if known.get(k) != identity.get(k))
            if differ:
                raise InputError(f"--resume: the interrupted run had another {', '.join(differ)}", file=self.out)
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
                n: line for n, line in written.items() if _is(self.stage / n, line["size"], line["sha256"])
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
                    _remove(path)
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
            _is(self.out / name, line["size"], line["sha256"]) for name, line in written.items()
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
                if not _is(self.out / name, **self.files[name]):
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

    def mark(self, file: HashedFile, counts: Mapping[str, Report]) -> None:
        """Make what is written of a file durable, and remember it, with the counts since the last mark."""
        name, digest = file.shown.name, file.sync_beginning()
        with failures_named(file.shown, self.needed):
            sync_directory(self.stage)
            numbers = {n: _to_numbers(report) for n, report in counts.items()}
            self._journal.append({"part": name, "end": file.at, "sha256": digest, "counts": numbers})

    def counts_before(self, name: str, at: int) -> dict[str, Report]:
        """The counts that an interrupted run remembered for the first `at` bytes of a file."""
        lines = [line for line in self._marks.get(name, ()) if line["end"] <= at]
        return {n: _from_numbers(numbers) for line in lines for n, numbers in line["counts"].items()}

    def finish(self, file: HashedFile, counts: Mapping[str, Report] | None = None) -> None:
        """Sync a file. If it is whole it gets its name, and with `counts` the journal remembers it."""
        file.sync()
        if file.whole:
            self._complete(file.shown.name, file.size, file.hexdigest(), counts)
        else:
            self._parts[file.shown.name] = counts or {}

    def _complete(self, name: str, size: int, digest: str, counts: Mapping[str, Report] | None) -> None:
        with failures_named(self.out / name, self.needed):
            os.rename(self.stage / f"{name}.part", self.stage / name)
            sync_directory(self.stage)
            self.files[name] = {"size": size, "sha256": digest}
            if counts is not None:
                numbers = {n: _to_numbers(report) for n, report in counts.items()}
                self._journal.append({"file": name, **self.files[name], "counts": numbers})

    def join(self, counts: Mapping[str, Report]) -> dict[str, Report]:
        """Finish the files that several ranks wrote; returns the counts of all ranks. Every rank calls it."""
        if self._ranks.size == 1:
            return dict(counts)
        shared: dict[str, dict[str, Report]] = {}
        for parts in self._ranks.gather(self._parts):
            for name, of in parts.items():
                shared.setdefault(name, {}).update(of)
        for i, name in enumerate(sorted(shared)):
            if i % self._ranks.size == self._ranks.rank:
                part = self.stage / f"{name}.part"
                with failures_named(self.out / name):
                    self._complete(name, part.stat().st_size, hash_file(part), shared[name])
        everything: dict[str, Report] = {}
        for files, of in self._ranks.gather((self.files, dict(counts))):
            self.files.update(files)
            everything.update(of)
        return everything

    def publish(self) -> None:
        """Make the directory appear under its name, in one step."""
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
            Journal(self._lock_path).append(self._identity, *lines)
            self.discard()

    def _appear(self) -> None:
        if not (self._force and self.out.is_dir() and any(os.scandir(self.out))):
            os.rename(self.stage, self.out)
            return
        try:
            _exchange(self.stage, self.out)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise
            raise IOFailure(
                "this filesystem can't exchange directories; remove the old output and go on with --resume",
                file=self.out,
            ) from None

    def discard(self) -> None:
        """Leave neither stage nor journal behind."""
        _remove(self.stage)
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


class HashedFile:
    """Bytes [lo, hi) of a file, written from front to back and hashed on a second thread meanwhile.

    `at` is where the next bytes go. It starts behind `lo` if the file has what `marks` say: an end, and the SHA-256
    of all before it. A `sparse` file keeps long runs of zeros as holes; other files have their space reserved first.
    With `drop` the pages of what was written are given back, for files that outgrow memory.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        lo: int,
        hi: int,
        shown: Path,
        needed: int,
        *,
        sparse: bool,
        drop: bool,
        marks: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.path, self.size, self.shown, self._needed = path, size, shown, needed
        self.at, self._end, self._sparse, self._drop = lo, hi, sparse, drop
        self.whole = lo == 0 and hi == size
        self._hash = hashlib.sha256()
        # Ranks that share a file each reserve it; the stage held nothing under this name before.
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="safepatch-hash")
        try:
            if self.whole:
                room_for_a_thread()
                self._hasher.submit(int).result()  # starts it
                self._believe(marks)
                os.ftruncate(self._fd, self.at)
            self._settled = self.at  # everything before has been waited for and dropped
            if sparse:
                os.ftruncate(self._fd, size)
            elif size:
                os.posix_fallocate(self._fd, 0, size)
        except BaseException:
            self.close()
            raise

    def _believe(self, marks: Sequence[Mapping[str, Any]]) -> None:
        """Go on behind the last mark up to which the file has the bytes that were written once."""
        for mark in marks:
            hashed, at, end = self._hash.copy(), self.at, mark["end"]
            while at < end and (data := os.pread(self._fd, min(_READ, end - at), at)):
                hashed.update(data)
                at += len(data)
            if at < end or hashed.hexdigest() != mark["sha256"]:
                break
            self._hash, self.at = hashed, end

    def write(self, data: memoryview, source: Source | None = None) -> Future[None] | None:
        """The next bytes, which also lie at `source`, if given. They are read until the future is done, if any."""
        data = data.cast("B")
        hashed = self._hasher.submit(self._hash.update, data) if self.whole else None
        with failures_named(self.shown, self._needed):
            for lo, hi in _runs_of_data(data) if self._sparse else [(0, len(data))]:
                self._put(data[lo:hi], self.at + lo, source and Source(source.fd, source.offset + lo))
            self.at += len(data)
            self._start_writeback(self.at - len(data), len(data))
        return hashed

    def _put(self, data: memoryview, at: int, source: Source | None) -> None:
        written = 0
        if source is not None:
            # The kernel copies, or shares the blocks where the filesystem can; what it leaves is written below.
            with contextlib.suppress(OSError):
                while written < len(data):
                    n = os.copy_file_range(
                        source.fd, self._fd, len(data) - written, source.offset + written, at + written
                    )
                    if n == 0:
                        break
                    written += n
        while written < len(data):
            written += os.pwrite(self._fd, data[written:], at + written)

    def _start_writeback(self, at: int, nbytes: int) -> None:
        """Hand the pages to the disk now: the kernel alone starts late, and the final fsync would wait for all."""
        _sync_file_range(self._fd, at, nbytes, _SYNC_WRITE)
        behind = at - _DROP_LAG
        if self._drop and behind > self._settled:
            _sync_file_range(
                self._fd, self._settled, behind - self._settled, _SYNC_WAIT_BEFORE | _SYNC_WRITE | _SYNC_WAIT_AFTER
            )
            os.posix_fadvise(self._fd, self._settled, behind - self._settled, os.POSIX_FADV_DONTNEED)
            self._settled = behind

    def sync(self) -> None:
        """All bytes are on the disk. A failed fsync may have lost pages: it is never retried and trusted."""
        if self.at != self._end:
            raise RuntimeError(f"{self.path}: {self.at} of {self._end} bytes written")
        with failures_named(self.shown, self._needed):
            os.fsync(self._fd)

    def sync_beginning(self) -> str:
        """All bytes so far are on the disk; their SHA-256, in hexadecimal."""
        hashed = self._hasher.submit(self._hash.copy)
        with failures_named(self.shown, self._needed):
            os.fdatasync(self._fd)
        return hashed.result().hexdigest()

    def hexdigest(self) -> str:
        self._hasher.shutdown()
        return self._hash.hexdigest()

    def close(self) -> None:
        if self._fd >= 0:
            self._hasher.shutdown()
            os.close(self._fd)
            self._fd = -1


def _remove(path: Path) -> None:
    """A file or a whole directory; nothing where there is nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is(path: Path, size: int, sha256: str) -> bool:
    """Whether there is a file of that size and hash."""
    return path.is_file() and path.stat().st_size == size and hash_file(path) == sha256


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CheckpointSink:
    """Writes the merged shards into a stage; a `stream.Sink`."""

    def __init__(self, staging: Staging, drop: bool = False) -> None:
        self._staging, self._drop = staging, drop
        self._step = int(os.environ.get("SAFEPATCH_MARK", MARK_BYTES))
        self._file: HashedFile | None = None
        self.counts: dict[str, Report] = {}

    def begin(self, part: OutputPart, counts: dict[str, Report]) -> OutputPart | None:
        output = part.output
        line = self._staging.finished.get(output.name)
        if line is not None:
            self._staging.files[output.name] = {"size": line["size"], "sha256": line["sha256"]}
            self.counts.update({name: _from_numbers(numbers) for name, numbers in line["counts"].items()})
            return None
        self._file = file = self._staging.open(
            output.name, output.size, part.lo, part.hi, sparse=output.sparse, drop=self._drop
        )
        # How many tensors of the part end there or before.
        sizes = (t.nbytes for t in part.tensors)
        ends = itertools.accumulate(sizes, initial=part.lo or len(output.header))
        self._ends = {end: done for done, end in enumerate(ends) if end > part.lo}
        done = self._ends.get(file.at, 0)
        counts.update(self._staging.counts_before(output.name, file.at))
        self._part, self._counts, self._marked = part, counts, (file.at, done)
        return OutputPart(output, part.tensors[done:], file.at, part.hi)

    def write(self, data: memoryview, source: Source | None = None) -> Future[None] | None:
        file = self._file
        assert file is not None
        hashed = file.write(data, source)
        at, done = self._marked
        if file.whole and self._step <= file.at - at and file.at in self._ends and file.at < file.size:
            now = self._ends[file.at]
            names = [t.name for t in self._part.tensors[done:now] if t.name in self._counts]
            self._staging.mark(file, {name: self._counts[name] for name in names})
            self._marked = (file.at, now)
        return hashed

    def end(self) -> None:
        assert self._file is not None
        self.counts.update(self._counts)
        self._staging.finish(self._file, self._counts)
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _to_numbers(report: Report) -> list[list[int]]:
    return [[report.acted, report.changed], *([p.eligible, p.selected, p.applied] for p in report.patches)]


def _from_numbers(numbers: list[list[int]]) -> Report:
    (acted, changed), *patches = numbers
    found = [PatchReport(eligible, selected, applied) for eligible, selected, applied in patches]
    return Report(found, acted=acted, changed=changed)
