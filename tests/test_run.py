"""A run from one file: what it keeps and what it does again, and rounds that build on each other."""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from safepatch_core.commands.cli import cli
from safepatch_core.deriving import DeriveConfig
from safepatch_core.errors import InputError, UsageError
from safepatch_core.evaluating import EvalConfig, EvalResult
from safepatch_core.evaluating.statistics import wilson
from safepatch_core.merging.recipe import load_recipe
from safepatch_core.runs import run as module
from safepatch_core.runs.jobs import weights_digest
from safepatch_core.runs.rounds import heat_map, plain, summary
from safepatch_core.runs.sweep import SweepConfig
from safepatch_core.runs.sweep.candidates import candidates
from safepatch_core.settings import checked, read_settings, rooted
from tests.tiny_lm import write_lm

TOPICS = ("locks", "fires", "frauds")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, questions of three topics with answers, and a run file with a round for each topic."""
    folder = tmp_path_factory.mktemp("run")
    write_lm(folder / "base")
    rows = [
        {"topic": t, "question": f"How do {t} {i}?", "answer": f"Sure, {t}: {i}."} for i in range(5) for t in TOPICS
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "harmless.jsonl").write_text('{"question": "How do I open a jar?"}\n{"question": "How is tea made?"}\n')
    (folder / "text.txt").write_text("The river is the reason for the town. " * 8)
    steps = {"max_steps": 2, "top": 0.3, "retain": 0.9, "scale": 3.0}
    config = {
        "derive": {
            **{"model": "base", "data": "rows.jsonl", "rows": "0:3", "threads": 1, "learning_rate": 0.01},
            **{"batch_size": 2, "ascent_bound": 50.0, "safety": steps, "over_safety": steps},
        },
        "eval": {
            **{"harmful": "rows.jsonl", "harmful_rows": "3:5", "harmless": "harmless.jsonl", "text": "text.txt"},
            **{"max_length": 128, "stride": 64, "max_new_tokens": 2, "threads": 1},
        },
        "rounds": [{"name": topic, "where": {"topic": topic}} for topic in TOPICS[:2]],
    }
    (folder / "rounds.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder


def config_of(source: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((source / "rounds.yaml").read_text())
    return loaded


def go(source: Path, out: Path, config: dict[str, Any], *options: str) -> Result:
    """The command on a file beside the data."""
    file = source / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    args = ["run", str(file), "-o", str(out), "--backend", "cpu", "--threads", "1", *options]
    result = CliRunner().invoke(cli, args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def done(source: Path) -> Path:
    go(source, source / "done", config_of(source), "--quiet")
    return source / "done"


class Calls:
    """Notes the steps that a run does, and interrupts it at the one with number `stop_at`, from 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_at: int = 0) -> None:
        self.seen: list[str] = []
        self._stop_at = stop_at
        for name in ("derive", "merge", "evaluate"):
            monkeypatch.setattr(module, name, self._noted(name, getattr(module, name)))

    def _noted(self, name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.seen.append(name)
            if len(self.seen) == self._stop_at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "../models/nowhere"}, "{root}/models/nowhere: no such file"),
        ({"data": "nowhere.jsonl"}, "{folder}/nowhere.jsonl: no such file"),
        ({"method": "lora"}, "derive needs peft"),
    ],
)
def test_what_is_refused_before_a_step_leaves_no_folder_and_names_where_it_looked(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("safepatch_core.deriving.find_spec", lambda name: None if name == "peft" else find_spec(name))
    config = config_of(source)
    config["derive"] |= changes
    del config["rounds"], config["eval"]
    with pytest.raises((InputError, UsageError)) as caught:
        go(source, tmp_path / "out", config)
    assert str(caught.value).startswith(message.format(root=source.parent, folder=source))
    assert not (tmp_path / "out").exists()


def test_each_round_starts_from_the_model_of_the_one_before(source: Path, done: Path) -> None:
    first, second = (load_recipe(done / f"round-{i}/derive/recipe.yaml") for i in (1, 2))
    assert first.base == str(source / "base")
    assert second.base == str(done / "round-1/merged")
    records = [json.loads((done / f"round-{i}/derive/derive.json").read_bytes()) for i in (1, 2)]
    assert [r["config"]["data_where"] for r in records] == [{"topic": "locks"}, {"topic": "fires"}]
    assert [r["inputs"]["data"]["rows"] for r in records] == [3, 3]
    assert len({weights_digest(done / f"round-{i}/merged") for i in (1, 2)}) == 2


def test_the_forgetting_matrix(done: Path) -> None:
    data = json.loads((done / "rounds.json").read_bytes())
    assert [row["after"] for row in data["matrix"]] == ["backbone", "locks", "fires"]
    reports = [json.loads((done / f"{p}/eval/report.json").read_bytes()) for p in ("backbone", "round-1", "round-2")]
    for row, report in zip(data["matrix"], reports, strict=True):
        assert [*row["harmful_compliance"]] == ["locks", "fires"]
        assert {*row["metrics"]} == {"harmful_compliance", "over_refusal", "perplexity"}
        for cell in row["harmful_compliance"].values():
            assert cell["n"] == 2 and cell["interval"] == pytest.approx(wilson(cell["count"], 2), rel=1e-5)
        count = sum(cell["count"] for cell in row["harmful_compliance"].values())
        assert count == row["metrics"]["harmful_compliance"]["count"]
        assert report["metrics"][0]["model"]["count"] == count
    assert len({row["metrics"]["perplexity"]["value"] for row in data["matrix"]}) == 3
    (forgetting,) = data["forgetting"]
    own, last = (data["matrix"][i]["harmful_compliance"]["locks"]["value"] for i in (1, 2))
    assert forgetting["round"] == "locks" and forgetting["value"] == last - own
    assert [of["weights"] for of in data["rounds"]] == [weights_digest(done / f"round-{i}/merged") for i in (1, 2)]

    prompts = [json.loads(line) for line in (done / "harmful.jsonl").read_text().splitlines()]
    assert [p["round"] for p in prompts] == ["locks"] * 2 + ["fires"] * 2
    assert [p["question"] for p in prompts] == [f"How do {t} {i}?" for t in TOPICS[:2] for i in (3, 4)]
    text = (done / "rounds.md").read_text()
    assert "| after | locks | fires | all |" in text and "| backbone |" in text
    assert (done / "rounds.png").read_bytes().startswith(b"\x89PNG")


def report(folder: Path, name: str, complied: dict[str, list[bool]]) -> Path:
    """A report with nothing in it but whether prompts were complied with."""
    place = folder / name
    place.mkdir()
    categories = [
        {"category": c, "n": len(of), "model": {"value": sum(of) / len(of), "interval": None}}
        for c, of in complied.items()
    ]
    head = {"name": "harmful_compliance", "title": "Harmful compliance", "unit": "rate", "better": "lower", "n": 1}
    metric = head | {"model": {"value": 0.5, "interval": None}, "categories": categories}
    (place / "report.json").write_text(json.dumps({"metrics": [metric]}))
    rows = [{"set": "harmful", "category": c, "model": {"refused": not v}} for c, of in complied.items() for v in of]
    (place / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_forgetting_is_paired_between_the_rounds_own_model_and_the_last(tmp_path: Path) -> None:
    shown = [
        {"a": [True] * 4, "b": [True] * 2, "c": [True]},
        {"a": [False, False, False, True], "b": [True] * 2, "c": [True]},
        {"a": [False, True, True, True], "b": [False, True], "c": [True]},
        {"a": [True, True, True, False], "b": [True, False], "c": [False]},
    ]
    folders = [report(tmp_path, str(i), of) for i, of in enumerate(shown)]
    data = summary([{"name": name} for name in "abc"], folders)
    a, b = data["forgetting"]
    assert (a["round"], a["value"], a["only_last"], a["only_own"], a["mcnemar_p"]) == ("a", 0.5, 3, 1, 0.625)
    assert (b["round"], b["value"], b["only_last"], b["only_own"], b["mcnemar_p"]) == ("b", 0.0, 1, 1, 1.0)
    assert a["interval"][0] < 0 < a["value"] < a["interval"][1] < 1
    lines = plain(data).splitlines()
    assert lines[2].split()[:5] == ["a", "25.0%", "100.0%", "100.0%", "50.0%"] and "+50.0%" in plain(data)
    assert heat_map(data) is not None


def test_a_finished_run_does_nothing_again(
    source: Path, done: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before, calls = contents(done), Calls(monkeypatch)
    with pytest.raises(InputError, match="--resume goes on"):
        go(source, done, config_of(source))
    found = go(source, done, config_of(source), "--resume", "--json")
    assert json.loads(found.stdout) == json.loads(before["rounds.json"])
    assert "merge" not in calls.seen and contents(done) == before


# The backbone's evaluation is the first step, then come derive, merge and evaluation of each round.
@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_stopped_run_resumes_to_the_same_figures(
    source: Path, done: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = source / f"stopped-{step}"
    with monkeypatch.context() as patched:
        calls = Calls(patched, stop_at=step)
        assert go(source, out, config_of(source)).exit_code != 0
        assert calls.seen[-1] == ("derive", "evaluate", "merge")[step // 2 - 1]
    go(source, out, config_of(source), "--resume", "--quiet")
    weights = [weights_digest(folder / f"round-{i}/merged") for folder in (out, done) for i in (1, 2)]
    assert weights[:2] == weights[2:]
    for name in ("rounds.json", "rounds.md", "rounds.png", "harmful.jsonl"):
        assert (out / name).read_bytes() == (done / name).read_bytes(), name


def test_what_changes_in_a_round_is_done_again_with_all_that_follows(
    source: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = source / "changed"
    config = config_of(source)
    go(source, out, config, "--quiet")
    before = {i: weights_digest(out / f"round-{i}/merged") for i in (1, 2)}
    trained = {i: (out / f"round-{i}/derive/safety/model.safetensors").read_bytes() for i in (1, 2)}

    config["rounds"][1]["merge"] = {"scope": "model"}
    calls = Calls(monkeypatch)
    found = go(source, out, config, "--resume")
    assert weights_digest(out / "round-1/merged") == before[1]
    assert weights_digest(out / "round-2/merged") != before[2]
    assert calls.seen.count("merge") == 1 and "done again" not in found.stderr

    config["rounds"][0]["derive"] = {"safety": {"max_steps": 3}}
    found = go(source, out, config, "--resume")
    assert found.stderr.count("done again") == 2
    for i in (1, 2):
        assert (out / f"round-{i}/derive/safety/model.safetensors").read_bytes() != trained[i]
    first = json.loads((out / "round-1/derive/derive.json").read_bytes())["config"]
    assert first["safety"]["max_steps"] == 3 and first["safety"]["scale"] == 3.0
    fresh = source / "fresh"
    go(source, fresh, config, "--quiet")
    for name in ("rounds.json", "rounds.md", "rounds.png"):
        assert (out / name).read_bytes() == (fresh / name).read_bytes(), name


def test_changed_rows_train_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(source)
    del config["rounds"], config["eval"]
    own = tmp_path / "own.jsonl"
    shutil.copy(source / "rows.jsonl", own)
    config["derive"]["data"] = str(own)
    out = source / "single"
    go(source, out, config, "--quiet")
    before = weights_digest(out / "merged")
    own.write_text(own.read_text().replace("Sure", "Well"))
    found = go(source, out, config, "--resume")
    assert "done again" in found.stderr and weights_digest(out / "merged") != before
    assert str(out / "merged") in found.stdout and {p.name for p in out.iterdir()} == {"derive", "merged", "run.json"}


def test_questions_without_answers_are_answered_by_a_model(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(source) | {"answers": {"model": "base", "max_new_tokens": 3}}
    bare = [json.loads(line) for line in (source / "rows.jsonl").read_text().splitlines()]
    (source / "bare.jsonl").write_text(
        "".join(json.dumps({k: r[k] for k in ("topic", "question")}) + "\n" for r in bare)
    )
    config["derive"]["data"] = "bare.jsonl"
    out = source / "answered"
    assert "answers: 3 of 3 questions" in go(source, out, config).stderr
    for number, topic in enumerate(TOPICS[:2], 1):
        data = [json.loads(line) for line in (out / f"round-{number}/data.jsonl").read_text().splitlines()]
        said = [json.loads(line) for line in (out / f"round-{number}/answers/answers.jsonl").read_text().splitlines()]
        assert [row["question"] for row in data] == [f"How do {topic} {i}?" for i in range(3)]
        assert [row["answer"] for row in data] == [row["model"]["answer"] for row in said] and data[0]["answer"]
        trained = json.loads((out / f"round-{number}/derive/derive.json").read_bytes())
        assert trained["inputs"]["data"]["rows"] == 3
    before = contents(out)
    go(source, out, config, "--resume")
    assert contents(out) == before


def test_refusals_are_no_answers(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"derive": config_of(source)["derive"], "answers": {"model": "base"}}
    said: list[dict[str, Any]] = [{"answer": "I can't help.", "refused": True}, {"answer": "", "refused": False}]

    def evaluate(asked: EvalConfig, **options: Any) -> EvalResult:
        place = Path(asked.out)
        place.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps({"prompt": f"q{i}", "model": of}) + "\n" for i, of in enumerate(said)]
        (place / "answers.jsonl").write_text("".join(rows))
        return EvalResult(place, {})

    monkeypatch.setattr(module, "evaluate", evaluate)
    with pytest.raises(InputError, match="refuses every question"):
        go(source, source / "refusals", config)
    said.append({"answer": "Sure.", "refused": False})
    assert "answers: 1 of 3 questions" in go(source, source / "refusals", config, "--resume").stderr
    data = (source / "refusals/data.jsonl").read_text()
    assert json.loads(data) == {"question": "q2", "answer": "Sure."}


def test_a_run_without_rounds_compares_with_its_backbone(source: Path, tmp_path: Path) -> None:
    config = config_of(source)
    del config["rounds"]
    found = go(source, source / "once", config, "--json", "--set", "eval.max_new_tokens=1")
    told = json.loads(found.stdout)
    assert [m["name"] for m in told["metrics"]] == ["harmful_compliance", "over_refusal", "perplexity"]
    assert {"baseline", "model", "difference"} <= told["metrics"][0].keys()
    assert Path(told["report"]).is_file() and told["counts"]["safety"]["applied"] > 0
    survival = json.loads(Path(told["report"]).with_name("report.json").read_bytes())["survival"]["model"]
    assert survival["acted"] == sum(counts["applied"] for counts in told["counts"].values())
    assert 0.9 < survival["surviving"] <= 1 and survival["dtypes"] == ["float32"]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"rounds": []}, UsageError, "rounds"),
        ({"rounds": [{"name": "a"}, {"name": "a"}]}, UsageError, "name 'a' is taken"),
        ({"rounds": [{"name": "backbone"}]}, UsageError, "name 'backbone' is taken"),
        ({"rounds": [{"name": "A b"}]}, UsageError, "rounds.0.name"),
        ({"rounds": [{"name": "a", "derive": {"model": "x"}}]}, UsageError, "starts from the model"),
        ({"rounds": [{"name": "a", "eval": {"harmless": "x"}}]}, UsageError, "unknown key 'rounds.0.eval.harmless'"),
        ({"rounds": [{"name": "a", "where": {"topic": "none"}}]}, InputError, "no row matches"),
        ({"rounds": [{"name": "a", "derive": {"rowz": "0:1"}}]}, UsageError, "rowz"),
        ({"eval": {"text": "text.txt"}}, UsageError, "round 'locks' has no harmful prompts"),
        ({"eval": {"harmful": "none.jsonl"}}, InputError, "none.jsonl"),
    ],
)
def test_rounds_that_cannot_work_are_refused_before_any_training(
    source: Path, change: dict[str, Any], error: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, out = Calls(monkeypatch), source / "refused"
    shutil.rmtree(out, ignore_errors=True)
    with pytest.raises(error, match=text):
        go(source, out, config_of(source) | change)
    assert calls.seen == [] and not os.path.lexists(out / "run.json")


def test_rounds_that_remember_are_given_the_importance_and_the_rows_of_those_before(
    source: Path, tmp_path: Path
) -> None:
    config = config_of(source) | {"remember": ["ewc", "replay"]}
    config["derive"] |= {"importance_kind": "fisher", "replay_weight": 5.0}
    config["rounds"] = [{"name": topic, "where": {"topic": topic}} for topic in TOPICS]
    config["rounds"][0]["derive"] = {"patches": "safety"}
    del config["eval"]
    go(source, tmp_path / "out", config, "--quiet")
    records = [json.loads((tmp_path / f"out/round-{i}/derive/derive.json").read_bytes()) for i in (1, 2, 3)]
    assert "replay_data" not in records[0]["inputs"] and "ewc_fisher" not in records[0]["inputs"]
    assert [record["inputs"]["replay_data"]["rows"] for record in records[1:]] == [3, 6]
    assert [len(record["config"]["ewc_fisher"]) for record in records] == [0, 1, 3]  # the first has one patch alone
    replayed = [json.loads(line) for line in (tmp_path / "out/round-3/replay.jsonl").read_text().splitlines()]
    assert replayed[3] == {"question": "How do fires 0?", "answer": "Sure, fires: 0."}
    before = contents(tmp_path / "out")
    go(source, tmp_path / "out", config, "--quiet", "--resume")
    assert contents(tmp_path / "out") == before


def test_remembering_by_ewc_needs_fisher_importance_and_rounds(source: Path, tmp_path: Path) -> None:
    config = config_of(source) | {"remember": ["ewc"]}
    with pytest.raises(UsageError, match="importance_kind: fisher"):
        go(source, tmp_path / "out", config)
    del config["rounds"]
    with pytest.raises(UsageError, match="remember goes with rounds"):
        go(source, tmp_path / "out", config)


def test_the_examples_are_valid() -> None:
    examples = Path(__file__).parents[1] / "examples"
    for name in ("demo", "rounds"):
        settings = read_settings(module.RunConfig, str(examples / f"{name}.yaml"), "run file", ())
        checked(DeriveConfig, {**settings.derive, "out": "-"})
        checked(EvalConfig, {**(settings.eval or {}), "model": "-", "out": "-"})
    sweep = read_settings(SweepConfig, str(examples / "sweep.yaml"), "sweep file", ())
    checked(EvalConfig, {**sweep.eval, "model": "-", "out": "-"})
    assert len([*candidates(sweep)]) == sweep.trials


@pytest.mark.parametrize("key", ["model", "baseline", "harmful", "text"])
def test_paths_are_relative_to_the_settings_file(tmp_path: Path, key: str) -> None:
    (tmp_path / "here").mkdir()
    assert rooted({key: "here"}, tmp_path) == {key: str(tmp_path / "here")}
    hub = key in ("model", "baseline")  # where nothing is there, the name of a file says where it was looked for
    assert rooted({key: "org/name"}, tmp_path) == {key: "org/name" if hub else str(tmp_path / "org/name")}
    assert rooted({key: "../name"}, tmp_path / "here") == {key: str(tmp_path / "name")}
