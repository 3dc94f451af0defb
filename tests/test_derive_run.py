"""A derive run as a whole: what it writes, under which names, and that a stopped run ends in the same bytes."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from safepatch_core.deriving import DeriveConfig, DeriveResult, derive
from safepatch_core.errors import Busy, InputError, OutputError, UsageError
from safepatch_core.merging.recipe import load_recipe
from tests.tiny_lm import tiny_tokenizer, write_lm, write_rows

FAST = {
    "threads": 1,
    "learning_rate": 1e-3,
    "batch_size": 3,
    "safety": {"max_steps": 2},
    "over_safety": {"max_steps": 2},
}


def settings(where: Path, **changes: Any) -> DeriveConfig:
    given = {
        "model": where / "base",
        "data": where / "rows.jsonl",
        "out": where / "run",
        "ascent_bound": 50.0,
        **FAST,
    }
    return DeriveConfig.model_validate(given | changes)


@pytest.fixture
def where(tmp_path: Path) -> Path:
    write_lm(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def go(config: DeriveConfig, **kwargs: Any) -> DeriveResult:
    return derive(config, quiet=True, **kwargs)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def test_a_run_writes_two_checkpoints_their_importance_traces_record_and_recipe(where: Path) -> None:
    result = go(settings(where))
    run = where / "run"
    assert (result.run, result.recipe) == (run, run / "recipe.yaml")
    assert sorted(p.name for p in run.iterdir()) == sorted(
        ["safety", "over-safety", "importance", "trace-safety.jsonl", "trace-over-safety.jsonl", "derive.json"]
        + ["recipe.yaml", "curves.png"]
    )
    base = weights(where / "base")
    patched = {name: weights(run / name) for name in ("safety", "over-safety")}
    for name, tensors in patched.items():
        assert tensors.keys() == base.keys() and "lm_head.weight" not in tensors
        for key, tensor in tensors.items():
            assert tensor.shape == base[key].shape and tensor.dtype == torch.float32
            assert torch.equal(tensor, base[key]) != linear(key), key
        scores = weights(run / "importance" / name)
        assert scores.keys() == {key for key in base if linear(key)}
        assert all(s.dtype == torch.float32 and s.shape == base[n].shape for n, s in scores.items())
        assert all((s >= 0).all() and s.any() for s in scores.values())
        assert sorted(p.name for p in (run / "importance" / name).iterdir()) == ["model.safetensors"]
        AutoModelForCausalLM.from_pretrained(run / name, local_files_only=True)
        assert len((run / f"trace-{name}.jsonl").read_text().splitlines()) == 2
    record = json.loads((run / "derive.json").read_text())
    assert record == result.summary
    assert record["nll"]["over-safety"] < record["nll"]["backbone"] < record["nll"]["safety"]
    assert record["inputs"]["data"]["rows"] == 6
    for name in patched:
        entries = sum(t.numel() for n, t in base.items() if linear(n))
        changed = sum(int((patched[name][n] != base[n]).sum()) for n in base)
        assert record["patches"][name]["entries"] == entries
        assert record["patches"][name]["changed_share"] == changed / entries
    assert "out" not in record["config"] and record["config"]["seed"] == 0


def test_the_recipe_is_ready_to_merge(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(where)
    go(settings(where, model="base", out="runs/a", seed=7, over_safety={"max_steps": 1, "top": 0.25, "scale": 2.0}))
    assert yaml.safe_load((where / "runs/a/recipe.yaml").read_text()) == {
        "base": "../../base",
        "patches": [
            {
                "name": name,
                "source": name,
                "kind": "checkpoint",
                "importance": {"scores": f"importance/{name}"},
                "top": top,
                "retain": 0.3,
                "rescale": False,
                "scale": scale,
                "minus": None,
                "rows": "all",
            }
            for name, top, scale in (("safety", 0.03, 1.0), ("over-safety", 0.25, 2.0))
        ],
        "combine": "difference",
        "scope": "tensor",
        "order": "retain-first",
        "targets": "linear",
        "seed": 7,
        "nonfinite": "error",
        "missing": "error",
        "max_shard_size": None,
    }
    from safepatch_core.merging.api import merge

    merge("runs/a/recipe.yaml", "merged", backend="reference")
    base, merged = weights(where / "base"), weights(where / "merged")
    assert merged.keys() == base.keys()
    assert any(not torch.equal(merged[n], base[n]) for n in base)


def test_base_in_bfloat16_trains_in_float32_and_says_what_rounding_leaves(where: Path, tmp_path: Path) -> None:
    write_lm(where / "half", torch.bfloat16)
    result = go(settings(where, model=where / "half", learning_rate=1e-5))
    base, safety = weights(where / "half"), weights(where / "run" / "safety")
    assert {t.dtype for t in base.values()} == {torch.bfloat16}
    assert {t.dtype for t in safety.values()} == {torch.float32}
    assert all(torch.equal(safety[n], base[n].float()) for n in base if not linear(n))
    patch = result.summary["patches"]["safety"]
    survived = sum(int((safety[n].bfloat16() != base[n]).sum()) for n in base)
    assert patch["changed_share_in_base_dtype"] == survived / patch["entries"]
    assert 0 < patch["changed_share_in_base_dtype"] < 0.5 < patch["changed_share"]


def test_in_bfloat16_stochastic_rounding_keeps_small_updates_and_nearest_warns_that_it_does_not(where: Path) -> None:
    write_lm(where / "half", torch.bfloat16)
    shares = {}
    for rounding in ("stochastic", "nearest"):
        events: list[dict[str, Any]] = []
        given = {"dtype": "bfloat16", "rounding": rounding, "learning_rate": 1e-5, "importance": "none"}
        result = go(settings(where, model=where / "half", out=where / rounding, **given), report=events.append)
        assert any("vanishes" in event.get("warning", "") for event in events) == (rounding == "nearest")
        assert {t.dtype for t in weights(where / rounding / "safety").values()} == {torch.bfloat16}
        patch = result.summary["patches"]["safety"]
        assert patch["updates_below_half_step"] > 0.8
        lines = (where / rounding / "trace-safety.jsonl").read_text().splitlines()
        found = [json.loads(line)["below_half_step"] for line in lines]
        assert patch["updates_below_half_step"] == sum(found) / len(found)
        shares[rounding] = patch["changed_share"]
    assert shares["stochastic"] > 1.3 * shares["nearest"]


def test_importance_at_the_backbone_or_none(where: Path) -> None:
    go(settings(where, importance="backbone", out=where / "b"))
    assert [p.name for p in (where / "b/importance").iterdir()] == ["backbone"]
    recipe = load_recipe(where / "b/recipe.yaml")
    assert [p.importance_path for p in recipe.patches] == ["importance/backbone"] * 2
    result = go(settings(where, importance="none", out=where / "n"))
    assert not (where / "n/importance").exists()
    assert [p.importance for p in load_recipe(where / "n/recipe.yaml").patches] == ["magnitude"] * 2
    assert result.summary["nll"].keys() == {"backbone", "safety", "over-safety"}


def test_lora_gives_adapters_that_open_and_importance_of_the_merged_weights(where: Path) -> None:
    import peft

    result = go(settings(where, method="lora", lora_r=4, lora_alpha=8, learning_rate=1e-2))
    run, base = where / "run", weights(where / "base")
    assert [p.kind for p in load_recipe(result.recipe).patches] == ["lora", "lora"]
    for name in ("safety", "over-safety"):
        model = AutoModelForCausalLM.from_pretrained(where / "base")
        merged = peft.PeftModel.from_pretrained(model, run / name).merge_and_unload().state_dict()
        changed = sum(int((merged[n] != base[n]).sum()) for n in base)
        assert (
            changed / result.summary["patches"][name]["entries"] == result.summary["patches"][name]["changed_share"]
        )
        config = json.loads((run / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(where / "base")
        assert config["target_modules"] == sorted(config["target_modules"])
        assert weights(run / "importance" / name).keys() == {n for n in base if linear(n)}
    assert result.summary["nll"]["over-safety"] < result.summary["nll"]["backbone"] < result.summary["nll"]["safety"]

    from safepatch_core.deriving.importance import take_importance
    from safepatch_core.language.chat import Format
    from safepatch_core.progress import Progress

    chat = Format(tiny_tokenizer())
    rows = [json.loads(line) for line in (where / "rows.jsonl").read_text().splitlines()]
    examples = [chat.encode(row["question"], row["answer"], 512) for row in rows]
    model = AutoModelForCausalLM.from_pretrained(where / "base")
    model = peft.PeftModel.from_pretrained(model, run / "over-safety").merge_and_unload()
    with Progress("importance", 6, quiet=True, report=None) as progress:
        taken = take_importance(model, examples, lambda name, _: linear(name), progress)
    expected = {name: scores for layer in taken.layers for name, scores in layer.items()}
    for name, score in weights(run / "importance/over-safety").items():
        torch.testing.assert_close(score, expected[name], rtol=1e-4, atol=1e-9)


def test_a_seed_fixes_adapters_and_drawn_rows_whatever_the_callers_random_state(where: Path) -> None:
    config = settings(where, method="lora", lora_r=2, lora_dropout=0.5, importance_samples=2, seed=5)
    outputs = []
    for name, caller in (("a", 1), ("b", 2)):
        torch.manual_seed(caller)
        state = torch.get_rng_state()
        result = go(config.model_copy(update={"out": str(where / name)}))
        assert torch.equal(torch.get_rng_state(), state)
        outputs.append(content(where / name))
    assert outputs[0] == outputs[1]
    assert result.summary["importance"]["safety"] == {"samples": 2, "tensors": 14}
    go(config.model_copy(update={"out": str(where / "c"), "seed": 6}))
    assert content(where / "c")["safety/adapter_model.safetensors"] != outputs[0]["safety/adapter_model.safetensors"]


def test_unknown_lora_modules_are_a_usage_error(where: Path) -> None:
    with pytest.raises(UsageError, match="LoRA doesn't fit"):
        go(settings(where, method="lora", target_modules=["nothing"]))
    assert not (where / "run").exists()


def test_names_equal_the_bases_even_where_transformers_saves_others(where: Path) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=264, n_positions=256)).save_pretrained(
        where / "gpt2"
    )
    tiny_tokenizer().save_pretrained(where / "gpt2")
    tensors = {n.removeprefix("transformer."): t for n, t in weights(where / "gpt2").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 256, 256).tril()
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    first = {n: t for n, t in tensors.items() if n < "ln_f"}
    files = {"model-00001-of-00002.safetensors": first}
    files["model-00002-of-00002.safetensors"] = {n: t for n, t in tensors.items() if n not in first}
    (where / "gpt2/model.safetensors").unlink()
    for file, part in files.items():
        save_file(part, where / "gpt2" / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, part in files.items() for n in part}}
    (where / "gpt2/model.safetensors.index.json").write_text(json.dumps(index))

    go(settings(where, model=where / "gpt2", trainable="all"))
    for name in ("safety", "over-safety"):
        saved = weights(where / "run" / name)
        assert saved.keys() == tensors.keys()
        assert torch.equal(saved["h.0.attn.bias"], tensors["h.0.attn.bias"])
        assert torch.equal(saved["lm_head.weight"], saved["wte.weight"])
        assert not torch.equal(saved["wte.weight"], tensors["wte.weight"])
        scores = weights(where / "run/importance" / name)
        assert not scores["h.0.attn.bias"].any()
        assert scores.keys() == {n for n in tensors if n.startswith("h.0.") and n.endswith("c_attn.weight")} | {
            "h.0.attn.bias",
            "h.0.attn.c_proj.weight",
            "h.0.mlp.c_fc.weight",
            "h.0.mlp.c_proj.weight",
        }
        loaded: Any = AutoModelForCausalLM.from_pretrained(where / "run" / name)
        assert torch.equal(loaded.transformer.wte.weight, saved["wte.weight"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_lm(folder / "base")
    write_rows(folder / "rows.jsonl")
    go(settings(folder, method="full"))
    return folder


class Stop(BaseException):
    pass


PHASES = ["NLL backbone", "safety", "over-safety", "importance safety", "importance over-safety"]


@pytest.mark.parametrize("phase", ["NLL backbone", "over-safety", "importance over-safety"])
def test_a_stopped_run_resumes_to_the_same_bytes(undisturbed: Path, phase: str) -> None:
    config = settings(undisturbed, out=undisturbed / phase)

    def stop(event: dict[str, Any]) -> None:
        if event["phase"] == phase and event["done"] == min(2, event["total"]):
            raise Stop

    with pytest.raises(Stop):
        go(config, report=stop)
    half = content(Path(config.out))
    assert not any(".safepatch" in name for name in half)
    done = json.loads(half["derive.json"])["done"]
    assert len(done) == max(PHASES.index(phase) - 1, 0)
    phases: list[str] = []
    go(config, resume=True, report=lambda event: phases.append(event["phase"]))
    assert not {name for name in done if name in phases}
    assert content(Path(config.out)) == content(undisturbed / "run")


CHECKPOINTED: dict[str, dict[str, Any]] = {
    "full": {"optim": "adamw_in_backward"},
    "bfloat16": {"dtype": "bfloat16", "optim_state_dtype": "bfloat16", "gradient_checkpointing": True},
    "npo beside utility rows": {"safety": {"max_steps": 7, "objective": "npo"}, "utility_data": "rows.jsonl"},
    "lora with dropout": {"method": "lora", "lora_dropout": 0.3, "learning_rate": 1e-2},
}


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_training_goes_on_from_its_latest_checkpoint_to_the_same_bytes(where: Path, kind: str) -> None:
    changes: dict[str, Any] = {"safety": {"max_steps": 7}, "over_safety": {"max_steps": 3}, "importance": "none"}
    changes |= {"save_steps": 2} | CHECKPOINTED[kind]
    if "utility_data" in changes:
        changes["utility_data"] = where / changes["utility_data"]
    go(settings(where, **changes, out=where / "whole"))

    def stop(event: dict[str, Any]) -> None:
        if event["phase"] == "safety" and event["done"] == 5:
            raise Stop

    with pytest.raises(Stop):
        go(settings(where, **changes), report=stop)
    assert [p.name for p in (where / "run/checkpoint-safety").iterdir()] == ["4"]
    done: list[int] = []
    go(
        settings(where, **changes),
        resume=True,
        report=lambda event: done.append(event["done"]) if event["phase"] == "safety" else None,
    )
    assert done == [5, 6, 7]
    assert content(where / "run") == content(where / "whole")


def test_training_that_diverges_leaves_no_checkpoint(where: Path) -> None:
    with pytest.raises(UsageError, match="diverged"):
        go(settings(where, learning_rate=1e4, ascent_bound=None, safety={"max_steps": 400}, save_steps=1))
    assert not (where / "run").exists()


def test_npo_and_utility_rows_are_on_record(where: Path) -> None:
    write_rows(where / "ordinary.jsonl", 4)
    given = {"importance": "none", "utility_data": where / "ordinary.jsonl", "utility_rows": "1:4"}
    npo = {"max_steps": 2, "objective": "npo", "utility_weight": 0}
    summary = go(settings(where, safety=npo, **given)).summary
    assert [summary["patches"][n]["objective"] for n in ("safety", "over-safety")] == ["npo", "descent"]
    assert summary["inputs"]["utility_data"]["rows"] == 3
    assert summary["nll"]["safety"] > summary["nll"]["backbone"] > summary["nll"]["over-safety"]
    traces = [(where / f"run/trace-{n}.jsonl").read_text() for n in ("safety", "over-safety")]
    assert ["utility_nll" in trace for trace in traces] == [False, True]
    (where / "ordinary.jsonl").write_text('{"question": "a", "answer": " "}\n')
    with pytest.raises(InputError, match=r"ordinary.*line 1: column 'answer' is empty"):
        go(settings(where, out=where / "other", utility_data=where / "ordinary.jsonl"))


def test_curves_are_drawn_from_the_traces_or_their_lack_is_said(
    undisturbed: Path, where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = content(undisturbed / "run")["curves.png"]
    assert image.startswith(b"\x89PNG") and b"matplotlib" not in image and b"tIME" not in image
    monkeypatch.setattr("safepatch_core.deriving.steps.can_draw", lambda: False)
    events: list[dict[str, Any]] = []
    go(settings(where, importance="none"), report=events.append)
    assert events[0] == {"warning": "matplotlib is not installed: no curves.png"}
    assert not (where / "run/curves.png").exists()


def test_a_killed_run_resumes_to_the_same_bytes(undisturbed: Path) -> None:
    config = settings(undisturbed, out=undisturbed / "killed")
    code = (
        "import os, sys\nfrom safepatch_core.deriving import DeriveConfig, derive\n"
        "import safepatch_core.deriving.rundir as r\n"
        "rename = os.rename\n"
        "def late(a, b):\n    rename(a, b)\n    os._exit(9)\n"
        "r.os.rename = late\n"
        "derive(DeriveConfig.model_validate_json(sys.argv[1]), quiet=True)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, config.model_dump_json()], cwd=Path(__file__).parents[1])
    assert killed.returncode == 9
    # The folder was published, its record was not: it doesn't count.
    assert (undisturbed / "killed/safety").is_dir()
    assert json.loads((undisturbed / "killed/derive.json").read_text())["done"] == []
    (undisturbed / "killed/.safepatch-over-safety").mkdir()
    (undisturbed / "killed/.safepatch-over-safety/junk").touch()
    go(config, resume=True)
    assert content(undisturbed / "killed") == content(undisturbed / "run")


def test_a_finished_run_resumes_to_nothing_and_heals_a_lost_step(undisturbed: Path) -> None:
    before = content(undisturbed / "run")
    events: list[dict[str, Any]] = []
    result = go(settings(undisturbed), resume=True, report=events.append)
    assert events == [] and result.summary == json.loads(before["derive.json"])
    (undisturbed / "run/importance/safety/model.safetensors").unlink()
    (undisturbed / "run/importance/safety").rmdir()
    go(settings(undisturbed), resume=True, report=events.append)
    assert {event["phase"] for event in events} == {"importance safety"}
    assert content(undisturbed / "run") == before


def test_resuming_is_refused_where_one_weight_of_the_backbone_has_changed(undisturbed: Path) -> None:
    path = undisturbed / "base/model.safetensors"
    data = path.read_bytes()
    try:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(InputError, match=r"another inputs\.model\.sha256"):
            go(settings(undisturbed), resume=True)
    finally:
        path.write_bytes(data)


def test_resuming_another_run_is_refused_by_the_key_that_differs(undisturbed: Path, tmp_path: Path) -> None:
    before = content(undisturbed / "run")
    with pytest.raises(InputError, match=r"another batch_size, seed: found 2, expected 3"):
        go(settings(undisturbed, seed=1, batch_size=2), resume=True)
    with pytest.raises(InputError, match=r"another safety\.max_steps: found 3, expected 2"):
        go(settings(undisturbed, safety={"max_steps": 3}), resume=True)
    rows = (undisturbed / "rows.jsonl").read_text()
    try:
        write_rows(undisturbed / "rows.jsonl", 7)
        with pytest.raises(
            InputError, match=r"another inputs\.data\.answer_tokens, inputs\.data\.rows, inputs\.data\.sha256"
        ):
            go(settings(undisturbed), resume=True)
    finally:
        (undisturbed / "rows.jsonl").write_text(rows)
    assert content(undisturbed / "run") == before


def test_a_directory_in_use_or_not_empty_is_refused(where: Path) -> None:
    run = where / "run"
    run.mkdir()
    handle = os.open(run, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(Busy):
        go(settings(where))
    os.close(handle)
    (run / "mine.txt").touch()
    for resume in (False, True):
        with pytest.raises(InputError, match="not empty"):
            go(settings(where), resume=resume)
    assert [p.name for p in run.iterdir()] == ["mine.txt"]
    (where / "file").touch()
    with pytest.raises(OutputError, match="cannot create"):
        go(settings(where, out=where / "file"))


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_run_that_was_killed_before_its_record_was_there_starts_anew(where: Path) -> None:
    (where / "run").mkdir()
    (where / "run/.safepatch-derive.json").write_text('{"safe')
    go(settings(where, importance="none"), resume=True)
    assert not (where / "run/.safepatch-derive.json").exists()


def test_modes_follow_the_umask(where: Path, umask: None) -> None:
    go(settings(where, importance="none"))
    modes = {oct(p.stat().st_mode & 0o777) for p in (where / "run").rglob("*") if p.is_file()}
    assert modes == {"0o640"}


def test_bad_rows_are_named_with_their_line_before_anything_is_written(where: Path) -> None:
    rows = where / "rows.jsonl"
    good = rows.read_bytes()
    cases = [
        (good + b'{"question": "a"', "line 7: not JSON"),
        (good + b'{"question": "a", "answer": " "}\n', "line 7: column 'answer' is empty"),
        (good + b'{"question": "a"}\n', "line 7: no column 'answer'"),
        (good + b'\n{"question": "a", "answer": 3}\n', "line 8: column 'answer': found int"),
        (good + b'{"question": "\xff", "answer": "b"}\n', "line 7: not UTF-8"),
        (b"", "no rows"),
    ]
    for content_, message in cases:
        rows.write_bytes(content_)
        with pytest.raises(InputError, match=message):
            go(settings(where))
    rows.write_bytes(good + b'{"question": "' + b"long " * 99 + b'", "answer": "b"}\n')
    with pytest.raises(InputError, match=r"line 7: question leaves no room for an answer.*max_length"):
        go(settings(where, max_length=128))
    assert not (where / "run").exists()


def test_columns_and_rows_of_a_csv(where: Path) -> None:
    (where / "rows.csv").write_text('goal,target\nWhat?,Sure.\n"Two\nlines?","Well, yes."\nWho?,Me.\n')
    given = {"data": where / "rows.csv", "question_column": "goal", "answer_column": "target", "importance": "none"}
    assert go(settings(where, rows="1:3", **given)).summary["inputs"]["data"]["rows"] == 2
    with pytest.raises(InputError, match="no column 'reply': found columns goal, target, expected --answer-column"):
        go(settings(where, **{**given, "answer_column": "reply"}, out=where / "other"))


def test_a_bound_below_the_backbone_and_a_bad_device_are_usage_errors(where: Path) -> None:
    with pytest.raises(UsageError, match="ascent has no room"):
        go(settings(where, ascent_bound=0.5))
    assert not (where / "run").exists()
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(UsageError, match=f"device '{device}' can't be used"):
            go(settings(where, device=device, out=where / "other"))


def test_models_that_cannot_be_trained_are_input_errors(where: Path) -> None:
    base = where / "base"
    config = json.loads((base / "config.json").read_text())

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=message):
            go(settings(where, **changes))
        assert not (where / "run").exists()

    refused("a single file", model=base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    refused("quantised")
    (base / "config.json").write_text(json.dumps(config | {"model_type": "x", "auto_map": {"AutoConfig": "code.X"}}))
    (base / "code.py").write_text(f"open({str(where / 'executed')!r}, 'w')\nclass X: pass\n")
    refused("config can't be opened")
    assert not (where / "executed").exists()
    (base / "config.json").write_text(json.dumps(config))
    good = weights(base)
    tensors = dict(good)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    refused("model.layers.1.mlp.up_proj.weight.*missing")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].double()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    refused("model.layers.0.mlp.up_proj.weight.*found F64")
    save_file(good, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    refused("a token that the model doesn't know")
    (base / "tokenizer.json").unlink()
    refused("tokenizer can't be opened: no file has its tokens: expected tokenizer.json")


def test_rows_longer_than_the_models_positions_are_cut_and_counted(where: Path) -> None:
    row = {"question": "Go on?", "answer": "on and " * 60}
    (where / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "answer": "No."}) + "\n")
    data = go(settings(where, importance="none")).summary["inputs"]["data"]
    prompt = len("Suser\nGo on?E\nSassistant\n")  # S and E for the special tokens, a token per byte
    assert data["truncated_rows"] == 1
    assert data["answer_tokens"] == 256 - prompt + len("No.E")


def test_a_library_that_is_missing_is_named(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safepatch_core.deriving.find_spec", lambda name: None if name == "peft" else name)
    with pytest.raises(UsageError, match="derive needs peft"):
        go(settings(where, method="lora"))
    go(settings(where, importance="none"))


def test_config_refuses_unknown_keys_and_values_out_of_range() -> None:
    given = {"model": "m", "data": "d", "out": "o"}
    for key, value in (("steps", 3), ("seed", -1), ("method", "qlora"), ("ascent_bound", 0), ("safety", {"top": 2})):
        with pytest.raises(ValueError, match=key):
            DeriveConfig.model_validate({**given, key: value})
    defaults = DeriveConfig.model_validate(given)
    assert (defaults.safety.top, defaults.over_safety.top, defaults.safety.retain) == (0.03, 0.02, 0.3)
    assert all(f.description for m in (DeriveConfig, type(defaults.safety)) for f in m.model_fields.values())


def test_importing_the_configuration_loads_no_torch() -> None:
    code = "import sys, safepatch_core.deriving; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
