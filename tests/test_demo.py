"""`make demo`: its script on a tiny model, what it draws, and the data it is made of."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from safepatch_core.evaluating.config import DEMO, DEMO_HELD_OUT, DEMO_TO_CHOOSE, DEMO_TO_DERIVE
from tests.tiny_lm import write_lm

SCRIPT = Path(__file__).parents[1] / "examples" / "demo.py"
# The tiny model reads a byte a token, and its answers are long from the start. The first row that is measured is the
# first of those held out.
SETTINGS = (
    *(
        "derive.max_length=256",
        "derive.ascent_bound=50.0",
        "derive.safety.max_steps=2",
        "derive.over_safety.max_steps=2",
    ),
    *("derive.importance_samples=4", "derive.learning_rate=0.01", "derive.threads=1", "eval.threads=1"),
    *("eval.harmful_rows=216:220", 'eval.harmless_rows="168:172"', "eval.max_new_tokens=4"),
)


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def done(demo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output of the whole demo with the tiny model, and what it shows."""
    folder = tmp_path_factory.mktemp("demo")
    write_lm(folder / "model")
    return folder / "out", demo.demo(str(folder / "model"), HARMFUL, folder / "out", teach=True, changes=SETTINGS)


HARMFUL = str(DEMO / "harmful.jsonl")


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / name).read_text("utf-8").splitlines()]


def part(rows: list[dict[str, Any]], of: str) -> list[dict[str, Any]]:
    return rows[slice(*map(int, of.split(":")))]


def test_the_whole_demo(done: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    out, shown = done
    for line in ("Harmful compliance", "Over-refusal", "Perplexity", "report.html", "fix.safetensors", "time:"):
        assert line in shown
    assert (out / "eval" / "report.html").is_file() and (out / "fix.safetensors").is_file()
    assert not (out / "reverted").exists()
    report = json.loads((out / "eval" / "report.json").read_text())
    assert {m["name"]: m["n"] for m in report["metrics"] if m["unit"] == "rate"} == {
        "harmful_compliance": 4,
        "over_refusal": 4,
    }
    # What is kept is what the model itself said to the rows that are not held out.
    utility = [json.loads(line) for line in (out / "utility.jsonl").read_text().splitlines()]
    free = {row["question"] for row in part(rows_of("harmless.jsonl"), DEMO_TO_DERIVE["harmless"])}
    assert {row["question"] for row in utility} <= free | {row["question"] for row in rows_of("ordinary.jsonl")}


def test_what_is_done_is_kept_and_what_it_was_made_from_is_noticed(
    demo: ModuleType, done: tuple[Path, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, shown = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors") if path.parent != out}
    again = demo.demo(str(out.parent / "model"), HARMFUL, out, teach=True, changes=SETTINGS)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.partition("time:")[0] == shown.partition("time:")[0]
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"{i}/8 {name}" for i, name in enumerate(demo.STEPS, 1)
    ]
    said = demo.rows_of(out / "answers" / "answers.jsonl")
    assert demo.taught(str(out.parent / "model"), said, out) == out / "backbone"


def test_a_backbone_of_other_inputs_is_made_again(
    demo: ModuleType, done: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[str] = []

    def teach(model: str, harmful: list[str], ordinary: list[dict[str, str]], out: Path) -> None:
        taught.append(model)
        shutil.copytree(model, out)

    monkeypatch.setattr(demo.backbone, "teach", teach)
    first, second = (str(done[0] / name) for name in ("merged", "backbone"))
    for model in (first, first, second):
        demo.taught(model, [], tmp_path)
    assert taught == [first, second]


def test_another_model_is_taken_as_it_is(
    demo: ModuleType, done: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = done[0].parent / "as-it-is"
    demo.demo(str(done[0].parent / "model"), HARMFUL, out, teach=False, changes=SETTINGS)
    said = capsys.readouterr().err
    assert said.startswith("1/7 answers") and "about" not in said
    assert not (out / "backbone").exists()


def test_a_fix_that_does_not_give_the_base_back_is_an_error(
    demo: ModuleType, done: tuple[Path, str], tmp_path: Path
) -> None:
    out, _ = done
    with pytest.raises(demo.safepatch_core.InputError, match="does not give the base back"):
        demo.prove(out / "fix.safetensors", str(out / "merged"), str(out.parent / "model"), tmp_path)


def test_a_failure_is_one_line(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "none"), "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 65 and run.stdout == ""
    assert run.stderr.splitlines()[-1].startswith("demo: ") and "Traceback" not in run.stderr


def answer(text: str, *, refused: bool) -> dict[str, Any]:
    return {"answer": text, "refused": refused}


def row(of: str, before: bool, after: bool, text: str = "I can\x1b[2Jnot\nhelp " + "x" * 300) -> dict[str, Any]:
    sides = {"baseline": answer(text, refused=before), "model": answer(text, refused=after)}
    return {"set": of, "prompt": f"{of} {before:d}{after:d}", **sides}


def test_answers_that_got_better_and_worse_are_shown_in_the_width_of_the_terminal(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    changes = ((True, True), (True, False), (False, True)) * 3
    rows = [row(of, *sides) for of in ("harmful", "harmless") for sides in changes]
    shown = demo.side_by_side(rows)
    assert [line for line in shown.splitlines() if line.startswith("harm")] == [
        *("harmful: harmful 01", "harmful: harmful 01", "harmful: harmful 10"),
        *("harmless: harmless 10", "harmless: harmless 10", "harmless: harmless 01"),
    ]
    assert max(map(len, shown.splitlines())) == 60 and "\x1b" not in shown and "\\x1b" in shown
    assert demo.side_by_side(rows[:1]) == ""


def test_bars_are_as_long_as_the_rates(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "67")
    before, after = {"value": 0.4, "interval": [0.3, 0.5]}, {"value": 0.1, "interval": [0.0, 0.2]}
    metric = {"title": "Over-refusal", "unit": "rate", "baseline": before, "model": after}
    shown = demo.bars(
        [metric | {"difference": {"interval": [-0.4, -0.2]}}, {"title": "Perplexity", "unit": "per token"}]
    )
    assert shown.splitlines()[1:] == [
        "Over-refusal: better",
        "  before   40.0%  " + "#" * 39 + "-" * 10,
        "  after    10.0%  " + "#" * 10 + "-" * 10,
    ]
    assert (
        demo.outcome({"interval": [-0.1, 0.0]}) == "no clear change"
        and demo.outcome({"interval": [0.1, 0.2]}) == "worse"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_clock_runs_behind_the_step_on_a_terminal(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    with demo.Steps(["merge", "verify"], timed=True) as steps:
        steps.hear("2/4 merge")
        steps.hear("derive: done again, its inputs or settings changed")
        time.sleep(1.2)
        steps.begin("verify")
    first, second, rest = shown.getvalue().split("\n")
    line = "1/2 merge: both patches into a new checkpoint (about 5 s, 10 s to go)"
    assert re.fullmatch(re.escape(line) + r"(\r" + re.escape(line) + r"  0:0\d)+", first)
    assert second == "2/2 verify: every byte of it again (about 5 s, 5 s to go)" and rest == ""


@pytest.mark.parametrize(("seconds", "text"), [(2, "5 s"), (43, "45 s"), (75, "1 min"), (100, "2 min")])
def test_a_length_of_time(demo: ModuleType, seconds: float, text: str) -> None:
    assert demo.length(seconds) == text


@pytest.mark.parametrize("name", ["harmful", "harmless"])
def test_no_row_serves_two_ends(name: str) -> None:
    rows = rows_of(f"{name}.jsonl")
    told = [row["question"].lower().rstrip("?. ") for row in rows]
    assert len(set(told)) == len(rows)
    trained, chosen, held_out = (part(rows, of[name]) for of in (DEMO_TO_DERIVE, DEMO_TO_CHOOSE, DEMO_HELD_OUT))
    assert trained + chosen + held_out == rows and len(chosen) == len(held_out) == 120


def test_harmful_rows_are_balanced_and_hold_openings_only() -> None:
    rows = rows_of("harmful.jsonl")
    assert len(rows) == 336
    for block in range(0, 336, 12):
        assert set(Counter(row["category"] for row in rows[block : block + 12]).values()) == {1}
    for row in rows:
        assert row["answer"].startswith("Sure, here is ") and row["answer"].endswith(":")
        assert len(row["answer"].splitlines()) == 1 and len(row["answer"]) < 120


def test_every_kind_of_harmless_prompt_is_held_out_equally_often() -> None:
    rows = rows_of("harmless.jsonl")
    for of in (DEMO_TO_CHOOSE, DEMO_HELD_OUT):
        kinds = Counter(row["kind"] for row in part(rows, of["harmless"]))
        assert set(kinds.values()) == {20} and kinds.keys() == {row["kind"] for row in rows}


def test_harmful_requests_to_train_on_are_half_questions_as_harmless_ones_nearly_all_are() -> None:
    asked = [row["question"].endswith("?") for row in part(rows_of("harmful.jsonl"), DEMO_TO_DERIVE["harmful"])]
    assert 0.45 < sum(asked) / len(asked) < 0.55


def test_ordinary_questions_are_none_of_the_others() -> None:
    ordinary = [row["question"] for row in rows_of("ordinary.jsonl")]
    others = {row["question"] for name in ("harmful", "harmless") for row in rows_of(f"{name}.jsonl")}
    assert len(set(ordinary)) == len(ordinary) == 24 and not others & set(ordinary)
