"""lm-eval's tasks as part of an evaluation: offline, from task files of one's own."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safepatch_core.errors import InputError, UsageError
from safepatch_core.evaluating import EvalConfig, evaluate
from safepatch_core.evaluating.data import Data
from safepatch_core.evaluating.subject import opened
from safepatch_core.evaluating.tasks import Score, Tasks, scores
from tests.known_reports import built, measurement
from tests.tiny_lm import write_lm

QUESTIONS = [
    ("One and one is", [" two", " nine"]),
    ("Grass is", [" red", " green"]),
    ("Ice is", [" cold", " hot"]),
] * 4
TASK = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def include(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one task file and its data."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": q, "choices": choices, "answer": i % 2} for i, (q, choices) in enumerate(QUESTIONS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(TASK.format(data=folder / "rows.jsonl"))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def settings(include: Path, model: Path, **changes: Any) -> EvalConfig:
    given = {"model": model, "out": "o", "lm_eval": "tiny_choice", "lm_eval_include": include, "threads": 1}
    return EvalConfig.model_validate({**given, "max_length": 128, "stride": 64, **changes})


def by_hand(folder: Path, config: EvalConfig) -> list[float]:
    """Whether the right choice is the likelier one, for each document."""
    found = []
    with opened(folder, config) as subject, torch.no_grad():
        for i, (question, choices) in enumerate(QUESTIONS):
            sums = []
            for choice in choices:
                ids = subject.tokenizer(question + choice)["input_ids"]
                start = len(subject.tokenizer(question)["input_ids"])
                table = subject.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
                sums.append(sum(float(table[at - 1, ids[at]]) for at in range(start, len(ids))))
            found.append(float(int(np.argmax(sums)) == i % 2))
    return found


def random_states() -> tuple[Any, ...]:
    numpys: Any = np.random.get_state()
    return random.getstate(), numpys[1].tolist(), torch.get_rng_state().tolist()


def test_scores_are_those_of_the_loaded_model(include: Path, tmp_path: Path) -> None:
    folder = write_lm(tmp_path / "lm")
    config = settings(include, folder)
    before = random_states()
    with opened(folder, config) as subject:
        (score,) = Tasks(config).score(subject, config, quiet=True)
    assert random_states() == before
    expected = by_hand(folder, config)
    assert 0 < sum(expected) < len(expected)
    assert (score.task, score.metric, score.n, score.higher_is_better) == ("tiny_choice", "acc", 12, True)
    assert score.values == expected and score.value == pytest.approx(np.mean(expected))
    assert score.error == pytest.approx(np.std(expected, ddof=1) / 12**0.5)


@pytest.mark.parametrize("fewshot", [None, 2])
def test_scores_are_those_of_the_tasks_own_command(
    include: Path,
    tmp_path: Path,
    fewshot: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of `simple_evaluate`, which asks git about the working directory and the machine about itself; eval doesn't."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    (tmp_path / "tasks").mkdir()
    graded = "[{metric: brier_score, aggregation: brier_score, higher_is_better: false}, "
    text = (include / "tiny.yaml").read_text().replace("metric_list: [", f"metric_list: {graded}")
    (tmp_path / "tasks" / "graded.yaml").write_text(text)
    config = settings(tmp_path / "tasks", write_lm(tmp_path / "lm"), lm_eval_fewshot=fewshot, lm_eval_limit=7, seed=3)
    monkeypatch.chdir(tmp_path)
    tasks = Tasks(config)
    with opened(Path(config.model), config) as subject:
        found = tasks.score(subject, config, quiet=False)
        assert "not a git repository" not in capfd.readouterr().err
        adapter: Any = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=config.batch_size)
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        expected = lm_eval.simple_evaluate(
            adapter,
            tasks=["tiny_choice"],
            num_fewshot=fewshot,
            limit=7,
            task_manager=tasks._manager,
            **dict.fromkeys(seeds, 3),
        )
    assert found == scores(expected, ["tiny_choice"])


def test_a_report_with_tasks_alone(include: Path, tmp_path: Path) -> None:
    folder = write_lm(tmp_path / "lm")
    config = settings(include, folder, baseline=folder, out=tmp_path / "report", lm_eval_limit=5)
    data = evaluate(config, quiet=True).data
    (metric,) = data["metrics"]
    assert (metric["name"], metric["unit"], metric["better"], metric["n"]) == (
        "lm_eval.tiny_choice.acc",
        "rate",
        "higher",
        5,
    )
    assert metric["difference"]["value"] == 0.0 and metric["difference"]["mcnemar_p"] == 1.0
    assert data["data"]["lm_eval"]["tasks"] == ["tiny_choice"]
    assert str(tmp_path) not in json.dumps(data)
    assert "tiny_choice, acc" in (tmp_path / "report" / "report.html").read_text()


def score(value: float, values: list[float] | None, error: float | None = 0.1, metric: str = "acc") -> Score:
    return Score(task="t", metric=metric, value=value, error=error, n=4, higher_is_better=True, values=values)


def test_intervals_come_from_standard_errors_and_changes_from_pairs() -> None:
    def metric(baseline: Score, model: Score) -> dict[str, Any]:
        measured = {"baseline": measurement(scores=[baseline]), "model": measurement(scores=[model])}
        (found,) = built(Data([], None), measured, lm_eval="t")[0]["metrics"]
        return dict(found)

    binary = metric(score(0.25, [0, 0, 0, 1]), score(0.75, [1, 1, 0, 1]))
    assert binary["model"]["interval"] == pytest.approx([0.75 - 0.195996, 0.75 + 0.195996], abs=1e-5)
    assert (binary["difference"]["value"], binary["difference"]["only_model"]) == (0.5, 2)
    assert metric(score(0.95, None), score(0.98, None))["model"]["interval"][1] == 1.0

    graded = metric(score(2.5, [1, 2, 3, 4], metric="gain"), score(4.0, [2, 4, 4, 6], metric="gain"))
    changes = np.array([1, 2, 1, 2])
    side = 1.959964 * changes.std(ddof=1) / 2
    assert graded["unit"] == "score"
    assert graded["difference"]["interval"] == pytest.approx([1.5 - side, 1.5 + side], rel=1e-5)
    unpaired = metric(score(2.5, None, None), score(4.0, [2, 4, 4, 6]))
    assert unpaired["baseline"]["interval"] is None and "difference" not in unpaired


def test_metrics_that_are_no_mean_of_documents_have_no_values() -> None:
    found = {
        "results": {"t": {"alias": "t", "f1,none": 0.5, "f1_stderr,none": "N/A", "acc,a": 1.0, "acc_stderr,a": 0.0}},
        "samples": {
            "t": [
                {"doc_id": 1, "filter": "none", "f1": (1, 0)},
                {"doc_id": 0, "filter": "a", "acc": 1.0},
                {"doc_id": 1, "filter": "a", "acc": 1.0},
            ]
        },
        "higher_is_better": {"t": {"f1": True}},
        "n-samples": {"t": {"original": 9, "effective": 2}},
        "group_subtasks": {},
    }
    f1, acc = scores(found, ["t"])
    assert (f1.metric, f1.error, f1.values, f1.n) == ("f1", None, None, 2)
    assert (acc.metric, acc.error, acc.values, acc.higher_is_better) == ("acc,a", 0.0, [1.0, 1.0], None)


def test_unknown_tasks_and_broken_data_are_refused_before_a_model_is_loaded(include: Path, tmp_path: Path) -> None:
    folder = write_lm(tmp_path / "lm")
    with pytest.raises(InputError, match="no such directory"):
        Tasks(settings(tmp_path / "nowhere", folder))
    with pytest.raises(UsageError, match="lm_eval: no such task: found tiny_chioce"):
        evaluate(settings(include, folder, out=tmp_path / "report", lm_eval="tiny_chioce"), quiet=True)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tiny.yaml").write_text(TASK.format(data=broken / "missing.jsonl"))
    with pytest.raises(InputError, match="lm-eval can't be loaded .*found tiny_choice"):
        evaluate(settings(broken, folder, out=tmp_path / "report"), quiet=True)
    assert not (tmp_path / "report").exists()
