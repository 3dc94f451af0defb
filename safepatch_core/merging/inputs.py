"""The input files of a merge, opened once each, and proof that they stay what the plan saw."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from safepatch_core.errors import IOFailure
from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.files.direct import DirectReader
from safepatch_core.files.reading import TensorEntry, identify, is_sparse, read_exact


class Inputs:
    """Reads tensors of the given checkpoints; `drop_behind` where their files outgrow the page cache.

    What `load` reads goes past the cache where it is not there, unless it is read again (`again`) and the cache
    could hold it until then.
    """

    def __init__(self, checkpoints: Iterable[Checkpoint], *, drop_behind: bool = False) -> None:
        self._drop_behind, self.again = drop_behind, False
        self._direct = DirectReader()
        self._sparse: set[int] = set()
        self._identity = {s.path: s.identity for checkpoint in checkpoints for s in checkpoint.shards}
        self._fds: dict[Path, int] = {}
        self.bytes_read = 0

    def read(self, entry: TensorEntry, lo: int, buffer: NDArray[np.uint8]) -> None:
        """Fill `buffer` with the tensor's bytes from `lo` on."""
        fd, at, end = self.fd(entry), entry.start + lo, entry.start + lo + len(buffer)
        self.bytes_read += len(buffer)
        position = at
        while fd in self._sparse and position < end:
            # Holes are not read: the kernel would fill its cache with zeros first.
            data, hole = _next_data(fd, position, end)
            buffer[position - at : data - at] = 0
            if data < hole:
                read_exact(fd, buffer[data - at : hole - at], data, entry)
            position = hole
        if position < end:
            read_exact(fd, buffer[position - at :], position, entry)

    def load(self, entry: TensorEntry, lo: int, hi: int, memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Bytes [lo, hi) of the tensor, somewhere in `memory`: whole pages with one more than they fill."""
        fd, at = self.fd(entry), entry.start + lo
        placed = self._direct.read(fd, at, hi - lo, memory) if self._past_cache(fd, at, hi - lo) else None
        if placed is None:
            data = memory[: hi - lo]
            self.read(entry, lo, data)
            return data
        self.bytes_read += hi - lo
        for begin, end in placed.missing:
            read_exact(fd, placed.data[begin - at : end - at], begin, entry)
        return placed.data

    def _past_cache(self, fd: int, at: int, nbytes: int) -> bool:
        kept = self.again and not self._drop_behind
        return not kept and fd not in self._sparse and self._direct.takes(fd, at, nbytes)

    def prefetch(self, entry: TensorEntry, lo: int, hi: int, *, straight: bool = False) -> None:
        """Bytes [lo, hi) of the tensor are needed next: let the disk start on all inputs at once.

        Not on those that `load` is to read (`straight`) past the cache.
        """
        fd = self.fd(entry)
        nothing = lo == hi or fd in self._sparse  # no bytes would mean all to the end
        if not nothing and not (straight and self._past_cache(fd, entry.start + lo, hi - lo)):
            os.posix_fadvise(fd, entry.start + lo, hi - lo, os.POSIX_FADV_WILLNEED)

    def drop(self, entry: TensorEntry, lo: int, hi: int) -> None:
        """Bytes [lo, hi) of the tensor are not needed again: give their pages back, where files outgrow memory."""
        if self._drop_behind:
            os.posix_fadvise(self.fd(entry), entry.start + lo, hi - lo, os.POSIX_FADV_DONTNEED)

    def fd(self, entry: TensorEntry) -> int:
        """The open file that holds the tensor."""
        return self._open(entry.path)

    def _open(self, path: Path) -> int:
        if path not in self._fds:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
            except OSError as error:
                raise IOFailure(f"cannot open an input: {error.strerror}", file=path) from None
            self._fds[path] = fd
            self._check(path, os.fstat(fd))
            if is_sparse(os.fstat(fd)):
                self._sparse.add(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._fds[path]

    def _check(self, path: Path, status: os.stat_result) -> None:
        if identify(status) != self._identity[path]:
            raise IOFailure("the input changed while it was being read", file=path)

    def check_unchanged(self) -> None:
        """Raises IOFailure if any input that was opened is no longer the file the plan saw."""
        for path, fd in self._fds.items():
            self._check(path, os.fstat(fd))
            try:
                self._check(path, os.stat(path))
            except OSError as error:
                raise IOFailure(f"the input went away while it was being read: {error.strerror}", file=path) from None

    def close(self) -> None:
        self._direct.close()
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def _next_data(fd: int, position: int, end: int) -> tuple[int, int]:
    """The first run of data at or after `position`, cut at `end`; (end, end) where only a hole is left."""
    try:
        data = min(os.lseek(fd, position, os.SEEK_DATA), end)
        return data, min(os.lseek(fd, data, os.SEEK_HOLE), end) if data < end else end
    except OSError as error:
        if error.errno == errno.ENXIO:
            return end, end
        raise
