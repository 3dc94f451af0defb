"""Reader, engine and writer at work at once, over one arena that is allocated once."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from safepatch_core.memory import PAGE
from safepatch_core.threads import room_for_a_thread


class Begun(Protocol):
    """What is still to be done of a unit, somewhere else, while others are worked on."""

    def done(self) -> bool:
        """Whether `result` returns at once."""

    def result(self) -> None:
        """Wait for it, and do what is left."""


T = TypeVar("T")
U = TypeVar("U")
P = ParamSpec("P")
R = TypeVar("R")
ALIGN = PAGE  # of every buffer in the ring


def align(nbytes: int) -> int:
    """So many bytes, filled up to ALIGN."""
    return -(-nbytes // ALIGN) * ALIGN


def room(nbytes: int) -> int:
    """What so many bytes of a file take in the ring: whole pages, which they begin and end within (`Inputs.load`)."""
    return align(nbytes) + ALIGN


class Cancelled(Exception):
    """Another stage has failed; this one stops."""


@dataclass(slots=True)
class Region:
    """A contiguous part of the ring."""

    start: int
    memory: NDArray[np.uint8]
    returned: bool = False

    @property
    def end(self) -> int:
        return self.start + len(self.memory)


class Ring:
    """A circular arena. Regions are taken in order, may come back in any, and are reused in order.

    Touching fresh anonymous memory costs several times a copy on virtual machines, so nothing is ever freed.
    """

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self._memory = memory
        self._live: deque[Region] = deque()
        self._changed = threading.Condition()
        self._cancelled = False

    def take(self, nbytes: int) -> Region:
        """Wait for `nbytes` (at least 1) of contiguous room. Raises Cancelled after `cancel`."""
        if not 0 < nbytes <= len(self._memory):
            raise ValueError(f"a region of {nbytes} bytes from a ring of {len(self._memory)}")
        with self._changed:
            while (start := self._place(nbytes)) is None and not self._cancelled:
                self._changed.wait()
            if self._cancelled or start is None:
                raise Cancelled
            region = Region(start, self._memory[start : start + nbytes])
            self._live.append(region)
            return region

    def _place(self, nbytes: int) -> int | None:
        if not self._live:
            return 0
        oldest, tail = self._live[0].start, self._live[-1].end
        wrapped = self._live[-1].start < oldest
        if wrapped:
            return tail if oldest - tail >= nbytes else None
        if len(self._memory) - tail >= nbytes:
            return tail
        return 0 if oldest >= nbytes else None

    def give(self, region: Region) -> None:
        with self._changed:
            region.returned = True
            while self._live and self._live[0].returned:
                self._live.popleft()
            self._changed.notify_all()

    def cancel(self) -> None:
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()


Trace = Callable[[str, Any, float, float], None]


def traced(stage: str, function: Callable[P, R], trace: Trace) -> Callable[P, R]:
    """`function`, telling `trace` when it began and ended; the unit is its first argument."""

    def timed(*args: P.args, **kwargs: P.kwargs) -> R:
        begin = time.perf_counter()
        result = function(*args, **kwargs)
        trace(stage, args[0] if args else None, begin, time.perf_counter())
        return result

    return timed


def run(
    units: Iterable[T],
    room: Callable[[T], int],
    read: Callable[[T, Region], U],
    work: Callable[[U], Begun | None],
    write: Callable[[U], Future[None] | None] | None,
    ring: Ring,
    trace: Trace | None = None,
) -> None:
    """For each unit, in order: `read` into `room` bytes of the ring, `work`, `write`; the caller's thread works.

    Where `work` only begins a unit, the next are begun behind it, as many as are read already. Where `write` returns
    a future, the unit's region is still read until that is done; the next unit is written meanwhile. The first
    exception of any stage stops the others and is raised here; the ring bounds what is in flight.
    `trace` gets the stage (wait: the reader had no room), the unit (its bytes for wait) and the times
    (time.perf_counter) at which the stage began and ended it.
    """
    take = ring.take
    if trace is not None:
        take, read = traced("wait", take, trace), traced("read", read, trace)
        work, write = traced("work", work, trace), write and traced("write", write, trace)
    _Run(ring, work, write).all(partial(_read_all, units, room, take, read))


def _read_all(
    units: Iterable[T],
    room: Callable[[T], int],
    take: Callable[[int], Region],
    read: Callable[[T, Region], U],
) -> Iterator[tuple[Region, U]]:
    for unit in units:
        region = take(room(unit))
        yield region, read(unit, region)


class _Run(Generic[U]):
    """One run of the three stages: two queues between them, and what went wrong."""

    def __init__(
        self, ring: Ring, work: Callable[[U], Begun | None], write: Callable[[U], Future[None] | None] | None
    ) -> None:
        self._ring, self._work, self._write = ring, work, write
        self._loaded: queue.SimpleQueue[tuple[Region, U] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Region, U] | None] = queue.SimpleQueue()
        self._failures: list[BaseException] = []

    def all(self, read: Callable[[], Iterator[tuple[Region, U]]]) -> None:
        threads = [self._thread("reader", partial(self._reader, read))]
        if self._write is not None:
            threads.append(self._thread("writer", partial(self._writer, self._write)))
        try:
            for thread in threads:
                room_for_a_thread()
                thread.start()
            self._guarded(self._worker)
        except BaseException:
            self._ring.cancel()
            raise
        finally:
            self._done.put(None)
            for thread in threads:
                if thread.ident is not None:  # it was started; memory may lack for that
                    thread.join()
        if self._failures:
            raise self._failures[0]

    def _thread(self, name: str, stage: Callable[[], None]) -> threading.Thread:
        return threading.Thread(target=self._guarded, args=(stage,), name=f"safepatch-{name}", daemon=True)

    def _guarded(self, stage: Callable[[], None]) -> None:
        try:
            stage()
        except Cancelled:
            pass
        except BaseException as error:
            self._failures.append(error)
            self._ring.cancel()

    def _reader(self, read: Callable[[], Iterator[tuple[Region, U]]]) -> None:
        try:
            for item in read():
                self._loaded.put(item)
                if self._failures:
                    return
        finally:
            self._loaded.put(None)

    def _worker(self) -> None:
        begun: deque[tuple[tuple[Region, U], Begun | None]] = deque()
        try:
            while True:
                # The reader may wait for the room that these units hold, so nobody waits for it while there are any.
                while begun and (self._loaded.empty() or begun[0][1] is None or begun[0][1].done()):
                    self._pass_on(*begun[0])
                    begun.popleft()
                item = self._loaded.get()
                if item is None or self._failures:
                    break
                begun.append((item, self._work(item[1])))
            while begun and not self._failures:
                self._pass_on(*begun[0])
                begun.popleft()
        finally:
            for _, rest in begun:  # something has failed, and these may still be at work in the ring
                with suppress(Exception):
                    if rest is not None:
                        rest.result()

    def _pass_on(self, item: tuple[Region, U], rest: Begun | None) -> None:
        if rest is not None:
            rest.result()
        if self._write is None:
            self._ring.give(item[0])
        else:
            self._done.put(item)

    def _writer(self, write: Callable[[U], Future[None] | None]) -> None:
        last: Future[None] | None = None
        while (item := self._done.get()) is not None:
            region, unit = item
            last = write(unit)
            if last is None:
                self._ring.give(region)
            else:
                last.add_done_callback(partial(self._give_back, region))
        if last is not None:
            last.result()

    def _give_back(self, region: Region, written: Future[None]) -> None:
        self._ring.give(region)


class Once(Generic[T]):
    """The last value made for a key: units of one tensor come one after another and share it."""

    def __init__(self, make: Callable[[str], T]) -> None:
        self._make, self._key = make, ""
        self._value: T | None = None

    def get(self, key: str) -> T:
        if self._value is None or key != self._key:
            self._key, self._value = key, self._make(key)
        return self._value
