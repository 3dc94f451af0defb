"""A GPU as the Triton engine sees it: memory, streams and events, few enough to be played by a fake."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from safepatch_core.errors import UsageError
from safepatch_core.memory import page_aligned

if TYPE_CHECKING:
    import torch

    from safepatch_core.kernels.launch import Launch

DEFAULT_VRAM = 4 << 30
DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA, NVIDIA under Windows, AMD


def _missing() -> str | None:
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed; try: pip install 'safepatch[triton]'" if missing else None


def interpreted() -> bool:
    """Whether the kernels run on the CPU, for their meaning."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def usable() -> str | None:
    """None where a GPU can be used, else the reason why not. torch is imported only where a driver is."""
    if missing := _missing():
        return missing
    if not any(Path(driver).exists() for driver in DRIVERS):
        return "no GPU driver here"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


class Device(Protocol):
    """Memory, streams and events: all that the engine asks of a GPU. Buffers are 1-D uint8 tensors."""

    name: str
    warp: int  # lanes

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Device memory, aligned to 256 bytes. Raises UsageError where there is less."""

    def default_memory(self) -> int:
        """Bytes that an engine takes where nobody says how many."""

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory that copies reach directly, aligned to 4096 bytes, so that disks reach it too."""

    def stream(self) -> Any: ...

    def event(self) -> Any: ...

    def record(self, event: Any, stream: Any) -> None:
        """The event happens when all that the stream was given so far is done."""

    def wait(self, stream: Any, event: Any) -> None:
        """What the stream is given from now on waits for the event's last record, if there was one."""

    def upload(self, stream: Any, target: torch.Tensor, source: NDArray[Any]) -> None: ...

    def download(self, stream: Any, target: NDArray[Any], source: torch.Tensor) -> None: ...

    def clear(self, stream: Any, target: torch.Tensor) -> None: ...

    def launch(self, stream: Any, launch: Launch) -> None: ...

    def happened(self, event: Any) -> bool:
        """Whether the event's last record has been reached."""

    def finish(self, event: Any) -> None:
        """Wait until it is; what was queued after it goes on."""

    def synchronize(self) -> None:
        """Wait until all streams are done."""


def as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """The bytes of a contiguous host array of one byte or more; torch would complain of a read-only one."""
    import torch

    raw = (ctypes.c_uint8 * array.nbytes).from_address(array.ctypes.data)
    return torch.from_numpy(np.ctypeslib.as_array(raw))


class InterpretedDevice:
    """The CPU as a device: one thing after the other, so streams and events have nothing to do."""

    name, warp = "interpreter", 32

    def default_memory(self) -> int:
        return 256 << 20

    def allocate(self, nbytes: int) -> torch.Tensor:
        import torch

        return torch.from_numpy(page_aligned(nbytes))

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        return page_aligned(nbytes)

    def stream(self) -> None: ...

    def event(self) -> None: ...

    def record(self, event: None, stream: None) -> None: ...

    def wait(self, stream: None, event: None) -> None: ...

    def upload(self, stream: None, target: torch.Tensor, source: NDArray[Any]) -> None:
        target.copy_(as_tensor(source))

    def download(self, stream: None, target: NDArray[Any], source: torch.Tensor) -> None:
        as_tensor(target).copy_(source)

    def clear(self, stream: None, target: torch.Tensor) -> None:
        target.zero_()

    def launch(self, stream: None, launch: Launch) -> None:
        launch.run(self.warp)

    def happened(self, event: None) -> bool:
        return True

    def finish(self, event: None) -> None: ...

    def synchronize(self) -> None: ...


class TorchDevice:
    """A GPU by way of torch: CUDA, or ROCm under the same names."""

    def __init__(self, device: str | None) -> None:
        reason = usable()
        if reason is not None:
            raise UsageError(f"the triton engine can't run here: {reason}")
        import torch

        try:
            chosen = torch.device(device or f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
            chosen = torch.device(chosen.type, chosen.index or 0)
            properties = torch.cuda.get_device_properties(chosen)
        except (RuntimeError, AssertionError, ValueError) as error:
            count = torch.cuda.device_count()
            raise UsageError(
                "no such device", found=device or error, expected=f"cuda:0 to cuda:{count - 1}"
            ) from None
        if torch.version.hip is None and properties.major < 8:
            found = f"{properties.name}, sm_{properties.major}{properties.minor}"
            raise UsageError("the triton engine can't run on this GPU", found=found, expected="sm_80 or later")
        self._torch, self._device = torch, chosen
        self._cuda: Any = torch.cuda  # much of it is untyped
        self.name, self.warp = properties.name, properties.warp_size

    def allocate(self, nbytes: int) -> torch.Tensor:
        try:
            return self._torch.empty(nbytes, dtype=self._torch.uint8, device=self._device)
        except self._torch.OutOfMemoryError:
            free = self._free()
            raise UsageError(
                "not enough GPU memory; lower --vram-limit", found=f"{free} bytes free", expected=nbytes
            ) from None

    def default_memory(self) -> int:
        return min(DEFAULT_VRAM, self._free() * 9 // 10)

    def _free(self) -> int:
        """Bytes of the GPU's memory that nobody uses."""
        return int(self._cuda.mem_get_info(self._device)[0])

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Own memory, registered: torch's pinned allocator rounds sizes up to the next power of two."""
        memory = page_aligned(nbytes)
        runtime = self._cuda.cudart()
        with self._cuda.device(self._device):
            status = runtime.cudaHostRegister(memory.ctypes.data, max(nbytes, 1), 1)  # 1: portable
        if int(status) != 0:
            raise UsageError("host memory can't be pinned; lower --memory-limit", found=f"{nbytes} bytes ({status})")
        # The base goes when the last view does; at exit the runtime may be gone already.
        weakref.finalize(memory.base, runtime.cudaHostUnregister, memory.ctypes.data).atexit = False
        return memory

    def stream(self) -> Any:
        return self._cuda.Stream(self._device)

    def event(self) -> Any:
        return self._cuda.Event()

    def record(self, event: Any, stream: Any) -> None:
        event.record(stream)

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def upload(self, stream: Any, target: torch.Tensor, source: NDArray[Any]) -> None:
        with self._cuda.stream(stream):
            target.copy_(as_tensor(source), non_blocking=True)

    def download(self, stream: Any, target: NDArray[Any], source: torch.Tensor) -> None:
        with self._cuda.stream(stream):
            as_tensor(target).copy_(source, non_blocking=True)

    def clear(self, stream: Any, target: torch.Tensor) -> None:
        with self._cuda.stream(stream):
            target.zero_()

    def launch(self, stream: Any, launch: Launch) -> None:
        with self._cuda.stream(stream):
            launch.run(self.warp)

    def happened(self, event: Any) -> bool:
        return bool(event.query())

    def finish(self, event: Any) -> None:
        event.synchronize()

    def synchronize(self) -> None:
        self._cuda.synchronize(self._device)


def open_device(name: str | None) -> Device:
    """The device called `name` (a GPU of torch), by default this rank's; the CPU under TRITON_INTERPRET=1.

    Raises UsageError where there is none, saying why.
    """
    if not interpreted():
        return TorchDevice(name)
    if missing := _missing():
        raise UsageError(f"the triton engine can't run here: {missing}")
    if name not in (None, "cpu"):
        raise UsageError("TRITON_INTERPRET=1 runs on the CPU only", found=name, expected="no device")
    return InterpretedDevice()
