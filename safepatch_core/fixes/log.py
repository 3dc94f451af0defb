"""Which fixes does a checkpoint carry, by its ledger and by its bytes? The function behind `log`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint
from safepatch_core.files.filenames import BUSY
from safepatch_core.fixes.checking import check
from safepatch_core.fixes.inplace import finish, held
from safepatch_core.fixes.ledger import Ledger
from safepatch_core.fixes.reading import Fix, open_fix


@dataclass(frozen=True)
class Probe:
    """What a checkpoint's bytes tell of one fix."""

    file: str
    id: str
    state: str  # carried, not carried, mixed, or something else
    old: int  # touched entries on either side
    new: int
    reason: str | None = None  # why it is something else


@dataclass(frozen=True)
class LogResult:
    """What `log` found."""

    fixes: list[dict[str, Any]]  # of the ledger, the lowest first: id, direction, under_way, recipe, date if given
    under_way: dict[str, Any] | None  # the one of them that is being applied or taken out
    hidden: bool  # the config has not got its name back
    finished: str | None  # the id that --finish completed
    probes: list[Probe]


def log(
    checkpoint: str | os.PathLike[str], probes: Sequence[str | os.PathLike[str]] = (), *, finish: bool = False
) -> LogResult:
    """What a checkpoint carries.

    Args:
        checkpoint: a directory, a file or a hub id.
        probes: fix files that are looked for in the bytes, whatever the ledger says.
        finish: complete what an interrupted run in place has begun.

    Raises:
        InputError: the checkpoint, the ledger or a fix breaks a rule.
        Busy: another run changes the checkpoint.
    """
    if not probes and not os.path.lexists(checkpoint):
        raise InputError("no such file or directory", file=checkpoint)
    done = _finished(Path(checkpoint)) if finish else None
    opened = open_checkpoint(checkpoint, under_way=True)
    ledger = Ledger(opened.root)
    pending = ledger.pending
    found = []
    for path in probes:
        with open_fix(path) as fix:
            found.append(_probe(fix, os.fspath(path), opened))
    return LogResult(
        [entry.data() for entry in ledger.entries],
        None if pending is None else pending.data(),
        opened.root is not None and (opened.root / BUSY).exists(),
        done,
        found,
    )


def _finished(root: Path) -> str | None:
    with held(root) as ledger:
        entry = finish(ledger)
    return None if entry is None else entry.id


def _probe(fix: Fix, file: str, checkpoint: Checkpoint) -> Probe:
    try:
        sides = check(fix, checkpoint)
    except InputError as error:
        if error.file is not None and Path(error.file) == fix.path:
            raise  # the fix itself is broken
        return Probe(file, fix.id, "something else", 0, 0, str(error))
    state = "mixed" if sides.mixed else "carried" if sides.new else "not carried"
    return Probe(file, fix.id, state, sides.old, sides.new)
