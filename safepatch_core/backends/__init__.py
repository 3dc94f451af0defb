"""The engines, and how one is opened by its name."""

from __future__ import annotations

import os

from safepatch_core.backends.contract import Backend
from safepatch_core.errors import UsageError


def open_backend(
    name: str = "auto", *, threads: int | None = None, device: str | None = None, vram_limit: int | None = None
) -> Backend:
    """The engine called `name`; `auto` is triton where a GPU is usable (or a device is named), else cpu.

    threads: of the cpu engine; device, vram_limit (bytes): of the triton engine. Raises UsageError if an engine
    asked for by name can't run here.
    """
    if name == "auto":
        from safepatch_core.backends.device import usable

        name = "triton" if device is not None or usable() is None else "cpu"
    if name == "reference":
        from safepatch_core.backends.reference import ReferenceBackend

        return ReferenceBackend()
    if name == "cpu":
        from safepatch_core.backends.cpu import CpuBackend

        # Ranks on one machine share its cores.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return CpuBackend(threads or max(1, len(os.sched_getaffinity(0)) // ranks))
    if name == "triton":
        from safepatch_core.backends.triton import TritonBackend

        return TritonBackend(device, vram_limit)
    raise UsageError("unknown backend", found=repr(name), expected="auto, cpu, triton or reference")
