"""How fast this machine is, as `safepatch bench floor --save` measured it, and how long a merge then takes.

Imports nothing heavy: `safepatch plan` reads the rates each time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safepatch_core.spec import Kind

# Bytes and entries per second of one thread, seconds and counts; what `bench floor` measures and `predict` uses.
DISK_READ = "disk_read_bytes_per_s"  # nothing in the page cache
DISK_WRITE = "disk_write_bytes_per_s"  # until it is on the disk
READ = "read_bytes_per_s"  # from the page cache
WRITE = "write_bytes_per_s"  # into the page cache
HASH = "hash_bytes_per_s"
STARTUP = "startup_s"  # a merge of next to nothing
CORES = "cores"
STALLS = "stalls"  # how many times longer than its slowest part a merge takes
GATE = "gate_entries_per_s"  # entries of which gates are told two patches' deltas
GATE_THREADS = 8  # at most; each has buffers of its own, a few MiB and an adapter's factors
PASSES = ("merge", "histogram", "apply")
# The forms in which patches reach an engine. There are no more, whatever kinds of sources come to be.
FORMS: tuple[Kind, ...] = ("checkpoint", "delta", "lora")


def engine_rate(pass_: str, form: str) -> str:
    """The name of an engine's rate: entries of one patch per second and thread."""
    return f"{pass_}_{form}_entries_per_s"


MACHINE = (DISK_READ, DISK_WRITE, READ, WRITE, HASH, STARTUP, CORES, STALLS)
NAMES = (*MACHINE, GATE, *(engine_rate(pass_, form) for pass_ in PASSES for form in FORMS))


def rates_path() -> Path:
    """Where this user's rates are kept."""
    cache = os.environ.get("XDG_CACHE_HOME")
    home = Path(cache) if cache and os.path.isabs(cache) else Path.home() / ".cache"
    return home / "safepatch" / "rates.json"


def load_rates() -> dict[str, float] | None:
    """The saved rates; None where there are none, or none of the machine or of an engine. Other keys are ignored."""
    try:
        data = json.loads(rates_path().read_text(encoding="utf-8"))
        rates = {name: float(data[name]) for name in NAMES if name in data}
    except (OSError, ValueError, TypeError):
        return None
    whole = all(name in rates for name in MACHINE) and len(rates) > len(MACHINE)
    return rates if whole and all(math.isfinite(value) and value > 0 for value in rates.values()) else None


def save_rates(rates: Mapping[str, float]) -> Path:
    """Keep rates for `load_rates`; where they are kept. Raises OSError."""
    path = rates_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    known = {name: rates[name] for name in NAMES if name in rates}
    fresh.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    fresh.replace(path)
    return path


def lanes(
    description: Mapping[str, Any], rates: Mapping[str, float], *, cached: float = 0.0, streams: int = 1
) -> dict[str, float]:
    """Seconds that each part of a merge takes by itself: reader, engine, hash, writer, the processor, the disk.

    description: what `api.describe` returns, with its `tensors`; `threads`, if it is there, are the engine's.
    cached: the share of the inputs that is in the page cache.
    streams: how many shards are under way at once, each with a reader, a hash and a writer of its own.
    """
    read = int(description["bytes_read"]) - _gates(description)[1]
    written = int(description["bytes_written"])
    cores = _rate(rates, CORES)
    threads = min(cores, description.get("threads") or cores)
    engine = 0.0
    for tensor in description["tensors"]:
        passes = ("merge",) if tensor["passes"] == 1 else ("histogram", "apply")
        names = [engine_rate(pass_, form) for pass_ in passes for form in tensor["forms"] if form]
        engine += sum(tensor["entries"] / _rate(rates, name) for name in names)
    reader, hashing, writer = read / _rate(rates, READ), written / _rate(rates, HASH), written / _rate(rates, WRITE)
    return {
        "reader": reader / streams,
        "engine": engine / threads,
        "hash": hashing / streams,
        "writer": writer / streams,
        "processor": (reader + engine + hashing + writer) / cores,
        "disk": (1 - cached) * read / _rate(rates, DISK_READ) + written / _rate(rates, DISK_WRITE),
    }


def predict(
    description: Mapping[str, Any], rates: Mapping[str, float], *, cached: float = 0.0, streams: int = 1
) -> float:
    """Seconds that a merge will take; arguments as of `lanes`.

    All parts work at once, so the slowest of them counts. How well they do that, `bench floor` has seen in a merge.
    Gates are told first, by threads of their own. At most, where `bytes_read_at_most` is said of the bytes.
    """
    entries, read = _gates(description)
    gates = max(
        entries / (_rate(rates, GATE) * min(_rate(rates, CORES), GATE_THREADS)),
        (1 - cached) * read / _rate(rates, DISK_READ),
    )
    slowest = max(lanes(description, rates, cached=cached, streams=streams).values())
    return rates.get(STARTUP, 0.0) + gates + rates.get(STALLS, 1.0) * slowest


def _gates(description: Mapping[str, Any]) -> tuple[int, int]:
    """Entries and bytes that are read for gates, before the merge."""
    of = description["gates"]
    return of["entries"], of["bytes_read"]


def _rate(rates: Mapping[str, float], name: str) -> float:
    """A rate; where it wasn't measured, the slowest of its pass, or else no limit."""
    alike = [rate for other, rate in rates.items() if other.partition("_")[0] == name.partition("_")[0] in PASSES]
    return rates.get(name, min(alike, default=math.inf))
