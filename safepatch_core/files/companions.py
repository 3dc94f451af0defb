"""The small files beside the weights: which of them an output takes along, and what it then lacks."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.files.filenames import ADAPTER_CONFIG, COMPANIONS, CONFIG, LEDGER, MANIFEST, SUMS
from safepatch_core.files.parsing import read_json
from safepatch_core.files.reading import belongs

COMPANION_LIMIT = 64 << 20  # bytes
# An adapter's config is left because transformers would load the adapter; and nothing that runs is carried along.
_NEVER = ("*.index.json", "*.index.*.json", MANIFEST, LEDGER, ADAPTER_CONFIG, "*.py", ".*")
# What nobody misses, because it is written anew.
_REPLACED = ("*.index.json", "*.index.*.json", MANIFEST, LEDGER, SUMS, "README*", ".*")
_WITH_CODE = (CONFIG, "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def home(checkpoint: Checkpoint) -> Path | None:
    """The folder of a checkpoint's small files: its own, or that of a file which has a config beside it."""
    if checkpoint.root is not None or checkpoint.folder is None:
        return checkpoint.root
    return checkpoint.folder if os.path.isfile(checkpoint.folder / CONFIG) else None


def companions(checkpoint: Checkpoint) -> list[Path]:
    """The small files that a merged checkpoint takes along, sorted by name.

    Those matching COMPANIONS, up to 64 MiB. Not: indexes, a previous manifest or ledger of fixes, an adapter's
    config, scripts, hidden files, subdirectories, links out of the directory.
    """
    folder = home(checkpoint)
    if folder is None:
        return []
    return [folder / name for name in _wanted(folder) if _why_not(folder, name) is None]


def left_out(checkpoint: Checkpoint) -> list[str]:
    """What of a checkpoint's folder an output does not have, and what it can't be loaded without: a line each."""
    folder = home(checkpoint)
    if folder is None:
        return [f"the output has no {CONFIG}: there is none beside the base"]
    refused = {name: why for name in _wanted(folder) if (why := _why_not(folder, name))}
    lines = [f"{name} is not carried along: it is {why}" for name, why in refused.items()]
    names = sorted(os.listdir(folder))
    folders = [name for name in names if os.path.isdir(folder / name) and not name.startswith(".")]
    if folders:
        lines.append(f"folders are not carried along: {_listed(folders)}")
    known = {path.name for path in companions(checkpoint)} | refused.keys() | {*folders}
    known |= {shard.file for shard in checkpoint.shards}
    others = [name for name in names if name not in known and not _like(name, _REPLACED)]
    if others:
        lines.append(f"files that are not carried along: {_listed(others)}")
    return lines + lacking(folder, {path.name for path in companions(checkpoint)})


def lacking(folder: Path, present: Collection[str]) -> list[str]:
    """What loaders miss where only the files `present` of a folder are there: a config, code that configs name."""
    lines = [] if CONFIG in present else [f"there is no {CONFIG}, which loaders ask for"]
    for name in _WITH_CODE:
        modules = sorted(_code(folder / name) - set(present)) if name in present else []
        if modules:
            lines.append(f"{name} names code that is not there, to be copied from its origin: {_listed(modules)}")
    return lines


def _wanted(folder: Path) -> list[str]:
    return [name for name in sorted(os.listdir(folder)) if _like(name, COMPANIONS) and not _like(name, _NEVER)]


def _why_not(folder: Path, name: str) -> str | None:
    path = folder / name
    if os.path.isdir(path):
        return None if path.is_symlink() else "a folder"
    if not belongs(folder, Path(os.path.realpath(path))):
        return "a link out of the folder"
    if not os.path.isfile(path):
        return "no file"
    return f"larger than {COMPANION_LIMIT} bytes" if os.path.getsize(path) > COMPANION_LIMIT else None


def _code(path: Path) -> set[str]:
    """The scripts beside it that a config's auto_map names."""
    try:
        config = read_json(path, within=path.parent)
    except InputError:
        return set()
    classes: Any = config.get("auto_map") if isinstance(config, dict) else None
    found = set()
    for given in classes.values() if isinstance(classes, dict) else ():
        for name in given if isinstance(given, list) else [given]:
            # Code of another repository is named with it, `org/name--module.Class`.
            if isinstance(name, str) and "--" not in name and "." in name:
                found.add(f"{name.rpartition('.')[0]}.py")
    return found


def _like(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
