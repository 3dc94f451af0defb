"""Merges one after another: the same weights as one by one, whatever is remembered, and patches that are not read."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from safepatch_core.errors import InputError
from safepatch_core.merging.api import merge, plan
from safepatch_core.merging.plan import FIXED_BYTES
from safepatch_core.merging.recipe import Recipe, parse_recipe
from safepatch_core.merging.series import Made, Series, listing
from safepatch_core.runs.jobs import files_digest, weights_digest

SHAPES = {f"layers.{i}.weight": (300, 400) for i in range(4)} | {"embed.weight": (50, 400), "norm.weight": (400,)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of two shards' size, two patches and scores."""
    folder, generator = tmp_path_factory.mktemp("series"), torch.Generator().manual_seed(3)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for model in ("base", "one", "two", "scores"):
        (folder / model).mkdir()
        moved = {n: t + (model != "base") * 0.01 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        tensors = {n: (t.abs() if model == "scores" else t).bfloat16().contiguous() for n, t in moved.items()}
        save_file(tensors, folder / model / "model.safetensors")
    (folder / "base/config.json").write_text("{}")
    return folder


def recipe(models: Path, one: dict[str, Any] | None = None, **keys: Any) -> Recipe:
    patches = [{"name": n, "source": n, "kind": "checkpoint", "top": 0.03, "retain": 0.3} for n in ("one", "two")]
    patches[0] |= one or {}
    data = {"base": "base", "patches": patches, "max_shard_size": "600KB", **keys}
    return parse_recipe(data, origin=models, file="recipe.yaml")


def made(series: Series, of: Recipe, tmp_path: Path) -> tuple[Made, str]:
    """One merge of a series; raises AssertionError unless it is that of `merge`."""
    number = sum(1 for _ in tmp_path.iterdir())
    found = series.merge(of, tmp_path / str(number))
    alone = merge(of, tmp_path / f"alone-{number}", backend="cpu", threads=1)
    assert {p.name for p in (tmp_path / str(number)).iterdir()} == {
        p.name for p in alone.out.iterdir() if p.name not in ("README.md", "SHA256SUMS", "safepatch.json")
    }
    assert found.counts == alone.counts
    digest = files_digest(tmp_path / str(number))
    assert digest == weights_digest(alone.out)
    return found, digest


def test_what_differs_in_scale_top_or_combine_reads_the_base_alone(models: Path, tmp_path: Path) -> None:
    alike = [
        recipe(models),
        recipe(models, {"scale": -2.5}),
        recipe(models, {"top": 0.06, "skip": 0.01}),
        recipe(models, {"top": 0.001, "rescale": True}, combine="sum", accumulate="deltas", **{"lambda": 0.5}),
        recipe(models, {"top": 0}, combine="ties"),
        recipe(models, {"overrides": [{"names": ["layers.1*"], "scale": 3.0, "top": 0.01}]}),
    ]
    assert len({listing(of) for of in alike}) == 1
    series = Series(alike, backend="cpu", threads=2)
    results = [made(series, of, tmp_path) for of in alike]
    assert len({digest for _, digest in results}) == len(alike)
    assert [of.found for of, _ in results] == [0, *[4] * 5]
    base = (models / "base/model.safetensors").stat().st_size
    assert results[0][0].bytes_read > 2.8 * base and all(of.bytes_read < base for of, _ in results[1:])


def test_what_finds_other_entries_looks_again(models: Path, tmp_path: Path) -> None:
    scores = {"importance": {"scores": "scores"}}
    others = [recipe(models, {"retain": 0.5}), recipe(models, seed=1), recipe(models, order="select-first")]
    others += [recipe(models, scores), recipe(models, scope="model"), recipe(models, {"top": 0.9})]
    assert len({listing(of) for of in [recipe(models), *others]}) == 6  # the last is listed as the first
    series = Series([recipe(models), *others], backend="cpu", threads=1)
    assert [made(series, of, tmp_path)[0].found for of in [recipe(models), *others]] == [0] * 7
    # Each is remembered beside the others.
    again = [recipe(models, {"scale": 2.0}), recipe(models, {"retain": 0.5, "top": 0.01}), recipe(models, scores)]
    assert [made(series, of, tmp_path)[0].found for of in again] == [4, 4, 0]


def test_what_another_patch_or_a_weight_decides_is_looked_at_again(models: Path, tmp_path: Path) -> None:
    gradients = [{"importance": {"gradients": "scores", "weight": weight}} for weight in ("base", "delta", "patched")]
    signs = [{"agreement": {"patch": "two", "signs": signs}} for signs in ("same", "opposite")]
    gates = [{"gate": {"patch": "two", **gate}} for gate in ({"below": 0.0}, {"least": 0.0})]
    every: list[dict[str, Any]] = [{}, *gradients, *signs, *gates]
    recipes = [recipe(models, one, combine="sum") for one in every]
    assert len({listing(of) for of in recipes}) == len(recipes)
    series = Series(recipes, backend="cpu", threads=1)
    # Both gates together have every tensor, so one of them may have all of them.
    assert len({made(series, of, tmp_path)[1] for of in recipes}) >= len(recipes) - 1


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_recipes(models: Path, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)

    def drawn() -> Recipe:
        one = {"top": draw.choice([0, 0.01, 0.05, 0.3, 1.0]), "scale": draw.choice([1.0, -0.5, 4.0])}
        one |= {"retain": draw.choice([0.3, 1.0])}
        return recipe(models, one, combine=draw.choice(["difference", "sum", "ties"]), seed=draw.choice([0, 7]))

    recipes = [drawn() for _ in range(8)]
    series = Series(recipes, backend="cpu", threads=1)
    found = [made(series, of, tmp_path)[0].found for of in recipes]
    assert any(found)


def test_the_memory_limit_holds_and_what_is_idle_makes_room(models: Path, tmp_path: Path) -> None:
    one, other = recipe(models), recipe(models, {"retain": 0.5})
    wide = Series([one, other], backend="cpu", threads=1)
    held = [made(wide, of, tmp_path) and wide.held for of in (one, one, other)]
    assert 0 < held[0] == held[1] < held[2]
    needed = plan(one, backend="cpu", threads=1)
    least = FIXED_BYTES + needed.ring_bytes + needed.beside_bytes
    for room, found in ((0, [0, 0, 0, 0]), ((held[2] - held[0]) * 5 // 4, [0, 4, 0, 4])):
        series = Series([one, other], backend="cpu", threads=1, memory_limit=least + room)
        assert [made(series, of, tmp_path)[0].found for of in (one, one, other, other)] == found
        assert series.held <= room


def test_a_changed_input_is_looked_at_again(models: Path, tmp_path: Path) -> None:
    series = Series([recipe(models)], backend="cpu", threads=1)
    before = made(series, recipe(models), tmp_path)[1]
    path = models / "two/model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-2000:] = raw[-4000:-2000]
    path.write_bytes(raw)
    found, after = made(series, recipe(models), tmp_path)
    assert found.found == 0 and after != before


def test_an_engine_without_notes_and_faults(models: Path, tmp_path: Path) -> None:
    series = Series([recipe(models)], backend="reference")
    assert [made(series, of, tmp_path)[0].found for of in [recipe(models)] * 2] == [0, 0]
    series = Series([recipe(models)], backend="cpu", threads=1)
    made(series, recipe(models), tmp_path)
    for name in ("bad", "bad again"):
        with pytest.raises(InputError, match="overflow"):
            high = {"combine": "sum", "accumulate": "deltas", "lambda": 3e38}
            series.merge(recipe(models, {"scale": 300.0}, **high), tmp_path / name)
