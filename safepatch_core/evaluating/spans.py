"""What is read for likelihoods: token sequences of which a tail is scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """The tokens `ids[start:]` are scored, given everything before them; start >= 1."""

    ids: Sequence[int]
    start: int

    @property
    def scored(self) -> int:
        return len(self.ids) - self.start


def windows(ids: Sequence[int], lead: Sequence[int], length: int, stride: int) -> list[Span]:
    """Windows of at most `length` tokens over a text, a new one every `stride` tokens, each opening with `lead`.

    Every token is scored exactly once, in the first window that holds it; the text's first token only if there is a
    `lead` to predict it from.
    """
    room = length - len(lead)
    step = min(stride, room)
    found = []
    begin, scored = 0, 0 if lead else 1
    while scored < len(ids):
        end = min(begin + room, len(ids))
        if end > scored:
            found.append(Span([*lead, *ids[begin:end]], len(lead) + scored - begin))
            scored = end
        begin += step
    return found
