"""Which side of a fix is a checkpoint on? Told for every touched entry, proved by hashes, before a byte changes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal, TypeVar

import numpy as np

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.files.reading import TensorEntry
from safepatch_core.fixes import codec
from safepatch_core.fixes.format import BLOCK, WIDTH, table_hash
from safepatch_core.fixes.reading import WINDOW, Fix, Proof, Touched, stretches
from safepatch_core.fixes.reference import Broken, Entries, Run, Tally
from safepatch_core.merging.inputs import Inputs
from safepatch_core.threads import room_for_a_thread

T = TypeVar("T")
U = TypeVar("U")
Direction = Literal["apply", "revert"]
THREADS = 2  # that tell sides or set them, each with a window of its own: decoding and hashing take most of a core
GOAL = {"apply": codec.NEW, "revert": codec.OLD}
Advance = Callable[[int], None]
# What `codec.settle` does for entries that are known: gets a run and room for the old and the new entries.
Settle = Callable[[Run, Entries, Entries], Tally]


@dataclass(frozen=True, slots=True)
class Sides:
    """How many touched entries are on either side."""

    old: int
    new: int

    def __add__(self, other: Sides) -> Sides:
        return Sides(self.old + other.old, self.new + other.new)

    @property
    def mixed(self) -> bool:
        return self.old > 0 and self.new > 0


@dataclass
class Teller:
    """Goes through the windows of one tensor, tells and sets sides, and in the end proves what it met."""

    fix: Fix
    touched: Touched
    width: int
    where: str  # what carries the tensor, for complaints
    sides: Sides = Sides(0, 0)
    _proof: Proof = field(init=False)

    def __post_init__(self) -> None:
        self._proof = Proof(self.fix, self.touched)
        self._old, self._new = blake2b(digest_size=16), blake2b(digest_size=16)

    def windows(self) -> Iterator[tuple[int, Run]]:
        """All of the tensor in order: the first entry of a window, and what the fix says of it."""
        for first, last in self.touched.windows(self.width):
            yield first * BLOCK, self.fix.run(self.touched, self.width, first, last)

    def settle(self, run: Run, settle: Settle) -> None:
        """The next window: `settle` tells the sides of its entries, which it knows, and may set them."""
        old, new = (np.empty(run.changes, f"<u{self.width}") for _ in range(2))
        try:
            tally = settle(run, old, new)
        except Broken as error:
            self.fix.broken(str(error), self.touched)
        self._old.update(old.tobytes())
        self._new.update(new.tobytes())
        self._proof.add(run, tally.codes)
        self.sides += Sides(tally.old, tally.new)

    def finish(self) -> Sides:
        """Raises InputError where the tensor carries something else in the touched places, or the fix is broken."""
        self._proof.finish()
        if self._old.hexdigest() != self.touched.facts.old:
            raise InputError(
                f"carries something else where fix {self.fix.id} acts: another base, an edit, or another fix",
                file=self.where,
                tensor=self.touched.name,
            )
        if self._new.hexdigest() != self.touched.facts.new:
            self.fix.broken("its XORs don't lead to the entries that it promises", self.touched)
        return self.sides


def settling(entries: Entries, goal: int) -> Settle:
    """Settles a window whose `entries` are at hand, by leaving the side `goal` in them."""
    return lambda run, old, new: codec.settle(run, entries, goal, old, new)


def width_of(entry: TensorEntry) -> int:
    return WIDTH[entry.dtype]


def teller_of(fix: Fix, entry: TensorEntry) -> Teller:
    """Of a tensor of a checkpoint that the fix touches."""
    return Teller(fix, fix.tensors[entry.name], width_of(entry), str(entry.path))


def check_table(fix: Fix, checkpoint: Checkpoint) -> None:
    """Raises InputError unless the checkpoint has the table of the fix's base."""
    for name, touched in fix.tensors.items():
        entry = checkpoint.tensors.get(name)
        if entry is None:
            raise InputError("the fix touches it, but it is not there", file=checkpoint.ref, tensor=name)
        if entry.entries != touched.entries or entry.dtype not in WIDTH:
            raise InputError(
                "is not the tensor that the fix touches",
                file=entry.path,
                tensor=name,
                found=f"{entry.dtype} {list(entry.shape)}",
                expected=f"{touched.entries} entries of 1, 2 or 4 bytes",
            )
    found = table_hash(checkpoint.tensors)
    if found != fix.base:
        raise InputError(
            "another table of tensors than that of the fix's base",
            file=checkpoint.ref,
            found=found,
            expected=fix.base,
        )


def check(fix: Fix, checkpoint: Checkpoint, advance: Advance = lambda n: None) -> Sides:
    """Tell the side of every touched entry. Reads the touched tensors and all of the fix; changes nothing.

    Raises:
        InputError: another table, a tensor that carries something else there, or a broken fix.
        IOFailure: a file can't be read, or changed meanwhile.
    """
    check_table(fix, checkpoint)
    total, files = Sides(0, 0), Inputs([checkpoint])

    def opened() -> Iterator[TensorEntry]:  # by one thread
        for shard in checkpoint.shards:
            for entry in (entry for entry in shard.tensors if entry.name in fix.tensors):
                files.fd(entry)
                yield entry

    with closing(files):
        for entry, sides in in_threads(lambda entry: (entry, _check(teller_of(fix, entry), files, entry)), opened()):
            total += sides
            advance(entry.nbytes)
        files.check_unchanged()
    fix.check_unchanged()
    return total


def in_threads(work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """What `work` makes of each item, in order. Few are ahead: what is wrong with one is told before much is done."""
    threads = min(THREADS, len(os.sched_getaffinity(0)))
    pool, ahead = ThreadPoolExecutor(threads), deque[Future[U]]()
    try:
        for item in items:
            room_for_a_thread()
            ahead.append(pool.submit(work, item))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def window_of(entry: TensorEntry) -> Entries:
    """Room for a window of a tensor's entries, to be filled again and again: fresh memory costs more than reading."""
    return np.empty(min(WINDOW // width_of(entry), entry.entries), f"<u{width_of(entry)}")


def _check(teller: Teller, files: Inputs, entry: TensorEntry) -> Sides:
    room = window_of(entry)
    for lo, run in teller.windows():
        entries = room[: run.entries]
        for a, b in stretches(run.rows, run.entries):
            files.read(entry, (lo + a) * teller.width, entries[a:b].view(np.uint8))
        teller.settle(run, settling(entries, codec.KEEP))
    return teller.finish()


def on_side(sides: Sides, direction: Direction) -> bool:
    """Whether all these entries are on the side that `direction` starts from."""
    return not (sides.new if direction == "apply" else sides.old)


def require(fix: Fix, sides: Sides, direction: Direction, file: object) -> None:
    """Raises InputError unless every touched entry is on the side that `direction` starts from."""
    if sides.mixed:
        raise InputError(
            f"a mixture of fix {fix.id}, and no ledger says that it was under way",
            file=str(file),
            found=f"{sides.new} of {sides.old + sides.new} touched entries are new",
        )
    if direction == "apply" and sides.new:
        raise InputError(f"carries fix {fix.id} already", file=str(file))
    if direction == "revert" and sides.old:
        raise InputError(f"does not carry fix {fix.id}: there is nothing to take out", file=str(file))


def overlap(lower: Fix, upper: Fix, checkpoint: Checkpoint) -> tuple[str, int] | None:
    """The first tensor in which two fixes touch the same entries, and how many of them."""
    for name, touched in lower.tensors.items():
        other = upper.tensors.get(name)
        if other is not None:
            width = width_of(checkpoint.tensors[name])
            count = sum(_common(lower, touched, upper, other, width, *window) for window in touched.windows(width))
            if count:
                return name, count
    return None


def _common(lower: Fix, a: Touched, upper: Fix, b: Touched, width: int, first: int, last: int) -> int:
    lo, hi = first * BLOCK, min(last * BLOCK, a.entries)
    one, other = lower.changes_in(a, width, lo, hi), upper.changes_in(b, width, lo, hi)
    return len(np.intersect1d(one.at, other.at, assume_unique=True))
