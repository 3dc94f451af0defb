"""Apply a fix to a checkpoint in place, or take it out: no second copy, and no kill at any point loses a weight.

Every touched entry tells by itself whether it is old or new, so nothing that is overwritten need be saved. What must
not happen is that something loads a mixture: the ledger says that a fix is under way and `config.json` has another
name before the first byte changes, and until the last one is on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from safepatch_core.errors import InputError, IOFailure, OutputError, Stopped
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint
from safepatch_core.files.disk import (
    failures_named,
    hash_file,
    hold,
    replacing,
    staged_name,
    start_writeback,
    sync_directory,
)
from safepatch_core.files.filenames import BUSY, CONFIG, LEDGER, MANIFEST, SUMS
from safepatch_core.files.parsing import Shard, read_json
from safepatch_core.files.reading import TensorEntry, identify, read_exact
from safepatch_core.fixes.checking import (
    GOAL,
    Advance,
    Direction,
    Sides,
    Teller,
    check,
    check_table,
    in_threads,
    overlap,
    require,
    settling,
    teller_of,
    width_of,
    window_of,
)
from safepatch_core.fixes.ledger import Entry, Ledger, drop_kept, keep, kept_path, open_kept, orphans
from safepatch_core.fixes.reading import Fix, open_fix, stretches
from safepatch_core.threads import room_for_a_thread

GO_ON = "`safepatch log --finish` goes on"
UNCHANGED = "run it again; no weight was changed (`safepatch log --finish` leaves it so)"


@contextlib.contextmanager
def held(root: Path) -> Iterator[Ledger]:
    """A checkpoint's directory, locked, and its ledger.

    Raises:
        InputError: it is no directory.
        OutputError: nothing may be written there.
        Busy: another run changes it.
    """
    if not root.is_dir():
        raise InputError("only a checkpoint's directory can be changed in place", file=root)
    if not os.access(root, os.W_OK):
        raise OutputError("nothing may be written in this directory: apply to a copy (-o)", file=root)
    lock = -1
    try:
        lock = hold(root, "checkpoint")
        with failures_named(root, go_on=GO_ON):
            yield Ledger(root)
    except Stopped:
        raise Stopped(f"stopped; {GO_ON}") from None
    finally:
        if lock >= 0:
            os.close(lock)


def carry(
    ledger: Ledger, fix: Fix, direction: Direction, date: str | None = None, advance: Advance = lambda n: None
) -> Sides:
    """Bring a checkpoint to one side of a fix, all of it. If that fix was under way, whatever the direction, go on.

    Returns:
        The sides that were met.

    Raises:
        InputError: the checkpoint can't be changed in place, carries something else, or is on that side already.
        OutputError: a file may not be written.
        IOFailure: reading or writing failed; the ledger tells what is under way.
    """
    root = ledger.root
    assert root is not None
    tidy(ledger)
    resumed = ledger.pending
    if resumed is not None and resumed.id != fix.id:
        finish(ledger, advance)
        resumed = None
    checkpoint = open_checkpoint(root, under_way=True)
    if direction == "revert":
        require_free(ledger, fix, checkpoint)
    sides = check(fix, checkpoint, advance)
    if resumed is None:
        require(fix, sides, direction, root)
        require_changeable(checkpoint, fix)
    listed = Sums(root)
    known = next((entry for entry in ledger.entries if entry.id == fix.id), None)
    entry = known or Entry(fix.id, fix.recipe, date=date)
    _begin(ledger, fix, replace(entry, direction=direction, under_way=True))
    _hide(root)
    listed.tell(_rewrite(checkpoint, fix, direction, listed.any, advance))
    _done(ledger, entry, direction)
    return sides


def _begin(ledger: Ledger, fix: Fix, entry: Entry) -> None:
    """From here on the ledger says what is under way. Where it can't, nothing stays of the attempt."""
    root = ledger.root
    assert root is not None
    try:
        with failures_named(root, go_on=UNCHANGED):
            keep(fix.path, fix.id, root)
            ledger.put(entry)
            ledger.write(UNCHANGED)
    except IOFailure:
        with contextlib.suppress(OSError):
            kept = kept_path(root, fix.id)
            for path in [staged_name(kept)] if fix.id in Ledger(root).ids else [staged_name(kept), kept]:
                drop_kept(path)
        raise


def _done(ledger: Ledger, entry: Entry, direction: Direction) -> None:
    """All is on the disk: the ledger says so, and the checkpoint can be loaded again."""
    assert ledger.root is not None
    if direction == "apply":
        ledger.put(replace(entry, direction="apply", under_way=False))
    else:
        ledger.drop(entry.id)
    ledger.write(GO_ON)
    tidy(ledger)
    if direction == "revert":
        drop_kept(kept_path(ledger.root, entry.id))


def finish(ledger: Ledger, advance: Advance = lambda n: None) -> Entry | None:
    """Complete what is under way, in its direction; the fix that it was, if any."""
    assert ledger.root is not None
    pending = ledger.pending
    if pending is not None:
        with open_kept(ledger.root, pending.id) as fix:
            carry(ledger, fix, pending.direction, advance=advance)
    tidy(ledger)
    for path in orphans(ledger.root, ledger):
        if path.name.startswith(".") or _is_free_of(ledger.root, path):
            drop_kept(path)
    return pending


def _is_free_of(root: Path, path: Path) -> bool:
    """Whether a checkpoint carries nothing of a fix that it keeps without a ledger: a run ended before it began."""
    try:
        with open_fix(path) as fix:
            return check(fix, open_checkpoint(root)).new == 0
    except InputError:
        return False


def tidy(ledger: Ledger) -> None:
    """What a run may have left undone when its ledger was written: nothing of it concerns a weight."""
    root = ledger.root
    assert root is not None
    for name in (LEDGER, SUMS, MANIFEST):
        staged_name(root / name).unlink(missing_ok=True)
    if ledger.pending is None and (root / BUSY).exists():
        os.rename(root / BUSY, root / CONFIG)
        sync_directory(root)


def require_free(ledger: Ledger, fix: Fix, checkpoint: Checkpoint) -> None:
    """Raises InputError if a fix above touches entries of this one."""
    check_table(fix, checkpoint)
    for other in ledger.above(fix.id):
        assert ledger.root is not None
        with open_kept(ledger.root, other) as upper:
            common = overlap(fix, upper, checkpoint)
        if common is not None:
            raise InputError(
                f"fix {other} lies above and touches the same entries: take that out first",
                file=ledger.root,
                tensor=common[0],
                found=f"{common[1]} entries",
            )


def require_changeable(checkpoint: Checkpoint, fix: Fix) -> None:
    """Raises InputError or OutputError if a file that the fix touches can't be changed in place."""
    root = checkpoint.root
    assert root is not None
    for shard in _touched(checkpoint, fix):
        path = root / shard.file
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode) or Path(os.path.realpath(root)).parent.name == "snapshots":
            raise InputError("is a symlink, or lies in a hub cache: apply to a copy (-o)", file=path)
        if status.st_nlink > 1:
            raise InputError(
                "is hard-linked, so that its other names would change too: apply to a copy (-o)",
                file=path,
                found=f"{status.st_nlink} links",
            )
        if not status.st_mode & 0o222:
            raise OutputError("is read-only", file=path)
        for entry in shard.tensors:
            if entry.name in fix.tensors and entry.start % width_of(entry):
                raise InputError(
                    "its entries are not aligned to their width, so one could be torn: apply to a copy (-o)",
                    file=path,
                    tensor=entry.name,
                    found=f"byte {entry.start}",
                )
        os.close(_open(shard, path))


def _touched(checkpoint: Checkpoint, fix: Fix) -> list[Shard]:
    return [shard for shard in checkpoint.shards if any(entry.name in fix.tensors for entry in shard.tensors)]


def _open(shard: Shard, path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise OutputError(f"can't be opened for writing: {error.strerror}", file=path) from None


def _hide(root: Path) -> None:
    if (root / CONFIG).exists():
        os.rename(root / CONFIG, root / BUSY)
    sync_directory(root)


def _rewrite(
    checkpoint: Checkpoint, fix: Fix, direction: Direction, summed: bool, advance: Advance
) -> dict[str, str]:
    """Every touched shard on its new side and on the disk; their SHA-256 if they shall be `summed`.

    A shard is hashed while the next one is rewritten: to hash it as it is rewritten would order the threads that do.
    """
    root, sums, hasher = checkpoint.root, dict[str, Future[str]](), ThreadPoolExecutor(1)
    assert root is not None
    try:
        for shard in _touched(checkpoint, fix):
            path = root / shard.file
            fd = _open(shard, path)
            try:
                with failures_named(path, go_on=GO_ON):
                    if identify(os.fstat(fd)) != shard.identity:
                        raise IOFailure("the file changed meanwhile", file=path)
                    _rewrite_shard(fd, shard, fix, GOAL[direction], advance)
                    os.fsync(fd)
            finally:
                os.close(fd)
            if summed:
                room_for_a_thread()
                sums[shard.file] = hasher.submit(_summed, path)
        fix.check_unchanged()
        return {name: digest.result() for name, digest in sums.items()}
    finally:
        hasher.shutdown(cancel_futures=True)


def _summed(path: Path) -> str:
    with failures_named(path, go_on=GO_ON):
        return hash_file(path)


def _rewrite_shard(fd: int, shard: Shard, fix: Fix, goal: int, advance: Advance) -> None:
    """Blocks with changes are written again also where they are on their side: an earlier write may be lost."""
    touched = [entry for entry in shard.tensors if entry.name in fix.tensors]
    for entry in in_threads(lambda entry: _rewrite_tensor(fd, entry, teller_of(fix, entry), goal), touched):
        advance(entry.nbytes)


def _rewrite_tensor(fd: int, entry: TensorEntry, teller: Teller, goal: int) -> TensorEntry:
    """A tensor on its new side. What is read and written are its blocks with changes."""
    room = window_of(entry)
    for lo, run in teller.windows():
        entries, parts = room[: run.entries], stretches(run.rows, run.entries)
        for a, b in parts:
            read_exact(fd, entries[a:b], entry.start + (lo + a) * teller.width, entry)
        teller.settle(run, settling(entries, goal))
        for a, b in parts:
            _write(fd, entries[a:b].view(np.uint8).data, entry.start + (lo + a) * teller.width)
        start_writeback(fd, entry.start + lo * teller.width, entries.nbytes)
    teller.finish()
    return entry


def _write(fd: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], at + done)


class Sums:
    """What a checkpoint tells of its files' SHA-256: its sums and its manifest, where it has them."""

    def __init__(self, root: Path) -> None:
        """Raises InputError for a manifest that can't be read."""
        self._sums, self._manifest = root / SUMS, root / MANIFEST
        self._lines = self._sums.read_bytes().split(b"\n") if self._sums.exists() else None
        self._data = read_json(self._manifest, within=root) if self._manifest.exists() else None
        if self._data is not None and not isinstance(self._data, dict):
            raise InputError("not a manifest", file=self._manifest)

    @property
    def any(self) -> bool:
        """Whether a file that changes has to be hashed."""
        return self._lines is not None or self._data is not None

    def tell(self, sums: dict[str, str]) -> None:
        """Some files have another SHA-256 now. The sums come last: they list the manifest too."""
        if self._data is not None:
            files = self._data.get("files")
            for name, digest in sums.items():
                if isinstance(files, dict) and isinstance(files.get(name), dict):
                    files[name]["sha256"] = digest
            text = (json.dumps(self._data, indent=2, ensure_ascii=False) + "\n").encode()
            with replacing(self._manifest, "wb", GO_ON) as file:
                file.write(text)
            sums = {**sums, MANIFEST: hashlib.sha256(text).hexdigest()}
        if self._lines is not None:
            known = {f"  {name}".encode(): digest.encode() for name, digest in sums.items()}
            with replacing(self._sums, "wb", GO_ON) as file:
                file.write(b"\n".join(known.get(line[64:], line[:64]) + line[64:] for line in self._lines))
