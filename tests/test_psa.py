"""The evidence's own rules: disjoint splits, methods as recipes, the intersection, the means of the table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

from safepatch_core.bench.psa import quantised
from safepatch_core.bench.psa.data import TRAINED, Corpora
from safepatch_core.bench.psa.methods import DEFAULTS, METHODS, intersection, merge, recipe_of, swept_method
from safepatch_core.bench.psa.quantised import Behaviour, Row, told
from safepatch_core.bench.psa.report import collect, markdown
from safepatch_core.bench.psa.steps import Evidence, settings
from safepatch_core.bench.psa.tasks import CHOICE, CONTEXT, continuations
from safepatch_core.bench.psa.twins import LAYOUTS, as_floats, quantise
from safepatch_core.deriving import DeriveConfig, OverSafetyPatch, SafetyPatch
from safepatch_core.merging.recipe import parse_recipe
from tests.small_corpora import Small
from tests.tiny_lm import write_lm

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


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_twin_has_the_nearest_codes_and_stands_for_their_values(tmp_path: Path, name: str) -> None:
    write_lm(tmp_path / "base")
    quantise(tmp_path / "base", tmp_path / "twin", name)
    as_floats(tmp_path / "twin", tmp_path / "floats")
    base, floats = (load_file(tmp_path / of / "model.safetensors") for of in ("base", "floats"))
    assert base.keys() == floats.keys()
    for tensor, w in base.items():
        if not tensor.endswith("_proj.weight") or (name == "int4-g32" and w.shape[1] % 32):
            assert np.array_equal(floats[tensor], w), tensor
            continue
        if name == "int4-g32":
            w = w.reshape(len(w), -1, 32)
        highest = {"fp8-block": 448, "int8-channel": 127.5, "int4-g32": 7.5}[name]
        s = np.abs(w).max(None if name == "fp8-block" else -1, keepdims=True) / np.float32(highest)
        if name == "fp8-block":
            q = torch.from_numpy(w / s).to(torch.float8_e4m3fn).float().numpy()
        else:
            q = np.clip(np.rint(w / s), -math.ceil(highest), math.floor(highest))
        assert np.array_equal(floats[tensor], (q * s).reshape(floats[tensor].shape)), tensor


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evidence:
    def few_steps(of: Evidence, variant: str, seed: int, out: Path, **changes: Any) -> DeriveConfig:
        safety = changes.get("safety", SafetyPatch()).model_copy(update={"max_steps": 2})
        changes |= {"safety": safety, "over_safety": OverSafetyPatch(max_steps=2)}
        return settings(of, variant, seed, out, **changes, learning_rate=1e-3, ascent_bound=None)

    monkeypatch.setattr(quantised, "settings", few_steps)
    corpora = Small(tmp_path / "data")
    corpora.write()
    write_lm(tmp_path / "out" / "backbone")
    (tmp_path / "out" / "utility.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    return Evidence("none", corpora, tmp_path / "out", 1, lambda text: None)


def test_rows_are_measured_once_and_told_beside_their_own_twin(job: Evidence) -> None:
    of = Behaviour(job, "quarter")
    rows = [Row("int8-channel", way) for way in (quantised.PLAIN, quantised.STOCHASTIC)]
    found = {row: of.found(row) for row in rows}
    assert told(of, {rows[1]: found[rows[1]]}) == []
    twin, patched = told(of, found)
    assert "change" not in twin["metrics"]["perplexity"] and twin["codes"] == {} == found[rows[0]]["codes"]
    assert patched["codes"].keys() == set(NAMES) and all(of["changed"] > 0 for of in patched["codes"].values())
    for metric, n in {"harmful_compliance": 30, "harmful_compliance.sst": 25, "over_refusal": 63}.items():
        one, other = (line["metrics"][metric] for line in (twin, patched))
        assert (one["n"], other["n"]) == (n, n)
        assert other["change"]["value"] == pytest.approx(other["value"] - one["value"])
    assert patched["metrics"]["perplexity"]["change"]["interval"] is not None
    kept = [path.name for path in (job.out / "quantised").iterdir()]
    assert sorted(kept) == ["int8-channel-unpatched-0", "measured-quarter", "patches"]
    before = (job.out / "quantised" / "patches" / "recipe.yaml").stat()
    again = Behaviour(job, "quarter")
    assert {row: again.found(row) for row in rows} == found
    assert (job.out / "quantised" / "patches" / "recipe.yaml").stat() == before


def test_a_twin_is_restored_on_what_its_original_answers_otherwise(job: Evidence) -> None:
    of = Behaviour(job, "quarter")
    rows = [Row(quantised.INT4, way) for way in (quantised.PLAIN, quantised.RESTORED)]
    _, restored = told(of, {row: of.found(row) for row in rows})
    assert restored["codes"].keys() == {"safety"} and restored["codes"]["safety"]["changed"] > 0
    questions, pairs = (
        [json.loads(line) for line in (job.out / "quantised" / file).read_text().splitlines()]
        for file in ("questions.jsonl", "restored/data.jsonl")
    )
    assert pairs and all(pair["chosen"] != pair["rejected"] for pair in pairs)
    asked = {row["question"] for row in questions}
    assert {"do 120", "do 316"} <= asked and not asked & {"do 119", "do 320"}
    assert {pair["question"] for pair in pairs} <= asked


def test_the_committed_table_is_of_the_committed_rows() -> None:
    folder = Path(__file__).parents[1] / "bench" / "results" / "quantised"
    lines = [json.loads(line) for line in (folder / "behaviour.jsonl").read_text().splitlines()]
    assert quantised.table(lines) in (folder / "README.md").read_text()


def test_a_star_marks_what_the_usual_guard_stops(job: Evidence) -> None:
    codes = {"a": {"survival": 7.4, "acted": 4, "changed": 1}, "b": {"survival": 1.0, "acted": 4, "changed": 2}}
    metric = {"value": 0.25, "change": {"value": -0.5, "interval": [-0.75, 0.25]}}
    line = {"format": "int4-g32", "way": quantised.NEAREST, "seed": 0, "codes": codes, "guard_stops": ["a"]}
    text = quantised.table([line | {"metrics": dict.fromkeys(quantised.COLUMNS, metric)}])
    assert "| int4-g32 | nearest |  | 25.0% (-50.0 [-75.0, +25.0]) |" in text
    assert text.endswith("| 7.40*, 1.00 | 25.00%, 50.00% |\n")
