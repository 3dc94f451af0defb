"""Nothing succeeds without an effect, and what a patch brings beside the targets is told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from safepatch_core import merge, plan, verify
from safepatch_core.errors import InputError
from tests.oracle import Tensor, from_f32, load_checkpoint, save_file
from tests.twins import FLOAT, SHAPE, UP, Q, Twin

Tensors = dict[str, Tensor]


def f32(*shape: int, seed: int = 0) -> Tensor:
    values = np.random.default_rng(seed).standard_normal(shape).astype("<f4")
    return Tensor("F32", shape, values.tobytes())


def zeros(*shape: int) -> Tensor:
    return Tensor("F32", shape, bytes(4 * int(np.prod(shape))))


def model(seed: int = 0) -> Tensors:
    return {
        "model.embed_tokens.weight": f32(9, 4),
        "model.layers.0.q_proj.weight": f32(4, 4, seed=seed),
        "model.layers.1.q_proj.weight": f32(4, 4, seed=seed + 1 if seed else 0),
        "model.norm.weight": f32(4),
    }


def write(root: Path, base: Tensors, patch: Tensors, spec: dict[str, Any] | None = None, **recipe: Any) -> Path:
    for name, tensors in (("base", base), ("tuned", patch)):
        (root / name).mkdir()
        save_file(root / name / "model.safetensors", tensors)
    (root / "base" / "config.json").write_text("{}")
    path = root / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({"base": "base", "patches": [{"name": "p", "source": "tuned"} | (spec or {})]} | recipe)
    )
    return path


def adapter(root: Path, module: str, b: Tensor, **config: Any) -> None:
    root.mkdir()
    save_file(
        root / "adapter_model.safetensors",
        {
            f"base_model.model.{module}.lora_A.weight": f32(2, 4, seed=7),
            f"base_model.model.{module}.lora_B.weight": b,
        },
    )
    (root / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2} | config))


def refused(recipe: Path, *words: str) -> str:
    """No merge, no output, nothing beside it, and one line that does not advise to skip what is missing."""
    out = recipe.parent / "out"
    before = sorted(recipe.parent.iterdir())
    with pytest.raises(InputError) as caught:
        merge(recipe, out, backend="reference")
    message = str(caught.value)
    assert caught.value.status == 65 and "\n" not in message and sorted(recipe.parent.iterdir()) == before
    for word in ("tuned", *words):
        assert word in message, message
    return message


@pytest.mark.parametrize("missing", ["error", "skip"])
def test_other_names_throughout(tmp_path: Path, missing: str) -> None:
    other = {f"student.{name.replace('.', '_')}": tensor for name, tensor in model(1).items()}
    message = refused(
        write(tmp_path, model(), other, missing=missing), "no tensor of the patch is in the base", "4 other"
    )
    assert "tensor 'student.model_embed_tokens_weight'" in message and "model.layers.0.q_proj.weight" in message
    assert "skip" not in message


@pytest.mark.parametrize("missing", ["error", "skip"])
def test_nothing_that_is_a_target(tmp_path: Path, missing: str) -> None:
    patch = {"model.norm.weight": f32(4, seed=3), "model.embed_tokens.weight": f32(9, 4, seed=3)}
    recipe = write(tmp_path, model(), patch, missing=missing)
    assert "skip" not in refused(
        recipe, "no tensor of the patch is a target", "'model.embed_tokens.weight'", "2 tensors"
    )


def test_a_rule_that_takes_nothing(tmp_path: Path) -> None:
    recipe = write(tmp_path, model(), model(1), targets={"include": ["layers"]})  # a glob without its wildcard
    refused(recipe, "the rule of `targets` takes no tensor of the base")


def test_an_adapter_of_the_head_alone(tmp_path: Path) -> None:
    recipe = write(tmp_path, model() | {"lm_head.weight": f32(9, 4)}, {}, {"source": "lora"})
    (tmp_path / "tuned" / "model.safetensors").unlink()
    (tmp_path / "tuned").rmdir()
    adapter(tmp_path / "tuned", "lm_head", f32(9, 2))
    recipe.write_text(recipe.read_text().replace("lora", "tuned"))
    refused(recipe, "no tensor of the patch is a target", "'lm_head.weight'")


@pytest.mark.parametrize("quiet", [True, False])
@pytest.mark.parametrize("kind", ["checkpoint", "delta"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_deltas_that_are_all_zero(tmp_path: Path, kind: str, scope: str, quiet: bool) -> None:
    scores = {name: f32(*tensor.shape) for name, tensor in model().items()}
    scores = {
        name: Tensor("F32", t.shape, np.abs(np.frombuffer(t.data, "<f4")).tobytes()) for name, t in scores.items()
    }
    save_file(tmp_path / "scores.safetensors", scores)
    patch = model() if kind == "checkpoint" else {name: zeros(*tensor.shape) for name, tensor in model().items()}
    spec: dict[str, Any] = {"kind": kind} | ({"importance": {"scores": "scores.safetensors"}} if quiet else {})
    refused(
        write(tmp_path, model(), patch, spec, scope=scope), "'p' changes nothing", "every delta of a target is zero"
    )


def test_the_same_values_in_another_dtype(tmp_path: Path) -> None:
    halves = {n: np.frombuffer(t.data, "<f4").astype("<f2") for n, t in model().items()}
    base = {n: Tensor("F16", model()[n].shape, x.tobytes()) for n, x in halves.items()}
    patch = {n: Tensor("F32", model()[n].shape, x.astype("<f4").tobytes()) for n, x in halves.items()}
    refused(write(tmp_path, base, patch), "every delta of a target is zero")


@pytest.mark.parametrize("b", [zeros(4, 2), Tensor("F32", (4, 2), np.array([[-0.0, 0]] * 4, "<f4").tobytes())])
def test_an_adapter_before_its_first_step(tmp_path: Path, b: Tensor) -> None:
    recipe = write(tmp_path, model(), {})
    (tmp_path / "tuned" / "model.safetensors").unlink()
    (tmp_path / "tuned").rmdir()
    adapter(tmp_path / "tuned", "model.layers.0.q_proj", b)
    refused(recipe, "every delta of a target is zero")


def test_one_entry_among_millions_is_an_effect(tmp_path: Path) -> None:
    base = {"a.weight": zeros(3, 400_000), "b.weight": zeros(2, 2)}
    moved = np.zeros((3, 400_000), "<f4")
    moved[2, -1] = 1
    recipe = write(tmp_path, base, base | {"a.weight": Tensor("F32", moved.shape, moved.tobytes())})
    result = merge(recipe, tmp_path / "out", backend="reference")
    assert result.changed == 1 and load_checkpoint(tmp_path / "out")["a.weight"].data == moved.tobytes()


def test_scores_that_are_all_zero(tmp_path: Path) -> None:
    save_file(tmp_path / "scores.safetensors", {n: zeros(*t.shape) for n, t in model().items()})
    spec = {"importance": {"scores": "scores.safetensors"}}
    refused(write(tmp_path, model(), model(1), spec), "'p' changes nothing", "no entry of a target is eligible")


@pytest.mark.parametrize("missing", ["error", "skip"])
def test_importance_under_other_names(tmp_path: Path, missing: str) -> None:
    save_file(tmp_path / "scores.safetensors", {n.replace(".", "_"): t for n, t in model().items()})
    spec = {"importance": {"gradients": "scores.safetensors"}}
    recipe = write(tmp_path, model(), model(1), spec, missing=missing)
    with pytest.raises(
        InputError, match=r"scores\.safetensors: the importance of patch 'p' has none of the targets"
    ) as e:
        merge(recipe, tmp_path / "out", backend="reference")
    assert "skip" not in str(e.value)


@pytest.mark.parametrize("spec", [{"top": 0}, {"retain": 0}, {"scale": 0}, {"skip": 1}])
def test_zeros_that_the_recipe_asks_for_are_legal_and_told(tmp_path: Path, spec: dict[str, float]) -> None:
    result = merge(write(tmp_path, model(), model(1), spec), tmp_path / "out", backend="reference")
    assert load_checkpoint(tmp_path / "out") == model() and result.changed == 0
    zero = "skip of 1" if "skip" in spec else "top, retain or scale of 0"
    assert result.warnings[0] == f"patch p changes nothing, as its {zero} asks"
    assert result.warnings[1].startswith("the output equals the base")


def test_steps_that_rounding_takes_back_are_told(tmp_path: Path) -> None:
    base = {"w.weight": Tensor("BF16", (1, 2), np.array([0x3F80, 0x3F80], "<u2").tobytes())}
    patch = {"w.weight": Tensor("F32", (1, 2), np.array([1 + 2**-12, 1 + 2**-13], "<f4").tobytes())}
    result = merge(write(tmp_path, base, patch), tmp_path / "out", backend="reference")
    assert result.acted == 2 and result.warnings == (
        "the output equals the base: rounding into its dtype took every step back",
    )


# Beside the targets


def told(recipe: Path) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, Any]]:
    """Warnings and notes of the plan, which are those of the merge, and what the manifest says."""
    made, out = plan(recipe, backend="reference"), recipe.parent / "out"
    result = merge(recipe, out, backend="reference")
    assert (result.warnings, result.notes) == (made.warnings, made.notes)
    assert verify(out, recipe, backend="reference").ok
    facts: dict[str, Any] = json.loads((out / "safepatch.json").read_text())["patches"][0]["beside"]
    return made.warnings, made.notes, facts


def test_what_a_fine_tune_has_beside_the_targets_is_a_note(tmp_path: Path) -> None:
    warnings, notes, facts = told(write(tmp_path, model(), model(1)))
    assert warnings == () and notes == (
        "patch p also brings 2 tensors beside the targets, the first 'model.embed_tokens.weight': "
        "the output keeps what the base has",
    )
    assert facts == {"tensors": 2, "first": "model.embed_tokens.weight", "files": []}


def test_extra_tensors_that_are_no_targets_are_no_reason_to_refuse(tmp_path: Path) -> None:
    patch = model(1) | {"lm_head.weight": f32(9, 4), "model.layers.0.q_norm.weight": f32(4)}
    (warning,), notes, facts = told(write(tmp_path, model(), patch))
    assert "4 tensors beside the targets, the first 'lm_head.weight'" in warning and notes == ()
    assert facts["tensors"] == 4


def test_extra_tensors_that_would_be_targets_are(tmp_path: Path) -> None:
    patch = model(1) | {"model.layers.2.q_proj.weight": f32(4, 4), "model.layers.3.q_proj.weight": f32(4, 4)}
    recipe = write(tmp_path, model(), patch)
    refused(recipe, "'model.layers.2.q_proj.weight'", "found 2 such tensors", "missing: skip")
    recipe.write_text(recipe.read_text() + "missing: skip\n")
    (warning,), _, _ = told(recipe)
    assert "4 tensors beside the targets" in warning


def test_a_vocabulary_that_grew(tmp_path: Path) -> None:
    patch = model(1) | {"model.embed_tokens.weight": f32(11, 4)}
    recipe = write(tmp_path, model(), patch)
    for folder, text in (("base", "{}"), ("tuned", '{"added": 2}')):
        (tmp_path / folder / "tokenizer.json").write_text(text)
        (tmp_path / folder / "vocab.json").write_text("{}")
    (warning,), _, facts = told(recipe)
    assert "another shape of 'model.embed_tokens.weight'" in warning
    assert "1 other tokenizer file, the first tokenizer.json" in warning and facts["files"] == ["tokenizer.json"]


def test_an_adapter_with_a_trained_head(tmp_path: Path) -> None:
    recipe = write(tmp_path, model() | {"lm_head.weight": f32(9, 4)}, {})
    (tmp_path / "tuned" / "model.safetensors").unlink()
    (tmp_path / "tuned").rmdir()
    adapter(tmp_path / "tuned", "model.layers.0.q_proj", f32(4, 2), modules_to_save=["lm_head"])
    file = tmp_path / "tuned" / "adapter_model.safetensors"
    save_file(file, load_checkpoint(file) | {"base_model.model.lm_head.weight": f32(9, 4, seed=5)})
    (warning,), _, _ = told(recipe)
    assert "1 tensor beside the targets, the first 'lm_head.weight'" in warning
    recipe.write_text(recipe.read_text() + "targets: all\n")
    merge(recipe, tmp_path / "all", backend="reference")
    merged = np.frombuffer(load_checkpoint(tmp_path / "all")["lm_head.weight"].data, "<f4")
    assert np.allclose(merged, np.frombuffer(f32(9, 4, seed=5).data, "<f4"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_unchanged_checkpoint_of_a_quantised_base_is_refused(tmp_path: Path, backend: str) -> None:
    """What the dequantised base is when rounded to bfloat16, as a trainer was handed it."""
    twin = Twin(tmp_path)
    same = {FLOAT: twin.base[FLOAT]}
    for name in (Q, UP):
        same[name] = Tensor("BF16", SHAPE, from_f32(twin.values(name), "BF16"))
    save_file(tmp_path / "p.safetensors", same)
    recipe = twin.recipe({"name": "p", "source": "p.safetensors", "kind": "checkpoint", "top": 0.5})
    with pytest.raises(InputError, match="every delta of a target is zero"):
        merge(recipe, tmp_path / "out", backend=backend)
