"""The files of a checkpoint, opened once each, and proof that they stay what they were when its table was read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from safepatch_core.errors import IOFailure
from safepatch_core.files.checkpoint import Checkpoint, TensorEntry, identify, read_exact
from safepatch_core.fixes.reference import Entries


class Shards:
    """Reads entries of a checkpoint's tensors. May be used by several threads; a context manager."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._identity = {shard.path: shard.identity for shard in checkpoint.shards}
        self._fds: dict[Path, int] = {}
        for path in self._identity:
            try:
                self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
            except OSError as error:
                self.close()
                raise IOFailure(f"cannot open an input: {error.strerror}", file=path) from None

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def read(self, entry: TensorEntry, width: int, lo: int, buffer: Entries) -> None:
        """Fill `buffer` with the tensor's entries of `width` bytes from `lo` on."""
        read_exact(self._fds[entry.path], buffer, entry.start + lo * width, entry)

    def entries(self, entry: TensorEntry, width: int, lo: int, hi: int) -> Entries:
        """Entries [lo, hi) of a tensor, as unsigned integers."""
        data = np.empty(hi - lo, f"<u{width}")
        self.read(entry, width, lo, data)
        return data

    def check_unchanged(self) -> None:
        """Raises IOFailure if a file is no longer the one whose table was read."""
        for path, fd in self._fds.items():
            if identify(os.fstat(fd)) != self._identity[path]:
                raise IOFailure("the input changed while it was being read", file=path)
