"""Which way round a layer is stored is asked of the layer, not of the adapter's one flag for all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.against_peft import gpt2, peft, require_peft, torch, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("config_json", [True, False])
@pytest.mark.parametrize(
    "modules",
    [["c_attn", "attn.c_proj"], ["c_attn", "lm_head"], ["attn.c_proj", "lm_head"], ["attn.c_proj", "wte", "c_fc"]],
)
def test_conv1d_beside_linear_layers(tmp_path: Path, modules: list[str], config_json: bool) -> None:
    model = gpt2(tie_word_embeddings=False)
    live = write_adapter(tmp_path, model, peft.LoraConfig(r=2, target_modules=modules), torch.float32)
    told_otherwise = modules != ["attn.c_proj", "lm_head"]  # here only the base's config tells that c_proj is turned
    if not config_json and told_otherwise:
        (tmp_path / "base" / "config.json").unlink()
    require_peft(tmp_path, live, tmp_path / "recipe.yaml")


@pytest.mark.parametrize("flag", [True, False])
def test_the_flag_is_not_believed(tmp_path: Path, flag: bool) -> None:
    live = write_adapter(tmp_path, gpt2(), peft.LoraConfig(r=2, target_modules=["attn.c_proj"]), torch.bfloat16)
    path = tmp_path / "adapter" / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "fan_in_fan_out": flag}))
    require_peft(tmp_path, live, tmp_path / "recipe.yaml")
