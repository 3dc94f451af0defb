"""The table of all methods, overlap of importance, and rounds that remember, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safepatch_core.bench.psa import compared, measures, overlap, remembering, separation
from safepatch_core.bench.psa.compared import ORIGINAL, TUNED, UTILITY, Models, between, of_patches
from safepatch_core.bench.psa.data import FRAMINGS, SIZES
from safepatch_core.bench.psa.measures import Measures
from safepatch_core.bench.psa.overlap import Scored, overlaps, top_set
from safepatch_core.bench.psa.steps import BACKBONE, ROUNDS, WITH_UTILITY, Evidence, rounds, settings
from safepatch_core.deriving import DeriveConfig, OverSafetyPatch, SafetyPatch
from safepatch_core.merging.recipe import parse_recipe
from tests.small_corpora import Small
from tests.tiny_lm import write_lm


def few_steps(of: Evidence, variant: str, seed: int, out: Path, **changes: Any) -> DeriveConfig:
    few: dict[str, Any] = {
        "safety": SafetyPatch(max_steps=2, top=0.3),
        "over_safety": OverSafetyPatch(max_steps=2, top=0.3),
    }
    # Made-up orders are too short to need more; rows beyond the first ones would only take time.
    few |= {"rows": "0:8"} if "data" not in changes else {}
    few |= {"max_length": 200, "learning_rate": 1e-2, "ascent_bound": None}  # a token is a byte
    return settings(of, variant, seed, out, **{**few, **changes})


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Evidence:
    for module in (compared, overlap):
        monkeypatch.setattr(module, "settings", few_steps)
    corpora = Small(tmp_path / "data")
    corpora.write()
    write_lm(tmp_path / "out" / "backbone")
    original = load_file(write_lm(tmp_path / "original") / "model.safetensors")
    shifted = {name: w + np.float32(0.01) * np.sign(w) if w.ndim > 1 else w for name, w in original.items()}
    save_file(shifted, tmp_path / "original" / "model.safetensors", metadata={"format": "pt"})
    rows = [{"question": f"what is {i}", "answer": f"it is {i}"} for i in range(48)]
    (tmp_path / "out" / "utility.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Evidence(str(tmp_path / "original"), corpora, tmp_path / "out", 1, lambda text: None)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so much is asked that a tiny model takes seconds."""
    whole = measures.asked

    def asked(job: Evidence, size: str) -> dict[str, Any]:
        few = whole(job, size)
        few |= {"harmful_rows": "400:406", "harmless_rows": "0:6", "max_new_tokens": 4, "lm_eval": None}
        few |= {"lm_eval_include": None, "lm_eval_limit": None, "text_rows": "200:201"}
        return few | {"more_sets": [of | {"rows": "0:4"} for of in few["more_sets"]]}

    again = measures.asked_again
    few = {"harmful_rows": "400:406", "relearn_rows": "320:324", "max_new_tokens": 4, "relearn_learning_rate": 1e-2}
    monkeypatch.setattr(measures, "asked", asked)
    monkeypatch.setattr(measures, "asked_again", lambda job, size: again(job, size) | few)


def weights(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return load_file(folder / "model.safetensors")


def test_every_way_is_a_recipe_and_moves_the_backbone(job: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compared, "STRENGTHS", {"patches.safety.scale": {"values": [4.0, 8.0]}})  # two trials
    models = Models(job)
    for name in compared.WAYS:
        recipe = models.recipe(name, 0)
        parse_recipe({key: value for key, value in recipe.items() if key != "origin"})
        moved, base = weights(models.merged(name, 0, recipe)), weights(job.backbone)
        assert moved.keys() == base.keys()
        assert any(not np.array_equal(moved[of].view(np.uint32), base[of].view(np.uint32)) for of in base), name


def test_patches_on_another_row_start_from_its_model(job: Evidence) -> None:
    models = Models(job)
    on = models.merged(UTILITY, 0, models.recipe(UTILITY, 0))
    run = models.patches(compared.DIRECTIONS, 0, UTILITY)
    assert json.loads((run / "derive.json").read_text())["config"]["model"] == str(on.resolve())
    assert models.patches(compared.DIRECTIONS, 0) != run


def test_whole_models_are_mixed_by_their_names(job: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compared.WAYS, UTILITY, of_patches(WITH_UTILITY, {"patches": [{"scale": 2.0}] * 2}))
    way = between(TUNED | {"scale": 0.5}, compared.SAFETY | {"scale": 0.25}, combine="sum")
    monkeypatch.setitem(compared.WAYS, "mixed", way)
    models = Models(job)
    mixed = weights(models.merged("mixed", 0, models.recipe("mixed", 0)))
    base, original = weights(job.backbone), weights(models.named(ORIGINAL, 0))
    tuned = weights(models.named(UTILITY, 0))
    name = "model.layers.0.mlp.down_proj.weight"
    half, quarter = np.float32(0.5), np.float32(0.25)
    expected = base[name] + half * (tuned[name] - base[name]) + quarter * (base[name] - original[name])
    np.testing.assert_array_equal(mixed[name].view(np.uint32), expected.view(np.uint32))


def test_a_model_is_made_again_only_where_its_recipe_has_changed(
    job: Evidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(scale: float) -> int:
        monkeypatch.setitem(compared.WAYS, "way", between(compared.SAFETY | {"scale": scale}, combine="sum"))
        models = Models(job)
        place = models.merged("way", 0, models.recipe("way", 0))
        return (place / "model.safetensors").stat().st_mtime_ns

    first = made(0.5)
    assert made(0.5) == first != made(1.0)


def test_what_was_measured_is_kept_until_something_changes(job: Evidence, short: None) -> None:
    calls: list[str] = []

    def make() -> Path:
        calls.append("made")
        return job.backbone

    first = Measures(job, "quarter").found("model", {"scale": 1}, make)
    assert Measures(job, "quarter").found("model", {"scale": 1}, make) == first and calls == ["made"]
    Measures(job, "quarter").found("model", {"scale": 2}, make)
    assert calls == ["made", "made"]


def test_rows_are_told_beside_the_backbone_and_a_second_run_measures_nothing(
    job: Evidence, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {name: compared.WAYS[name] for name in (UTILITY, "ExPO")}
    monkeypatch.setattr(compared, "WAYS", ways)
    compared.run(job, "quarter", range(2))
    results = job.out / "results"
    lines = [json.loads(line) for line in (results / "methods-quarter.jsonl").read_text().splitlines()]
    assert [(line["method"], line.get("seed")) for line in lines] == [
        (BACKBONE, None),
        (UTILITY, 0),
        ("ExPO", 0),  # draws nothing: once
        (UTILITY, 1),
    ]
    assert set(lines[1]["metrics"]) >= set(measures.COLUMNS) - {
        name for name in measures.COLUMNS if name.startswith("lm_eval")
    }
    base, utility = (line["metrics"]["perplexity"] for line in lines[:2])
    assert utility["change"]["value"] == pytest.approx(utility["value"] - base["value"], abs=1e-3)
    assert lines[1]["metrics"]["consistency.framed-harmful"]["n"] == 1  # 4 rows in 4 framings
    assert lines[1]["metrics"]["relearned.2"]["n"] == 6 and "relearned.0" not in lines[1]["metrics"]
    table = (results / "methods-quarter.md").read_text()
    assert f"| {UTILITY} |" in table and "Beside the backbone" in table
    assert not (job.out / "compared" / compared.slug("ExPO", 0)).exists()

    said: list[str] = []
    again = Evidence(job.model, job.corpora, job.out, 1, said.append)
    compared.run(again, "quarter", range(2))
    assert said == []
    assert (results / "methods-quarter.md").read_text() == table


def test_what_a_method_pays_with_is_named() -> None:
    def row(harmful: float, sst: float, catqa: float, refused: float) -> dict[str, Any]:
        names = (*compared.HARMFUL, compared.REFUSAL)
        return {name: {"mean": value} for name, value in zip(names, (harmful, sst, catqa, refused), strict=True)}

    start = row(0.1, 0.4, 0.5, 0.3)
    table = {BACKBONE: start, "still": start, "free": row(0.1, 0.3, 0.5, 0.2), "pays": row(0.1, 0.45, 0.5, 0.1)}
    assert compared.verdict(table | {"pays too": row(0.1, 0.41, 0.5, 0.2)}) == {
        "as the backbone": ["still"],
        "below in harmful, SimpleSafetyTests, over-refusal, XSTest": ["free"],
        "below in over-refusal, XSTest; above in harmful, SimpleSafetyTests": ["pays", "pays too"],
    }


def test_what_is_trained_on_is_not_measured(job: Evidence) -> None:
    def rows(text: str) -> set[int]:
        return set(range(550)[slice(*(int(part) if part else None for part in text.split(":")))])

    chosen_by = rows(next(of for of in job.corpora.development()["more_sets"] if of["name"] == "catqa")["rows"])
    trained = set().union(*(rows(of["rows"]) for of in job.corpora.trained_questions()))
    measured = [rows(job.corpora.questions(step)["rows"]) for step in SIZES.values()]
    assert [len(of) for of in measured] == [55, 28, 14, 7] and len(trained) == 79
    assert not trained & (measured[0] | chosen_by) and not chosen_by & measured[0]


def test_orders_and_questions_stand_one_beside_the_other(job: Evidence) -> None:
    rows = [json.loads(line) for line in compared.orders_and_questions(job).read_text().splitlines()]
    questions = [row["question"] for row in rows[1::2]]
    assert all(of["question"].startswith("do ") for of in rows[::2])
    assert all(of.startswith("how to ") for of in questions) and len(rows) == 2 * len(questions)
    assert len({row["question"] for row in rows}) == len(rows)
    assert max(int(row["question"].removeprefix("do ")) for row in rows[::2]) < 320


def test_a_request_stands_in_every_framing(tmp_path: Path) -> None:
    corpora = Small(tmp_path / "data")
    corpora.write()
    for step, counts in ((1, (40, 32)), (4, (10, 8))):
        for of, count in zip(corpora.write_framings(tmp_path / "framings", step), counts, strict=True):
            rows = [json.loads(line) for line in Path(of["file"]).read_text().splitlines()]
            assert len(rows) == count * len(FRAMINGS) and len({row["request"] for row in rows}) == count
            first = rows[0]["question"]
            assert [row["question"] for row in rows[: len(FRAMINGS)]] == [f.format(first) for f in FRAMINGS]


@pytest.mark.parametrize(
    ("scores", "share", "chosen"),
    [
        ([3, 1, 4, 1, 5], 0.4, [2, 4]),
        ([1, 2, 2, 2, 0], 0.4, [1, 2]),  # of equal ones the lower positions
        ([0, 0, 0, 7, 0], 0.6, [3]),  # what has no score is in no set
        ([0, 0, 0, 0, 0], 0.6, []),
        ([1, 1, 1, 1, 1], 0.0, []),
    ],
)
def test_a_top_set_is_the_contracts(scores: list[float], share: float, chosen: list[int]) -> None:
    assert np.flatnonzero(top_set(np.array(scores, np.float32), share)).tolist() == chosen


def test_overlap_is_counted_over_all_tensors(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    folders, sets = {}, []
    for seed in (0, 1):
        tensors = {name: draw.random((20, 10), np.float32) for name in ("a", "b")}
        tensors["b"][0] = 2  # ten of b are in both sets
        (tmp_path / str(seed)).mkdir()
        save_file(tensors, tmp_path / str(seed) / "model.safetensors")
        folders[Scored("data", seed)] = tmp_path / str(seed)
        sets.append({(name, i) for name, w in tensors.items() for i in np.argsort(-w.ravel(), kind="stable")[:20]})
    (found,) = overlaps(folders, 0.1)
    assert found["iou"] == len(sets[0] & sets[1]) / len(sets[0] | sets[1]) > 0.1
    assert (found["a"], found["b"]) == (["data", 0], ["data", 1])


def test_overlap_of_a_tiny_model_and_its_table(job: Evidence) -> None:
    overlap.run(job, "quarter", range(2))
    pairs = json.loads((job.out / "results" / "overlap.json").read_text())
    assert len(pairs) == len(overlap.SHARES) * 8 * 7 / 2  # four data sets of two seeds, and no patches yet
    assert all(0 <= pair["iou"] <= 1 for pair in pairs)
    orders = [p["iou"] for p in pairs if p["share"] == 0.1 and p["a"][0] == p["b"][0] == overlap.ORDERS]
    assert f"| {overlap.ORDERS} | {orders[0]:.3f} |" in (job.out / "results" / "overlap.md").read_text()


def test_the_ways_of_remembering_stand_side_by_side() -> None:
    def found(way: str, seed: int, last: float) -> dict[str, Any]:
        def row(after: str, value: float) -> dict[str, Any]:
            own = {name: {"value": value} for name in ROUNDS}
            metrics = {"harmful_compliance": {"value": value}, "over_refusal": {"value": 0.25}}
            return {"after": after, "harmful_compliance": own, "metrics": metrics}

        forgot = [{"round": "violence", "value": last - 0.5}]
        return {"way": way, "seed": seed, "matrix": [row(BACKBONE, 0.7), row("fraud", last)], "forgetting": forgot}

    text = remembering.table([found("nothing", 0, 0.4), found("nothing", 1, 0.6), found("ewc", 0, 0.3)])
    assert "Remembering nothing, seeds 2; forgotten: violence +0.0% (-10.0% to +10.0%)." in text
    assert "| fraud | 50.0% (40.0% to 60.0%) |" in text and "| backbone | 70.0% |" in text
    assert "Remembering ewc, seeds 1; forgotten: violence -20.0%." in text


def test_a_way_of_remembering_is_a_run_file(job: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    asked: list[dict[str, Any]] = []

    def run_file(file: Path, out: Path, *, resume: bool) -> None:
        asked.append(yaml.safe_load(file.read_text()))
        out.mkdir()
        (out / "rounds.json").write_text(json.dumps({"matrix": [], "forgetting": []}))

    monkeypatch.setattr(remembering, "run_file", run_file)
    monkeypatch.setattr(remembering, "table", lambda found: f"{len(found)}")
    for _ in range(2):  # the second time all is there
        remembering.run(job, "quarter", range(2))
    assert len(asked) == 2 * len(remembering.WAYS)
    assert {of["derive"]["importance_kind"] for of in asked} == {"fisher"}
    assert [of["remember"] for of in asked[: len(remembering.WAYS)]] == list(remembering.WAYS.values())
    assert {of["derive"]["seed"] for of in asked} == {0, 1}
    assert {of["eval"]["harmful_rows"] for of in asked} == {"1:100:8"}


def test_rounds_that_remember_on_a_tiny_model(job: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    def few(of: Evidence, answering: str) -> dict[str, Any]:
        section = rounds(of, answering)
        section["derive"] |= {"ascent_bound": None, "rows": "0:12:2", "importance_samples": 4}
        section["derive"]["over_safety"] |= {"max_steps": 2}
        section["eval"] |= {"max_new_tokens": 4, "harmless_rows": "0:4"}
        section["answers"] |= {"max_new_tokens": 4}
        return section

    monkeypatch.setattr(remembering, "rounds", few)
    monkeypatch.setattr(remembering, "WAYS", {"both": ["ewc", "replay"]})
    remembering.run(job, "eighth", range(1))
    out = job.out / "remembering-both-0-eighth"
    terms = [json.loads((out / f"round-{n}" / "derive" / "derive.json").read_text())["config"] for n in (1, 2, 3)]
    assert [len(of["ewc_fisher"]) for of in terms] == [0, 2, 4]
    assert [of["replay_data"] is not None for of in terms] == [False, True, True]
    (found,) = json.loads((job.out / "results" / "remembering-eighth.json").read_text())
    assert [row["after"] for row in found["matrix"]] == [BACKBONE, *ROUNDS]
    assert found["matrix"][0]["metrics"]["harmful_compliance"]["n"] == 21  # seven of each round
    assert (
        "Remembering both, seeds 1; forgotten: violence"
        in (job.out / "results" / "remembering-eighth.md").read_text()
    )


def test_the_committed_table_is_of_the_committed_rows() -> None:
    folder = Path(__file__).parents[1] / "bench" / "results" / "psa"
    page = (folder / "README.md").read_text()
    for name, told in (("methods", compared.markdown), ("separation", separation.table)):
        lines = [json.loads(line) for line in (folder / f"{name}-half.jsonl").read_text().splitlines()]
        assert told(lines) in page
    assert overlap.table(json.loads((folder / "overlap.json").read_text())) in page


def test_what_refuses_more_alike_tells_nothing_better() -> None:
    start = {"harmless": [5.0, 6.0, 7.0], **{name: [4.0, 6.0, 8.0, 9.0] for name in separation.SETS}}
    alike = {name: [nats - 2 for nats in of] for name, of in start.items()}
    better = {name: [nats - 2 * (name != "harmless") for nats in of] for name, of in start.items()}
    for told in (separation.areas(start, start), separation.areas(alike, start)):
        assert told["catqa"] == {"n": [4, 3], "value": 0.375, "change": {"value": 0.0, "interval": [0.0, 0.0]}}
    told = separation.areas(better, start)["catqa"]
    assert told["value"] == 0.6667 and told["change"]["value"] == 0.2917  # 8 and 4.5 of 12 pairs
    assert 0 <= told["change"]["interval"][0] < 0.2917 < told["change"]["interval"][1] <= 1
    lines = [{"method": BACKBONE, "area": separation.areas(start, start)}]
    lines += [{"method": "way", "area": separation.areas(better, start)}]
    table = separation.table(lines)
    assert "| way | 0.667" in table and "| AUC against harmless prompts |" in table


def test_separation_of_a_tiny_model_is_kept(job: Evidence, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separation, "WAYS", {name: compared.WAYS[name] for name in (UTILITY, "ExPO")})
    separation.run(job, "quarter", range(1))
    results = job.out / "results"
    lines = [json.loads(line) for line in (results / "separation-quarter.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines] == [BACKBONE, UTILITY, "ExPO"]
    assert all(set(line["area"]) == set(separation.SETS) for line in lines)
    assert all(0 <= of["value"] <= 1 for line in lines for of in line["area"].values())
    said: list[str] = []
    separation.run(Evidence(job.model, job.corpora, job.out, 1, said.append), "quarter", range(1))
    assert not [line for line in said if not line.startswith("merge")]


@pytest.mark.parametrize(("chosen", "scale"), [(0, 1.0), (None, 2.0)])
def test_where_every_trial_refuses_too_much_the_least_is_taken(
    job: Evidence, monkeypatch: pytest.MonkeyPatch, chosen: int | None, scale: float
) -> None:
    refused = {1.0: 0.6, 2.0: 0.4, 3.0: 0.5}
    trials = [
        {"parameters": {"patches.safety.scale": at}, "metrics": {compared.REFUSAL: {"value": rate}}}
        for at, rate in refused.items()
    ]
    monkeypatch.setattr(compared, "search", lambda *_, **__: {"chosen": chosen, "trials": trials})
    recipe = compared.searched(WITH_UTILITY).recipe(Models(job), 0)
    assert recipe["patches"][0]["scale"] == scale


def test_seeds_that_agree_are_drawn(tmp_path: Path) -> None:
    names = (*compared.HARMFUL, compared.REFUSAL)
    metric = {"n": 28, "better": "lower", "value": 0.892857, "change": {"value": 0.0, "interval": [-0.1, 0.1]}}
    lines: list[dict[str, Any]] = [{"method": BACKBONE, "size": "half", "metrics": dict.fromkeys(names, metric)}]
    lines += [{"method": UTILITY, "seed": seed, "metrics": dict.fromkeys(names, metric)} for seed in range(3)]
    compared.write(lines, tmp_path, "half")
    assert (tmp_path / "methods-half.png").exists()
