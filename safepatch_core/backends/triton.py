"""The Triton engine: blocks stream through a GPU's memory in pieces, and the kernels meet them there.

`TRITON_INTERPRET=1` runs the same kernels on the CPU, for their meaning and not for their speed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import SELECT_NONE, Block, Counting, Cut, Later, Report, Window
from safepatch_core.backends.device import Device, open_device
from safepatch_core.backends.select import COARSE, FINE, NOTHING, Selection, Tally
from safepatch_core.spec import EVERY

if TYPE_CHECKING:
    from safepatch_core.backends.ahead import Asked, Found
    from safepatch_core.backends.counting import Sweep
    from safepatch_core.backends.passes import Call

T = TypeVar("T")


class TritonBackend:
    """The engine on a GPU. Its methods are documented on `Backend`.

    device: a GPU as torch names it, by default this rank's, or a device that is open already; vram_limit: bytes
    of its memory to use, all taken at once. Raises UsageError where there is no GPU or less memory than that.
    Calls from several threads take turns; one that the limit doesn't suffice for raises UsageError.
    """

    def __init__(self, device: str | Device | None = None, vram_limit: int | None = None) -> None:
        self._device = open_device(device) if device is None or isinstance(device, str) else device
        from safepatch_core.backends.ahead import Ahead
        from safepatch_core.backends.passes import Arena, Streams

        self._arena = Arena(self._device.allocate(vram_limit or self._device.default_memory()))
        self._streams = Streams(self._device.stream(), self._device.stream(), self._device.stream())
        self._ahead = Ahead(self._device, self._arena, self._streams)
        self._turn = threading.RLock()

    def describe(self) -> str:
        import triton

        return f"triton {triton.__version__} ({self._device.name}, {self._arena.nbytes / (1 << 30):.3g} GiB)"

    def allocate(self, nbytes: int) -> NDArray[np.uint8]:
        return self._device.pinned(nbytes)

    def scratch(self, entries: int, patches: int) -> int:
        """Upper bound in bytes of `merge`'s host memory: what is sent beside the entries, and, where a tensor is too
        long for the device, histograms, their sums, and ties by segment."""
        from safepatch_core.backends.ahead import STAGE
        from safepatch_core.kernels.launch import BLOCK

        segments, block = entries // int(BLOCK) + 2, int(BLOCK)
        return STAGE + patches * (2 * 8 * 8 * (COARSE + FINE) + 32 * segments + 8 * block) + (1 << 20)

    @contextmanager
    def _call(
        self, block: Block, windows: int = 0, bins: int = 0, select: bool = False, skips: Sequence[bool] = ()
    ) -> Iterator[Call]:
        from safepatch_core.backends.passes import Call

        with self._taking_turns():
            self._ahead.drain()
            yield Call(self._device, self._arena, self._streams, block, windows, bins, select, skips=skips)

    @contextmanager
    def _taking_turns(self) -> Iterator[None]:
        with self._turn:
            try:
                yield
            except BaseException as error:
                # Copies may still be on their way to or from the caller's memory.
                with suppress(Exception):
                    self._device.synchronize()
                self._ahead.abandon(error)
                raise

    def histogram(self, block: Block, windows: Sequence[Sequence[Window]]) -> Report:
        sweep = self.counting()
        report = sweep.begin(block, windows)
        sweep.end()
        return report.result()

    def _histogram(self, block: Block, windows: Sequence[Sequence[Window]]) -> Report:
        """Count in a block that is too long for the device, or empty."""
        flat = [w for patch, wanted in zip(block.patches, windows, strict=True) if patch for w in wanted]
        with self._call(block, len(flat), sum(len(w.counts) for w in flat)) as call:
            call.prepare([SELECT_NONE] * len(block.patches))
            call.histogram(windows)
            return call.report()

    def count_equal(self, block: Block, keys: Sequence[int]) -> list[int]:
        with self._call(block, select=True) as call:
            call.prepare([Cut(key, 0) for key in keys])
            return [int(counts.sum()) for counts in call.count_equal()]

    def apply(self, block: Block, cuts: Sequence[Cut], out: NDArray[np.unsignedinteger]) -> Report:
        with self._call(block, skips=[cut.skip_key > 0 for cut in cuts]) as call:
            call.prepare(cuts)
            call.apply(out)
            return call.report()

    def begin_apply(self, block: Block, cuts: Sequence[Cut], out: NDArray[np.unsignedinteger]) -> Later[Report]:
        from safepatch_core.backends.ahead import Asked

        asked = Asked(block, out, cuts=cuts)
        self._begin(asked, lambda: (list(cuts), self.apply(block, cuts, out)))
        return _Later(self, asked, lambda found: found[1])

    def begin_merge(
        self, block: Block, quotas: Sequence[int], out: NDArray[np.unsignedinteger], skips: Sequence[int] = ()
    ) -> Later[tuple[list[Cut], Report]]:
        from safepatch_core.backends.ahead import Asked

        wanted = [0 if patch is None else min(k, len(block)) for patch, k in zip(block.patches, quotas, strict=True)]
        skipped = [k and min(skip, len(block)) for k, skip in zip(wanted, skips or [0] * len(wanted), strict=True)]
        asked = Asked(block, out, wanted, skipped)
        self._begin(asked, lambda: self._sweep(block, wanted, out, skipped))
        return _Later(self, asked, lambda found: found)

    def counting(self) -> Counting:
        from safepatch_core.backends.counting import Sweep

        return _Counting(self, Sweep())

    def _begin(self, asked: Asked, otherwise: Callable[[], Found]) -> None:
        """Queue a tensor, or do it at once where there is nothing to queue or no room for it."""
        with self._taking_turns():
            something = len(asked.block) and any(asked.block.patches)
            if not (something and self._ahead.begin(asked)):
                asked.found = otherwise()

    def _result(self, asked: Asked) -> Found:
        with self._taking_turns():
            self._ahead.wait(asked)
        if asked.found is None:
            assert asked.failed is not None
            raise asked.failed
        return asked.found

    def merge(
        self, block: Block, quotas: Sequence[int], out: NDArray[np.unsignedinteger], skips: Sequence[int] = ()
    ) -> tuple[list[Cut], Report]:
        return self.begin_merge(block, quotas, out, skips).result()

    def _sweep(
        self, block: Block, wanted: Sequence[int], out: NDArray[np.unsignedinteger], skipped: Sequence[int]
    ) -> Found:
        """Merge a tensor that is too long for the device, the host deciding between sweeps."""
        selection = Selection([""], wanted, len(block), skipped)
        windows = len(wanted) + sum(k > 0 for k in skipped)
        with self._call(block, windows, windows * COARSE, True, [k > 0 for k in skipped]) as call:
            while selection.pending:
                call.prepare([SELECT_NONE] * len(wanted))
                call.histogram(selection.windows(""), tell=False)
                selection.advance()
            cuts = _cuts(call, selection.tallies()[""])
            call.prepare(cuts)
            call.apply(out)
            return cuts, call.report()


@dataclass(frozen=True)
class _Later(Generic[T]):
    """A `Later` of a tensor that was begun."""

    engine: TritonBackend
    asked: Asked
    of: Callable[[Found], T]

    def done(self) -> bool:
        return self.asked.found is not None or (self.asked.job is not None and self.asked.job.happened)

    def result(self) -> T:
        return self.of(self.engine._result(self.asked))


@dataclass(frozen=True)
class _Counting:
    """A `Counting`."""

    engine: TritonBackend
    sweep: Sweep

    def begin(self, block: Block, windows: Sequence[Sequence[Window]]) -> Later[Report]:
        from safepatch_core.backends.ahead import Asked

        nothing = [SELECT_NONE] * len(block.patches)
        asked = Asked(block, block.base.data, cuts=nothing, windows=windows, sweep=self.sweep)
        self.engine._begin(asked, lambda: ([], self.engine._histogram(block, windows)))
        return _Later(self.engine, asked, lambda found: found[1])

    def end(self) -> None:
        with self.engine._taking_turns():
            self.engine._ahead.drain()
        if self.sweep.failed is not None:
            raise self.sweep.failed


def open_engine(*, threads: int | None, device: str | None, vram_limit: int | None) -> TritonBackend:
    """A `contract.Opener`."""
    return TritonBackend(device, vram_limit)


def _cuts(call: Call, tallies: Sequence[Tally]) -> list[Cut]:
    """Where each patch's ties end: the segment that the last one lies in is counted out key by key."""
    if any(t.skip for t in tallies):
        best = _cuts(call, [t.skip or NOTHING for t in tallies])
        plain = _cuts(call, [replace(t, skip=None) for t in tallies])
        return [cut.without(skipped) for cut, skipped in zip(plain, best, strict=True)]
    cuts = [Cut(t.key, EVERY if t.left else 0) for t in tallies]
    if any(0 < t.left < EVERY for t in tallies):
        call.prepare([Cut(t.key, 0) for t in tallies])
        for p, (tally, counts) in enumerate(zip(tallies, call.count_equal(), strict=True)):
            if 0 < tally.left < EVERY:
                sums = np.cumsum(counts, dtype=np.int64)
                segment = int(np.searchsorted(sums, tally.left))
                rank = tally.left - int(sums[segment] - counts[segment])
                equal = np.flatnonzero(call.keys(segment)[p] == tally.key)
                cuts[p] = Cut(tally.key, call.start_of(segment) + int(equal[rank - 1]) + 1)
    return cuts
