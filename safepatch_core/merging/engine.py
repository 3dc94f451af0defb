"""How a merge is run: engine, device, threads and limits as one value. None of it shows in the result."""

from __future__ import annotations

from typing import TypedDict

from safepatch_core.backends import open_backend
from safepatch_core.backends.contract import Backend
from safepatch_core.sizes import size


class EngineOptions(TypedDict, total=False):
    """Keywords of every function that merges or recomputes; what is left out or None is chosen here.

    Attributes:
        backend: auto, cpu, triton, reference or another engine's name; or an engine that is open already.
        device: the GPU of the triton engine, as torch names it.
        threads: of the cpu engine, all cores by default.
        memory_limit: bytes (or "2GiB") of buffers on the host, 2 GiB by default. Tensors that don't fit are done in
            chunks.
        vram_limit: bytes (or "8GiB") of the GPU's memory.
        streams: output shards that `merge` has under way at once; by default one per four threads, at most four. The
            memory limit and the number of shards allow fewer; with whole-model scope and on a GPU it is one, and
            more is refused.
        chunk_entries: cut larger targets into chunks of so many entries, whatever fits; for tests.
    """

    backend: str | Backend
    device: str | None
    threads: int | None
    memory_limit: int | str | None
    vram_limit: int | str | None
    streams: int | None
    chunk_entries: int | None


def open_engine(options: EngineOptions) -> tuple[Backend, int | None]:
    """The engine that the options ask for, and the host's memory limit in bytes.

    Raises:
        UsageError: the engine can't run here, or a size is none.
    """
    limit, vram = size(options.get("memory_limit")), size(options.get("vram_limit"))
    engine = options.get("backend", "auto")
    if isinstance(engine, str):
        engine = open_backend(engine, threads=options.get("threads"), device=options.get("device"), vram_limit=vram)
    return engine, limit
