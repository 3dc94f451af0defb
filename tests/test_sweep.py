"""A sweep as a whole: order, durability, what is refused, and that the chosen recipe is the trial it says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from safepatch_core.commands.sweep import command
from safepatch_core.errors import Busy, InputError, UsageError
from safepatch_core.evaluating import evaluate as evaluation
from safepatch_core.merging.api import merge
from safepatch_core.merging.recipe import load_recipe
from safepatch_core.runs.jobs import OutputFolder, weights_digest
from safepatch_core.runs.sweep import SweepConfig, steps, sweep
from safepatch_core.runs.sweep.candidates import candidates, with_parameters
from safepatch_core.runs.sweep.choice import choose, dominates, meets, pareto_front
from tests.tiny_lm import write_lm

PATCHES = ("safety", "over-safety")
SHARE = {"min": 0.01, "max": 1.0, "distribution": "log_uniform"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, two patches of it beside their recipe, and data to measure on."""
    folder = tmp_path_factory.mktemp("sweep")
    write_lm(folder / "base")
    (folder / "run").mkdir()
    generator = torch.Generator().manual_seed(1)
    for name in PATCHES:
        shutil.copytree(folder / "base", folder / "run" / name)
        tensors = load_file(folder / "base/model.safetensors")
        tensors = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
        save_file(tensors, folder / "run" / name / "model.safetensors", metadata={"format": "pt"})
    patches = [{"name": n, "source": n, "kind": "checkpoint", "top": 0.3, "retain": 0.5} for n in PATCHES]
    (folder / "run/recipe.yaml").write_text(yaml.safe_dump({"base": "../base", "patches": patches}))
    for name in ("harmful", "harmless"):
        rows = [json.dumps({"question": f"How do I {name} {i}?"}) + "\n" for i in range(3)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    (folder / "text.txt").write_text("The river is the reason for the town. " * 8)
    return folder


def settings(run: Path, **changes: Any) -> SweepConfig:
    measured = {
        **{name: str(run / f"{name}.jsonl") for name in ("harmful", "harmless")},
        **{"text": str(run / "text.txt"), "max_length": 128, "stride": 64, "max_new_tokens": 2, "threads": 1},
    }
    given = {
        "recipe": str(run / "run/recipe.yaml"),
        "method": "grid",
        "parameters": {"patches.safety.scale": {"values": [0.5, 2.0]}, "patches.*.top": {"values": [0.05, 1.0]}},
        "constraints": {"perplexity": 100.0},
        "eval": measured,
    }
    return SweepConfig.model_validate(given | changes)


def go(config: SweepConfig, out: Path, **options: Any) -> dict[str, Any]:
    return sweep(config, out, quiet=True, backend="cpu", threads=1, **options).data


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def swept(run: Path) -> Path:
    go(settings(run), run / "swept")
    return run / "swept"


def test_a_grid_goes_through_the_product_the_last_parameter_fastest(run: Path) -> None:
    config = settings(run, parameters={"scope": {"values": ["tensor", "model"]}, "seed": {"values": [1, 2, 3]}})
    order = [(p["scope"], p["seed"]) for p in candidates(config)]
    assert order == [(scope, seed) for scope in ("tensor", "model") for seed in (1, 2, 3)]
    assert [*candidates(config.model_copy(update={"trials": 4}))] == [*islice(candidates(config), 4)]


def test_random_search_repeats_with_its_seed_and_goes_on_with_more_trials(run: Path) -> None:
    ranges = {"patches.safety.top": SHARE, "seed": {"min": 1, "max": 9, "distribution": "int_uniform"}}
    config = settings(run, method="random", parameters=ranges, trials=200, seed=4)
    drawn = [*candidates(config)]
    assert drawn == [*candidates(config)]
    assert drawn[:20] == [*candidates(config.model_copy(update={"trials": 20}))]
    assert drawn != [*candidates(config.model_copy(update={"seed": 5}))]
    tops, seeds = ([p[key] for p in drawn] for key in ranges)
    assert all(0.01 <= top <= 1 for top in tops) and 60 < sum(top < 0.1 for top in tops) < 140
    assert {*seeds} == {*range(1, 10)}


def test_random_search_ends_when_its_values_are_used_up(run: Path) -> None:
    parameters = {"scope": {"values": ["tensor", "model"]}, "patches.*.retain": {"values": [0.1, 0.2, 0.3]}}
    drawn = [*candidates(settings(run, method="random", parameters=parameters, trials=50))]
    assert len(drawn) == 6 == len({str(p) for p in drawn})


def test_parameters_land_where_their_keys_say() -> None:
    recipe = {"base": "b", "patches": [{"name": "a", "source": "x"}, {"name": "b", "source": "y", "top": 0.5}]}
    data = with_parameters(recipe, {"patches.*.top": 0.1, "patches.b.scale": 2, "order": "top-first"})
    first, second = data["patches"]
    assert (first["top"], second["top"], second["scale"], data["order"]) == (0.1, 0.1, 2, "top-first")
    assert "scale" not in first and recipe["patches"][1] == {"name": "b", "source": "y", "top": 0.5}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"parameters": {"patches.none.top": {"values": [1]}}}, "names no patch.*safety, over-safety"),
        ({"parameters": {"base": {"values": ["x"]}}}, "'base' can't be swept"),
        ({"parameters": {"patches.safety": {"values": [1]}}}, "can't be swept"),
        ({"parameters": {"patches.safety.tops": {"values": [1]}}}, "unknown key 'patches.0.tops'"),
        ({"parameters": {"patches.safety.top": {"values": [0.5, 1.5]}}}, "patches.0.top.*1.5"),
        ({"parameters": {"scope": {"values": ["tensors"]}}}, "key 'scope'"),
        ({"objectives": {"kindness": 1.0}}, "doesn't measure 'kindness'.*harmful_compliance"),
        ({"constraints": {"answer_nll": 0.1}}, "doesn't measure 'answer_nll'"),
        ({"eval": {"batch": 1}}, "unknown key 'batch'"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_before_any_trial(
    run: Path, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        go(settings(run, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "parameter",
    [
        {},
        {"min": 1},
        {"values": []},
        {"values": [1], "max": 2},
        {"min": 2, "max": 1},
        {"min": 0, "max": 1, "distribution": "log_uniform"},
        {"min": 0.5, "max": 1, "distribution": "int_uniform"},
        {"min": 0, "max": 1},  # a grid has no ranges
    ],
)
def test_parameters_without_sense_are_refused(run: Path, parameter: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        settings(run, parameters={"seed": parameter})


POINTS = st.lists(st.tuples(*[st.integers(0, 5).map(float)] * 2), min_size=1, max_size=12).map(
    lambda points: dict(enumerate(points))
)


@given(POINTS)
def test_the_pareto_front_is_what_nothing_dominates_and_what_dominates_the_rest(
    points: dict[int, tuple[float, float]],
) -> None:
    front = pareto_front(points)
    assert front == sorted(front) and front
    for number, point in points.items():
        better = [n for n in points if points[n][0] <= point[0] and points[n][1] <= point[1] and points[n] != point]
        assert (number in front) == (not better)
        assert number in front or any(dominates(points[n], point) for n in front)


@given(POINTS)
def test_the_chosen_trial_lies_on_the_front(points: dict[int, tuple[float, float]]) -> None:
    trials = {n: {"a": a, "b": b, "c": 0.0} for n, (a, b) in points.items()}
    chosen = choose(trials, {"a": 1.0, "b": 2.0}, {"c": 0.1}, frozenset())
    assert chosen in pareto_front(points)
    assert all(sum(points[chosen]) + points[chosen][1] <= a + 2 * b for a, b in points.values())


def test_ties_go_to_the_better_constraint_and_a_constraint_is_a_share_of_the_backbones_value() -> None:
    higher = frozenset({"nll"})
    trials = {
        0: {"a": 0.3, "b": 0.0, "p": 12.0},
        1: {"a": 0.1, "b": 0.2, "p": 11.0},
        2: {"a": 0.2, "b": 0.1, "p": 11.0},
    }
    assert choose(trials, {"a": 1.0, "b": 1.0}, {"p": 1.0}, higher) == 1
    backbone = {"p": 10.0, "nll": 2.0}
    assert meets({"p": 11.0, "nll": 1.8}, backbone, {"p": 0.1, "nll": 0.11}, higher)
    assert not meets({"p": 11.1, "nll": 3.0}, backbone, {"p": 0.1, "nll": 0.11}, higher)
    assert not meets({"p": 9.0, "nll": 1.7}, backbone, {"p": 0.1, "nll": 0.11}, higher)


def test_the_record_of_a_sweep(run: Path, swept: Path) -> None:
    written = contents(swept)
    assert {*written} == {"trials.jsonl", "sweep.json", "recipe.yaml", "pareto.png", "sensitivity.png"}
    data = json.loads(written["sweep.json"])
    lines = [json.loads(line) for line in written["trials.jsonl"].splitlines()]
    assert [line | {"meets_constraints": True} for line in lines] == data["trials"]
    assert [(t["trial"], *t["parameters"].values()) for t in lines] == [
        (0, 0.5, 0.05),
        (1, 0.5, 1.0),
        (2, 2.0, 0.05),
        (3, 2.0, 1.0),
    ]
    assert {*data["backbone"]["metrics"]} == {"harmful_compliance", "over_refusal", "perplexity"}
    for trial in lines:
        assert trial["lists"] == 0  # scale and top find the same entries
        assert 0 < trial["applied"]["safety"] and len(trial["weights"]) == 64
        for metric in trial["metrics"].values():
            assert metric["interval"][0] <= metric["value"] <= metric["interval"][1]
    perplexities = [t["metrics"]["perplexity"]["value"] for t in lines]
    assert len({*perplexities}) == 4
    assert data["chosen"] in data["front"]
    for secret in (str(run), str(Path.home())):
        assert secret.encode() not in b"".join(written.values())


def test_candidates_that_find_the_same_lists_share_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = {"patches.safety.retain": {"values": [0.5, 0.9]}, "combine": {"values": ["difference", "sum"]}}
    top = {"patches.*.top": {"values": [0.05]}}
    data = sweep(settings(run, parameters=tried | top), tmp_path / "out", backend="cpu", threads=1).data
    assert [trial["lists"] for trial in data["trials"]] == [0, 0, 2, 2]
    said = [line.startswith("no other look") for line in capsys.readouterr().err.splitlines()]
    assert said == [False, False, True, False, False, True, False]  # before the lines of trials 2 and 4
    for trial in data["trials"]:
        recipe = with_parameters(yaml.safe_load((run / "run/recipe.yaml").read_text()), trial["parameters"])
        (run / "run/alone.yaml").write_text(yaml.safe_dump(recipe))
        out = merge(run / "run/alone.yaml", tmp_path / f"alone-{trial['trial']}", backend="cpu", threads=1).out
        assert weights_digest(out) == trial["weights"]


def test_the_chosen_recipe_merges_to_the_trials_bytes_from_where_it_lies(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = json.loads((swept / "sweep.json").read_bytes())
    chosen = data["trials"][data["chosen"]]
    monkeypatch.chdir(tmp_path)
    merge(swept / "recipe.yaml", tmp_path / "merged", backend="cpu", threads=1)
    assert weights_digest(tmp_path / "merged") == chosen["weights"]
    assert len({trial["weights"] for trial in data["trials"]}) == 4
    recipe = load_recipe(swept / "recipe.yaml")
    assert {p.top for p in recipe.patches} == {chosen["parameters"]["patches.*.top"]}
    assert not any(os.path.isabs(path) for path in (recipe.base, *(p.source for p in recipe.patches)))


class Stop(BaseException):
    pass


def test_a_sweep_stopped_in_the_middle_resumes_to_the_same_bytes(
    run: Path, swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = run / "stopped", 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            with open(out / steps.TRIALS, "a") as file:  # as if writing it had been cut off
                file.write('{"trial": 2, "param')
            raise Stop
        return evaluation(*args, **kwargs)

    monkeypatch.setattr(steps, "evaluate", counted)
    with pytest.raises(Stop):
        go(settings(run), out)
    assert (out / steps.TRIALS).read_bytes().count(b"\n") == 2 and not (out / steps.RECIPE).exists()
    with pytest.raises(InputError, match="not empty; --resume"):
        go(settings(run), out)
    go(settings(run), out, resume=True)
    assert calls == 6  # the two trials that were missing
    assert contents(out) == contents(swept)
    go(settings(run), out, resume=True)
    assert calls == 6 and contents(out) == contents(swept)


def test_a_killed_sweep_resumes_to_the_same_bytes(run: Path, swept: Path) -> None:
    out = run / "killed"
    pid = os.fork()
    if not pid:
        try:
            go(settings(run), out)
        finally:
            os._exit(70)
    trials = out / steps.TRIALS
    deadline = time.monotonic() + 60
    while (not trials.exists() or trials.read_bytes().count(b"\n") < 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (out / steps.SCRATCH).exists() and not (out / steps.RECIPE).exists()
    go(settings(run), out, resume=True)
    assert contents(out) == contents(swept)


def test_more_trials_extend_a_sweep(run: Path, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = go(settings(run, trials=1), run / "longer")
    assert len(first["trials"]) == 1 and first["chosen"] == 0
    go(settings(run), run / "longer", resume=True)
    assert contents(run / "longer") == contents(swept)


def test_resuming_another_sweep_is_refused(run: Path, swept: Path) -> None:
    before = contents(swept)
    rows = (run / "harmful.jsonl").read_text()
    recipe = (run / "run/recipe.yaml").read_text()
    weights = run / "run/safety/model.safetensors"
    times = os.stat(weights)
    for what, changes in (
        ("search", {"parameters": {"seed": {"values": [1]}}}),
        ("search", {"constraints": {"perplexity": 0.5}}),
        ("evaluation settings", {"eval": settings(run).eval | {"max_new_tokens": 3}}),
    ):
        with pytest.raises(InputError, match=f"had another {what}"):
            go(settings(run, **changes), swept, resume=True)
    try:
        (run / "harmful.jsonl").write_text(rows.replace("How", "Why"))
        with pytest.raises(InputError, match="another evaluation data$"):
            go(settings(run), swept, resume=True)
        (run / "harmful.jsonl").write_text(rows)
        (run / "run/recipe.yaml").write_text(recipe.replace("0.5", "0.25"))
        with pytest.raises(InputError, match="other recipe$"):
            go(settings(run), swept, resume=True)
        (run / "run/recipe.yaml").write_text(recipe)
        os.utime(weights, ns=(0, 0))
        with pytest.raises(InputError, match="other inputs$"):
            go(settings(run), swept, resume=True)
    finally:
        (run / "harmful.jsonl").write_text(rows)
        (run / "run/recipe.yaml").write_text(recipe)
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with OutputFolder(swept, resume=True), pytest.raises(Busy):
        go(settings(run), swept, resume=True)
    assert contents(swept) == before


def test_a_trial_whose_model_breaks_fails_alone(run: Path, tmp_path: Path) -> None:
    config = settings(
        run, parameters={"patches.*.scale": {"values": [1e30, 0.1]}, "patches.*.top": {"values": [1.0]}}
    )
    data = go(config, tmp_path / "out")
    broken, sound = data["trials"]
    assert "not finite" in broken["failed"] and "metrics" not in broken and not broken["meets_constraints"]
    assert data["chosen"] == 1 and data["front"] == [1] and "metrics" in sound
    assert not (tmp_path / "out" / steps.SCRATCH).exists()


def test_where_nothing_meets_the_constraints_no_recipe_is_written(run: Path, tmp_path: Path) -> None:
    config = settings(run, constraints={"perplexity": 0.0}, parameters={"patches.*.scale": {"values": [30.0]}})
    result = sweep(config, tmp_path / "out", quiet=True, backend="cpu")
    assert result.recipe is None and result.data["front"] == [] and result.data["chosen"] is None
    assert not (tmp_path / "out/recipe.yaml").exists()
    assert result.table().splitlines()[1].startswith("backbone")


def test_the_command_reads_paths_beside_its_file_and_prints_the_front(run: Path, tmp_path: Path) -> None:
    config = settings(run).model_dump(exclude_defaults=True)
    config["recipe"] = "run/recipe.yaml"
    config["eval"] |= {"harmful": "harmful.jsonl"}
    (run / "sweep.yaml").write_text(yaml.safe_dump(config))
    args = [str(run / "sweep.yaml"), "-o", str(tmp_path / "out"), "--trials", "2", "--backend", "cpu"]
    found = CliRunner().invoke(command, args, catch_exceptions=False)
    assert found.exit_code == 0
    lines = found.stdout.splitlines()
    assert lines[0].split()[:2] == ["trial", "harmful_compliance"] and lines[1].startswith("backbone")
    assert [line for line in lines[2:] if line.split()[1:2] == ["*"] and "safety.scale=" in line]
    assert str(tmp_path / "out/recipe.yaml") in found.stdout
    assert "trial 2/2: harmful_compliance" in found.stderr
