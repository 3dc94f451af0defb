"""SIGTERM and Ctrl-C at random times: exit 75, resumable, the same bytes."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import (
    INTERRUPT,
    LONG,
    MARK_BYTES,
    Server,
    contents,
    fault,
    memory_directory,
    restore,
    write_model,
    write_recipe,
)

TIMES = 50 if LONG else 12
SLOW: dict[str, Any] = {
    "chunk": 256,
    "mark_bytes": MARK_BYTES,
}  # entries per unit, so that a small merge takes long enough


@pytest.fixture(scope="module")
def slow(run: Server) -> Iterator[tuple[Path, dict[str, bytes], float]]:
    """A recipe whose merge takes some hundred milliseconds, its output and how long it took."""
    with memory_directory() as folder:
        for seed, name in enumerate(("base", "safety", "over-safety")):
            write_model(folder / name, seed, rows=160, cols=128)
        recipe = write_recipe(folder)
        took = []
        for i in range(3):
            begin = time.perf_counter()
            ended = run("merge", recipe, "-o", folder / f"clean-{i}", "--backend", "cpu", "--threads", 1, **SLOW)
            took.append(time.perf_counter() - begin)
            assert ended.status == 0, ended.text
        yield recipe, contents(folder / "clean-0"), min(took)


def test_signals_at_random_times(run: Server, slow: tuple[Path, dict[str, bytes], float]) -> None:
    recipe, whole, took = slow
    place = recipe.parent / "place"
    dice, stopped = random.Random(5), 0
    for i in range(4 * TIMES):
        if stopped == TIMES:
            break
        number = (signal.SIGTERM, signal.SIGINT)[i % 2]
        restore(place, None)
        args = ["merge", recipe, "-o", place / "out", "--backend", "cpu", "--threads", 1 + i % 2]
        after = 0.01 + dice.random() * took * 0.9
        ended = run(*args, signal=(number, after), timeout=30, **SLOW)
        assert not ended.hung, f"hung after signal {number} at {after:.3f} s"
        if ended.status == 75:
            stopped += 1
            assert f"stopped by {signal.Signals(number).name}" in ended.said()
            assert not (place / "out").exists() or contents(place / "out") == whole
            ended = run(*args, "--resume", **SLOW)
        assert ended.status == 0, ended.text
        assert contents(place / "out") == whole and os.listdir(place) == ["out"]
    assert stopped == TIMES


def test_a_second_signal_does_not_wait(run: Server, slow: tuple[Path, dict[str, bytes], float]) -> None:
    """Ctrl-C twice, or a terminal and `make` both, is exit 75 and no traceback."""
    recipe, whole, _ = slow
    place = recipe.parent / "place"
    args = ["merge", recipe, "-o", place / "out", "--backend", "cpu", "--threads", 1]
    for _ in range(6):
        restore(place, None)
        calls = run(*args, fault=fault(place, 60, INTERRUPT, stays=True), **SLOW)
        assert calls.status == 75 and "Traceback" not in calls.text, calls.text
        assert run(*args, "--resume", **SLOW).status == 0
        assert contents(place / "out") == whole and os.listdir(place) == ["out"]
