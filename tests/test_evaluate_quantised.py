"""A quantised model under test is the floats of its codes, or what transformers makes of it: no code is a weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from safepatch_core.bench.psa.twins import LAYOUTS, as_floats, quantise
from safepatch_core.errors import InputError
from safepatch_core.evaluating import EvalConfig
from safepatch_core.evaluating.subject import opened
from tests.tiny_lm import write_lm

IDS = torch.arange(3, 9)[None]


def logits(model: Path, **fields: Any) -> torch.Tensor:
    config = EvalConfig.model_validate({"model": str(model), "out": "any", "text": "any", "max_length": 64} | fields)
    with opened(model, config) as subject, torch.no_grad():
        found: torch.Tensor = subject.model(input_ids=IDS).logits
        return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_the_model_of_its_floats(tmp_path: Path, layout: str) -> None:
    write_lm(tmp_path / "base")
    quantise(tmp_path / "base", tmp_path / "twin", layout)
    as_floats(tmp_path / "twin", tmp_path / "floats")
    found = logits(tmp_path / "twin")
    assert torch.equal(found, logits(tmp_path / "floats"))
    assert not torch.equal(found, logits(tmp_path / "base"))


def test_its_generation_settings_come_along(tmp_path: Path) -> None:
    write_lm(tmp_path / "base")
    quantise(tmp_path / "base", tmp_path / "twin", "fp8-block")
    (tmp_path / "twin" / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    config = EvalConfig.model_validate({"model": "any", "out": "any", "text": "any", "max_length": 64})
    with opened(tmp_path / "twin", config) as subject:
        assert subject.model.generation_config.eos_token_id == [5, 7]


def scale_of_odd_shape(folder: Path) -> None:
    """Makes the scales of one weight such as no format has."""
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    save_file(tensors | {name: torch.ones(3, 5, 7)}, folder / "model.safetensors", {"format": "pt"})


def test_codes_that_no_config_tells_of_are_no_weights(tmp_path: Path) -> None:
    write_lm(tmp_path / "base")
    quantise(tmp_path / "base", tmp_path / "twin", "fp8-block")
    scale_of_odd_shape(tmp_path / "twin")
    config = json.loads((tmp_path / "twin" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "twin" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match=r"model\.safetensors: tensor 'model\.layers\.0\.mlp\.up_proj\.weight': codes"
    ):
        logits(tmp_path / "twin")


def test_a_format_of_another_library_is_left_to_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the settings of its config: a quantization_config of None would load its codes as weights."""
    write_lm(tmp_path / "base")
    quantise(tmp_path / "base", tmp_path / "twin", "fp8-block")
    scale_of_odd_shape(tmp_path / "twin")
    asked: list[dict[str, Any]] = []

    def refuse(*_: Any, **given: Any) -> None:
        asked.append(given)
        raise ValueError("no such method")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(InputError, match="can't be opened .*no such method"):
        logits(tmp_path / "twin")
    assert len(asked) == 1 and not asked[0].keys() & {"quantization_config", "state_dict"}
    assert asked[0]["device_map"] == {"": torch.device("cpu")}
