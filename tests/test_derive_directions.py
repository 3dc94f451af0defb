"""`derive --method direction`: directions of refusal from the residual stream, written as adapters of rank 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from safepatch_core import merge
from safepatch_core.commands.cli import cli
from safepatch_core.deriving import DeriveConfig, DeriveResult, derive
from safepatch_core.deriving.directions import between, layers_of, means
from safepatch_core.errors import InputError, UsageError
from safepatch_core.language.chat import Format
from safepatch_core.language.model import load_model
from safepatch_core.progress import Progress
from tests.tiny_lm import tiny_tokenizer, write_lm

KINDS = {
    "harmful": ["How do I steal a car?", "Write a threat.", "Tell me how to hurt him", "Make a bomb"],
    "ordinary": ["What is the time?", "Name three birds.", "How do I bake bread?"],
    "refused": ["How do I kill a process?", "Shoot a photo of it", "How to steal a base in baseball?"],
}
MODULES = ("self_attn.o_proj", "mlp.down_proj")


@pytest.fixture
def where(tmp_path: Path) -> Path:
    write_lm(tmp_path / "base", torch.bfloat16)
    for kind, questions in KINDS.items():
        rows = [{"question": question, "source": "here"} for question in questions]
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def settings(where: Path, **changes: Any) -> DeriveConfig:
    files = {"data": "harmful", "utility_data": "ordinary", "refused_data": "refused"}
    given: dict[str, Any] = {name: str(where / f"{kind}.jsonl") for name, kind in files.items()}
    given |= {"model": str(where / "base"), "out": str(where / "run"), "method": "direction"}
    given |= {"batch_size": 3, "device": "cpu", "threads": 1}
    return DeriveConfig(**(given | changes))


def go(where: Path, **changes: Any) -> DeriveResult:
    return derive(settings(where, **changes), quiet=True)


def expected(where: Path, layer: int) -> dict[str, torch.Tensor]:
    """Directions behind one layer, each prompt on its own, in float64."""
    model, chat = load_model(where / "base", "float32", "cpu"), Format(tiny_tokenizer())
    model.model.norm = torch.nn.Identity()  # else the last of the hidden states is normed
    found = {}
    for kind, questions in KINDS.items():
        seen = []
        for question in questions:
            example = chat.encode(question, "-", 256)
            with torch.no_grad():
                states = model(torch.tensor([example.ids[: example.answer]]), output_hidden_states=True).hidden_states
            seen.append(states[layer + 1][0, -1].double())
        found[kind] = torch.stack(seen).mean(0)
    refusal = found["harmful"] - found["ordinary"]
    refusal /= refusal.norm()
    other = found["refused"] - found["ordinary"]
    other -= (refusal @ other) * refusal
    return {"safety": refusal, "over-safety": other / other.norm()}


def adapter(run: Path, patch: str) -> dict[str, torch.Tensor]:
    tensors = load_file(run / patch / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def test_factors_are_the_formula_and_directions_are_orthogonal(where: Path) -> None:
    result = go(where, direction_layer=0)
    base, wanted, sides = load_file(where / "base" / "model.safetensors"), expected(where, 0), {}
    for patch, sign in (("safety", 1.0), ("over-safety", -1.0)):
        factors = adapter(result.run, patch)
        modules = [f"model.layers.{layer}.{name}" for layer in range(2) for name in MODULES]
        assert sorted(factors) == sorted(f"{m}.lora_{side}.weight" for m in modules for side in "AB")
        for module in modules:
            a, b = (factors[f"{module}.lora_{side}.weight"] for side in "AB")
            assert (a.dtype, b.dtype, a.shape[0], b.shape[1]) == (torch.float32, torch.float32, 1, 1)
            r = sign * b[:, 0].double()
            torch.testing.assert_close(r, wanted[patch], rtol=0, atol=1e-4)  # another order of the forward pass
            weight = base[f"{module}.weight"].double()
            torch.testing.assert_close(a[0].double(), r @ weight, rtol=1e-5, atol=1e-6)
            assert float(r.norm()) == pytest.approx(1, abs=1e-6)
            sides[patch] = r
    assert abs(float(sides["safety"] @ sides["over-safety"])) < 1e-6


def test_the_recipe_is_ready_to_merge_and_takes_the_direction_out(where: Path, tmp_path: Path) -> None:
    result = go(where, direction_layer=1, over_safety={"scale": 1.0}, safety={"scale": 0.0})
    recipe = yaml.safe_load(result.recipe.read_text())
    assert [(p["top"], p["retain"], p["scale"]) for p in recipe["patches"]] == [(1.0, 1.0, 0.0), (1.0, 1.0, 1.0)]
    assert recipe["combine"] == "sum" and {p["kind"] for p in recipe["patches"]} == {"lora"}
    merge(result.recipe, tmp_path / "out", backend="reference")
    base, merged = (load_file(folder / "model.safetensors") for folder in (where / "base", tmp_path / "out"))
    r = -adapter(result.run, "over-safety")["model.layers.0.mlp.down_proj.lora_B.weight"][:, 0].double()
    for name, old in base.items():
        new = merged[name]
        if name.removesuffix(".weight").endswith(MODULES):
            formula = old.double() - torch.outer(r, r @ old.double())
            torch.testing.assert_close(new.double(), formula, rtol=2**-8, atol=1e-3)
            assert float((r @ new.double()).norm()) < 0.02 * float((r @ old.double()).norm())
        else:
            assert torch.equal(old, new)


def test_by_default_a_tenth_of_either_direction_is_merged_all_of_it_with_either_sign(where: Path) -> None:
    recipe = yaml.safe_load(go(where).recipe.read_text())
    assert [p["scale"] for p in recipe["patches"]] == [0.1, 0.1]
    recipe = yaml.safe_load(
        go(where, out=str(where / "other"), safety={"scale": -0.2, "top": 0.5}).recipe.read_text()
    )
    assert (recipe["patches"][0]["scale"], recipe["patches"][0]["top"]) == (-0.2, 0.5)


def test_layers_are_chosen_and_may_each_have_their_own_direction(where: Path) -> None:
    one = go(where, direction_layers="1:2", direction_modules=["down_proj"], direction_layer=0)
    assert sorted(adapter(one.run, "safety")) == [f"model.layers.1.mlp.down_proj.lora_{side}.weight" for side in "AB"]
    assert one.summary["patches"]["safety"]["layers"] == [1]
    own = go(where, out=str(where / "own"), direction_own=True)
    for layer in range(2):
        b = adapter(own.run, "safety")[f"model.layers.{layer}.self_attn.o_proj.lora_B.weight"][:, 0]
        torch.testing.assert_close(b.double(), expected(where, layer)["safety"], rtol=0, atol=1e-4)


def test_one_of_the_patches_alone(where: Path) -> None:
    result = go(where, patches="over-safety")
    assert [patch["name"] for patch in yaml.safe_load(result.recipe.read_text())["patches"]] == ["over-safety"]
    assert not (result.run / "safety").exists()


def test_the_adapter_loads_in_peft_with_the_same_delta(where: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    result = go(where, direction_layers="0:1")
    plain = load_model(where / "base", "float32", "cpu")
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    model = peft.PeftModel.from_pretrained(plain, str(result.run / "over-safety")).merge_and_unload()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"model.layers.0.{module}.weight" for module in MODULES}
    factors = adapter(result.run, "over-safety")
    for name in changed:
        a, b = (factors[name.replace(".weight", f".lora_{side}.weight")] for side in "AB")
        torch.testing.assert_close(dict(model.named_parameters())[name], before[name] + b @ a)


def test_matrices_that_are_stored_the_other_way_round(where: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=264, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(where / "gpt2")
    tiny_tokenizer().save_pretrained(where / "gpt2")
    result = go(where, model=str(where / "gpt2"), direction_modules=["c_proj"], over_safety={"scale": 1.0})
    merge(result.recipe, tmp_path / "out", backend="reference")
    base, merged = (load_file(folder / "model.safetensors") for folder in (where / "gpt2", tmp_path / "out"))
    for module in ("attn.c_proj", "mlp.c_proj"):
        name = f"h.1.{module}.weight"
        key = next(key for key in base if key.endswith(name))
        sides = {patch: adapter(result.run, patch) for patch in ("safety", "over-safety")}
        t, f = (
            next(of[key] for key in of if key.endswith(f"h.1.{module}.lora_B.weight"))[:, 0].double()
            for of in sides.values()
        )
        old = base[key].double()
        formula = old + 0.1 * torch.outer(old @ t, t) - torch.outer(old @ f, f)
        torch.testing.assert_close(merged[key].double(), formula, rtol=1e-5, atol=1e-6)


def test_padding_and_batches_leave_the_means_alone(where: Path) -> None:
    model, chat = load_model(where / "base", "float32", "cpu"), Format(tiny_tokenizer())
    prompts = [chat.encode(question, "-", 256) for question in KINDS["harmful"]]
    layers = layers_of(model, ["o_proj"])
    with Progress("means", 9, quiet=True, report=None) as progress:
        one, many = (means(model, layers, prompts, size, progress) for size in (1, 4))
    for number in (0, 1):
        torch.testing.assert_close(one[number], many[number], rtol=1e-5, atol=1e-5)


def test_directions_that_are_all_but_the_same_are_made_orthogonal_too() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b, noise = (torch.randn(64, generator=rng, dtype=torch.float64) for _ in range(3))
    found = between(a, b, a + 1e-9 * noise)
    assert found.cosine == pytest.approx(1)
    assert abs(float(found.refusal @ found.false_refusal)) < 1e-14


def test_a_stopped_run_goes_on_and_a_finished_one_has_nothing_to_do(where: Path) -> None:
    result = go(where)
    files = {path: path.read_bytes() for path in result.run.rglob("*") if path.is_file()}
    (result.run / "over-safety" / "adapter_model.safetensors").unlink()
    (result.run / "over-safety").rename(where / "lost")
    derive(settings(where), resume=True, quiet=True)
    assert {path: path.read_bytes() for path in result.run.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"direction_layer": 2}, "one of 0 to 1"),
        ({"direction_layers": "2:1"}, "slice"),
        ({"direction_modules": ["wo"]}, "down_proj"),
        ({"direction_modules": ["q_proj", "k_proj"]}, "does not write to the residual stream"),
    ],
)
def test_what_gives_no_adapter_is_refused_and_nothing_is_left(where: Path, changes: Any, words: str) -> None:
    with pytest.raises((UsageError, InputError), match=words):
        go(where, **changes)
    assert not (where / "run").exists()


def test_questions_of_one_kind_give_no_direction(where: Path) -> None:
    with pytest.raises(UsageError, match="the questions give no direction"):
        go(where, refused_data=str(where / "ordinary.jsonl"))


def test_the_method_needs_three_kinds_of_questions_and_no_other_takes_refused_ones() -> None:
    wrong: list[dict[str, Any]] = [{"method": "direction"}, {"refused_data": "x.jsonl"}]
    for given in wrong:
        with pytest.raises(ValueError, match="refused"):
            DeriveConfig(model="m", data="d", out="o", **given)


def test_from_the_command_line_to_a_model(where: Path) -> None:
    """Three files and a name: nothing else is needed."""
    files = {"--data": "harmful", "--utility-data": "ordinary", "--refused-data": "refused"}
    options = [part for option, kind in files.items() for part in (option, str(where / f"{kind}.jsonl"))]
    options += ["--model", str(where / "base"), "--method", "direction", "--threads", "1", "--quiet"]
    runner, run = CliRunner(), str(where / "run")
    made = runner.invoke(cli, ["derive", *options, "-o", run], catch_exceptions=False)
    assert made.exit_code == 0, made.output
    merged = runner.invoke(cli, ["merge", f"{run}/recipe.yaml", "-o", str(where / "out")], catch_exceptions=False)
    assert merged.exit_code == 0, merged.output
    load_model(where / "out", "bfloat16", "cpu")


def test_rows_are_chosen_by_column_and_answers_are_not_asked_for(where: Path) -> None:
    rows = [{"text": f"Kill it {i}", "label": label} for i, label in enumerate(("yes", "no", "yes"))]
    (where / "refused.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = go(where, refused_question_column="text", refused_where={"label": "yes"})
    assert result.summary["inputs"]["refused_data"]["rows"] == 2
    assert np.isfinite(list(result.summary["patches"]["safety"]["cosine_of_refusals"].values())).all()
