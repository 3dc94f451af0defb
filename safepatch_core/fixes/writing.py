"""Write a fix file: changes come tensor by tensor, in any cut; nothing is held but a window of them.

A tensor's changes lie in temporary files until its last one: only then it is known which type its gaps take and which
planes are sparse. What is ready waits in another one, for the header of the file tells all sizes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safepatch_core.fixes import codec, format
from safepatch_core.fixes.format import BLOCK, SKIP, Facts, blocks, is_sparse
from safepatch_core.fixes.reference import Entries
from safepatch_core.ranks import Ranks

_IN_MEMORY = 1 << 20  # bytes of a temporary file that are held in memory
_STEP = 1 << 20  # changes that are encoded at once


class Stored(NamedTuple):
    """A finished array: suffix, dtype, shape, and where it lies in the spool."""

    suffix: str
    dtype: str
    shape: list[int]
    at: int
    nbytes: int


@dataclass
class Ready:
    """A finished tensor."""

    facts: Facts
    arrays: list[Stored]


class _Scratch:
    """Items of one array that come in pieces and are read again in pieces."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(folder))

    def put(self, items: NDArray[Any]) -> None:
        self._file.write(items.tobytes())

    def rewind(self) -> None:
        self._file.seek(0)

    def take(self, count: int) -> NDArray[Any]:
        """The next `count` items, or those that are left."""
        return np.frombuffer(self._file.read(count * self._dtype.itemsize), self._dtype)

    def pieces(self) -> Iterator[NDArray[Any]]:
        """All items from the first on, in pieces of a multiple of 8."""
        self.rewind()
        while len(piece := self.take(_STEP)):
            yield piece

    def close(self) -> None:
        self._file.close()


class Encoder:
    """Collects the changes of one tensor, in order of position."""

    def __init__(self, folder: Path, entries: int, width: int) -> None:
        self._entries = entries
        self._counts = np.zeros(blocks(entries), np.int64)
        self._nonzero = [0] * width
        self._old, self._new = blake2b(digest_size=16), blake2b(digest_size=16)
        self._at, self._side = _Scratch(folder, "<u2"), _Scratch(folder, "u1")
        self._planes = [_Scratch(folder, "u1") for _ in range(width)]

    def add(self, old: Entries, new: Entries, start: int) -> None:
        """The entries of either side from position `start` on."""
        for lo in range(0, len(old), 8 * BLOCK):
            self._add(old[lo : lo + 8 * BLOCK], new[lo : lo + 8 * BLOCK], start + lo)

    def _add(self, old: Entries, new: Entries, start: int) -> None:
        found = codec.find(old, new, start)
        first = start // BLOCK
        self._counts[first : first + len(found.counts)] += found.counts
        self._at.put(found.at)
        self._side.put(found.side)
        for k, plane in enumerate(found.planes):
            self._nonzero[k] += int(np.count_nonzero(plane))
            self._planes[k].put(plane)
        self._old.update(found.old.tobytes())
        self._new.update(found.new.tobytes())

    @property
    def changes(self) -> int:
        return int(self._counts.sum())

    def finish(self, spool: IO[bytes]) -> Ready:
        """The tensor's arrays, appended to `spool`."""
        n, arrays = self.changes, []

        def store(suffix: str, dtype: str, pieces: Iterator[NDArray[Any]]) -> Stored:
            at = spool.tell()
            items = 0
            for piece in pieces:
                spool.write(piece.tobytes())
                items += len(piece)
            return Stored(suffix, dtype, [items], at, spool.tell() - at)

        lengths = {dtype: self._lengths(most) for dtype, most in SKIP.items()}
        dtype = "U8" if lengths["U8"].sum() <= 2 * lengths["U16"].sum() else "U16"
        rows = np.zeros((len(self._counts) + 1, 2), "<u8")
        rows[1:, 0], rows[1:, 1] = np.cumsum(lengths[dtype]), np.cumsum(self._counts)
        arrays.append(store("block", "U64", iter([rows]))._replace(shape=list(rows.shape)))
        arrays.append(store("gap", dtype, (codec.gaps(*some, SKIP[dtype])[0] for some in self._some_blocks())))
        packed = (np.packbits(piece, bitorder="little") for piece in self._side.pieces())
        arrays.append(store("side", "U8", packed))
        for k, plane in enumerate(self._planes):
            if is_sparse(self._nonzero[k], n) and self._nonzero[k]:
                places = format.place_type(n)
                arrays.append(store(f"xor{k}.at", places, _places(plane, "<u8" if places == "U64" else "<u4")))
                arrays.append(store(f"xor{k}.val", "U8", (piece[piece != 0] for piece in plane.pieces())))
            elif self._nonzero[k]:
                arrays.append(store(f"xor{k}", "U8", plane.pieces()))
        return Ready(Facts(self._entries, n, self._old.hexdigest(), self._new.hexdigest()), arrays)

    def _lengths(self, most: int) -> NDArray[np.int64]:
        return np.concatenate([codec.gap_lengths(*some, most) for some in self._some_blocks()])

    def _some_blocks(self) -> Iterator[tuple[NDArray[np.uint16], NDArray[np.int64]]]:
        """The places of changes and their number per block, in pieces of whole blocks."""
        self._at.rewind()
        step = _STEP // BLOCK
        for first in range(0, len(self._counts), step):
            counts = self._counts[first : first + step]
            yield self._at.take(int(counts.sum())), counts

    def close(self) -> None:
        for scratch in (self._at, self._side, *self._planes):
            scratch.close()


def _places(plane: _Scratch, dtype: str) -> Iterator[NDArray[Any]]:
    done = 0
    for piece in plane.pieces():
        yield (np.flatnonzero(piece) + done).astype(dtype)
        done += len(piece)


class Writer:
    """Collects finished tensors, and writes them out in the order of their names. A context manager.

    Temporary files lie in `folder`, where the output goes, and have no names; only what a rank collects for the first
    one is a file with a name, `shared`.
    """

    def __init__(self, folder: Path, shared: Path | None = None) -> None:
        self._folder, self._shared = folder, shared
        self._ready: dict[str, tuple[Ready, IO[bytes]]] = {}
        self._open = ExitStack()
        spool = tempfile.TemporaryFile(dir=folder) if shared is None else open(shared, "w+b")
        self._spool: IO[bytes] = self._open.enter_context(spool)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        if self._shared is not None:
            self._shared.unlink(missing_ok=True)

    def encoder(self, entries: int, width: int) -> Encoder:
        return Encoder(self._folder, entries, width)

    def add(self, name: str, encoder: Encoder) -> None:
        """A tensor is complete; one without changes leaves nothing."""
        if encoder.changes:
            self._ready[name] = encoder.finish(self._spool), self._spool
        encoder.close()

    def join(self, ranks: Ranks) -> None:
        """Every rank collected some of the tensors; now all know of all, and the first may write them."""
        self._spool.flush()
        for path, found in ranks.gather((self._shared, {name: ready for name, (ready, _) in self._ready.items()})):
            if path != self._shared:
                spool = self._open.enter_context(open(path, "rb"))
                self._ready.update({name: (ready, spool) for name, ready in found.items()})

    @property
    def facts(self) -> dict[str, Facts]:
        return {name: ready.facts for name, (ready, _) in self._ready.items()}

    def write(self, file: IO[bytes], about: Mapping[str, str]) -> None:
        """The whole fix file, with this metadata."""
        self._spool.flush()
        ready = [(name, *self._ready[name]) for name in sorted(self._ready, key=str.encode)]
        arrays = [(f"{name}::{a.suffix}", a, spool) for name, of, spool in ready for a in of.arrays]
        file.write(format.header(about, [(name, a.dtype, a.shape, a.nbytes) for name, a, _ in arrays]))
        for _, stored, spool in arrays:
            end = stored.at + stored.nbytes
            for at in range(stored.at, end, _IN_MEMORY):
                file.write(os.pread(spool.fileno(), min(_IN_MEMORY, end - at), at))
