"""`report`: fixes and merges side by side, as numbers and as a page."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.files.disk import replacing
from safepatch_core.fixes.comparing import Progress, ReportResult, compare, names_of, open_item
from safepatch_core.fixes.page import page


def report(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ReportResult:
    """Compare fix files and merged checkpoints of one base.

    Args:
        paths: fix files, directories that `merge` wrote, or, with `base`, any checkpoints of its table.
        out: an HTML file to write, which holds all of it and asks for nothing else.
        base: their base. With it the changed entries of checkpoints are counted and compared one by one; without it
            a merge's manifest tells on how many entries it acts, and its overlap is not known.
        force: replace an existing file.
        progress: called with (bytes done, bytes in all) as inputs are read.

    Raises:
        UsageError: nothing to compare, or something twice.
        InputError: an input is neither a fix nor a merge, is of another base, or the output may not be replaced.
        IOFailure: reading or writing failed.
    """
    if out is not None:
        _require_room(Path(out), [*paths, *([] if base is None else [base])], force)
    with ExitStack() as opened:
        below = None if base is None else open_checkpoint(base)
        items = [
            opened.enter_context(closing(open_item(name, path, below))) for name, path in names_of(paths).items()
        ]
        result = compare(items, progress or (lambda done, total: None))
    if out is not None:
        with replacing(Path(out), go_on="run it again") as file:
            file.write(page(result))
    return result


def _require_room(out: Path, inputs: Iterable[str | os.PathLike[str]], force: bool) -> None:
    """Raises InputError where a page may not be put."""
    if out.is_dir():
        raise InputError("the output is a directory", file=out, expected="a file name")
    if out.exists() and any(os.path.exists(path) and os.path.samefile(out, path) for path in inputs):
        raise InputError("the output is an input", file=out)
    if os.path.lexists(out) and not force:
        raise InputError("the output exists; --force replaces it", file=out)
