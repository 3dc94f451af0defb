"""Lists of all that can be selected of a model, made by the sweep that counts it: the last then reads no patch again.

Only an engine that takes notes has them, and only as many as the memory limit leaves room for: a chunk without a list
is read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safepatch_core.backends.contract import Block, Notes, Noting, Report, Window
from safepatch_core.backends.select import Tally
from safepatch_core.merging.work import Unit
from safepatch_core.spec import EVERY, NO_KEY


@dataclass(frozen=True, slots=True)
class _List:
    """Notes of a unit, and per patch the least key that is in them."""

    notes: Notes
    floors: Sequence[int]


class Lists:
    """The lists of a merge, in `room` bytes; a unit's is given up when it is taken out."""

    def __init__(self, engine: Noting, room: int) -> None:
        self._engine, self._room = engine, room
        self._lists: dict[tuple[str, int], _List] = {}

    def count(self, unit: Unit, block: Block, windows: Sequence[Sequence[Window]]) -> Report | None:
        """As the engine's `histogram`, with a list of the unit; None, and nothing is done, where no room is left."""
        if self._room <= 0:
            return None
        report, notes = self._engine.note(block, windows)
        if notes is not None:
            self._room -= notes.nbytes
            if self._room >= 0:
                floors = [min((window.lo for window in of), default=NO_KEY) for of in windows]
                self._lists[unit.entry.name, unit.lo] = _List(notes, floors)
        return report

    def take(self, unit: Unit, tallies: Sequence[Tally]) -> Notes | None:
        """Notes that do for the unit; None where there are none, or where it is one of those that share out ties."""
        found = self._lists.pop((unit.entry.name, unit.lo), None)
        if found is None or not all(map(_serves, found.floors, tallies)):
            return None
        return found.notes


def _serves(floor: int, tally: Tally) -> bool:
    """Whether what a tally asks for is in a list of the keys from `floor` on, and needs no count of ties."""
    shared = 0 < tally.left < EVERY
    return tally.key >= floor and not shared and (tally.skip is None or _serves(floor, tally.skip))
