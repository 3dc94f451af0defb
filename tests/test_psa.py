"""The evidence's own rules: disjoint splits, methods as recipes, the intersection, the means of the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from safepatch_core.bench.psa.data import TRAINED, Corpora
from safepatch_core.bench.psa.methods import DEFAULTS, METHODS, intersection, merge, recipe_of, swept_method
from safepatch_core.bench.psa.report import collect, markdown
from safepatch_core.bench.psa.tasks import CHOICE, CONTEXT, continuations
from safepatch_core.merging.recipe import parse_recipe

NAMES = ("safety", "over-safety")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory as `derive` leaves it: two patches of one matrix, and a recipe."""
    draw = np.random.default_rng(0)
    base = draw.standard_normal((64, 64)).astype(np.float32)
    for name in ("base", *NAMES):
        values = base if name == "base" else base + np.float32(1e-3) * draw.standard_normal((64, 64), np.float32)
        (tmp_path / name).mkdir()
        save_file({"layer.weight": values}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    patches = [{"name": name, "source": name, "top": 0.3, "retain": 0.5} for name in NAMES]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"base": "base", "patches": patches}))
    return tmp_path


def weights(folder: Path) -> np.ndarray[Any, Any]:
    return load_file(folder / "model.safetensors")["layer.weight"].view(np.uint32)


def test_every_method_is_a_recipe(run: Path) -> None:
    for method in METHODS.values():
        parse_recipe(recipe_of(run, method))


def test_intersection_keeps_both_patches_where_both_rank_high_and_the_base_elsewhere(run: Path) -> None:
    both = intersection(run, METHODS["intersection"], run / "out", 1)["both"]
    base, out = weights(run / "base"), weights(run / "out")
    merge(run, {"combine": "sum"}, run / "sum", 1)
    merge(run, {"combine": "difference"}, run / "difference", 1)
    in_both = weights(run / "sum") != weights(run / "difference")
    assert both == in_both.sum() > 0
    assert np.array_equal(out[in_both], weights(run / "sum")[in_both])
    assert np.array_equal(out[~in_both], base[~in_both])
    # A patch alone moves more than the intersection.
    assert (weights(run / "difference") != base).sum() > 0


def test_a_trial_of_a_sweep_becomes_a_method() -> None:
    method = swept_method({"patches.*.retain": 0.5, "patches.safety.top": 0.1, "scope": "model"})
    assert method == {"scope": "model", "patches": [{"retain": 0.5, "top": 0.1}, {"retain": 0.5}]}
    assert METHODS[DEFAULTS]["patches"] == [{}, {}]


def test_no_prompt_is_in_two_splits() -> None:
    corpora = Corpora(Path("data"))
    development, held_out = corpora.development(), corpora.held_out()

    def rows(text: str, of: int) -> set[int]:
        return set(range(of)[slice(*(int(part) for part in text.split(":")))])

    harmful = [rows(TRAINED, 520), rows(development["harmful_rows"], 520), rows(held_out["harmful_rows"], 520)]
    assert sum(map(len, harmful)) == len(set.union(*harmful)) == 320 + 40 + 120
    harmless = [rows(development["harmless_rows"], 250), rows(held_out["harmless_rows"], 250)]
    assert sum(map(len, harmless)) == len(set.union(*harmless)) == 63 + 63


def test_a_continuation_has_four_choices_and_its_own_comes_first() -> None:
    lines = [" ".join(f"{line}-{word}" for word in range(60)) for line in range(8)] + [" = Title = ", "short"]
    found = continuations(lines)
    assert len(found) == 8
    for document in found:
        choices: Any = document["choices"]
        line = str(document["context"]).split("-")[0]
        assert document["context"] == " ".join(f"{line}-{word}" for word in range(CONTEXT))
        assert [choice.split("-")[0].strip() == line for choice in choices] == [True, False, False, False]
        assert all(len(choice.split()) == CHOICE for choice in choices) and len(set(choices)) == 4
    assert found == continuations(lines)


def test_the_table_takes_means_over_seeds_and_counts_the_seeds_that_differ() -> None:
    def rate(value: float) -> dict[str, Any]:
        return {"value": value, "interval": [value - 0.1, value + 0.1]}

    metric = {"name": "over_refusal", "better": "lower", "n": 10, "baseline": rate(0.5)}
    for at, value in enumerate((0.2, 0.25, 0.9)):
        label = "model" if at == 0 else f"model_{at + 1}"
        metric |= {label: rate(value), "difference" + label.removeprefix("model"): rate(value - 0.5)}
    report = {"models": dict.fromkeys(("baseline", "model", "model_2", "model_3")), "metrics": [metric]}
    found = collect(report, [("a", 0), ("a", 1), ("b", 0)])
    assert found["a"]["over_refusal"]["mean"] == pytest.approx(0.225)
    assert found["a"]["over_refusal"]["range"] == [0.2, 0.25]
    assert (found["a"]["over_refusal"]["better"], found["a"]["over_refusal"]["worse"]) == (2, 0)
    assert (found["b"]["over_refusal"]["better"], found["b"]["over_refusal"]["worse"]) == (0, 1)
    text = markdown({"plain": found})
    assert "22.5% (20.0–25.0) ▲" in text and "90.0% ▼" in text and "| backbone | 50.0% |" in text
