"""Whole-model scope from lists: the same bytes with them, without, and with some; patches that are not read again."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from safepatch_core.merging.api import describe, merge, plan
from safepatch_core.merging.plan import Plan
from safepatch_core.merging.recipe import Recipe
from tests import test_series
from tests.test_ranks import files

SHAPES = {f"layers.{i}.weight": (100 + 40 * i, 300) for i in range(4)} | {"embed.weight": (50, 300), "norm": (300,)}
CHUNK = 4096
ALL = 1 << 30


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two patches, whose steps are the larger the later a layer comes."""
    folder, generator = tmp_path_factory.mktemp("lists"), torch.Generator().manual_seed(4)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for model in ("base", "one", "two"):
        (folder / model).mkdir()
        tensors = {}
        for i, (name, tensor) in enumerate(base.items()):
            step = 0.01 * (i + 1) * torch.randn(tensor.shape, generator=generator)
            tensors[name] = (tensor if model == "base" else tensor + step).bfloat16()
        save_file(tensors, folder / model / "model.safetensors")
    (folder / "base/config.json").write_text("{}")
    return folder


def recipe(models: Path, one: dict[str, Any] | None = None, **keys: Any) -> Recipe:
    return test_series.recipe(models, one, **{"scope": "model", "max_shard_size": "60KB", **keys})


def room(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """What the memory limit leaves for lists."""
    monkeypatch.setattr(Plan, "room_for_lists", nbytes)


def read(of: Recipe, out: Path, threads: int = 1, chunk: int = CHUNK) -> int:
    return merge(of, out, backend="cpu", threads=threads, chunk_entries=chunk).bytes_read


def test_as_many_lists_as_fit(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, reads = recipe(models), []
    merge(of, tmp_path / "reference", backend="reference", chunk_entries=CHUNK)
    for nbytes in (ALL, 30_000, 0):
        room(monkeypatch, nbytes)
        reads.append(read(of, tmp_path / str(nbytes)))
        assert files(tmp_path / str(nbytes)) == files(tmp_path / "reference")
    assert reads[0] < reads[1] < reads[2] == plan(of, backend="cpu", chunk_entries=CHUNK).bytes_to_read
    # With all of them both patches are read once, and again where one of them shares out ties.
    sizes = [2 * 2 * math.prod(shape) for name, shape in SHAPES.items() if name.startswith("layers")]
    assert reads[2] - reads[0] in {sum(sizes) - sum({a, b}) for a, b in product(sizes, sizes)}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("chunk", [300, 7000, ALL])
def test_chunks_and_threads_do_not_show(models: Path, tmp_path: Path, threads: int, chunk: int) -> None:
    of = recipe(models, {"skip": 0.01}, combine="sum")
    merge(of, tmp_path / "reference", backend="reference")
    read(of, tmp_path / "out", threads, chunk)
    assert files(tmp_path / "out") == files(tmp_path / "reference")


@pytest.mark.parametrize(
    ("one", "keys"),
    [
        ({"top": 0.1, "skip": 0.002}, {"combine": "ties"}),
        ({"retain": 1.0, "scale": -3.0}, {"order": "select-first"}),
        ({"top": 0}, {}),
        ({"top": 1.0}, {}),
        ({"top": 1.0, "skip": 0.02}, {}),
        ({"top": 0.6, "retain": 0.3}, {"combine": "sum"}),
        ({"importance": {"scores": "one"}}, {"nonfinite": "skip"}),
    ],
)
def test_any_recipe(models: Path, tmp_path: Path, one: dict[str, Any], keys: dict[str, Any]) -> None:
    if "importance" in one:
        (models / "scores").mkdir(exist_ok=True)
        scores = {name: torch.rand(shape).bfloat16() for name, shape in SHAPES.items()}
        save_file(scores, models / "scores/model.safetensors")
        one = {"importance": {"scores": "scores"}}
    of = recipe(models, one, **keys)
    merge(of, tmp_path / "reference", backend="reference")
    read(of, tmp_path / "out", 2)
    assert files(tmp_path / "out") == files(tmp_path / "reference")


@pytest.mark.parametrize("layer", [0, 3])
def test_a_sample_that_misleads(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int) -> None:
    """Of the smallest steps, where the lists begin low enough, or of the largest, where they begin too high."""
    of = recipe(models)
    merge(of, tmp_path / "reference", backend="reference", chunk_entries=CHUNK)
    sample_units: Callable[..., Any] = Plan.sample_units
    monkeypatch.setattr(Plan, "sample_units", lambda plan, scope: sample_units(plan, scope[layer : layer + 1]))
    listed = read(of, tmp_path / "listed")
    room(monkeypatch, 0)
    plain = read(of, tmp_path / "plain")
    assert files(tmp_path / "listed") == files(tmp_path / "plain") == files(tmp_path / "reference")
    assert listed == plain if layer == 3 else listed < plain


def test_the_plan_tells_of_lists_where_there_can_be_some(models: Path) -> None:
    listed, scored = recipe(models), recipe(models, {"importance": {"gradients": "one"}})
    told = [describe(plan(of, backend="cpu", memory_limit="64MiB", chunk_entries=CHUNK)) for of in (listed, scored)]
    assert [of["bytes_read_at_most"] for of in told] == [True, False]
    assert told[0]["memory"] - told[1]["memory"] == 7 * sum(told[0]["model_quotas"])
    small = describe(plan(listed, backend="cpu", memory_limit="16MiB", chunk_entries=CHUNK))
    assert small["memory"] <= small["memory_limit"]
    assert not describe(plan(listed, backend="reference"))["bytes_read_at_most"]


def test_a_stopped_merge_goes_on_without_lists_of_before(models: Path, tmp_path: Path) -> None:
    of, out = recipe(models), tmp_path / "out"
    total = plan(of, backend="cpu", chunk_entries=CHUNK).bytes_to_read

    def stop(done: int, _: int) -> None:
        if done > 0.6 * total:  # in the second pass: a sample is read beside what is told here
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(of, out, backend="cpu", chunk_entries=CHUNK, progress=stop)
    assert not out.exists()
    merge(of, out, backend="cpu", chunk_entries=CHUNK, resume=True)
    merge(of, tmp_path / "whole", backend="reference", chunk_entries=CHUNK)
    assert files(out) == files(tmp_path / "whole")
