"""Open safetensors checkpoints: one strict parser for headers, tables and indexes. Never reads tensor data.

The rules are those of the safetensors format read strictly: whatever the `safetensors` library rejects is
rejected here, and so are leading blanks, duplicate keys, unknown fields and files that are not regular.
"""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from safepatch_core.errors import InputError, IOFailure, UsageError
from safepatch_core.files.converters import foreign, kind_by_name
from safepatch_core.files.filenames import DIFFUSERS, DIFFUSERS_INDEX, INDEX, LEDGER, SINGLE

# Bits per entry of every dtype that the format knows.
BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
FLOATS = frozenset(name for name in BITS if name.startswith(("F", "BF")))
HEADER_LIMIT = 100_000_000  # bytes, the format's own cap
# Braces, brackets, commas, colons, quotes and backslashes that one JSON text may hold: parsing takes time and
# memory by these, about a second for this many. A tensor takes about 26: room for over 100,000 tensors in a file.
MARKS_LIMIT = 3_000_000

_FIELDS = {"dtype", "shape", "data_offsets"}
_INTEGER = frozenset((int,))
_INDEX = re.compile(r"[^.].*\.safetensors\.index(\..+)?\.json")  # a variant may stand before the ending
_INDEXED = "loading with transformers and save_pretrained writes one"
_HUBS = ("huggingface.co", "hf.co")
_ADDRESS = re.compile(rf"[A-Za-z][A-Za-z0-9+.-]*://|(www\.)?({'|'.join(map(re.escape, _HUBS))})/")
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", re.ASCII)


class TensorEntry(NamedTuple):
    """Where one tensor lies."""

    name: str
    dtype: str  # as in the header: "F32", "BF16", "I64", ...
    shape: tuple[int, ...]
    path: Path  # the real file to open, symlinks resolved
    file: str  # the shard's name within the checkpoint
    start: int  # absolute byte offset in the file
    nbytes: int

    @property
    def entries(self) -> int:
        return math.prod(self.shape)


Identity = tuple[int, int, int, int]


def identify(status: os.stat_result) -> Identity:
    """What stays the same as long as nobody writes or replaces a file: st_dev, st_ino, st_size, st_mtime_ns."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def is_sparse(status: os.stat_result) -> bool:
    """Whether a good part of the file is holes (a few blocks less than its size is nothing)."""
    return status.st_blocks * 512 < status.st_size - max(status.st_size // 16, 1 << 20)


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its header verbatim and its table."""

    file: str
    path: Path
    size: int  # bytes
    header: bytes  # the file's first 8+N bytes
    metadata: dict[str, str]
    tensors: tuple[TensorEntry, ...]  # in order of their offsets
    identity: Identity  # when the header was read
    sparse: bool  # has holes


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
        raise _fault(path, "not a checkpoint", found=_file_kind(path), expected="a directory or a .safetensors file")
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


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the collector of cycles, which walks through all of a large header again and again as it grows.

    What is made of a header, and a plan, has no cycles. A fix of 45,000 tensors took 40 % longer to open with it.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


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


def read_shard(
    path: str | os.PathLike[str], file: str | None = None, *, within: Path | None = None, marks: int = MARKS_LIMIT
) -> Shard:
    """Read and check the header of one safetensors file; `file` is its name within the checkpoint.

    With `within`, a symlink may not lead out of that checkpoint directory. A header of more than so many `marks` is
    refused.
    """
    path = Path(path)
    fd, real, status = open_regular(path, within=within)
    try:
        head = bytearray(min(512, status.st_size))
        read_exact(fd, head, 0, path)
        header = bytearray(8 + _header_length(path, head, status.st_size))
        read_exact(fd, header, 0, path)
    finally:
        os.close(fd)
    name = path.name if file is None else file
    metadata, tensors = _read_table(path, name, real, header, status.st_size, marks)
    return Shard(name, real, status.st_size, bytes(header), metadata, tensors, identify(status), is_sparse(status))


def read_tensor(entry: TensorEntry, identity: Identity, lo: int = 0, hi: int | None = None) -> bytearray:
    """Bytes [lo, hi) of a tensor, as far as it goes.

    Raises IOFailure where the file can't be read or is no longer the one of that `identity`.
    """
    data = bytearray(min(entry.nbytes, entry.nbytes if hi is None else hi) - lo)
    try:
        fd = os.open(entry.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _failure(entry, f"can't open: {error.strerror}") from None
    try:
        read_exact(fd, data, entry.start + lo, entry)
        if identify(os.fstat(fd)) != identity:
            raise _failure(entry, "the file changed since its header was read")
    finally:
        os.close(fd)
    return data


def read_json(path: Path, *, within: Path | None = None) -> Any:
    """The value of a JSON file of at most 100 MB; duplicate keys are refused. `within` as in `read_shard`."""
    fd, _, status = open_regular(path, within=within)
    try:
        if status.st_size > HEADER_LIMIT:
            raise _fault(path, "too large", found=f"{status.st_size} bytes", expected=f"at most {HEADER_LIMIT}")
        raw = bytearray(status.st_size)
        read_exact(fd, raw, 0, path)
    finally:
        os.close(fd)
    return _parse(_FILE_DECODER, path, _decode(path, raw, "the file").strip(" \t\r\n"), "the file")


def read_exact(fd: int, buffer: Any, offset: int, what: TensorEntry | Path) -> None:
    """Fill `buffer` (any writable contiguous buffer) from byte `offset`; `what` is named when that fails.

    Raises IOFailure where the file ends early or can't be read.
    """
    view = memoryview(buffer)
    if view.nbytes == 0:
        return
    view = view.cast("B")
    done = 0
    while done < len(view):
        try:
            got = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise _failure(what, f"can't read: {error.strerror}") from None
        if got == 0:
            size = offset + done
            raise _failure(
                what, "the file ended while being read", found=f"{size} bytes", expected=f"{offset + len(view)}"
            )
        done += got


def open_regular(path: Path, *, within: Path | None = None) -> tuple[int, Path, os.stat_result]:
    """Open a regular file for reading, never waiting: its descriptor, real path and status.

    Raises InputError for anything else: FIFO, directory, device, dangling or looping symlink, and with
    `within` a symlink out of that checkpoint directory.
    """
    try:
        real = Path(os.path.realpath(path, strict=True))
        if within is not None and not belongs(within, real):
            raise _fault(
                path, "the symlink leads out of the checkpoint", found=str(real), expected=f"a file in {within}"
            )
        _require_regular(path, os.stat(real))
        fd = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise _fault(path, _open_fault(path, error)) from None
    try:
        status = os.fstat(fd)
        _require_regular(path, status)
    except BaseException:
        os.close(fd)
        raise
    return fd, real, status


def _refuse_half_fixed(root: Path) -> None:
    """A fix that is applied or taken out in place leaves a mixture until it is done; the ledger tells."""
    ledger = read_json(root / LEDGER, within=root) if os.path.isfile(root / LEDGER) else None
    fixes = ledger.get("fixes") if isinstance(ledger, dict) else None
    for entry in fixes if isinstance(fixes, list) else ():
        if isinstance(entry, dict) and entry.get("under_way"):
            raise _fault(
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
        raise _fault(
            root, "several safetensors files and no index", found=_some(files), expected=f"{INDEX} ({_INDEXED})"
        )
    what, expected = foreign(root, names) or (None, f"{SINGLE} or {INDEX}")
    raise _fault(root, "no safetensors file in the directory", found=what, expected=expected)


def _choose_index(root: Path, names: Sequence[str]) -> str | None:
    """The default index, or else the only one: that of a variant."""
    found = [name for name in names if _INDEX.fullmatch(name)]
    default = next((name for name in (INDEX, DIFFUSERS_INDEX) if name in found), None)
    if default is not None or SINGLE in names or DIFFUSERS in names:
        return default
    found = [name for name in found if not name.startswith("consolidated")] or found
    if len(found) > 1:
        raise _fault(root, "several indexes", found=_some(found), expected=f"one, or {INDEX}")
    return found[0] if found else None


def _open_either(root: Path, names: Sequence[str], index: str, single: str) -> _Found:
    """An index and a single file beside each other: they must be one checkpoint, or only the file be there."""
    files = _weight_map(root, root / index)
    if set(files.values()) == {single}:
        return _open_indexed(root, names, index)
    if all(name in names for name in files.values()):
        raise _fault(
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
        raise _fault(path, "no weight_map", expected="an object from tensor names to files")
    for name, file in files.items():
        if not _is_basename(file):
            raise _fault(
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
                raise _fault(root / shard.file, "in two shards", tensor=entry.name, found=f"also in {other}")
    for name, file in files.items():
        if seen.get(name, file) != file:
            raise _fault(
                root / seen[name],
                "in the shard, but the index says otherwise",
                tensor=name,
                found=f"{file} in {index_name}",
                expected=seen[name],
            )
        if name not in seen:
            expected = f"an index of what is there: it is stale ({_INDEXED})"
            raise _fault(root / file, "in the index, but not in the shard", tensor=name, expected=expected)
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
        return _fault(root / index_name, "names a missing shard", tensor=tensor, found=file)
    return _fault(
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


def _header_length(path: Path, head: bytes | bytearray, size: int) -> int:
    """N of the 8+N bytes of the header, once its first 512 bytes look like one."""
    length = int.from_bytes(head[:8], "little")
    if len(head) > 8 and length <= min(HEADER_LIMIT, size - 8) and head[8] == ord("{"):
        return length
    if size == 0:
        raise _fault(path, "empty file", expected="a safetensors file")
    kind = _kind_by_content(head) if length > HEADER_LIMIT else None
    if kind is not None:
        raise _fault(path, "not a safetensors file", found=kind)
    if size < 8:
        raise _fault(path, "no header length", found=f"{size} bytes", expected="at least 8")
    if length == 0:
        raise _fault(path, "the header's length is zero")
    if length > HEADER_LIMIT:
        raise _fault(path, "header over the cap", found=f"{length} bytes", expected=f"at most {HEADER_LIMIT}")
    if length > size - 8:
        raise _fault(path, "truncated header", found=f"a file of {size} bytes", expected=f"at least {length + 8}")
    start = bytes(head[8:11])
    found = "a byte order mark" if start == b"\xef\xbb\xbf" else repr(start[:1])[1:]
    raise _fault(path, "the header does not start with its object", found=found, expected="'{'")


def _read_table(
    path: Path, file: str, real: Path, header: bytearray, size: int, marks: int
) -> tuple[dict[str, str], tuple[TensorEntry, ...]]:
    text = _decode(path, header[8:].rstrip(b" "), "the header", marks)
    first = len(header)
    tensors = []
    with uncollected():
        # Numbers are parsed faster by `int`, and the same but for -0, which is none, and for those too long for it.
        table = _parse(_HEADER_DECODER if "-0" in text else _PLAIN_DECODER, path, text, "the header")
        metadata = _check_metadata(path, table.pop("__metadata__", None))
        for name, info in table.items():
            if not _is_plain(name, info):
                _check_entry(path, name, info)
            begin, end = info["data_offsets"]
            shape = tuple(info["shape"])
            tensors.append(TensorEntry(name, info["dtype"], shape, real, file, first + begin, end - begin))
    tensors.sort(key=attrgetter("start", "nbytes"))
    _check_layout(path, tensors, first, size)
    return metadata, tuple(tensors)


def _check_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if metadata is _TWICE:
        raise _fault(path, "duplicate key __metadata__ in the header")
    if metadata is None:  # also where it says null, which safetensors reads
        return {}
    if not isinstance(metadata, dict):
        raise _fault(path, "__metadata__ is not an object", found=shown(metadata))
    for key, value in metadata.items():
        if value is _TWICE:
            raise _fault(path, f"duplicate key '{key}' in __metadata__")
        if not isinstance(value, str):
            raise _fault(path, f"__metadata__ key '{key}'", found=shown(value), expected="a string")
        if not (_is_text(key) and _is_text(value)):
            raise _fault(path, f"__metadata__ key '{key}'", found="a lone surrogate")
    return metadata


def _is_plain(name: str, info: Any) -> bool:
    """Whether a tensor breaks no rule, told fast; what is not plain may still be legal."""
    try:
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        begin, end = offsets
        return (
            len(info) == 3
            and type(shape) is type(offsets) is list
            and len(shape) <= 32
            and _INTEGER.issuperset(map(type, shape + offsets))
            and 0 <= begin <= end < 1 << 60
            and min(shape, default=1) > 0
            and math.prod(shape) * BITS[dtype] == 8 * (end - begin)
            and _is_text(name)
        )
    except (KeyError, TypeError, ValueError):
        return False


def _check_entry(path: Path, name: str, info: Any) -> None:
    """Raises InputError unless the dtype, shape and range of one tensor are there and agree."""

    def fault(what: str, found: object, expected: str) -> InputError:
        return _fault(path, what, tensor=name, found=shown(found), expected=expected)

    if not _is_text(name):
        raise fault("its name is not text", name, "no lone surrogates")
    if info is _TWICE:
        raise _fault(path, "duplicate key in the header", tensor=name)
    if type(info) is not dict:
        raise fault("its entry is not an object", info, "dtype, shape and data_offsets")
    if info.keys() != _FIELDS:
        raise fault("its fields", sorted(info), "dtype, shape and data_offsets")
    if _TWICE in info.values():
        raise _fault(path, "duplicate key in its entry", tensor=name)
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    bits = BITS.get(dtype) if type(dtype) is str else None
    if bits is None:
        raise fault("unknown dtype", dtype, f"one of {', '.join(BITS)}")
    if type(shape) is not list or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        raise fault("its shape", shape, "a list of whole numbers from 0 to 2^63 - 1")
    if (
        type(offsets) is not list
        or len(offsets) != 2
        or not all(type(offset) is int and 0 <= offset < 1 << 63 for offset in offsets)
    ):
        raise fault("its data_offsets", offsets, "two whole numbers from 0 to 2^63 - 1")
    begin, end = offsets
    if begin > end:
        raise fault("its range is reversed", offsets, "begin <= end")
    total = bits
    for size in shape:
        total *= size or 1
        if total >= 1 << 64:
            raise fault(f"shape x {dtype} overflows", shape, "less than 2^64 bits")
    if 0 in shape:
        total = 0
    if total != 8 * (end - begin):
        needed = f"{total // 8} bytes" if total % 8 == 0 else f"{total} bits"
        raise fault("its range does not fit its shape", f"{end - begin} bytes", f"{needed} for {dtype} {shape}")


def _check_layout(path: Path, tensors: Sequence[TensorEntry], first: int, size: int) -> None:
    """Ranges follow each other from the header to the end of the file."""
    end, before = first, ""
    for entry in tensors:
        if entry.start != end:
            gap = entry.start - end
            what = f"{gap} bytes before it belong to no tensor" if gap > 0 else f"overlaps tensor '{before}'"
            raise _fault(
                path,
                what,
                tensor=entry.name,
                found=f"offset {entry.start - first}",
                expected=f"offset {end - first}",
            )
        end, before = entry.start + entry.nbytes, entry.name
    if end > size:
        cut = next(entry for entry in tensors if entry.start + entry.nbytes > size)
        raise _fault(
            path, "truncated data", tensor=cut.name, found=f"a file of {size} bytes", expected=f"{end} bytes"
        )
    if end < size:
        raise _fault(path, "bytes after the data", found=f"{size} bytes", expected=f"{end} bytes")


class _Duplicate(ValueError):
    """`args[0]` is the key that an object holds twice."""


_TWICE = object()  # stands for the value of a duplicate key in a header, so that its tensor can be named


def _marked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                members[key] = _TWICE
            seen.add(key)
    return members


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = _marked(pairs)
    if len(members) != len(pairs):
        raise _Duplicate(next(key for key, value in members.items() if value is _TWICE))
    return members


def _integer(digits: str) -> int | float:
    """An int that fits 64 bits; `-0` and longer ones come as floats, which no rule accepts for an integer."""
    return int(digits) if len(digits) <= 20 and digits != "-0" else float(digits)


_PLAIN_DECODER = json.JSONDecoder(object_pairs_hook=_marked)
_HEADER_DECODER = json.JSONDecoder(object_pairs_hook=_marked, parse_int=_integer)
_FILE_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)


def count_marks(raw: bytes | bytearray) -> int:
    """What costs time and memory in JSON."""
    return len(raw) - len(raw.translate(None, b'{}[],:"\\'))


def _decode(path: Path, raw: bytearray, where: str, most: int = MARKS_LIMIT) -> str:
    marks = count_marks(raw)
    if marks > most:
        raise _fault(
            path,
            f"{where} is too complex",
            found=f"{marks} JSON marks",
            expected=f"at most {most} (split the file into shards)",
        )
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _fault(path, f"{where} is not UTF-8", found=f"byte {raw[error.start]:#04x} at {error.start}") from None


def _parse(decoder: json.JSONDecoder, path: Path, text: str, where: str) -> Any:
    """The JSON value that fills `text` from end to end."""
    try:
        value, end = decoder.raw_decode(text)
    except _Duplicate as error:
        raise _fault(path, f"duplicate key '{error.args[0]}' in {where}") from None
    except json.JSONDecodeError as error:
        what = "a byte order mark" if text.startswith("\ufeff") else error.msg
        raise _fault(path, f"{where} is not JSON: {what} at {error.pos}") from None
    except RecursionError:
        raise _fault(path, f"{where} is nested too deeply") from None
    except ValueError:  # of `int`, which takes some thousands of digits
        if decoder is _PLAIN_DECODER:
            return _parse(_HEADER_DECODER, path, text, where)
        raise
    if end != len(text):
        found = f"{text[end : end + 16]!r} at {end}"
        raise _fault(path, f"{where} has bytes after its JSON value", found=found)
    return value


def _kind_by_content(head: bytes | bytearray) -> str | None:
    start = bytes(head).lstrip()[:16].lower()
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (run `git lfs pull`)"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML page"
    if head.startswith(b"GGUF"):
        return "a GGUF file"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive, as PyTorch saves pickles (never loaded)"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle (never loaded)"
    if start.startswith((b"{", b"[")):
        return "a JSON file"
    return None


def _file_kind(path: Path) -> str:
    fd, _, status = open_regular(path)
    head = bytearray(min(512, status.st_size))
    try:
        read_exact(fd, head, 0, path)
    finally:
        os.close(fd)
    return _kind_by_content(head) or kind_by_name(path.name) or "another kind of file"


def _require_regular(path: Path, status: os.stat_result) -> None:
    kinds = {
        stat.S_IFIFO: "a FIFO",
        stat.S_IFDIR: "a directory",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    if not stat.S_ISREG(status.st_mode):
        found = kinds.get(stat.S_IFMT(status.st_mode), "another kind of file")
        raise _fault(path, "not a regular file", found=found)


def _open_fault(path: Path, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "a looping symlink"
    if error.errno == errno.ENOENT:
        return "a dangling symlink" if os.path.islink(path) else "no such file"
    return f"can't open: {error.strerror}"


def belongs(root: Path, real: Path) -> bool:
    """Whether a resolved file lies in the directory, or among the blobs of a Hugging Face cache.

    A snapshot links to the blobs of its own repository, and a download into a folder of one's own may do so too.
    """
    if real.is_relative_to(Path(os.path.realpath(root))):
        return True
    for blobs in real.parents:
        if blobs.name == "blobs":
            shared = (blobs / ".huggingface-shared-blobs").is_file()
            return shared or blobs.parent.name.startswith(("models--", "datasets--", "spaces--"))
    return False


def _names(root: Path) -> list[str]:
    try:
        return sorted(os.listdir(root))
    except OSError as error:
        raise _fault(root, f"can't list: {error.strerror}") from None


def _is_basename(file: Any) -> bool:
    return (
        isinstance(file, str)
        and file not in ("", ".", "..")
        and not re.search(r"[/\\\x00-\x1f\x7f-\x9f\u2028\u2029]", file)
        and _is_text(file)
    )


def _is_text(text: str) -> bool:
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def shown(value: object) -> str:
    """A JSON value for a message; nesting and length are cut before they cost anything."""
    if value is None or isinstance(value, str):
        return "null" if value is None else value
    short = reprlib.Repr()
    short.maxlist, short.maxlevel, short.maxlong = 16, 3, 60
    return short.repr(value)


def _fault(
    path: Path, what: str, *, tensor: str | None = None, found: str | None = None, expected: str | None = None
) -> InputError:
    """The InputError of `path`; texts that come from the file are cut, lest a name of megabytes floods the line."""

    def brief(text: str | None) -> str | None:
        return text if text is None or len(text) <= 200 else f"{text[:200]}…"

    return InputError(what[:400], file=path, tensor=brief(tensor), found=brief(found), expected=brief(expected))


def _failure(what: TensorEntry | Path, fault: str, **facts: str) -> IOFailure:
    if isinstance(what, Path):
        return IOFailure(fault, file=what, **facts)
    where = what.path if what.path.name == what.file else Path(f"{what.path} ({what.file})")
    return IOFailure(fault, file=where, tensor=what.name, **facts)
