"""Copy a checkpoint's shards with a fix applied or taken out: read, settled and written at once, window by window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.files.disk import HashedFile
from safepatch_core.files.reading import TensorEntry
from safepatch_core.files.staging import Staging
from safepatch_core.fixes.checking import (
    GOAL,
    Advance,
    Direction,
    Teller,
    check,
    on_side,
    require,
    settling,
    teller_of,
)
from safepatch_core.fixes.reading import WINDOW, Fix
from safepatch_core.fixes.reference import Run
from safepatch_core.memory import page_aligned
from safepatch_core.merging import pipeline
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.layout import OutputFile
from safepatch_core.merging.pipeline import Region, Ring, room

RING_BYTES = 4 * room(WINDOW)  # one that is read, one that is settled, one written and one hashed


@dataclass(slots=True)
class _Window:
    """Bytes of a tensor, and what the fix says of them."""

    entry: TensorEntry
    lo: int
    nbytes: int
    teller: Teller | None = None
    run: Run | None = None
    data: NDArray[np.uint8] | None = None

    @property
    def last(self) -> bool:
        return self.lo + self.nbytes == self.entry.nbytes


class Copier:
    """Writes shards on their new side.

    Sides are told on the way, so that the input is read once: nothing of an output appears unless all of it was on
    the side that `direction` starts from.
    """

    def __init__(
        self, staging: Staging, fix: Fix, checkpoint: Checkpoint, direction: Direction, advance: Advance
    ) -> None:
        self._staging, self._fix, self._checkpoint = staging, fix, checkpoint
        self._direction, self._advance = direction, advance
        self._files, self._memory = Inputs([checkpoint]), page_aligned(RING_BYTES)

    def copy(self, outputs: Sequence[OutputFile]) -> None:
        """Every shard that no earlier run has finished.

        Raises:
            InputError: the checkpoint is not on the side that the direction starts from, or the fix is broken.
            IOFailure: reading or writing failed, or an input changed meanwhile.
        """
        with closing(self._files):
            for output in outputs:
                done = self._staging.finished.get(output.name)
                if done is not None:
                    self._staging.files[output.name] = {"size": done["size"], "sha256": done["sha256"]}
                else:
                    self._copy(output)
            self._files.check_unchanged()
        self._fix.check_unchanged()

    def _copy(self, output: OutputFile) -> None:
        with closing(self._staging.open(output.name, output.size, sparse=output.sparse)) as file:
            file.write(memoryview(output.header))
            pipeline.run(
                self._windows(output),
                lambda window: room(window.nbytes),
                self._read,
                self._settle,
                lambda window: self._write(file, window),
                Ring(self._memory),
            )
            self._staging.finish(file, {})

    def _windows(self, output: OutputFile) -> Iterator[_Window]:
        for entry in (entry for entry in output.tensors if entry.nbytes):
            if entry.name in self._fix.tensors:
                teller = teller_of(self._fix, entry)
                for lo, run in teller.windows():
                    yield _Window(entry, lo * teller.width, run.entries * teller.width, teller, run)
            else:
                for lo in range(0, entry.nbytes, WINDOW):
                    yield _Window(entry, lo, min(WINDOW, entry.nbytes - lo))

    def _read(self, window: _Window, region: Region) -> _Window:
        hi = window.lo + window.nbytes
        self._files.prefetch(window.entry, hi, min(hi + WINDOW, window.entry.nbytes), straight=True)
        window.data = self._files.load(window.entry, window.lo, hi, region.memory)
        return window

    def _settle(self, window: _Window) -> None:
        teller = window.teller
        if teller is None or window.run is None or window.data is None:
            return
        teller.settle(window.run, settling(window.data.view(f"<u{teller.width}"), GOAL[self._direction]))
        if window.last and not on_side(teller.finish(), self._direction):
            # The whole checkpoint tells what is wrong with it.
            require(self._fix, check(self._fix, self._checkpoint), self._direction, self._checkpoint.ref)

    def _write(self, file: HashedFile, window: _Window) -> Future[None] | None:
        assert window.data is not None
        self._advance(window.nbytes)
        return file.write(window.data.data)
