"""Patches derived on a quantised backbone: trained on its floats, merged into its codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from safepatch_core.deriving import DeriveConfig, derive
from safepatch_core.errors import InputError
from safepatch_core.merging.api import merge
from safepatch_core.merging.recipe import load_recipe
from tests.oracle import load_checkpoint
from tests.test_quantised_transformers import loaded, write_twin
from tests.tiny_lm import tiny_tokenizer, write_rows


@pytest.fixture
def where(tmp_path: Path) -> Path:
    write_twin(tmp_path, vocab_size=264)
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def settings(where: Path, **changes: Any) -> DeriveConfig:
    places = {"model": str(where / "base"), "data": str(where / "rows.jsonl"), "out": str(where / "run")}
    given: dict[str, Any] = {"learning_rate": 1e-2, "threads": 1, "batch_size": 3, "ascent_bound": 50.0}
    steps = {"safety": {"max_steps": 3}, "over_safety": {"max_steps": 3}}
    return DeriveConfig(**{**places, **given, **steps, **changes})


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16", "save_as": "delta"}, {"method": "lora", "lora_r": 4}])
def test_patches_of_a_quantised_backbone_go_into_its_codes(where: Path, changes: dict[str, Any]) -> None:
    result = derive(settings(where, **changes), quiet=True)
    recipe = load_recipe(result.recipe)
    rule = recipe.quantized
    assert rule is not None and rule.reference_dtype == "bfloat16" and recipe.base == str(where / "base")
    # So few entries survive well only in the mean.
    wide = recipe.model_copy(update={"quantized": rule.model_copy(update={"survival": [0.0, 2.0]})})
    done = merge(wide, where / "out")
    assert done.kept is not None and all((of["changed"] or 0) > 100 for of in done.kept.values())
    before, after = load_checkpoint(where / "base"), load_checkpoint(where / "out")
    assert {n.rpartition(".")[2] for n in before if before[n] != after[n]} == {"weight"}


def test_the_float_copy_is_what_transformers_hands_out(where: Path) -> None:
    derive(settings(where, importance="none"), quiet=True)
    copy = load_file(where / "run.backbone" / "model.safetensors")
    model = loaded(where / "base")
    for name, parameter in model.named_parameters():
        assert torch.equal(copy[name], parameter.detach().to(torch.bfloat16)), name
    config = json.loads((where / "run.backbone" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    derive(settings(where, importance="none"), quiet=True, resume=True)  # the copy is there


def test_a_copy_of_another_model_is_not_taken(where: Path) -> None:
    (where / "run.backbone").mkdir()
    with pytest.raises(InputError, match="no float copy of this backbone"):
        derive(settings(where), quiet=True)
    assert not (where / "run").exists()


def test_what_can_not_be_merged_into_is_not_trained(where: Path) -> None:
    path = where / "base" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {"transform_config": {"config_groups": {}}}
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="rotated"):
        derive(settings(where), quiet=True)
    assert sorted(p.name for p in where.iterdir()) == sorted(["base", "float", "rows.jsonl", "tuned.safetensors"])
