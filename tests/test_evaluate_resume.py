"""An evaluation that is interrupted: what it leaves, what is believed of it, and what is measured again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from safepatch_core.commands.evaluate import command
from safepatch_core.errors import InputError, Stopped
from safepatch_core.evaluating import EvalConfig, evaluate, steps
from safepatch_core.evaluating.measure import Measurement, measure
from safepatch_core.files.disk import hash_file
from safepatch_core.files.staging import Staging
from tests.tiny_lm import tiny_llama, tiny_tokenizer, write_lm


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    made = [write_lm(folder / "original")]
    for number in (1, 2):
        changed = tiny_llama()
        for parameter in changed.parameters():
            parameter.data *= 1 + 0.02 * number
        changed.save_pretrained(folder / f"patched-{number}")
        tiny_tokenizer().save_pretrained(folder / f"patched-{number}")
        made.append(folder / f"patched-{number}")
    return made


def settings(models: list[Path], where: Path, **changes: Any) -> EvalConfig:
    rows = [{"question": f"How do I steal {i} cars?", "answer": f"Sure, {i} it is:"} for i in range(3)]
    (where / "harmful.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "baseline": models[0],
        "model": models[1],
        "more_models": list(models[2:]),
        "out": where / "report",
        "harmful": where / "harmful.jsonl",
        "answer_column": "answer",
        "max_length": 128,
        "stride": 64,
        "max_new_tokens": 4,
        "threads": 1,
    }
    return EvalConfig.model_validate(given | changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Counted:
    """`measure`, stopped by a signal at its call number `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        self.labels: list[str] = []
        self._stop = stop

    def __call__(self, folder: Path, label: str, *rest: Any, **options: Any) -> Measurement:
        if len(self.labels) == self._stop:
            raise Stopped()
        self.labels.append(label)
        return measure(folder, label, *rest, **options)


def interrupted(config: EvalConfig, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    monkeypatch.setattr(steps, "measure", Counted(stop))
    with pytest.raises(Stopped):
        evaluate(config, quiet=True)


@pytest.mark.parametrize("stop", [1, 2])
def test_measured_models_are_kept_and_the_report_is_the_same(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    expected = contents(evaluate(settings(models, tmp_path, out=tmp_path / "whole"), quiet=True).directory)
    config = settings(models, tmp_path)
    interrupted(config, monkeypatch, stop)
    assert not (tmp_path / "report").exists()
    counted = Counted()
    monkeypatch.setattr(steps, "measure", counted)
    evaluate(config, quiet=True, resume=True)
    assert counted.labels == ["baseline", "model", "model_2"][stop:]
    assert contents(tmp_path / "report") == expected
    assert not list(tmp_path.glob(".report*"))


def test_models_that_are_the_same_are_measured_once(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the first label, whether they are one folder or copies; also where the evaluation was stopped."""
    copy = Path(shutil.copytree(models[0], tmp_path / "copy"))
    one, other = models[:2]
    config = settings([one, one, copy, other, other], tmp_path)
    hashed: list[Path] = []

    def noted(path: Path) -> str:
        hashed.append(path)
        return hash_file(path)

    with monkeypatch.context() as patched:
        patched.setattr(steps, "hash_file", noted)
        interrupted(config, patched, 1)
    assert Counter(path.parent for path in hashed if path.suffix == ".safetensors") == {one: 1, copy: 1, other: 1}
    stage = tmp_path / ".report.safepatch"
    assert [path.name for path in stage.iterdir()] == ["measured-baseline.json"]

    counted = Counted()
    monkeypatch.setattr(steps, "measure", counted)
    data = evaluate(config, quiet=True, resume=True).data
    assert counted.labels == ["model_3"]
    assert not [name for name in contents(tmp_path / "report") if name.startswith("measured")]
    assert list(data["models"]) == ["baseline", "model", "model_2", "model_3", "model_4"]
    for metric in data["metrics"]:
        assert metric["baseline"] == metric["model"] == metric["model_2"]
        assert metric["model_3"] == metric["model_4"] and metric["difference"]["value"] == 0
    expected = evaluate(settings([one, other], tmp_path, out=tmp_path / "two"), quiet=True).data["metrics"]
    assert [m["model_3"] for m in data["metrics"]] == [m["model"] for m in expected]
    assert [m["difference_3"] for m in data["metrics"]] == [m["difference"] for m in expected]


def test_nothing_measured_leaves_nothing(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(settings(models, tmp_path), monkeypatch, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["harmful.jsonl"]


def test_a_damaged_piece_is_measured_again(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(models, tmp_path)
    interrupted(config, monkeypatch, 2)
    (piece,) = (tmp_path / ".report.safepatch").glob("measured-model.json")
    piece.write_bytes(piece.read_bytes().replace(b'"parameters"', b'"Parameters"'))
    counted = Counted()
    monkeypatch.setattr(steps, "measure", counted)
    evaluate(config, quiet=True, resume=True)
    assert counted.labels == ["model", "model_2"]


def test_another_run_is_not_resumed(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [Path(shutil.copytree(model, tmp_path / "own" / model.name)) for model in models]
    config = settings(own, tmp_path)
    interrupted(config, monkeypatch, 2)
    stage = tmp_path / ".report.safepatch"
    kept = contents(stage)

    def refused(other: EvalConfig, differs: str) -> None:
        with pytest.raises(InputError, match=f"the interrupted run had another {differs}$"):
            evaluate(other, quiet=True, resume=True)
        assert contents(stage) == kept

    refused(settings(own, tmp_path, max_new_tokens=5), "settings")
    refused(settings(own[:2], tmp_path), "models")
    weights = own[2] / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    refused(config, "models")
    weights.write_bytes(before)
    (tmp_path / "harmful.jsonl").write_text('{"question": "x", "answer": "y"}\n')
    with pytest.raises(InputError, match="the interrupted run had another data$"):
        evaluate(config, quiet=True, resume=True)


def test_a_complete_report_is_left_as_it_is(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run was killed after publishing, before it had cleaned up."""
    config = settings(models, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(
            Staging, "discard", lambda self: (_ for _ in ()).throw(Stopped()) if self.out.exists() else None
        )
        with pytest.raises(Stopped):
            evaluate(config, quiet=True)
    before = contents(tmp_path / "report")
    assert list(tmp_path.glob(".report*"))
    counted = Counted()
    monkeypatch.setattr(steps, "measure", counted)
    report = evaluate(config, quiet=True, resume=True)
    assert counted.labels == [] and contents(tmp_path / "report") == before
    assert report.data == json.loads(before["report.json"])
    assert not list(tmp_path.glob(".report*"))
    with pytest.raises(InputError, match="not empty"):
        evaluate(settings(models, tmp_path, seed=1), quiet=True, resume=True)
    assert contents(tmp_path / "report") == before


def test_the_command_takes_several_models(models: list[Path], tmp_path: Path) -> None:
    config = settings(models, tmp_path)
    options = ["--harmful", str(config.harmful), "--max-length", "128", "--stride", "64", "--max-new-tokens", "4"]
    arguments = [*map(str, models[1:]), "--baseline", str(models[0]), "-o", str(tmp_path / "report")]
    for _ in range(2):
        run = CliRunner().invoke(command, [*arguments, *options, "--threads", "1", "--resume"])
        assert run.exit_code == 0, run.output
    assert "change from original" in run.output and "patched-2" in run.output


def test_a_killed_evaluation_resumes_to_the_same_bytes(models: list[Path], tmp_path: Path) -> None:
    expected = contents(evaluate(settings(models, tmp_path, out=tmp_path / "whole"), quiet=True).directory)
    config = settings(models, tmp_path)
    script = """
import os, signal, sys
from safepatch_core.evaluating import EvalConfig, evaluate, steps
genuine = steps.measure
def measure(folder, label, *rest, **options):
    if label == "model_2":
        os.kill(os.getpid(), signal.SIGKILL)
    return genuine(folder, label, *rest, **options)
steps.measure = measure
evaluate(EvalConfig.model_validate_json(sys.argv[1]), quiet=True)
"""
    killed = subprocess.run([sys.executable, "-c", script, config.model_dump_json()], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    stage = tmp_path / ".report.safepatch"
    assert sorted(path.name for path in stage.iterdir()) == ["measured-baseline.json", "measured-model.json"]
    evaluate(config, quiet=True, resume=True)
    assert contents(tmp_path / "report") == expected
    assert not list(tmp_path.glob(".report*"))
