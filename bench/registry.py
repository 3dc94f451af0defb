"""The suite: every case by name, with its gate and its measure, and the one place that runs them.

A case is shown only if its gate passes before and its measure finds nothing wrong: a red gate prints no speed, leaves
no record and fails the run.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

from safepatch_core.errors import SafepatchError, UsageError
from safepatch_core.spec import Kind

from . import models
from .measure import Failed, Red, Series, Skipped, remove
from .models import ModelShape

MODULES = (
    "kernels",
    "merges",
    "series",
    "floor",
    "peers",
    "fixes",
    "derive",
    "shape",
    "quantised",
    "simulate",
    "tracing",
)


@dataclass
class Measured:
    """What a case found. Quantities are named by their units: …_s, …_bytes, …_per_s."""

    series: Series
    ratios: list[tuple[str, str]] = field(default_factory=list)  # subjects whose `wall_s` to divide, pairwise
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # name → text, stored beside the results


@dataclass(frozen=True)
class Case:
    """One thing to measure. `gate` raises Red, or Skipped where the case can't run here."""

    name: str  # group/…
    description: str
    params: dict[str, Any]
    gate: Callable[[Bench], None]
    measure: Callable[[Bench], Measured]
    short: bool = False  # part of the five-minute selection


@dataclass
class Bench:
    """Where and how a run of the suite works."""

    workdir: Path
    threads: int
    rounds: int = 3
    disk: int = 25_000_000_000  # bytes that may lie in `workdir` at once
    memory_limit: str | None = None  # of merges, as `--memory-limit`
    mergekit: str | None = None  # its mergekit-yaml
    timeout: float = 7200  # seconds for one process
    backend: str = "auto"
    device: str | None = None  # of the triton engine
    vram_limit: str | None = None

    def models(
        self,
        shape: ModelShape,
        kinds: Sequence[Kind] = ("checkpoint",),
        *,
        sparse: int | None = None,
        base: bool = True,
        twin: bool = False,
    ) -> Path:
        """A set of models of `shape` in the working directory, made once; what other cases left makes room for it.

        base, twin: whether the bfloat16 base and its FP8 twin are part of it. Raises Skipped where it and one output
        don't fit.
        """
        folder = self.workdir / "models" / (shape.name if sparse is None else f"{shape.name}-sparse")
        folder.mkdir(parents=True, exist_ok=True)
        writers: dict[str, Callable[[Path], object]] = {}
        if base:
            writers["base"] = lambda path: models.write_checkpoint(path, shape, sparse=sparse)
        if twin:
            writers[models.TWIN] = lambda path: models.write_twin(path, shape, sparse=sparse)
        for kind, patch in product(kinds, models.PATCHES):
            writers[models.source_name(patch, kind)] = partial(
                models.write_patch, shape=shape, name=patch, kind=kind, sparse=sparse
            )
        whole = shape.nbytes if sparse is None else sum(min(sparse, 2 * math.prod(s)) for _, s in shape.tensors())
        self._make_room({folder / part: 0 if part.endswith("-lora") else whole for part in writers}, whole)
        for part, write in writers.items():
            if not (folder / part).exists():
                fresh = folder / f".{part}"
                remove(fresh)
                write(fresh)
                fresh.rename(folder / part)
        for kind in kinds:
            for scope in ("tensor", "model"):
                models.write_recipe(models.recipe_path(folder, kind, scope), kind, scope=scope)
            if twin:
                models.write_twin_recipe(folder, kind)
        return folder

    def _make_room(self, wanted: dict[Path, int], output: int) -> None:
        """Remove models of other cases, the oldest first, until the wanted ones and an output fit."""
        # Sets that the user linked to are used and left alone.
        sets = [path for path in (self.workdir / "models").iterdir() if not path.is_symlink()]
        present = {path: _disk_use(path) for folder in sets for path in folder.iterdir() if path.is_dir()}
        missing = output + sum(size for path, size in wanted.items() if not path.exists())
        for path in sorted(present.keys() - wanted.keys(), key=lambda path: path.stat().st_mtime):
            if sum(present.values()) + missing <= self.disk:
                break
            remove(path)
            del present[path]
        free = shutil.disk_usage(self.workdir).free
        if sum(present.values()) + missing > self.disk or missing > free:
            needed, allowed = sum(present.values()) + missing, min(self.disk, free)
            raise Skipped(f"needs {needed / 1e9:.1f} GB of disk, found {allowed / 1e9:.1f}")

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty directory on the same filesystem as the models."""
        folder = Path(tempfile.mkdtemp(dir=self.workdir))
        try:
            yield folder
        finally:
            remove(folder)


def _disk_use(path: Path) -> int:
    """Bytes that a directory's files take on the disk."""
    return sum(512 * file.stat().st_blocks for file in path.rglob("*") if file.is_file())


def cases() -> dict[str, Case]:
    """Every case by name, group by group."""
    found: dict[str, Case] = {}
    for module in MODULES:
        for case in import_module(f".{module}", __package__).cases():
            if case.name in found:
                raise RuntimeError(f"two cases are called {case.name}")
            found[case.name] = case
    return found


def select(patterns: Sequence[str]) -> list[Case]:
    """The cases that match any of the globs; a group's name stands for all of it. Raises UsageError."""
    everything = cases()
    chosen: dict[str, Case] = {}
    for pattern in patterns:
        matching = [
            case
            for name, case in everything.items()
            if fnmatchcase(name, pattern) or name.startswith(f"{pattern.rstrip('/')}/")
        ]
        if not matching:
            raise UsageError("no such case", found=repr(pattern), expected="a name or glob of `bench list`")
        chosen |= {case.name: case for case in matching}
    return list(chosen.values())


@dataclass(frozen=True)
class Outcome:
    """How a case ended: `measured` is None unless it is green."""

    case: Case
    measured: Measured | None
    why: str = ""
    red: bool = False


def run(case: Case, bench: Bench) -> Outcome:
    """Gate, then measure. A failed gate, or anything wrong met while measuring, leaves no figures."""
    try:
        case.gate(bench)
        return Outcome(case, case.measure(bench))
    except Skipped as reason:
        return Outcome(case, None, str(reason))
    except (Red, Failed, SafepatchError, AssertionError) as reason:
        return Outcome(case, None, str(reason) or type(reason).__name__, red=True)
