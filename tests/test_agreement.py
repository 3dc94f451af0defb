"""Agreement: a patch is chosen where its signs are those of another patch, or the opposite ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safepatch_core import merge, plan
from safepatch_core.errors import InputError, UsageError
from safepatch_core.merging.recipe import parse_recipe
from tests import oracle
from tests.oracle import Tensor, load_checkpoint
from tests.recipes import write_plain

ENGINES = ("oracle", "reference", "cpu")


def f32(*values: float) -> Tensor:
    return Tensor("F32", (len(values),), np.array(values, "<f4").tobytes())


def run(engine: str, recipe: Path) -> list[float]:
    """The merged tensor."""
    if engine == "oracle":
        merged = oracle.merge(recipe).tensors
    else:
        merge(recipe, recipe.parent / f"out-{engine}", backend=engine)
        merged = load_checkpoint(recipe.parent / f"out-{engine}")
    return list(oracle.to_f32(merged["w"]).tolist())


def agreeing(root: Path, mine: Tensor, other: Tensor, signs: str, spec: dict[str, Any] | None = None) -> Path:
    """A merge in which the other patch is only looked at."""
    rule = {"agreement": {"patch": "other", "signs": signs}}
    patches = {
        "mine": ({"w": mine}, {"kind": "delta"} | rule | (spec or {})),
        "other": ({"w": other}, {"kind": "delta", "top": 0.0}),
    }
    base = {"w": f32(*[0] * (len(mine.data) // 4))}
    return write_plain(root, base, patches, targets="all", combine="sum")


@pytest.mark.parametrize("engine", ENGINES)
def test_signs_that_fit(engine: str, tmp_path: Path) -> None:
    mine, other = f32(1, 2, -3, -4, 5, 0, 1e-45), f32(9, -1, -1e-45, 2, 0, 7, 1e-45)
    assert run(engine, agreeing(tmp_path / "a", mine, other, "same")) == pytest.approx([1, 0, -3, 0, 0, 0, 1e-45])
    assert run(engine, agreeing(tmp_path / "b", mine, other, "opposite")) == [0, 2, 0, -4, 0, 0, 0]


@pytest.mark.parametrize("engine", ENGINES)
def test_top_is_a_share_of_all_entries(engine: str, tmp_path: Path) -> None:
    mine, other = f32(1, 2, 3, 4, 5, 6, 7, 8), f32(1, 1, 1, 1, -1, -1, -1, -1)
    assert run(engine, agreeing(tmp_path, mine, other, "same", {"top": 0.25})) == [0, 0, 3, 4, 0, 0, 0, 0]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_safety_vector_contradicts_is_removed_the_most_important_first(engine: str, tmp_path: Path) -> None:
    """IRR without its recalibration: the fine-tuning but for entries of the other sign, ranked by Fisher."""
    rng = np.random.default_rng(0)
    tuned, vector, fisher = (rng.standard_normal(40).astype(np.float32) for _ in range(3))
    fisher = fisher * fisher
    rule = {"agreement": {"patch": "tuned", "signs": "opposite"}, "top": 0.2, "scores": {"w": f32(*fisher)}}
    patches = {
        "tuned": ({"w": f32(*tuned)}, {"kind": "delta"}),
        "safety": ({"w": f32(*vector)}, {"kind": "delta"} | rule),
    }
    recipe = write_plain(tmp_path, {"w": f32(*[0] * 40)}, patches, targets="all")
    against = np.flatnonzero(np.sign(tuned) != np.sign(vector))
    worst = against[np.argsort(-fisher[against])][:8]
    expected = tuned.copy()
    expected[worst] = 0
    assert 8 < len(against) < 32
    assert run(engine, recipe) == expected.tolist()


def test_scores_that_break_a_rule_do_so_whatever_the_signs(tmp_path: Path) -> None:
    spec = {"scores": {"w": f32(1, -1)}}
    with pytest.raises(InputError, match="negative"):
        run("cpu", agreeing(tmp_path / "a", f32(1, 1), f32(1, -1), "same", spec))
    spec = {"scores": {"w": f32(1, np.inf)}}
    with pytest.raises(InputError, match="score is NaN or infinite"):
        run("cpu", agreeing(tmp_path / "b", f32(1, 1), f32(1, -1), "same", spec))


def test_signs_that_fit_nowhere_leave_nothing_to_choose(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no entry of a target is eligible"):
        run("cpu", agreeing(tmp_path, f32(1, 1), f32(1, 1), "opposite"))


def test_the_recipe_keeps_the_rule_and_refuses_a_patch_that_is_not_there(tmp_path: Path) -> None:
    recipe = plan(agreeing(tmp_path, f32(1), f32(1), "same")).recipe
    assert recipe.written()["patches"][0]["agreement"] == {"patch": "other", "signs": "same"}
    assert "agreement" not in recipe.written()["patches"][1]
    spec = {"name": "p", "source": "a", "agreement": {"patch": "p", "signs": "same"}}
    with pytest.raises(UsageError, match="the agreement of patch 'p' is with another patch of the recipe"):
        parse_recipe({"base": "base", "patches": [spec]})
