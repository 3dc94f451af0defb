"""Read files to the last byte, never waiting, and name file and tensor when that fails."""

from __future__ import annotations

import errno
import math
import os
import re
import reprlib
import stat
from pathlib import Path
from typing import Any, NamedTuple

from safepatch_core.errors import InputError, IOFailure


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
            raise fault(
                path, "the symlink leads out of the checkpoint", found=str(real), expected=f"a file in {within}"
            )
        _require_regular(path, os.stat(real))
        fd = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise fault(path, _open_fault(path, error)) from None
    try:
        status = os.fstat(fd)
        _require_regular(path, status)
    except BaseException:
        os.close(fd)
        raise
    return fd, real, status


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
        raise fault(path, "not a regular file", found=found)


def _open_fault(path: Path, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "a looping symlink"
    if error.errno == errno.ENOENT:
        return "a dangling symlink" if os.path.islink(path) else "no such file"
    return f"can't open: {error.strerror}"


def _failure(what: TensorEntry | Path, reason: str, **facts: str) -> IOFailure:
    if isinstance(what, Path):
        return IOFailure(reason, file=what, **facts)
    where = what.path if what.path.name == what.file else Path(f"{what.path} ({what.file})")
    return IOFailure(reason, file=where, tensor=what.name, **facts)


def fault(
    path: Path, what: str, *, tensor: str | None = None, found: str | None = None, expected: str | None = None
) -> InputError:
    """The InputError of `path`; texts that come from the file are cut, lest a name of megabytes floods the line."""

    def brief(text: str | None) -> str | None:
        return text if text is None or len(text) <= 200 else f"{text[:200]}…"

    return InputError(what[:400], file=path, tensor=brief(tensor), found=brief(found), expected=brief(expected))


def shown(value: object) -> str:
    """A JSON value for a message; nesting and length are cut before they cost anything."""
    if value is None or isinstance(value, str):
        return "null" if value is None else value
    short = reprlib.Repr()
    short.maxlist, short.maxlevel, short.maxlong = 16, 3, 60
    return short.repr(value)


def is_text(text: str) -> bool:
    return text.isascii() or not re.search("[\ud800-\udfff]", text)
