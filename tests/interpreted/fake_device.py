"""A device that never hurries: work queues up, is run in a random order that events allow, and races are found.

Two operations race if they touch the same byte, one of them writes it, and no chain of streams and events orders
them. Host memory counts too, unless it isn't pinned: then copies are staged or waited for, as CUDA does it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from safepatch_core.backends.device import InterpretedDevice, as_tensor
from safepatch_core.errors import UsageError
from safepatch_core.kernels.launch import Launch

Range = tuple[int, int]  # addresses
# Arguments that kernels write.
WRITTEN = {"out", "tally", "counts", "keys", "total", "sums", "searches", "fine", "cuts"}


class Race(Exception):
    pass


@dataclass
class Stream:
    index: int
    clock: dict[int, int] = field(default_factory=dict)  # how far into each stream what comes next may rely on


@dataclass
class Event:
    clock: dict[int, int] | None = None


@dataclass
class Operation:
    kind: str
    stream: int
    position: int
    needs: dict[int, int]
    run: Callable[[], object]
    reads: list[Range]
    writes: list[Range]


def _range(memory: torch.Tensor | NDArray[Any]) -> Range:
    if isinstance(memory, torch.Tensor):
        start, nbytes = memory.data_ptr(), memory.numel() * memory.element_size()
        if memory.dim() > 1 and not memory.is_contiguous():
            nbytes = (
                sum((n - 1) * s for n, s in zip(memory.shape, memory.stride(), strict=True)) + 1
            ) * memory.itemsize
    else:
        start, nbytes = memory.ctypes.data, memory.nbytes
    return start, start + nbytes


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, tuple):
        for each in argument:
            yield from _tensors(each)


def _meet(one: Iterable[Range], other: Iterable[Range]) -> bool:
    others = list(other)
    return any(a < d and c < b for a, b in one for c, d in others)


class FakeDevice(InterpretedDevice):
    """limit: bytes of memory; fail_at: the number of the operation that raises; deaf_to: which of the four waits
    of each round is not heard. Memory starts out with random bytes in it."""

    name = "fake"

    def __init__(self, limit: int, seed: int = 0, fail_at: int | None = None, deaf_to: int | None = None) -> None:
        self.limit, self.fail_at, self.deaf_to = limit, fail_at, deaf_to
        self.allocated = self.issued = self.waits = self.synchronized = self.finished = self.uploaded = 0
        self.history: list[Operation] = []
        self._random = random.Random(seed)
        self._streams: list[Stream] = []
        self._pending: list[Operation] = []
        self._pinned: list[Range] = []

    def allocate(self, nbytes: int) -> torch.Tensor:
        self.allocated += nbytes
        if self.allocated > self.limit:
            raise UsageError("not enough GPU memory", found=self.limit, expected=self.allocated)
        memory = super().allocate(nbytes)
        memory.copy_(torch.from_numpy(np.random.default_rng(1).integers(0, 256, nbytes, dtype=np.uint8)))
        return memory

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        memory = super().pinned(nbytes)
        self._pinned.append(_range(memory))
        return memory

    def stream(self) -> Any:
        self._streams.append(Stream(len(self._streams)))
        return self._streams[-1]

    def event(self) -> Any:
        return Event()

    def record(self, event: Any, stream: Any) -> None:
        event.clock = dict(stream.clock)

    def wait(self, stream: Any, event: Any) -> None:
        self.waits += 1
        if self.deaf_to is not None and (self.waits - 1) % 4 == self.deaf_to:
            return
        for index, position in (event.clock or {}).items():
            stream.clock[index] = max(stream.clock.get(index, 0), position)

    def _is_pinned(self, host: NDArray[Any]) -> bool:
        start, end = _range(host)
        return any(a <= start and end <= b for a, b in self._pinned)

    def upload(self, stream: Any, target: torch.Tensor, source: NDArray[Any]) -> None:
        self.uploaded += source.nbytes
        pinned = self._is_pinned(source)
        held = source if pinned else source.copy()
        self._add("upload", stream, lambda: target.copy_(as_tensor(held)), [_range(held)], [_range(target)])

    def download(self, stream: Any, target: NDArray[Any], source: torch.Tensor) -> None:
        self._add("download", stream, lambda: as_tensor(target).copy_(source), [_range(source)], [_range(target)])
        if not self._is_pinned(target):
            self._run_pending()

    def clear(self, stream: Any, target: torch.Tensor) -> None:
        self._add("clear", stream, target.zero_, [], [_range(target)])

    def launch(self, stream: Any, launch: Launch) -> None:
        arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=True))
        reads = [_range(t) for argument in arguments.values() for t in _tensors(argument)]
        writes = [_range(t) for name, a in arguments.items() if name in WRITTEN for t in _tensors(a)]
        self._add(launch.kernel.__name__, stream, lambda: launch.run(self.warp), reads, writes)

    def happened(self, event: Any) -> bool:
        return not any(self._before(event, o) for o in self._pending)

    def finish(self, event: Any) -> None:
        self.finished += 1
        self._run_pending(lambda operation: self._before(event, operation))

    def _before(self, event: Any, operation: Operation) -> bool:
        return bool((event.clock or {}).get(operation.stream, 0) >= operation.position)

    def synchronize(self) -> None:
        self.synchronized += 1
        self._run_pending()

    @property
    def kinds(self) -> list[str]:
        return [operation.kind for operation in self.history]

    @property
    def idle(self) -> bool:
        return not self._pending

    def _add(
        self, kind: str, stream: Stream, run: Callable[[], object], reads: list[Range], writes: list[Range]
    ) -> None:
        self.issued += 1
        if self.issued == self.fail_at:
            raise RuntimeError(f"{kind} failed")
        position = stream.clock.get(stream.index, 0) + 1
        needs = dict(stream.clock)
        stream.clock[stream.index] = position
        new = Operation(kind, stream.index, position, needs, run, reads, writes)
        for old in self._pending:
            if needs.get(old.stream, 0) < old.position:
                if _meet(new.writes, old.reads + old.writes) or _meet(new.reads, old.writes):
                    raise Race(f"{new.kind} {position} of stream {new.stream} and {old.kind} {old.position}")
        self.history.append(new)
        self._pending.append(new)

    def _run_pending(self, wanted: Callable[[Operation], bool] = lambda operation: True) -> None:
        """Run what is queued and wanted, in any order that streams and events allow."""
        done: dict[int, int] = {}
        for each in self._pending:
            done.setdefault(each.stream, each.position - 1)
        while left := [o for o in self._pending if wanted(o)]:
            ready = [
                o
                for o in left
                if all(done.get(s, p) >= p for s, p in o.needs.items()) and done[o.stream] == o.position - 1
            ]
            chosen = self._random.choice(ready)
            chosen.run()
            done[chosen.stream] = chosen.position
            self._pending.remove(chosen)
