"""What applying a fix, or taking it out, will take, told before a byte changes: reads, writes, memory and space."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safepatch_core.errors import InputError, UsageError
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint
from safepatch_core.files.companions import companions
from safepatch_core.files.reading import TensorEntry
from safepatch_core.fixes.checking import Direction, check_table, width_of
from safepatch_core.fixes.format import BLOCK
from safepatch_core.fixes.inplace import Sums, require_changeable, require_free
from safepatch_core.fixes.ledger import Ledger
from safepatch_core.fixes.reading import WINDOW, Fix, stretches
from safepatch_core.merging.layout import OutputFile, lay_out

SMALL_FILES = 1 << 20  # room that card, manifest, sums and ledger may need beside the shards and companions
_OBJECTS = 8  # bytes of memory for a byte of a fix's header, once it is read


@dataclass(frozen=True)
class FixPlan:
    """What applying a fix, or taking it out, will do."""

    id: str
    direction: Direction
    in_place: bool
    goes_on: bool  # with what an interrupted run in place has begun
    tensors: int  # touched
    entries: int  # of these
    changes: int
    bytes_read: int
    bytes_written: int
    files: int  # weight files written
    space: int  # bytes needed on the disk of the output
    free: int  # bytes there
    memory: int  # bytes at once, about


def plan_fix(
    fix: Fix,
    checkpoint: str | os.PathLike[str],
    direction: Direction = "apply",
    out: str | os.PathLike[str] | None = None,
    *,
    in_place: bool = False,
) -> FixPlan:
    """Everything that `apply` or `revert` will do. Reads headers and the fix's block tables; writes nothing.

    Args:
        fix: an open fix.
        checkpoint: what it shall go into, or come out of.
        direction: apply or revert.
        out: where a copy would be written, for the space there; the current directory if not given.
        in_place: plan for no copy.

    Raises:
        UsageError: `out` and `in_place` together.
        InputError: the checkpoint has another table than the fix's base, or can't be changed in place, or a fix above
            touches the same entries. Whether it carries the fix is told by reading the weights, which this does not.
        OutputError: a file may not be written.
    """
    if in_place and out is not None:
        raise UsageError("either an output or --in-place")
    opened = open_checkpoint(checkpoint, under_way=in_place)
    check_table(fix, opened)
    ledger = Ledger(opened.root)
    if direction == "revert":
        require_free(ledger, fix, opened)
    touched = [entry for shard in opened.shards for entry in shard.tensors if entry.name in fix.tensors]
    changing = sum(_changing_bytes(fix, entry) for entry in touched)
    cost = _in_place(fix, opened, ledger, changing) if in_place else _copied(fix, opened, Path(out or "."))
    return FixPlan(
        id=fix.id,
        direction=direction,
        in_place=in_place,
        tensors=len(fix.tensors),
        entries=sum(of.entries for of in fix.tensors.values()),
        changes=fix.changes,
        memory=memory_needed(fix),
        **cost._asdict(),
    )


def memory_needed(fix: Fix) -> int:
    """Bytes that applying a fix takes at once, about: the headers, two windows, and what the fix says of one."""
    return _OBJECTS * fix.header_size + 8 * WINDOW


def _changing_bytes(fix: Fix, entry: TensorEntry) -> int:
    """Bytes of the blocks of a tensor in which something changes: only these are looked at, and written in place."""
    touched, width = fix.tensors[entry.name], width_of(entry)
    found = 0
    for first, last in touched.windows(width):
        within = min(last * BLOCK, touched.entries) - first * BLOCK
        found += sum(hi - lo for lo, hi in stretches(fix.rows(touched, first, last), within))
    return width * found


class _Cost(NamedTuple):
    """The fields of a FixPlan that differ between a copy and a change in place."""

    goes_on: bool
    bytes_read: int
    bytes_written: int
    files: int
    space: int
    free: int


def _in_place(fix: Fix, checkpoint: Checkpoint, ledger: Ledger, changing: int) -> _Cost:
    root = checkpoint.root
    if root is None:
        raise InputError("only a checkpoint's directory can be changed in place", file=checkpoint.ref)
    goes_on = ledger.pending is not None and ledger.pending.id == fix.id
    if not goes_on:
        require_changeable(checkpoint, fix)
    shards = [shard for shard in checkpoint.shards if any(entry.name in fix.tensors for entry in shard.tensors)]
    hashed = sum(shard.size for shard in shards) if Sums(root).any else 0
    read, space = 2 * (changing + fix.size) + hashed, SMALL_FILES + _kept(fix, root)
    return _Cost(goes_on, read, changing, len(shards), space, shutil.disk_usage(root).free)


def _copied(fix: Fix, checkpoint: Checkpoint, out: Path) -> _Cost:
    outputs, _ = lay_out(checkpoint, None)
    place = Path(os.path.abspath(out))
    while not place.exists():
        place = place.parent
    read = sum(entry.nbytes for entry in checkpoint.tensors.values()) + fix.size
    written = sum(output.size for output in outputs) + _kept(fix, place)
    space, free = space_needed(outputs, companions(checkpoint), fix), shutil.disk_usage(place).free
    return _Cost(False, read, written, len(outputs), space, free)


def _kept(fix: Fix, place: Path) -> int:
    """Bytes that keeping the fix there takes: none on its own disk, where it is linked."""
    return 0 if os.stat(fix.path).st_dev == os.stat(place).st_dev else fix.size


def space_needed(outputs: Sequence[OutputFile], small: Sequence[Path], fix: Fix) -> int:
    """Bytes that a copy needs. A sparse file takes what its base takes: it is not asked for up front."""
    weights = sum(output.size for output in outputs if not output.sparse)
    return weights + sum(path.stat().st_size for path in small) + fix.size + SMALL_FILES
