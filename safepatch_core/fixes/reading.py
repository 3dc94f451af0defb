"""Open a fix file: every rule of its layout is checked here; data are read in windows of blocks, as they are used.

What only a pass over all of a tensor can tell (that its gaps and planes are of the right form) is for `Proof`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from safepatch_core.errors import InputError, IOFailure
from safepatch_core.files.parsing import Shard, read_shard, uncollected
from safepatch_core.files.reading import TensorEntry, identify, read_exact
from safepatch_core.fixes import format, reference
from safepatch_core.fixes.format import BLOCK, KEYS, MOST_CODES, VERSION, WIDEST, Facts, blocks, is_sparse
from safepatch_core.fixes.reference import Broken, Changes, Run

WINDOW = 4 << 20  # bytes of entries that are worked on at once


class Sparse(NamedTuple):
    """A plane of which few bytes are not zero."""

    at: TensorEntry
    val: TensorEntry


class Touched(NamedTuple):
    """One tensor that a fix changes: facts, and where its arrays lie."""

    name: str
    facts: Facts
    block: TensorEntry
    gap: TensorEntry
    side: TensorEntry
    planes: tuple[TensorEntry | Sparse | None, ...]  # one per byte of the widest entries; None is all zero

    @property
    def entries(self) -> int:
        return self.facts.entries

    @property
    def changes(self) -> int:
        return self.facts.changes

    def windows(self, width: int) -> Iterator[tuple[int, int]]:
        """Runs of blocks whose entries fill about a window."""
        count, step = blocks(self.entries), max(WINDOW // (BLOCK * width), 1)
        for first in range(0, count, step):
            yield first, min(first + step, count)


def stretches(rows: NDArray[np.uint64], entries: int) -> list[tuple[int, int]]:
    """The runs [lo, hi) of entries that are blocks with changes, of a window with these rows of the block table."""
    full = np.concatenate(([False], rows[1:, 1] > rows[:-1, 1], [False]))
    edges = np.flatnonzero(full[1:] != full[:-1]) * BLOCK
    return [(int(lo), min(int(hi), entries)) for lo, hi in edges.reshape(-1, 2)]


class Fix:
    """An open fix file. Its methods may be called from several threads; all raise InputError for a broken file.

    Close it after use, or use it as a context manager.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with uncollected():
            shard = read_shard(path, marks=format.MARKS)
            self.about = _checked_metadata(self.path, shard)
            self.id, self.base = self.about["id"], self.about["base"]
            self.recipe = _parsed(self.path, "recipe", self.about["recipe"])
            self.tensors = _tensors(self.path, shard, _checked_facts(self.path, self.about["tensors"]))
        self._identity, self.size, self.header_size = shard.identity, shard.size, len(shard.header)
        self._fd = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)

    def __enter__(self) -> Fix:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def changes(self) -> int:
        return sum(of.changes for of in self.tensors.values())

    def check_unchanged(self) -> None:
        """Raises IOFailure if the file is no longer the one whose header was read."""
        if identify(os.fstat(self._fd)) != self._identity:
            raise IOFailure("the fix file changed while it was being read", file=self.path)

    def broken(self, what: str, touched: Touched | None = None, **facts: object) -> NoReturn:
        """Raises InputError for a rule that the file breaks."""
        raise InputError(what, file=self.path, tensor=touched.name if touched else None, **facts)

    def rows(self, touched: Touched, first: int, last: int) -> NDArray[np.uint64]:
        """Rows first to last of a tensor's block table, checked: what they point to lies within bounds."""
        rows = self._array(touched.block, "<u8", 2 * first, 2 * last + 2).reshape(-1, 2)
        begin, end = [0, 0], [touched.gap.shape[0], touched.changes]
        if (first == 0 and rows[0].tolist() != begin) or (
            last == blocks(touched.entries) and rows[-1].tolist() != end
        ):
            found = f"{rows[0].tolist()} to {rows[-1].tolist()}"
            self.broken(
                "the block table does not span the gaps and changes",
                touched,
                found=found,
                expected=f"{begin} to {end}",
            )
        if (rows[1:] < rows[:-1]).any() or (rows[-1] > end).any():
            self.broken("the block table is not in order", touched)
        if (np.diff(rows, axis=0) > (MOST_CODES, BLOCK)).any():
            self.broken("the block table gives a block more codes or changes than it has room for", touched)
        return rows

    def run(self, touched: Touched, width: int, first: int, last: int) -> Run:
        """What the fix says about blocks [first, last) of a tensor whose entries have `width` bytes."""
        rows = self.rows(touched, first, last)
        (code, rank), (code_end, rank_end) = rows[0].tolist(), rows[-1].tolist()
        bits = 1 if touched.gap.dtype == "U8" else 2
        entries = min(touched.entries, last * BLOCK) - first * BLOCK
        if any(touched.planes[width:]):
            self.broken(f"XORs of entries wider than the tensor's {width} bytes", touched)
        return Run(
            entries,
            rows,
            self._array(touched.gap, f"<u{bits}", code, code_end),
            self._array(touched.side, "u1", rank // 8, -(-rank_end // 8)),
            tuple(self._plane(touched, plane, rank, rank_end) for plane in touched.planes[:width]),
        )

    def changes_in(self, touched: Touched, width: int, lo: int, hi: int) -> Changes:
        """The changes at positions [lo, hi) of a tensor, `at` counted from its beginning."""
        first, last = lo // BLOCK, blocks(hi)
        try:
            at, xor, side = reference.decode(self.run(touched, width, first, last))
        except Broken as error:
            self.broken(str(error), touched)
        at = at + first * BLOCK
        a, b = np.searchsorted(at, (lo, hi))
        return Changes(at[a:b], xor[a:b], side[a:b])

    def _array(self, entry: TensorEntry, dtype: str, lo: int = 0, hi: int | None = None) -> NDArray[Any]:
        """Items [lo, hi) of an array, counted flat."""
        size = np.dtype(dtype).itemsize
        hi = entry.entries if hi is None else hi
        items = np.empty(hi - lo, dtype)
        read_exact(self._fd, items, entry.start + lo * size, entry)
        return items

    def _plane(
        self, touched: Touched, plane: TensorEntry | Sparse | None, lo: int, hi: int
    ) -> NDArray[np.uint8] | None:
        """Bytes [lo, hi) of a plane, dense."""
        if plane is None:
            return None
        if isinstance(plane, TensorEntry):
            return self._array(plane, "u1", lo, hi)
        at, val = plane
        first = self._place(at, lo) if lo else 0
        last = self._place(at, hi) if hi < touched.changes else at.entries
        places = self._array(at, _place_dtype(at), first, last)
        values = self._array(val, "u1", first, last)
        if len(places) and (places[0] < lo or places[-1] >= hi or (places[1:] <= places[:-1]).any()):
            self.broken(f"the places of '{at.name}' are not in order", touched)
        dense = np.zeros(hi - lo, np.uint8)
        dense[places - places.dtype.type(lo)] = values
        return dense

    def _place(self, at: TensorEntry, rank: int) -> int:
        """How many of a sparse plane's places, which should be in order, lie before `rank`."""
        lo, hi = 0, at.entries
        while lo < hi:
            middle = (lo + hi) // 2
            if int(self._array(at, _place_dtype(at), middle, middle + 1)[0]) < rank:
                lo = middle + 1
            else:
                hi = middle
        return lo


@dataclass
class Proof:
    """Adds up, over all runs of a tensor in order, what tells that its encoding is the one that it must have."""

    fix: Fix
    touched: Touched
    codes: int = 0  # that the other type of gap would take
    nonzero: list[int] = field(default_factory=lambda: [0] * WIDEST)  # bytes, per plane

    def add(self, run: Run, codes: int) -> None:
        """One run, and how many codes of the other type it would take."""
        self.codes += codes
        for k, plane in enumerate(run.planes):
            if plane is not None:
                self.nonzero[k] += int(np.count_nonzero(plane))
        spare = -self.touched.changes % 8
        if spare and run.rows[-1, 1] == self.touched.changes and len(run.side) and run.side[-1] >> (8 - spare):
            self.fix.broken("spare side bits are set", self.touched)

    def finish(self) -> None:
        """Raises InputError where an array has the wrong form: the encoding of a change is unique."""
        touched = self.touched
        if touched.gap.dtype == "U8":
            wrong = 2 * self.codes < touched.gap.nbytes
        else:
            wrong = self.codes <= touched.gap.nbytes
        if wrong:
            self.fix.broken("its gaps are stored in the type that takes more bytes", touched, found=touched.gap.dtype)
        for k, plane in enumerate(touched.planes):
            stored = plane.at.entries if isinstance(plane, Sparse) else None
            nonzero = self.nonzero[k]
            if plane is None:
                continue
            if stored is not None and stored != nonzero:
                self.fix.broken(f"plane xor{k} holds zeros, or places that no change has", touched)
            if nonzero == 0 or is_sparse(nonzero, touched.changes) != (stored is not None):
                self.fix.broken(f"plane xor{k} has the wrong form", touched, found=f"{nonzero} bytes not zero")


def open_fix(path: str | os.PathLike[str]) -> Fix:
    """Open a fix file and check its layout. Raises InputError for whatever breaks a rule."""
    return Fix(path)


def _place_dtype(at: TensorEntry) -> str:
    return "<u8" if at.dtype == "U64" else "<u4"


def _parsed(path: Path, key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"__metadata__ key '{key}' is not JSON", file=path) from None


def _checked_metadata(path: Path, shard: Shard) -> dict[str, str]:
    about = shard.metadata
    if about.get("format") != format.FORMAT:
        raise InputError("not a fix file", file=path, expected=f"format '{format.FORMAT}' in __metadata__")
    if about.get("version") != VERSION:
        raise InputError("a fix file of another version", file=path, found=about.get("version"), expected=VERSION)
    if about.keys() != KEYS:
        raise InputError(
            "the keys of __metadata__", file=path, found=", ".join(sorted(about)), expected=", ".join(sorted(KEYS))
        )
    if not _is_hex(about["base"], 64):
        raise InputError("the base's hash in __metadata__", file=path, found=about["base"], expected="64 hex digits")
    expected = format.fix_id(about["base"], about["tensors"])
    if about["id"] != expected:
        raise InputError("its id does not fit what it says", file=path, found=about["id"], expected=expected)
    return about


def _checked_facts(path: Path, text: str) -> dict[str, Facts]:
    table = _parsed(path, "tensors", text)
    if not isinstance(table, dict) or not table or not all(map(_is_facts, table.values())):
        raise InputError(
            "__metadata__ key 'tensors'", file=path, expected="entries, changes, old and new of each touched tensor"
        )
    if format.compact(table) != text:
        raise InputError("__metadata__ key 'tensors' is not sorted, compact JSON", file=path)
    return {name: Facts(**facts) for name, facts in table.items()}


def _is_facts(facts: Any) -> bool:
    try:
        entries, changes, old, new = facts["entries"], facts["changes"], facts["old"], facts["new"]
    except (KeyError, TypeError):
        return False
    return (
        len(facts) == 4
        and type(entries) is type(changes) is int
        and 0 < changes <= entries < 1 << 63
        and _is_hex(old, 32)
        and _is_hex(new, 32)
    )


def _is_hex(text: Any, length: int) -> bool:
    return isinstance(text, str) and len(text) == length and not text.strip("0123456789abcdef")


def _tensors(path: Path, shard: Shard, facts: Mapping[str, Facts]) -> dict[str, Touched]:
    """The touched tensors, once exactly their arrays lie in the file, in the right order, types and shapes."""
    arrays = _Arrays(path, shard)
    found = {name: arrays.touched(name, facts[name]) for name in sorted(facts, key=str.encode)}
    if arrays.following is not None:
        raise InputError("an array of no touched tensor, or out of order", file=path, tensor=arrays.following.name)
    return found


class _Arrays:
    """Takes the arrays of a fix file in their order."""

    def __init__(self, path: Path, shard: Shard) -> None:
        self._path, self._rest = path, iter(shard.tensors)
        self.following = next(self._rest, None)

    def touched(self, name: str, facts: Facts) -> Touched:
        """The arrays of one tensor, which come next."""
        n = facts.changes
        block = self._take(name, "block", ("U64",), (blocks(facts.entries) + 1, 2))
        gap = self._take(name, "gap", ("U8", "U16"), None)
        side = self._take(name, "side", ("U8",), (-(-n // 8),))
        return Touched(name, facts, block, gap, side, tuple(self._plane(name, k, n) for k in range(WIDEST)))

    def _plane(self, name: str, k: int, n: int) -> TensorEntry | Sparse | None:
        following = self.following.name if self.following else ""
        if following == f"{name}::xor{k}":
            return self._take(name, f"xor{k}", ("U8",), (n,))
        if following == f"{name}::xor{k}.at":
            at = self._take(name, f"xor{k}.at", (format.place_type(n),), None)
            return Sparse(at, self._take(name, f"xor{k}.val", ("U8",), at.shape))
        return None

    def _take(self, name: str, suffix: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None) -> TensorEntry:
        entry = self.following
        if entry is None or entry.name != f"{name}::{suffix}":
            said = f"'{entry.name}'" if entry else "the end"
            raise InputError(
                f"its array '{suffix}' is missing or out of order", file=self._path, tensor=name, found=said
            )
        fits = len(entry.shape) == 1 if shape is None else entry.shape == shape
        if entry.dtype not in dtypes or not fits:
            raise InputError(
                f"its array '{suffix}'",
                file=self._path,
                tensor=name,
                found=f"{entry.dtype} {list(entry.shape)}",
                expected=f"{' or '.join(dtypes)}{'' if shape is None else f' {list(shape)}'}",
            )
        self.following = next(self._rest, None)
        return entry
