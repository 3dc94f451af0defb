"""Which patch a changed entry belongs to: a merge done again, of which only that is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import SELECT_NONE, Backend, Bits, Block, Cut, Report
from safepatch_core.backends.reference import to_float32
from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.files.disk import Extent
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.layout import OutputPart
from safepatch_core.merging.plan import Plan
from safepatch_core.merging.quantised.sums import Owners
from safepatch_core.merging.stream import Merge, Work
from safepatch_core.spec import ITEMSIZE

# The owner of an entry that several patches selected. Patches are numbered in the order of the recipe.
SHARED = 255
# Entries whose owners are asked for together.
PIECE = 1 << 18


def bytes_of(plan: Plan) -> int:
    """An upper bound of what is held beside the merge: a unit's base, the owners of a tensor, a piece in float32."""
    targets = plan.targets.values()
    units = (ITEMSIZE[t.entry.dtype] * (t.entry.entries if t.whole else plan.chunk_entries(t)) for t in targets)
    selected = (t.entry.entries if plan.whole_model else min(t.entry.entries, sum(t.quotas)) for t in targets)
    return max(units, default=0) + max(selected, default=0) + 16 * PIECE


def find_owners(plan: Plan, out: Checkpoint, found: Callable[[TensorEntry, Owners], None]) -> None:
    """Merge again; `found` is called for each target with the owners of the entries that changed, in their order.

    Raises:
        InputError: the tensors of `out` are not what the recipe gives, or an input breaks a rule.
    """
    with closing(Inputs((out,))) as files:
        Merge(plan, plan.engine, around=_Recorder(plan, out, files, found).around, thorough=True).run(_Nowhere(plan))


class _Recorder:
    """Sees each unit before and after its patches were applied."""

    def __init__(
        self, plan: Plan, out: Checkpoint, files: Inputs, found: Callable[[TensorEntry, Owners], None]
    ) -> None:
        self._engine, self._out, self._files, self._found = plan.engine, out, files, found
        self._parts: list[Owners] = []

    def around(self, apply: Callable[[Work], None]) -> Callable[[Work], None]:
        def work(unit: Work) -> None:
            if unit.block is None:
                return
            before = replace(unit.block, base=Bits(unit.block.base.data.copy(), unit.block.base.dtype))
            apply(unit)
            self._require_same(unit)
            self._parts += [
                _owners(
                    self._engine, piece, unit.cuts, unit.block.base.data[piece.start - before.start :][: len(piece)]
                )
                for piece in (before.slice(lo, lo + PIECE) for lo in range(0, len(before), PIECE))
            ]
            if unit.unit.hi == unit.unit.entry.entries:
                self._found(unit.unit.entry, np.concatenate(self._parts))
                self._parts.clear()

        return work

    def _require_same(self, unit: Work) -> None:
        """The merge gives what the checkpoint holds."""
        entry = self._out.tensors[unit.unit.entry.name]
        held = np.empty(len(unit.base), np.uint8)
        self._files.read(entry, unit.unit.lo * ITEMSIZE[entry.dtype], held)
        if not np.array_equal(held, unit.base):
            raise InputError("is not what the recipe gives", file=entry.path, tensor=entry.name)


def _owners(engine: Backend, block: Block, cuts: Sequence[Cut], new: NDArray[np.unsignedinteger]) -> Owners:
    """Of the entries that changed, which patch alone selected each.

    A patch is asked by applying it alone, to the base in float32: there no step is lost that shows in the result.
    """
    changed = np.flatnonzero(block.base.data != new)
    owners = np.full(len(changed), SHARED, np.uint8)
    if not len(changed):
        return owners
    wide = replace(block, base=Bits(to_float32(block.base).view(np.uint32), "F32"))
    alone, times = np.empty_like(wide.base.data), np.zeros(len(changed), np.uint8)
    for p in range(len(block.patches)):
        engine.apply(wide, [cut if q == p else SELECT_NONE for q, cut in enumerate(cuts)], alone)
        acts = (alone != wide.base.data)[changed]
        owners[acts], times = p, times + acts
    owners[times != 1] = SHARED
    return owners


class _Nowhere:
    """A `stream.Sink` that keeps nothing, of a merge of the targets alone."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def begin(self, part: OutputPart, counts: dict[str, Report]) -> OutputPart | None:
        targets = tuple(entry for entry in part.tensors if entry.name in self._plan.targets)
        return OutputPart(part.output, targets, part.lo, part.hi)

    def write(self, data: memoryview, source: Extent | None = None) -> None:
        pass

    def end(self) -> None:
        pass
