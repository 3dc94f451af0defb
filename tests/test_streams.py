"""Several output shards at once: the same bytes, one failure that ends all, memory that counts each."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safepatch_core import merge
from safepatch_core.backends.cpu import CpuBackend
from safepatch_core.commands import cli
from safepatch_core.errors import InputError, Stopped, UsageError
from safepatch_core.merging import rates
from safepatch_core.merging.api import describe, plan
from tests.test_cli import write_safetensors

SHARDS = 6


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Six shards of unlike sizes and one patch of all of them."""
    rng = np.random.default_rng(3)
    base = {f"layer.{i}.weight": rng.standard_normal((64 * (1 + i % 3), 64), dtype=np.float32) for i in range(SHARDS)}
    patch = {name: tensor + np.float32(2.0**-8) * rng.integers(-2, 3, tensor.shape) for name, tensor in base.items()}
    write_safetensors(tmp_path / "base" / "model.safetensors", base)
    write_safetensors(tmp_path / "patch" / "model.safetensors", {n: t.astype(np.float32) for n, t in patch.items()})
    path = tmp_path / "recipe.yaml"
    path.write_text("base: base\nmax_shard_size: 16KB\npatches: [{name: a, source: patch, top: 0.2, retain: 0.5}]\n")
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("chunk", [None, 1024])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_same_bytes_and_counts(recipe: Path, tmp_path: Path, backend: str, chunk: int | None) -> None:
    one = merge(recipe, tmp_path / "one", backend=backend, streams=1)
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == SHARDS
    many = merge(recipe, tmp_path / "many", backend=backend, streams=3, chunk_entries=chunk)
    assert files(tmp_path / "many") == files(tmp_path / "one")
    assert (many.counts, many.changed) == (one.counts, one.changed)


def test_they_are_under_way_at_once(recipe: Path, tmp_path: Path) -> None:
    together, met = threading.Barrier(3), set[int]()

    def trace(stage: str, unit: Any, begin: float, end: float) -> None:
        if stage == "read" and threading.get_ident() not in met and len(met) < 3:
            met.add(threading.get_ident())
            together.wait(timeout=60)  # passes once three readers are here

    merge(recipe, tmp_path / "out", backend="cpu", streams=3, trace=trace)
    assert len(met) == 3 and not together.broken


def test_the_first_failure_ends_all_and_is_told(recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "patch" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()  # of the last shard
    path.write_bytes(data)
    threads = threading.active_count()
    with pytest.raises(InputError, match=r"'layer\.5\.weight': the delta is NaN"):
        merge(recipe, tmp_path / "out", backend="cpu", streams=3)
    assert not [p.name for p in tmp_path.iterdir() if "out" in p.name]
    assert threading.active_count() == threads


def test_what_was_stopped_goes_on_to_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    merge(recipe, tmp_path / "one", backend="cpu", streams=1)
    handled, told = threading.Event(), 0

    def handler(*given: Any) -> None:
        handled.set()
        cli._stop(*given)

    def stop(done: int, total: int) -> None:
        nonlocal told
        told += 1
        if told == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            handled.wait(timeout=60)  # the others are waiting to tell of what they read

    before = signal.signal(signal.SIGTERM, handler)

    try:
        with pytest.raises(Stopped):
            merge(recipe, tmp_path / "out", backend="cpu", streams=3, progress=stop)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "out").exists()
    merge(recipe, tmp_path / "out", backend="cpu", streams=2, resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "one")


def test_the_memory_limit_allows_fewer(recipe: Path) -> None:
    known = plan(recipe, backend="cpu", streams=4)
    each = known.ring_bytes + known.beside_bytes
    assert describe(known)["streams"] == 4 and describe(known)["memory"] == 4 * each
    assert plan(recipe, backend="cpu", streams=4, memory_limit=3 * each + (8 << 20)).streams == 3
    assert plan(recipe, backend="cpu", streams=99).streams == SHARDS
    text = recipe.read_text()
    recipe.write_text(text + "scope: model\n")
    assert plan(recipe, backend="cpu", threads=16).streams == 1


def test_the_default_follows_the_threads(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, streams in ((1, 1), (7, 1), (8, 2), (16, 4), (32, 4)):
        assert plan(recipe, backend="cpu", threads=threads).streams == streams
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert plan(recipe, backend="cpu").streams == 2
    assert plan(recipe, backend="cpu", threads=4).streams == 1
    assert plan(recipe, backend="reference").streams == 1


def test_several_are_refused_where_they_would_have_no_effect(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(UsageError, match=r"--streams: this engine .* found 2"):
        patch.setattr(CpuBackend, "takes_turns", False)
        plan(recipe, backend="cpu", streams=2)
    recipe.write_text(recipe.read_text() + "scope: model\n")
    with pytest.raises(UsageError, match=r"--streams: scope: model .* found 4, expected 1"):
        plan(recipe, backend="cpu", streams=4)
    assert plan(recipe, backend="cpu", streams=1).streams == 1


def test_the_time_is_of_what_is_under_way(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    slow = {rates.READ: 1e3, rates.CORES: 64.0, rates.STARTUP: 1e-9}  # readers bound it
    rates.save_rates(dict.fromkeys(rates.NAMES, 1e9) | {rates.STALLS: 1.0} | slow)
    one, four = (describe(plan(recipe, backend="cpu", streams=n))["seconds"] for n in (1, 4))
    assert one == pytest.approx(4 * four)
