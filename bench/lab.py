"""Measuring a GPU: moments on its streams, rates of its memory and links, and a trace of what each stream did.

All of it goes through the engine's own `Device`, so that a fake one tests it and the interpreter runs it.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from safepatch_core.backends.device import Device, TorchDevice
from safepatch_core.kernels.launch import Launch

from .measure import Spread
from .tracing import Span

if TYPE_CHECKING:
    import torch

LANES = ("H2D", "compute", "D2H")  # in the order in which the engine opens its streams


class Clock(Protocol):
    """Moments in the work of a stream."""

    def mark(self, stream: Any) -> Any:
        """The moment at which all that the stream was given so far is done."""

    def seconds(self, begin: Any, end: Any) -> float:
        """From one moment to another, once the device is synchronised."""


class HostClock:
    """For the interpreter, which does one thing after the other."""

    def mark(self, stream: Any) -> float:
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class EventClock:
    """A GPU's own, by way of torch's events."""

    def mark(self, stream: Any) -> Any:
        import torch

        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1e3


def clock_of(device: Device) -> Clock:
    return EventClock() if isinstance(device, TorchDevice) else HostClock()


class _Operation:
    """A function of tensors in a kernel's clothes, so that a device enqueues it as one."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.__name__ = function.__name__
        self.arg_names = list(inspect.signature(function).parameters)
        self._function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        return lambda *args, **options: self._function(*args)


def _copy(source: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(source)


def _read(source: torch.Tensor, out: torch.Tensor) -> None:
    import torch

    torch.sum(source.view(torch.float32), dim=0, out=out.view(torch.float32)[0])


def _write(out: torch.Tensor) -> None:
    out.fill_(0x5A)


class Lab:
    """A device on which launches are timed. `buffer`: bytes of each of two buffers, beyond the size of any cache."""

    def __init__(self, device: Device, clock: Clock, buffer: int, repeats: int) -> None:
        self.device, self.clock, self.repeats = device, clock, repeats
        self._streams = (device.stream(), device.stream())
        self._one, self._other = device.allocate(buffer), device.allocate(buffer)
        self._sum = device.allocate(256)
        self._filler = Launch(_Operation(_read), 1, (self._one, self._sum))

    @property
    def stream(self) -> Any:
        return self._streams[0]

    def time(self, launch: Launch) -> Spread:
        """Seconds of a launch, its data not in the caches.

        Each follows a read of a whole buffer: that empties the caches (and leaves nothing to be written back), and
        it keeps the stream busy until the host has enqueued what is timed.
        """
        self.device.launch(self.stream, launch)  # compiles it
        moments = []
        for _ in range(self.repeats):
            self.device.launch(self.stream, self._filler)
            begin = self.clock.mark(self.stream)
            self.device.launch(self.stream, launch)
            moments.append((begin, self.clock.mark(self.stream)))
        self.device.synchronize()
        return Spread.of([self.clock.seconds(*pair) for pair in moments])

    def memory_rates(self) -> dict[str, list[float]]:
        """Bytes per second, [median, lowest, highest]; a copy's bytes count twice, as read and as written."""
        nbytes = len(self._one)
        found = {}
        for name, function, args, moved in (
            ("copy_bytes_per_s", _copy, (self._one, self._other), 2 * nbytes),
            ("read_bytes_per_s", _read, (self._other, self._sum), nbytes),
            ("write_bytes_per_s", _write, (self._other,), nbytes),
        ):
            took = self.time(Launch(_Operation(function), 1, args))
            found[name] = [moved / took.median, moved / took.high, moved / took.low]
        return found

    def link_rates(self, sizes: Sequence[int], total: int) -> list[dict[str, float]]:
        """Copies from and to pinned memory, `total` bytes in pieces of each size: alone, then in both directions."""
        source, target = self.device.pinned(total), self.device.pinned(total)
        source[::4096] = target[::4096] = 1
        found = []
        for size in sizes:
            pieces = [(lo, min(lo + size, total)) for lo in range(0, total, size)]
            rates: dict[str, float] = {"bytes": size}
            for name, directions in (("alone", ["up"]), ("alone", ["down"]), ("both", ["up", "down"])):
                streams = [self._streams[direction == "down"] for direction in directions]
                begins = [self.clock.mark(stream) for stream in streams]
                for lo, hi in pieces:
                    for direction, stream in zip(directions, streams, strict=True):
                        if direction == "up":
                            self.device.upload(stream, self._one[lo:hi], source[lo:hi])
                        else:
                            self.device.download(stream, target[lo:hi], self._other[lo:hi])
                ends = [self.clock.mark(stream) for stream in streams]
                self.device.synchronize()
                for direction, begin, end in zip(directions, begins, ends, strict=True):
                    rates[f"{direction}_{name}_bytes_per_s"] = total / self.clock.seconds(begin, end)
            found.append(rates)
        return found


class _Lane:
    """A stream by name."""

    def __init__(self, name: str, stream: Any) -> None:
        self.name, self.stream = name, stream


class TracedDevice:
    """A device that also keeps when its streams did what; everything else is the device's own."""

    def __init__(self, device: Device, clock: Clock) -> None:
        self._device, self._clock = device, clock
        self.name, self.warp = device.name, device.warp
        self.allocate, self.default_memory, self.pinned = device.allocate, device.default_memory, device.pinned
        self.event, self.synchronize = device.event, device.synchronize
        self.happened, self.finish = device.happened, device.finish
        self.uploaded = self.downloaded = 0  # bytes
        self._lanes = 0
        self._kept: list[tuple[str, str, Any, Any]] = []
        self._zero: tuple[Any, float] | None = None

    def stream(self) -> _Lane:
        stream = self._device.stream()
        if self._zero is None:
            self._device.synchronize()
            self._zero = self._clock.mark(stream), time.perf_counter()
        self._lanes += 1
        return _Lane(LANES[self._lanes - 1] if self._lanes <= len(LANES) else f"stream {self._lanes}", stream)

    def record(self, event: Any, stream: _Lane) -> None:
        self._device.record(event, stream.stream)

    def wait(self, stream: _Lane, event: Any) -> None:
        self._device.wait(stream.stream, event)

    def upload(self, stream: _Lane, target: torch.Tensor, source: NDArray[Any]) -> None:
        self.uploaded += source.nbytes
        self._keep(f"upload {source.nbytes}", stream, lambda s: self._device.upload(s, target, source))

    def download(self, stream: _Lane, target: NDArray[Any], source: torch.Tensor) -> None:
        self.downloaded += target.nbytes
        self._keep(f"download {target.nbytes}", stream, lambda s: self._device.download(s, target, source))

    def clear(self, stream: _Lane, target: torch.Tensor) -> None:
        self._keep("clear", stream, lambda s: self._device.clear(s, target))

    def launch(self, stream: _Lane, launch: Launch) -> None:
        name = launch.kernel.__name__.removesuffix("_kernel")
        self._keep(name, stream, lambda s: self._device.launch(s, launch))

    def _keep(self, name: str, lane: _Lane, enqueue: Callable[[Any], None]) -> None:
        begin = self._clock.mark(lane.stream)
        enqueue(lane.stream)
        self._kept.append((lane.name, name, begin, self._clock.mark(lane.stream)))

    def spans(self, begin: float) -> Iterator[Span]:
        """What was done, in seconds since `begin` (of time.perf_counter), once the device is synchronised."""
        assert self._zero is not None, "no stream was opened"
        zero, origin = self._zero
        for lane, name, a, b in self._kept:
            first, last = (origin - begin + self._clock.seconds(zero, moment) for moment in (a, b))
            yield Span(lane, name.partition(" ")[0], name, first, last)
