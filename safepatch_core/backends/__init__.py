"""The engines by name, and how one is opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safepatch_core.errors import UsageError, lacks_memory

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from safepatch_core.backends.contract import Backend

# The module and its function that opens an engine, a `contract.Opener`. An installed package adds its own as entry
# points of GROUP; these names stay ours.
ENGINES = {
    "cpu": "safepatch_core.backends.cpu:open_engine",
    "triton": "safepatch_core.backends.triton:open_engine",
    "reference": "safepatch_core.backends.reference:open_engine",
}
GROUP = "safepatch.engines"


def find_engine(name: str) -> EntryPoint:
    """Where the engine called `name` is. Raises UsageError, naming those that there are, where there is none."""
    from importlib.metadata import EntryPoint, entry_points  # its import takes as long as that of the command line

    if name in ENGINES:
        return EntryPoint(name, ENGINES[name], GROUP)
    others = {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in ENGINES}
    if name in others:
        return others[name]
    raise UsageError("unknown backend", found=repr(name), expected=" or ".join(["auto", *ENGINES, *sorted(others)]))


def open_backend(
    name: str = "auto", *, threads: int | None = None, device: str | None = None, vram_limit: int | None = None
) -> Backend:
    """The engine called `name`; `auto` is triton where a GPU is usable (or a device is named), else cpu.

    Args:
        name: "auto", a key of ENGINES, or the name of an entry point of GROUP.
        threads: Of the cpu engine, the caller's included; by default all cores, shared by the ranks of a machine.
        device: GPU of the triton engine, like "cuda:0".
        vram_limit: Bytes of its memory that the triton engine may take.

    Raises:
        UsageError: There is no such engine, or it can't run here.
    """
    if name == "auto":
        from safepatch_core.backends.device import usable

        name = "triton" if device is not None or usable() is None else "cpu"
    entry = find_engine(name)
    try:
        opener = entry.load()
    except (ImportError, AttributeError) as error:
        if lacks_memory(error):
            raise
        raise UsageError(f"the {name} engine can't be loaded", found=str(error)) from error
    engine: Backend = opener(threads=threads, device=device, vram_limit=vram_limit)
    return engine
