"""Is a merged checkpoint what its manifest says, and what its recipe gives? The functions behind `verify`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

from safepatch_core.backends.contract import Report
from safepatch_core.errors import InputError, SafepatchError
from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.files.companions import lacking
from safepatch_core.files.disk import Extent, hash_file
from safepatch_core.files.filenames import KEPT, LEDGER, MANIFEST, SUMS
from safepatch_core.merging.api import manifest, model_card, planned
from safepatch_core.merging.engine import EngineOptions
from safepatch_core.merging.layout import OutputPart
from safepatch_core.merging.plan import Plan
from safepatch_core.merging.recipe import Recipe
from safepatch_core.merging.stream import Merge


@dataclass
class VerifyResult:
    """What was checked, and every difference found, one line each."""

    files: int = 0
    tensors: int = 0
    recomputed: bool = False
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # what loaders will miss, though it is as it was made

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    out: str | os.PathLike[str],
    recipe: str | os.PathLike[str] | Recipe | Plan | None = None,
    **engine: Unpack[EngineOptions],
) -> VerifyResult:
    """Check a merged checkpoint; with a recipe, also recompute every byte and compare.

    Sums, sizes, the set of files, the manifest and the tensor tables are checked.

    Args:
        out: the checkpoint's directory.
        recipe: what it should have been made from: a recipe file, a `Recipe` or a `Plan`.
        **engine: what recomputes, see `EngineOptions`.

    Raises:
        InputError: `out` is not a merged checkpoint at all; everything else is in the result.
        UsageError: the recipe or an option is wrong.
    """
    root = Path(out)
    sums = _read_sums(root)
    verdict = VerifyResult(files=len(sums))
    present = {p.name for p in root.iterdir()}
    for name in sorted(present - sums.keys() - {SUMS, LEDGER, KEPT}):
        verdict.problems.append(f"{name}: not listed in {SUMS}")
    for name, expected in sorted(sums.items()):
        path = root / name
        if not path.is_file():
            verdict.problems.append(f"{name}: missing")
        elif (found := hash_file(path)) != expected:
            verdict.problems.append(f"{name}: SHA-256 is {found}, expected {expected}")
    verdict.warnings += lacking(root, present)
    _check_manifest(root, sums, verdict)
    try:
        verdict.tensors = len(open_checkpoint(root).tensors)
    except SafepatchError as error:
        verdict.problems.append(str(error))
    if recipe is not None:
        _recompute(root, planned(recipe, engine), verdict)
    return verdict


def _read_sums(root: Path) -> dict[str, str]:
    if (root / SUMS).exists() and not (root / SUMS).is_file():
        raise InputError("not a regular file", file=root / SUMS)
    try:
        text = (root / SUMS).read_bytes().decode()
    except OSError as error:
        if not os.path.lexists(root):
            raise InputError("no such file or directory", file=root) from None
        raise InputError(f"not a merged checkpoint: no {SUMS} ({error.strerror})", file=root) from None
    except UnicodeDecodeError:
        raise InputError("not UTF-8", file=root / SUMS) from None
    if not text.endswith("\n"):
        raise InputError("the last line has no end", file=root / SUMS)
    sums = {}
    for number, line in enumerate(text[:-1].split("\n"), 1):
        match = re.fullmatch(r"([0-9a-f]{64})  ([^/\n]+)", line)
        if match is None:
            raise InputError(f"line {number} is not a checksum", file=root / SUMS)
        if match[2] in sums:
            raise InputError(f"line {number} names a file again", file=root / SUMS, found=match[2])
        sums[match[2]] = match[1]
    return sums


def _check_manifest(root: Path, sums: Mapping[str, str], verdict: VerifyResult) -> None:
    try:
        if not (root / MANIFEST).is_file():
            raise FileNotFoundError
        files = json.loads((root / MANIFEST).read_bytes())["files"]
        listed = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        verdict.problems.append(f"{MANIFEST}: missing or damaged")
        return
    for name, (size, digest) in sorted(listed.items()):
        if sums.get(name) != digest:
            verdict.problems.append(f"{name}: {SUMS} and {MANIFEST} disagree")
        path = root / name
        if path.is_file() and path.stat().st_size != size:
            verdict.problems.append(f"{name}: {path.stat().st_size} bytes, expected {size}")


class _Compare:
    """A sink that compares with the published files instead of writing."""

    def __init__(self, root: Path, verdict: VerifyResult) -> None:
        self._root, self._verdict = root, verdict
        self.counts: dict[str, Report] = {}

    def begin(self, part: OutputPart, counts: dict[str, Report]) -> OutputPart | None:
        output = part.output
        self._name, self._at, self._differs, self._counts = output.name, 0, False, counts
        path = self._root / output.name
        if not path.is_file():
            self._verdict.problems.append(f"{output.name}: missing")
        self._file = open(path if path.is_file() else os.devnull, "rb")
        return part

    def write(self, data: memoryview, source: Extent | None = None) -> None:
        found = self._file.read(data.nbytes)
        if not self._differs and found != data.cast("B"):
            self._differs = True
            end = self._at + data.nbytes
            self._verdict.problems.append(f"{self._name}: differs from the recipe within bytes {self._at} to {end}")
        self._at += data.nbytes

    def end(self) -> None:
        if self._file.read(1):
            self._verdict.problems.append(f"{self._name}: longer than the recipe's {self._at} bytes")
        self.counts.update(self._counts)
        self.close()

    def close(self) -> None:
        self._file.close()


def _recompute(root: Path, plan: Plan, verdict: VerifyResult) -> None:
    sink = _Compare(root, verdict)
    try:
        Merge(plan, plan.engine).run(sink)
    finally:
        sink.close()
    small = {path.name: path.read_bytes() for path in plan.companions}
    small["README.md"] = model_card(plan).encode()
    if plan.index is not None:
        small[plan.index.name] = plan.index.data
    for name, data in small.items():
        if not (root / name).is_file() or (root / name).read_bytes() != data:
            verdict.problems.append(f"{name}: differs from the recipe")
    names = {*small, *(o.name for o in plan.outputs)}
    if (root / MANIFEST).is_file() and not verdict.problems:
        files = {n: {"size": (root / n).stat().st_size, "sha256": hash_file(root / n)} for n in names}
        if (root / MANIFEST).read_text() != manifest(plan, sink.counts, files):
            verdict.problems.append(f"{MANIFEST}: differs from the recipe")
    verdict.recomputed = True
