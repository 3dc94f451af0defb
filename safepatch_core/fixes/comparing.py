"""Merges and fixes side by side: what each changes, and which entries two of them both change.

Entries are compared in windows, so that nothing of a model's size is ever in memory. A fix tells its own positions;
those of a checkpoint come from comparing it with its base. Without the base a manifest tells how many, not which.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safepatch_core.errors import InputError, UsageError
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint, require_same_table
from safepatch_core.files.disk import hash_file
from safepatch_core.files.filenames import MANIFEST
from safepatch_core.files.parsing import BITS, read_json
from safepatch_core.files.reading import TensorEntry
from safepatch_core.fixes.checking import check_table
from safepatch_core.fixes.format import BLOCK, WIDEST, table_hash
from safepatch_core.fixes.info import Share, added_up, kind_of, layer_of
from safepatch_core.fixes.reading import Fix, open_fix
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.manifest import Manifest, read_manifest

Progress = Callable[[int, int], None]
STEP = 16 * BLOCK  # entries that are compared at once


@dataclass(frozen=True)
class Compared:
    """One fix or merge of a report."""

    name: str
    kind: Literal["fix", "merge", "checkpoint"]  # a checkpoint without a manifest is just that
    counted: Literal["changed", "acted on"]  # of a manifest alone: entries that rounding may have left as they were
    id: str | None  # of a fix
    base: str | None  # hash of its base's table, where that is known
    size: int  # bytes of the fix, or of the merge's files
    recipe: Any
    patches: Mapping[str, Mapping[str, int]]  # entries that each patch of a merge selected, and acted on
    files: Mapping[str, str]  # SHA-256; those of a merge as its manifest lists them
    tensors: Mapping[str, int]  # how many entries change, where any does

    @property
    def changes(self) -> int:
        return sum(self.tensors.values())


@dataclass(frozen=True)
class Overlap:
    """The entries that two of a report both change."""

    a: str
    b: str
    shared: int
    union: int
    alike: int  # of the shared ones, those in which both flip the same bits
    tensors: Mapping[str, int]  # shared entries, where there are any

    @property
    def iou(self) -> float:
        """Intersection over union."""
        return self.shared / self.union if self.union else 0.0


@dataclass(frozen=True)
class ReportResult:
    """Fixes and merges of one base side by side."""

    items: tuple[Compared, ...]
    entries: Mapping[str, int]  # of every tensor that one of them changes
    overlaps: tuple[Overlap, ...]  # of every two whose positions are known

    def shares(self, item: Compared) -> dict[str, Share]:
        """Per tensor that any of them changes, how much of it this one does."""
        return {name: Share(entries, item.tensors.get(name, 0)) for name, entries in self.entries.items()}

    def layers(self, item: Compared) -> dict[str, Share]:
        return added_up(self.shares(item), layer_of)

    def kinds(self, item: Compared) -> dict[str, Share]:
        return added_up(self.shares(item), kind_of)

    def total(self, item: Compared) -> Share:
        return sum(self.shares(item).values(), Share(0, 0))

    def recipe_rows(self) -> list[tuple[str, list[Any]]]:
        """Every key of any recipe with its value in each; `ABSENT` where a recipe lacks it."""
        flat = [dict(_flattened(item.recipe)) for item in self.items]
        keys = dict.fromkeys(key for of in flat for key in of)
        return [(key, [of.get(key, ABSENT) for of in flat]) for key in keys]

    def data(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "items": [
                {
                    **{key: getattr(item, key) for key in ("name", "kind", "counted", "id", "base", "size")},
                    "entries": self.total(item).entries,
                    "changes": item.changes,
                    "layers": _plain(self.layers(item)),
                    "kinds": _plain(self.kinds(item)),
                    "tensors": _plain(self.shares(item)),
                    **{key: getattr(item, key) for key in ("patches", "recipe", "files")},
                }
                for item in self.items
            ],
            "overlaps": [
                {**{key: getattr(of, key) for key in ("a", "b", "shared", "union", "iou", "alike", "tensors")}}
                for of in self.overlaps
            ],
            "recipe_differences": [key for key, values in self.recipe_rows() if differ(values)],
        }


class Absent:
    """What a recipe says about a key that it lacks."""

    def __repr__(self) -> str:
        return "—"


ABSENT = Absent()


def differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def names_of(paths: Sequence[str | os.PathLike[str]]) -> dict[str, Path]:
    """What to call each: its file name, where that is enough to tell them apart."""
    found = [Path(os.path.abspath(path)) for path in paths]
    if not found:
        raise UsageError("nothing to report on", expected="fix files or merged checkpoints")
    twice = next((path for path, count in Counter(found).items() if count > 1), None)
    if twice is not None:
        raise UsageError("named twice", file=twice)
    short = Counter(path.name for path in found)
    return {
        path.name if short[path.name] == 1 else os.fspath(given): path
        for given, path in zip(paths, found, strict=True)
    }


class _Changes(NamedTuple):
    """Where entries change, ascending from the beginning of their tensor, and the bits that flip."""

    at: NDArray[np.int64]
    xor: NDArray[np.unsignedinteger[Any]]


class _OfFix:
    """A fix, which tells positions and counts by itself."""

    def __init__(self, name: str, fix: Fix) -> None:
        self.name, self.fix = name, fix
        self.entries: Mapping[str, int] = {name: touched.entries for name, touched in fix.tensors.items()}
        self.known: Mapping[str, int] | None = {name: touched.changes for name, touched in fix.tensors.items()}

    def nbytes(self, name: str) -> int:
        return self.fix.tensors[name].gap.nbytes

    def changes(self, name: str, lo: int, hi: int) -> _Changes:
        found = self.fix.changes_in(self.fix.tensors[name], WIDEST, lo, hi)
        return _Changes(found.at, found.xor)

    def told(self, tensors: Mapping[str, int]) -> Compared:
        fix, path = self.fix, self.fix.path
        sums = {path.name: hash_file(path)}
        fix.check_unchanged()
        return Compared(self.name, "fix", "changed", fix.id, fix.base, fix.size, fix.recipe, {}, sums, tensors)

    def close(self) -> None:
        self.fix.close()


class _OfManifest:
    """A merge without its base: counts alone."""

    def __init__(self, name: str, manifest: Manifest, acted: Mapping[str, int]) -> None:
        self.name, self.manifest = name, manifest
        self.entries: Mapping[str, int] = {name: of.entries for name, of in manifest.patches[0].tensors.items()}
        self.known: Mapping[str, int] | None = acted

    def told(self, tensors: Mapping[str, int]) -> Compared:
        return _of_merge(self.name, self.manifest, "acted on", None, tensors)

    def close(self) -> None:
        pass


class _OfCheckpoint:
    """A checkpoint beside its base, whose changes have to be counted."""

    def __init__(self, name: str, base: Checkpoint, merged: Checkpoint, manifest: Manifest | None) -> None:
        self.name, self.base, self.merged, self.manifest = name, base, merged, manifest
        self.entries: Mapping[str, int] = {
            name: entry.nbytes // _width(entry) for name, entry in base.tensors.items()
        }
        self.known: Mapping[str, int] | None = None
        self._files = Inputs((base, merged))

    def nbytes(self, name: str) -> int:
        return 2 * self.base.tensors[name].nbytes

    def changes(self, name: str, lo: int, hi: int) -> _Changes:
        sides: list[NDArray[np.unsignedinteger[Any]]] = []
        for checkpoint in (self.base, self.merged):
            entry = checkpoint.tensors[name]
            side = np.empty(hi - lo, f"<u{_width(entry)}")
            self._files.read(entry, lo * side.itemsize, side.view(np.uint8))
            sides.append(side)
        xor: NDArray[np.unsignedinteger[Any]] = np.bitwise_xor(*sides)
        at = np.flatnonzero(xor)
        return _Changes(at + lo, xor[at])

    def told(self, tensors: Mapping[str, int]) -> Compared:
        self._files.check_unchanged()
        base = table_hash(self.base.tensors)
        if self.manifest is not None:
            return _of_merge(self.name, self.manifest, "changed", base, tensors)
        size = sum(shard.size for shard in self.merged.shards)
        return Compared(self.name, "checkpoint", "changed", None, base, size, None, {}, {}, tensors)

    def close(self) -> None:
        self._files.close()


# `entries`: of the tensors that it may change. `known`: how many of them change, where that needs no comparing.
Item = _OfFix | _OfManifest | _OfCheckpoint
# Those of which it is known which entries change: `changes` at positions [lo, hi), and `nbytes`, what that reads.
Located = _OfFix | _OfCheckpoint


def _of_merge(
    name: str,
    manifest: Manifest,
    counted: Literal["changed", "acted on"],
    base: str | None,
    tensors: Mapping[str, int],
) -> Compared:
    size = sum(file.size for file in manifest.files.values())
    sums = {name: file.sha256 for name, file in manifest.files.items()}
    patches = {
        patch.name: {key: sum(getattr(of, key) for of in patch.tensors.values()) for key in ("selected", "applied")}
        for patch in manifest.patches
    }
    recipe = manifest.recipe.model_dump(mode="json")
    return Compared(name, "merge", counted, None, base, size, recipe, patches, sums, tensors)


def _width(entry: TensorEntry) -> int:
    """Bytes in which entries are compared; several share one where they have less."""
    return max(BITS[entry.dtype] // 8, 1)


def open_item(name: str, path: Path, base: Checkpoint | None) -> Item:
    if not path.exists():
        raise InputError("no such file or directory", file=path)
    if path.is_file() and (base is None or _is_fix(path)):
        return _OfFix(name, _fitting(open_fix(path), base))
    manifest = _manifest_of(path, needed=base is None)
    if base is not None:
        merged = open_checkpoint(path)
        require_same_table(base, merged)
        return _OfCheckpoint(name, base, merged, manifest)
    assert manifest is not None
    acted = manifest.acted()
    if acted is None:
        raise InputError(
            "its patches act together, and the manifest doesn't tell on how many entries",
            file=path,
            found=f"combine: {manifest.recipe.combine}",
            expected="--base, to count them",
        )
    return _OfManifest(name, manifest, acted)


def _is_fix(path: Path) -> bool:
    """Whether a file says that it is one; another is compared as a checkpoint of one file."""
    try:
        open_fix(path).close()
    except InputError as error:
        if error.what != "not a fix file":
            raise
        return False
    return True


def _fitting(fix: Fix, base: Checkpoint | None) -> Fix:
    try:
        if base is not None:
            check_table(fix, base)
    except InputError:
        fix.close()
        raise
    return fix


def _manifest_of(root: Path, *, needed: bool) -> Manifest | None:
    """What `merge` wrote beside its output; `apply` writes a manifest of another kind, without counts."""
    path = root / MANIFEST
    if path.is_file():
        found = read_json(path, within=root)
        if not needed and isinstance(found, dict) and "patches" not in found:
            return None
        return read_manifest(path)
    if needed:
        raise InputError(
            f"not the output of a merge: no {MANIFEST}", file=root, expected="--base, to compare it with"
        )
    return None


def compare(items: Sequence[Item], progress: Progress) -> ReportResult:
    """What the items change, and what every two of them have in common."""
    entries = _entries(items)
    counts = [Counter(item.known or {}) for item in items]
    places = [i for i, item in enumerate(items) if isinstance(item, Located)]
    pairs = {pair: _Pair() for pair in combinations(places, 2)}
    work = {name: _readers(items, name) for name in entries}
    done, total = 0, sum(item.nbytes(name) for name, readers in work.items() for item in readers.values())
    for name, readers in work.items():
        for lo in range(0, entries[name] if readers else 0, STEP):
            hi = min(lo + STEP, entries[name])
            found = {i: item.changes(name, lo, hi) for i, item in readers.items()}
            for i in (i for i, item in readers.items() if item.known is None):
                counts[i][name] += len(found[i].at)
            for a, b in combinations(readers, 2):
                pairs[a, b].add(name, found[a], found[b])
        done += sum(item.nbytes(name) for item in readers.values())
        progress(done, total)
    told = tuple(item.told({t: n for t, n in of.items() if n}) for item, of in zip(items, counts, strict=True))
    changed = {name for item in told for name in item.tensors}
    return ReportResult(
        told,
        {name: of for name, of in entries.items() if name in changed},
        tuple(pair.told(told[a], told[b]) for (a, b), pair in pairs.items()),
    )


def _entries(items: Sequence[Item]) -> dict[str, int]:
    """How many entries each tensor has, in bytewise order; all must say the same."""
    found: dict[str, int] = {}
    for item in items:
        for name, entries in item.entries.items():
            if found.setdefault(name, entries) != entries:
                raise InputError(
                    f"not of the base of {items[0].name}",
                    file=item.name,
                    tensor=name,
                    found=f"{entries} entries",
                    expected=str(found[name]),
                )
    return {name: found[name] for name in sorted(found, key=str.encode)}


def _readers(items: Sequence[Item], name: str) -> dict[int, Located]:
    """Those of which a tensor has to be read: all that it may have changes in common, or that have to be counted."""
    having = {i: item for i, item in enumerate(items) if isinstance(item, Located) and name in item.entries}
    return having if len(having) > 1 else {i: item for i, item in having.items() if item.known is None}


@dataclass
class _Pair:
    """What two have in common, as it is added up."""

    shared: Counter[str] = field(default_factory=Counter)
    alike: int = 0

    def add(self, name: str, a: _Changes, b: _Changes) -> None:
        _, left, right = np.intersect1d(a.at, b.at, assume_unique=True, return_indices=True)
        self.shared[name] += len(left)
        self.alike += int(np.count_nonzero(a.xor[left] == b.xor[right]))

    def told(self, a: Compared, b: Compared) -> Overlap:
        shared = {name: n for name, n in self.shared.items() if n}
        both = sum(shared.values())
        return Overlap(a.name, b.name, both, a.changes + b.changes - both, self.alike, shared)


def _flattened(recipe: Any, under: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; patches by their names."""
    if isinstance(recipe, dict) and recipe:
        for key, value in recipe.items():
            yield from _flattened(value, f"{under}.{key}" if under else str(key))
    elif isinstance(recipe, list) and recipe and all(isinstance(of, dict) and "name" in of for of in recipe):
        for of in recipe:
            rest = {key: value for key, value in of.items() if key != "name"}
            yield from _flattened(rest, f"{under}.{of['name']}")
    elif recipe is not None or under:
        yield under, recipe


def _plain(shares: Mapping[str, Share]) -> dict[str, dict[str, int]]:
    return {name: {"entries": of.entries, "changes": of.changes} for name, of in shares.items()}
