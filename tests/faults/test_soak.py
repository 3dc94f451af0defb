"""Many merges in a row, of random recipes, limits and threads, some killed: nothing grows, no byte differs."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from safepatch_core import merge
from safepatch_core.errors import SafepatchError
from safepatch_core.merging import sink
from tests.faults.harness import KILL, Bench, Server, contents, fault
from tests.recipes import write_random

MERGES = int(os.environ.get("SAFEPATCH_SOAK", "10"))
GROWTH = 4 << 20  # bytes that the resident memory may differ by between the first half and the end


def resident() -> int:
    """Bytes in memory, without what the C library keeps of freed memory for its next callers."""
    with suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def held() -> tuple[int, int]:
    """Open descriptors and threads."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def outcome(recipe: Path, out: Path, **how: object) -> dict[str, bytes] | type[SafepatchError]:
    try:
        merge(recipe, out, **how)  # type: ignore[arg-type]
    except SafepatchError as error:
        return type(error)
    return contents(out)


def test_soak(bench: Bench, run: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(7)
    place = bench.root / "soak"
    before, memory, killed = held(), [], 0
    for i in range(MERGES):
        recipe = write_random(place, 1000 + i, hostile=dice.random() < 0.2)
        inputs = sorted(os.listdir(place))
        expected = outcome(recipe, place / "reference", backend="reference")
        chunk = dice.choice((1, 7, 64, 1 << 20))
        mark = dice.choice((1, 500, 1 << 30))
        monkeypatch.setattr(sink, "MARK_BYTES", mark)
        threads, limit = dice.choice((1, 2)), dice.choice(("16MiB", "1GiB"))
        out = place / "out"
        if i % 2 == 0:
            args = ["merge", recipe, "-o", out, "--backend", "cpu", "--memory-limit", limit]
            kill = fault(out.with_name(".out"), dice.randrange(2, 60), KILL)
            ended = run(*args, fault=kill, mark_bytes=mark)
            killed += ended.status == -9
            done = out.exists()  # it wasn't killed, or when all was done
            found = outcome(
                recipe,
                out,
                backend="cpu",
                threads=threads,
                memory_limit=limit,
                chunk_entries=chunk,
                resume=True,
                force=done,
            )
        else:
            found = outcome(recipe, out, backend="cpu", threads=threads, memory_limit=limit, chunk_entries=chunk)
        assert found == expected, f"seed {1000 + i}: {recipe.read_text()}"
        left = set(os.listdir(place)) - set(inputs) - {"out", "reference"}
        assert not left, f"something temporary remains: {left}"
        shutil.rmtree(place)
        memory.append(resident())
        assert held() == before, f"after {i + 1} merges"
    assert killed > MERGES // 5
    assert max(memory[-MERGES // 4 :]) - max(memory[: MERGES // 2 + 1]) < GROWTH, [m >> 20 for m in memory]
    tenths = [m >> 20 for m in memory[:: max(MERGES // 10, 1)]]
    print(f"{MERGES} merges, {killed} killed, resident MiB: {tenths}")
