"""Apply a fix, or take it out: as a new checkpoint beside the old one, or in place. Behind `apply` and `revert`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from safepatch_core.errors import UsageError
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint
from safepatch_core.files.companions import companions
from safepatch_core.files.disk import replacing
from safepatch_core.files.filenames import LEDGER, MANIFEST
from safepatch_core.files.records import RunIdentity, digest
from safepatch_core.files.staging import Staging
from safepatch_core.fixes.checking import Advance, Direction, check_table
from safepatch_core.fixes.copying import Copier
from safepatch_core.fixes.inplace import carry, held, require_free
from safepatch_core.fixes.ledger import Entry, Ledger, is_id, keep, kept_path, open_kept
from safepatch_core.fixes.plan import memory_needed, space_needed
from safepatch_core.fixes.reading import Fix, open_fix
from safepatch_core.merging.layout import lay_out
from safepatch_core.sizes import size
from safepatch_core.version import __version__

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ApplyResult:
    """What applying or taking out a fix did."""

    out: Path  # the checkpoint that was written, or changed in place
    id: str
    direction: Direction
    tensors: int  # touched
    changes: int  # touched entries
    fixes: tuple[str, ...]  # that the checkpoint carries by its ledger, the lowest first
    resumed: bool = False  # it went on with what an interrupted run had begun


def apply(
    fix: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    in_place: bool = False,
    date: str | None = None,
    force: bool = False,
    resume: bool = False,
    memory_limit: str | int | None = None,
    progress: Progress | None = None,
) -> ApplyResult:
    """Apply a fix file to a checkpoint.

    Every touched entry is told apart and hashed: a checkpoint that carries something else there is refused, before
    a byte of it changes, and before anything of a copy appears.

    Args:
        fix: the fix file.
        checkpoint: a checkpoint of the fix's base, with other fixes or without.
        out: directory to create, a copy with the change; it appears complete or not at all.
        in_place: change the checkpoint itself, instead of `out`. Killed at any point, the next call goes on.
        date: noted in the ledger.
        force: replace an existing `out`, in one step.
        resume: finish an interrupted copy, to the same bytes.
        memory_limit: bytes, or text like "1GiB"; a fix that needs more is refused.
        progress: called with (bytes done, bytes in all).

    Raises:
        UsageError: neither or both of `out` and `in_place`, or the limit is too small.
        InputError: the fix is broken, or the checkpoint is not one that it can be applied to.
        OutputError: the output can't be created or written.
        IOFailure: reading or writing failed.
        Busy: another run changes the checkpoint or writes the output.
    """
    with opened(fix, checkpoint, memory_limit) as it:
        return _run(it, checkpoint, out, "apply", in_place, date, force, resume, progress)


def revert(
    fix: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    in_place: bool = False,
    force: bool = False,
    resume: bool = False,
    memory_limit: str | int | None = None,
    progress: Progress | None = None,
) -> ApplyResult:
    """Take a fix out of a checkpoint that carries it, which gives back the entries that were there, to the bit.

    Args:
        fix: the fix file, or the id of one that the checkpoint keeps.
        checkpoint: where the fix is.
        out: as for `apply`.
        in_place: as for `apply`.
        force: as for `apply`.
        resume: as for `apply`.
        memory_limit: as for `apply`.
        progress: as for `apply`.

    Raises:
        UsageError, OutputError, IOFailure, Busy: as for `apply`.
        InputError: the fix is broken, the checkpoint doesn't carry it, or a fix above touches the same entries.
    """
    with opened(fix, checkpoint, memory_limit) as it:
        return _run(it, checkpoint, out, "revert", in_place, None, force, resume, progress)


@contextmanager
def opened(
    fix: str | os.PathLike[str], checkpoint: str | os.PathLike[str], memory_limit: str | int | None = None
) -> Iterator[Fix]:
    """A fix file, or the one of that id that the checkpoint keeps, once the limit leaves room to apply it."""
    named = is_id(os.fspath(fix)) and not os.path.exists(fix)
    with open_kept(Path(checkpoint), os.fspath(fix)) if named else open_fix(fix) as it:
        limit, needed = size(memory_limit), memory_needed(it)
        if limit is not None and limit < needed:
            raise UsageError("--memory-limit is too small", found=f"{limit} bytes", expected=f"at least {needed}")
        yield it


def _run(
    fix: Fix,
    ref: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    direction: Direction,
    in_place: bool,
    date: str | None,
    force: bool,
    resume: bool,
    progress: Progress | None,
) -> ApplyResult:
    if in_place == (out is not None):
        raise UsageError("either an output or --in-place")
    if in_place:
        if force or resume:
            raise UsageError("--in-place needs neither --force nor --resume: it goes on by itself")
        return _in_place(fix, Path(ref), direction, date, progress)
    assert out is not None
    return _copy(fix, open_checkpoint(ref), Path(out), direction, date, force, resume, progress)


def _in_place(fix: Fix, root: Path, direction: Direction, date: str | None, progress: Progress | None) -> ApplyResult:
    with held(root) as ledger:
        resumed = ledger.pending is not None and ledger.pending.id == fix.id
        checkpoint = open_checkpoint(root, under_way=True)
        touched = sum(entry.nbytes for name, entry in checkpoint.tensors.items() if name in fix.tensors)
        carry(ledger, fix, direction, date, counted(progress, 2 * touched))
        return ApplyResult(root, fix.id, direction, len(fix.tensors), fix.changes, tuple(ledger.ids), resumed)


def counted(progress: Progress | None, total: int) -> Advance:
    """What is told the bytes of each step, and tells the bytes done so far."""
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    return advance


def _copy(
    fix: Fix,
    checkpoint: Checkpoint,
    out: Path,
    direction: Direction,
    date: str | None,
    force: bool,
    resume: bool,
    progress: Progress | None,
) -> ApplyResult:
    ledger = Ledger(checkpoint.root)
    outputs, index = lay_out(checkpoint, None)
    small = companions(checkpoint)
    advance = counted(progress, sum(entry.nbytes for entry in checkpoint.tensors.values()))
    check_table(fix, checkpoint)
    if direction == "revert":
        require_free(ledger, fix, checkpoint)
    if direction == "revert":
        ledger.drop(fix.id)
    else:
        ledger.put(Entry(fix.id, fix.recipe, date=date))
    needed = space_needed(outputs, small, fix)
    inputs = [shard.path for shard in checkpoint.shards] + [fix.path] + ([checkpoint.root] if checkpoint.root else [])
    identity = _identity(fix, checkpoint, direction, ledger)
    with Staging(out, inputs, identity, needed=needed, force=force, resume=resume) as staging:
        Copier(staging, fix, checkpoint, direction, advance).copy(outputs)
        if index is not None:
            staging.add(index.name, index.data)
        for path in small:
            staging.add(path.name, path.read_bytes())
        staging.add("README.md", model_card(fix, checkpoint, direction, ledger.entries).encode())
        staging.add(MANIFEST, _manifest(fix, checkpoint, direction, ledger, staging.files).encode())
        staging.beside(lambda stage: _keep_all(ledger, fix, stage))
        staging.publish()
    return ApplyResult(staging.out, fix.id, direction, len(fix.tensors), fix.changes, tuple(ledger.ids))


def _identity(fix: Fix, checkpoint: Checkpoint, direction: Direction, ledger: Ledger) -> RunIdentity:
    return RunIdentity(
        {
            "version": __version__,
            "fix": f"{direction} {fix.id}",
            "input": digest([(str(shard.path), shard.identity) for shard in checkpoint.shards]),
            "ledger": digest(ledger.text()),
        }
    )


def _keep_all(ledger: Ledger, fix: Fix, stage: Path) -> None:
    """The ledger and the fixes that it lists, into an output."""
    for entry in ledger.entries:
        if entry.id == fix.id:
            keep(fix.path, fix.id, stage)
        elif ledger.root is not None and kept_path(ledger.root, entry.id).is_file():
            keep(kept_path(ledger.root, entry.id), entry.id, stage)
    if ledger.entries:
        with replacing(stage / LEDGER) as file:
            file.write(ledger.text())


def _name(checkpoint: Checkpoint) -> str:
    """What to call a checkpoint in files that must not tell where it lay."""
    return Path(checkpoint.ref).name if os.path.isabs(checkpoint.ref) else checkpoint.ref


def _manifest(
    fix: Fix, checkpoint: Checkpoint, direction: Direction, ledger: Ledger, files: Mapping[str, Mapping[str, Any]]
) -> str:
    data = {
        "tool": {"name": "safepatch", "version": __version__},
        "base": _name(checkpoint),
        "fix": {"id": fix.id, "direction": direction, "tensors": len(fix.tensors), "changes": fix.changes},
        "fixes": [entry.data() for entry in ledger.entries],
        "files": {name: dict(files[name]) for name in sorted(files)},
    }
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def model_card(fix: Fix, checkpoint: Checkpoint, direction: Direction, entries: list[Entry]) -> str:
    """The output's README.md, with the metadata that model hubs read."""
    head = {
        "base_model": _name(checkpoint),
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["safepatch", "safepatch-fix", "safety", "post-safety-alignment"],
    }
    did = "with fix" if direction == "apply" else "without fix"
    carried = "".join(f"{i}. `{entry.id}`\n" for i, entry in enumerate(entries, 1)) or "None.\n"
    recipe = "" if fix.recipe is None else f"\n## Recipe of the fix\n\n```yaml\n{_yaml(fix.recipe)}```\n"
    return (
        f"---\n{_yaml(head)}---\n"
        f"# {Path(_name(checkpoint)).name}, {did} {fix.id[:8]}\n\n"
        f"`{_name(checkpoint)}` {did} `{fix.id}`: {fix.changes:,d} entries of {len(fix.tensors)} tensors, made with "
        f"safepatch {__version__}. `sha256sum -c SHA256SUMS` checks the files.\n\n"
        f"## Fixes that it carries\n\n{carried}{recipe}"
    )


def _yaml(data: Any) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
