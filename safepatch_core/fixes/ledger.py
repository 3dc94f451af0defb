"""Which fixes a checkpoint carries, in order: the ledger in its directory, and the fixes kept beside it.

The ledger also says which fix is being applied or taken out, so that whoever comes after a crash can go on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safepatch_core.errors import InputError
from safepatch_core.files.disk import replacing, staged_name, sync_directory
from safepatch_core.files.filenames import KEPT, LEDGER
from safepatch_core.files.parsing import read_json
from safepatch_core.fixes.checking import Direction
from safepatch_core.fixes.reading import Fix

_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One fix of a checkpoint."""

    id: str
    recipe: Any
    direction: Direction = "apply"
    under_way: bool = False
    date: str | None = None

    def data(self) -> dict[str, Any]:
        data = {"id": self.id, "direction": self.direction, "under_way": self.under_way, "recipe": self.recipe}
        return data if self.date is None else {**data, "date": self.date}


class Ledger:
    """The fixes of one checkpoint, the lowest first."""

    def __init__(self, root: Path | None) -> None:
        """Raises InputError for a file that is no ledger."""
        self.root = root
        path = None if root is None else root / LEDGER
        self.entries = [] if root is None or path is None or not path.is_file() else _read(root, path)

    @property
    def pending(self) -> Entry | None:
        """The fix that is under way, if any."""
        return next((entry for entry in self.entries if entry.under_way), None)

    @property
    def ids(self) -> list[str]:
        return [entry.id for entry in self.entries]

    def above(self, fix: str) -> list[str]:
        """The fixes that were applied after this one, the lowest first."""
        return self.ids[self.ids.index(fix) + 1 :] if fix in self.ids else []

    def put(self, entry: Entry) -> None:
        """Replace the entry of that fix, or add one on top."""
        if entry.id in self.ids:
            self.entries[self.ids.index(entry.id)] = entry
        else:
            self.entries.append(entry)

    def drop(self, fix: str) -> None:
        self.entries = [entry for entry in self.entries if entry.id != fix]

    def text(self) -> str:
        return json.dumps({"fixes": [entry.data() for entry in self.entries]}, indent=2, ensure_ascii=False) + "\n"

    def write(self, go_on: str) -> None:
        """Make it durable, in one step; without entries there is no ledger."""
        assert self.root is not None
        path = self.root / LEDGER
        if self.entries:
            with replacing(path, go_on=go_on) as file:
                file.write(self.text())
        elif path.exists():
            path.unlink()
            sync_directory(self.root)


def _read(root: Path, path: Path) -> list[Entry]:
    data = read_json(path, within=root)
    entries = data.get("fixes") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise InputError("not a ledger of fixes", file=path)
    return [Entry(e["id"], e["recipe"], e["direction"], e["under_way"], e.get("date")) for e in entries]


def _is_entry(data: Any) -> bool:
    return (
        isinstance(data, dict)
        and {"id", "recipe", "direction", "under_way"} <= data.keys()
        and is_id(data["id"])
        and data["direction"] in ("apply", "revert")
        and isinstance(data["under_way"], bool)
    )


def is_id(text: object) -> bool:
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def kept_path(root: Path, fix: str) -> Path:
    """Where a checkpoint keeps a fix."""
    return root / KEPT / f"{fix}.safetensors"


def open_kept(root: Path, fix: str) -> Fix:
    """Raises InputError where the checkpoint doesn't keep that fix."""
    path = kept_path(root, fix)
    if not path.is_file():
        raise InputError("the checkpoint keeps no such fix", file=path)
    opened = Fix(path)
    if opened.id != fix:
        opened.close()
        raise InputError("another fix than its name says", file=path, found=opened.id, expected=fix)
    return opened


def keep(path: Path, fix: str, root: Path) -> None:
    """Keep a fix file with a checkpoint: linked where that can be, else copied; on the disk when this returns."""
    target = kept_path(root, fix)
    target.parent.mkdir(exist_ok=True)
    if not (target.exists() and os.path.samefile(path, target)):
        staging = staged_name(target)
        staging.unlink(missing_ok=True)
        try:
            os.link(os.path.realpath(path), staging)
        except OSError:
            shutil.copyfile(path, staging)
        os.replace(staging, target)
    fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    sync_directory(target.parent)
    sync_directory(root)


def orphans(root: Path, ledger: Ledger) -> list[Path]:
    """Files kept with a checkpoint that its ledger doesn't name."""
    folder, names = root / KEPT, {kept_path(root, fix).name for fix in ledger.ids}
    return [path for path in folder.iterdir() if path.name not in names] if folder.is_dir() else []


def drop_kept(path: Path) -> None:
    """Remove a kept file, and the folder with the last one."""
    folder = path.parent
    path.unlink(missing_ok=True)
    if folder.is_dir() and any(folder.iterdir()):
        sync_directory(folder)
    elif folder.is_dir():
        folder.rmdir()
        sync_directory(folder.parent)
