"""Open checkpoints: a file, a directory with or without an index, a hub id; which files belong to it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safepatch_core.errors import InputError, UsageError
from safepatch_core.files.converters import foreign
from safepatch_core.files.filenames import DIFFUSERS, DIFFUSERS_INDEX, INDEX, LEDGER, SINGLE
from safepatch_core.files.parsing import Shard, file_kind, read_json, read_shard
from safepatch_core.files.reading import Identity, TensorEntry, fault, is_text, shown

_INDEX = re.compile(r"[^.].*\.safetensors\.index(\..+)?\.json")  # a variant may stand before the ending
_INDEXED = "loading with transformers and save_pretrained writes one"
_HUBS = ("huggingface.co", "hf.co")
_ADDRESS = re.compile(rf"[A-Za-z][A-Za-z0-9+.-]*://|(www\.)?({'|'.join(map(re.escape, _HUBS))})/")
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A set of shards whose tensors have unique names."""

    ref: str  # as the user named it
    root: Path | None  # the directory, None for a single file
    shards: tuple[Shard, ...]  # in order of file name
    tensors: Mapping[str, TensorEntry]
    index: dict[str, Any] | None  # the parsed index, where there is one
    revision: str | None  # commit hash of a hub id
    folder: Path | None = None  # where its small files lie
    index_name: str | None = None
    beyond: frozenset[str] = frozenset()  # tensors of the shards that the index does not name
    warnings: tuple[str, ...] = ()

    @property
    def of_several(self) -> str | None:
        """What to name in its place where it is but one shard of several."""
        if self.root is not None or not _one_of_several(self.shards[0].file):
            return None
        return f"the folder of {self.shards[0].file}, which is one shard of several"

    def identity_of(self, entry: TensorEntry) -> Identity:
        """The identity of the file that holds a tensor of this checkpoint."""
        return next(shard.identity for shard in self.shards if shard.file == entry.file)


def open_checkpoint(
    ref: str | os.PathLike[str], *, relative_to: Path | None = None, under_way: bool = False
) -> Checkpoint:
    """Open a directory with an index or one safetensors file, one .safetensors file, or `org/name[@revision]`.

    Relative paths are relative to `relative_to`; an existing path wins over a hub id. Raises InputError for
    whatever breaks a rule, and for a checkpoint in which a fix is `under_way` unless that is allowed; UsageError for
    a hub id without huggingface_hub.
    """
    path, revision = locate(ref, relative_to=relative_to)
    if os.path.isdir(path):
        if not under_way:
            _refuse_half_fixed(path)
        found = _open_directory(path)
        root, folder = path, path
    elif path.name.endswith(".safetensors"):
        warnings = (f"{path.name} is one shard of several, without the others",) if _one_of_several(path.name) else ()
        found, root, folder = _Found([read_shard(path)], warnings=warnings), None, path.parent
    else:
        raise fault(path, "not a checkpoint", found=file_kind(path), expected="a directory or a .safetensors file")
    tensors = {entry.name: entry for shard in found.shards for entry in shard.tensors}
    shards, index, name = tuple(found.shards), found.index, found.index_name
    return Checkpoint(
        os.fspath(ref), root, shards, tensors, index, revision, folder, name, found.beyond, found.warnings
    )


def require_same_table(base: Checkpoint, merged: Checkpoint) -> None:
    """Raises InputError unless two checkpoints have the same tensors, of the same dtypes and shapes."""
    for name in sorted(base.tensors.keys() | merged.tensors.keys(), key=str.encode):
        old, new = base.tensors.get(name), merged.tensors.get(name)
        if old is None or new is None:
            raise InputError("only one of the two has it", file=merged.ref if old is None else base.ref, tensor=name)
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            raise InputError(
                "the two differ in dtype or shape",
                file=merged.ref,
                tensor=name,
                found=f"{new.dtype} {list(new.shape)}",
                expected=f"{old.dtype} {list(old.shape)}",
            )


def locate(ref: str | os.PathLike[str], *, relative_to: Path | None = None) -> tuple[Path, str | None]:
    """The local path that `ref` names, and the commit hash where it is a hub id (which is fetched first)."""
    text = os.fspath(ref)
    if not text or "\0" in text:
        raise InputError("not a path", found=repr(text), expected="a path or org/name[@revision]")
    path = Path(text) if relative_to is None else relative_to / text
    if text.startswith("~") and not os.path.lexists(path):
        path = Path(os.path.expanduser(text))
    if os.path.lexists(path):
        return path, None
    _refuse_address(text)
    hub_id = _HUB_ID.fullmatch(text)
    if hub_id is None or text.endswith(".safetensors"):
        raise InputError("no such file or directory", file=path)
    from safepatch_core.files.hub import snapshot

    return snapshot(hub_id[1], hub_id[2])


def _refuse_address(text: str) -> None:
    """Recipes and manifests name a model as everybody would, wherever it was fetched from."""
    if _ADDRESS.match(text):
        expected = _hub_id(text) or "a path, or org/name[@revision] of the Hugging Face hub"
        raise UsageError("an address instead of a model's name", found=text, expected=expected)


def _hub_id(address: str) -> str | None:
    """What to write for the address of a model's page, or of a file of it."""
    from urllib.parse import unquote, urlsplit  # it takes as long to load as all the rest here

    parts = urlsplit(address if "://" in address else f"https://{address}")
    path = parts.path.strip("/").split("/")
    if parts.scheme == "hf":
        path.insert(0, parts.netloc)
    elif parts.netloc.removeprefix("www.") not in _HUBS:
        return None
    if len(path) < 2 or path[0] in ("datasets", "spaces"):
        return None
    repo, revision = "/".join(path[:2]).removesuffix(".git"), unquote("/".join(path[3:4]))
    return repo if revision in ("", "main") else f"{repo}@{revision}"


def _refuse_half_fixed(root: Path) -> None:
    """A fix that is applied or taken out in place leaves a mixture until it is done; the ledger tells."""
    ledger = read_json(root / LEDGER, within=root) if os.path.isfile(root / LEDGER) else None
    fixes = ledger.get("fixes") if isinstance(ledger, dict) else None
    for entry in fixes if isinstance(fixes, list) else ():
        if isinstance(entry, dict) and entry.get("under_way"):
            raise fault(
                root,
                "a fix is under way: its tensors may be old and new",
                found=shown(entry.get("id")),
                expected="`safepatch log --finish` first",
            )


@dataclass(frozen=True, slots=True)
class _Found:
    """What a directory or a file holds."""

    shards: list[Shard]
    index: dict[str, Any] | None = None
    index_name: str | None = None
    beyond: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()


def _open_directory(root: Path) -> _Found:
    names = _names(root)
    index, single = _choose_index(root, names), next((name for name in (SINGLE, DIFFUSERS) if name in names), None)
    if index is not None:
        return _open_indexed(root, names, index) if single is None else _open_either(root, names, index, single)
    files = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    # The same weights once more, in Mistral's and Meta's own layout.
    files = [name for name in files if not name.startswith("consolidated")] or files
    if single is not None and not any(name.startswith(f"{Path(single).stem}-") for name in files):
        files = [single]
    if len(files) == 1:
        return _Found([read_shard(root / files[0], within=root)])
    if files:
        raise fault(
            root, "several safetensors files and no index", found=_some(files), expected=f"{INDEX} ({_INDEXED})"
        )
    what, expected = foreign(root, names) or (None, f"{SINGLE} or {INDEX}")
    raise fault(root, "no safetensors file in the directory", found=what, expected=expected)


def _choose_index(root: Path, names: Sequence[str]) -> str | None:
    """The default index, or else the only one: that of a variant."""
    found = [name for name in names if _INDEX.fullmatch(name)]
    default = next((name for name in (INDEX, DIFFUSERS_INDEX) if name in found), None)
    if default is not None or SINGLE in names or DIFFUSERS in names:
        return default
    found = [name for name in found if not name.startswith("consolidated")] or found
    if len(found) > 1:
        raise fault(root, "several indexes", found=_some(found), expected=f"one, or {INDEX}")
    return found[0] if found else None


def _open_either(root: Path, names: Sequence[str], index: str, single: str) -> _Found:
    """An index and a single file beside each other: they must be one checkpoint, or only the file be there."""
    files = _weight_map(root, root / index)
    if set(files.values()) == {single}:
        return _open_indexed(root, names, index)
    if all(name in names for name in files.values()):
        raise fault(
            root,
            "two checkpoints in one directory",
            found=f"{index} and {single}",
            expected="one of them: delete the one that is out of date",
        )
    shard = read_shard(root / single, within=root)
    if files.keys() - {entry.name for entry in shard.tensors}:
        return _open_indexed(root, names, index)  # which says what is missing
    return _Found([shard], warnings=(f"{index} names shards that are not there: {single} is taken instead",))


def _weight_map(root: Path, path: Path) -> dict[str, str]:
    index = read_json(path, within=root)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise fault(path, "no weight_map", expected="an object from tensor names to files")
    for name, file in files.items():
        if not _is_basename(file):
            raise fault(
                path,
                "not a file of the checkpoint",
                tensor=name,
                found=shown(file),
                expected="a file name without a path",
            )
    return files


def _open_indexed(root: Path, names: Sequence[str], index_name: str) -> _Found:
    files = _weight_map(root, root / index_name)
    wanted = sorted(set(files.values()))
    for file in wanted:
        if not os.path.lexists(root / file):
            raise _missing_shard(root, names, index_name, files, file)
    shards = [read_shard(root / file, file, within=root) for file in wanted]
    seen: dict[str, str] = {}
    for shard in shards:
        for entry in shard.tensors:
            other = seen.setdefault(entry.name, shard.file)
            if other != shard.file:
                raise fault(root / shard.file, "in two shards", tensor=entry.name, found=f"also in {other}")
    for name, file in files.items():
        if seen.get(name, file) != file:
            raise fault(
                root / seen[name],
                "in the shard, but the index says otherwise",
                tensor=name,
                found=f"{file} in {index_name}",
                expected=seen[name],
            )
        if name not in seen:
            expected = f"an index of what is there: it is stale ({_INDEXED})"
            raise fault(root / file, "in the index, but not in the shard", tensor=name, expected=expected)
    beyond = sorted(seen.keys() - files.keys())
    told = f"{len(beyond)} tensors of the shards are not in {index_name}, the first '{beyond[0]}'" if beyond else ""
    warnings = (f"{told}: copied, and never a target",) if beyond else ()
    index = read_json(root / index_name, within=root)
    return _Found(shards, index, index_name, frozenset(beyond), warnings)


def _missing_shard(
    root: Path, names: Sequence[str], index_name: str, files: Mapping[str, str], file: str
) -> InputError:
    tensor = next(name for name, other in files.items() if other == file)
    others = [name for name in names if name.endswith(".safetensors") and name not in files.values()]
    if not others:
        return fault(root / index_name, "names a missing shard", tensor=tensor, found=file)
    return fault(
        root / index_name,
        "names a missing shard",
        tensor=tensor,
        found=f"{file}, where {_some(others)} lie beside it",
        expected=f"an index of these: it is stale ({_INDEXED})",
    )


def _one_of_several(file: str) -> bool:
    found = re.search(r"-\d+-of-(\d+)\.safetensors$", file)
    return found is not None and int(found[1]) > 1


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', …' if names[3:] else ''}"


def _names(root: Path) -> list[str]:
    try:
        return sorted(os.listdir(root))
    except OSError as error:
        raise fault(root, f"can't list: {error.strerror}") from None


def _is_basename(file: Any) -> bool:
    return (
        isinstance(file, str)
        and file not in ("", ".", "..")
        and not re.search(r"[/\\\x00-\x1f\x7f-\x9f\u2028\u2029]", file)
        and is_text(file)
    )
