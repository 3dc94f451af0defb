"""Histograms that outlive jobs: what a sweep counts stays on the device, and goes to the host once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from safepatch_core.backends.contract import Window
from safepatch_core.backends.device import Device
from safepatch_core.backends.passes import Arena, Streams, line
from safepatch_core.kernels.launch import HISTOGRAMS
from safepatch_core.kernels.select import fold

Windows = Sequence[Sequence[Window]]


def flat(windows: Windows) -> list[Window]:
    """The windows of all patches."""
    return [window for of in windows for window in of]


def nbytes_of(windows: Sequence[Window]) -> int:
    """Bytes of the device that counting in them takes."""
    return HISTOGRAMS * 8 * sum(len(window.counts) for window in windows)


def starts(windows: Sequence[Window]) -> list[int]:
    """Where in a copy each of the windows begins."""
    return list(accumulate((len(window.counts) for window in windows), initial=0))[:-1]


class Sweep:
    """Windows that jobs count in, one job after the other; on the device lie copies of each, one behind the other.

    Windows of the job before, if they are the same, go on where they are. `fresh` are the places of the others, which
    the job empties. `failed` says why counts were lost.
    """

    def __init__(self) -> None:
        self.copies = torch.empty((HISTOGRAMS, 0), dtype=torch.int64)
        self.fresh: list[torch.Tensor] = []
        self.failed: BaseException | None = None
        self._places: dict[tuple[int, int], tuple[Window, torch.Tensor]] = {}

    def take(self, memory: Arena) -> None:
        """Use this memory from now on."""
        self.copies = memory.take(torch.int64, HISTOGRAMS, memory.nbytes // (8 * HISTOGRAMS))

    def go_on(self, windows: Sequence[Window] = ()) -> list[Told]:
        """Let the next job count in these windows; the others, which have to be told before it begins."""
        before, self._places = self._places, {}
        for window, at in zip(windows, starts(windows), strict=True):
            if n := len(window.counts):
                self._places[at, id(window.counts)] = window, self.copies[:, at : at + n]
        self.fresh = [place for at, (_, place) in self._places.items() if at not in before]
        return [Told(*of) for at, of in before.items() if at not in self._places]


class Told:
    """A job: the counts of a window go to the host."""

    asked = ()

    def __init__(self, window: Window, copies: torch.Tensor) -> None:
        self._window, self._copies = window, copies
        self.device_bytes = self.host_bytes = line(8 * len(window.counts))

    def start(self, device: Device, streams: Streams, room: Arena, stage: Arena) -> None:
        """Queue all of it."""
        self._device, self.done, folded = device, device.event(), device.event()
        total = room.take(torch.int64, len(self._window.counts))
        self._host = stage.take(torch.int64, len(self._window.counts)).numpy()
        device.launch(streams.work, fold(self._copies, total))
        device.record(folded, streams.work)
        device.wait(streams.down, folded)
        device.download(streams.down, self._host, total.view(torch.uint8))
        device.record(self.done, streams.down)

    def collect(self) -> None:
        """Wait until it is done, and tell."""
        self._device.finish(self.done)
        self._window.counts[:] += self._host

    @property
    def happened(self) -> bool:
        return self._device.happened(self.done)
