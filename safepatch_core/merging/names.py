"""One resolver of names, for patches of every kind and their importance.

The same tensor is called differently by whoever saved it: torch.compile and FSDP wrap modules, hub checkpoints lack a
prefix that transformers adds, vision models were renamed. Names that the base has stay; the others are taken through
the exchange of a prefix under which all of them fit, if there is one and no second.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint

WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
Shapes = Mapping[str, Sequence[tuple[int, ...]]]  # by name, those that fit
Takes = Callable[[str, int], bool]  # the recipe's rule: whether a float tensor of that name and rank is a target
Pair = tuple[str, str]  # a prefix and what it becomes


@dataclass(frozen=True, slots=True)
class Exchange:
    """What the names of one checkpoint are in the base."""

    told: tuple[str, ...] = ()  # how, for people; nothing where they are the base's
    fusions: tuple[str, ...] = ()  # what else was done so that they are, for people
    closest: str | None = None  # what came nearest to serving the names that are left
    known: Mapping[str, str] = field(default_factory=dict)  # the base's names by what they are without wrappers
    names: Mapping[str, str] = field(default_factory=dict)  # those that were resolved
    pairs: tuple[Pair, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """All that was done, for people."""
        return self.told + self.fusions

    def __call__(self, name: str) -> str:
        """The base's name of `name`, also of one that was not asked for (integers, for example)."""
        if not self.told or name in self.names:
            return self.names.get(name, name)
        bare = _bare(name)
        if bare in self.known:
            return self.known[bare]
        # The longest prefix is that of the part of the model which the name is of.
        fit = [(before, after) for before, after in self.pairs if bare.startswith(before)]
        before, after = max(fit, key=lambda pair: len(pair[0]), default=("", ""))
        return after + bare.removeprefix(before)


def resolve(shapes: Shapes, base: Checkpoint, takes: Takes, file: object) -> Exchange:
    """The exchange under which the tensors of `file` are the base's.

    A name that it leads to nothing, or to a tensor of another shape, is no obstacle where `takes` says that it would
    be no target. Names without such an exchange stay as they are, which is for others to judge.

    Raises:
        InputError: two exchanges fit equally well, or two names become one.
    """
    resolver = _Resolver(base, takes, file)
    left = {name: fits for name, fits in shapes.items() if not resolver.keep(name, fits)}
    while left and resolver.exchange(left):
        left = {name: fits for name, fits in left.items() if name not in resolver.names}
    seen: set[str] = set()
    for name, to in resolver.names.items():
        if to in seen:
            raise InputError("two names of it are one tensor of the base", file=str(file), tensor=name)
        seen.add(to)
    return Exchange(
        told=tuple(resolver.told()),
        closest=resolver.closest,
        known=resolver.known,
        names=resolver.names,
        pairs=tuple(resolver.pairs),
    )


class _Resolver:
    """The base's names, and which of a checkpoint's names are found so far."""

    def __init__(self, base: Checkpoint, takes: Takes, file: object) -> None:
        self._base, self._takes, self._file = base, takes, file
        self.known: dict[str, str] = {}
        for name in base.tensors:
            self.known.setdefault(_bare(name), name)
        self.names: dict[str, str] = {}
        self.pairs: list[Pair] = []
        self.closest: str | None = None
        self._most = 0

    @cached_property
    def _alike(self) -> dict[tuple[str, ...], list[str]]:
        """The base's names by what an exchange of prefixes leaves alone; asked for where names are no base's."""
        found: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for bare in self.known:
            found[_key(bare)].append(bare)
        return found

    def keep(self, name: str, fits: Sequence[tuple[int, ...]]) -> bool:
        """Whether the base has that name, but for wrappers, with a shape that fits."""
        found = name if name in self._base.tensors else self.known.get(_bare(name))
        if found is None or self._base.tensors[found].shape not in fits:
            return False
        self.names[name] = found
        return True

    def exchange(self, left: Shapes) -> bool:
        """Serve the names that are left with the prefix that serves most of them; False where none does."""
        used, tried = set(self.names.values()), set[Pair]()
        for name in sorted(left, key=lambda name: (-name.count("."), name)):
            pairs = {pair for other in self._alike[_key(_bare(name))] if (pair := _pair(_bare(name), other))} - tried
            tried |= pairs
            scores = {pair: score for pair in pairs if (score := self._score(pair, left, used))}
            if scores:
                self._take(max(sorted(scores), key=scores.__getitem__), scores, name, left)
                return True
        return False

    def _take(self, best: Pair, scores: Mapping[Pair, int], name: str, left: Shapes) -> None:
        rivals = [pair for pair in sorted(scores) if scores[pair] == scores[best]]
        if len(rivals) > 1:
            raise InputError(
                "its names may be the base's in two ways",
                file=str(self._file),
                tensor=name,
                found=" and ".join(_line(pair) for pair in rivals[:2]),
                expected="names that one exchange of a prefix makes the base's",
            )
        self.pairs.append(best)
        for other, fits in left.items():
            if (found := self._served(best, other, fits)) is not None:
                self.names[other] = found

    def _served(self, pair: Pair, name: str, fits: Sequence[tuple[int, ...]]) -> str | None:
        """The base's tensor of a shape that fits to which the exchange leads."""
        found = self.known.get(_through(pair, name) or "")
        return found if found is not None and self._base.tensors[found].shape in fits else None

    def _score(self, pair: Pair, left: Shapes, used: set[str]) -> int:
        """How many names the exchange leads to a tensor of their shape; 0 where one that counts would be lost."""
        served, of, lost = 0, 0, None
        for name, fits in left.items():
            to = _through(pair, name)
            if to is None:
                continue
            of += 1
            found = self._served(pair, name, fits)
            if found is not None and found not in used:
                served += 1
            elif found is not None or self._takes(to, len(fits[0])):
                lost = lost or name
        if lost is not None and served > self._most:
            self._most, self.closest = served, f"{_line(pair)} serves {served} of {of} names, but not '{lost}'"
        return 0 if lost else served

    def told(self) -> list[str]:
        wrapped = any(name != to and (_bare(name), _bare(to)) != (name, to) for name, to in self.names.items())
        return (["parts of wrappers left aside"] if wrapped else []) + [_line(pair) for pair in self.pairs]


def _bare(name: str) -> str:
    """The name without the parts that wrappers add."""
    parts = name.split(".")
    return ".".join(part for part in parts if part not in WRAPPERS) if WRAPPERS.intersection(parts) else name


def _key(name: str) -> tuple[str, ...]:
    """What an exchange of prefixes leaves alone: the parameter, its module, and all numbers."""
    parts = name.split(".")
    return (*parts[-2:], *(part for part in parts if part.isdigit()))


def _pair(name: str, other: str) -> Pair | None:
    """The prefixes before the longest common end of two names; None where they are equal, or hold numbers."""
    a, b = name.split("."), other.split(".")
    same = 0
    while same < min(len(a), len(b)) and a[-1 - same] == b[-1 - same]:
        same += 1
    before, after = a[: len(a) - same], b[: len(b) - same]
    if same < 2 or before == after or any(part.isdigit() for part in before + after):
        return None
    return "".join(f"{part}." for part in before), "".join(f"{part}." for part in after)


def _through(pair: Pair, name: str) -> str | None:
    """What a name becomes; None where it does not begin so."""
    bare = _bare(name)
    return pair[1] + bare.removeprefix(pair[0]) if bare.startswith(pair[0]) else None


def _line(pair: Pair) -> str:
    before, after = pair
    if not after:
        return f"'{before}' dropped"
    return f"'{after}' for '{before}'" if before else f"'{after}' added"


def lines(what: str, told: Iterable[str]) -> list[str]:
    """A line for people, if there is something to tell."""
    joined = ", ".join(told)
    return [f"names of {what} are the base's with {joined}"] if joined else []
