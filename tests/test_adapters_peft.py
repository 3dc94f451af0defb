"""Every kind of adapter that is taken gives PEFT's merge, on every engine, whole and in chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.against_peft import gpt2, llama, peft, require_peft, torch, transformers, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")
LORA = peft.LoraConfig
SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
HEADS = {"num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2}


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(**SMALL, **HEADS, intermediate_size=16, num_local_experts=4)
    return transformers.GptOssForCausalLM(config)


def llama4() -> Any:
    config = transformers.Llama4TextConfig(
        **SMALL, **HEADS, intermediate_size=8, intermediate_size_mlp=24, num_local_experts=4
    )
    return transformers.Llama4ForCausalLM(config)


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
WHOLE = ["embed_tokens", "lm_head", "norm"]
CASES: dict[str, tuple[Any, Any]] = {
    "modules trained in full": (llama, LORA(r=2, target_modules=["q_proj"], modules_to_save=WHOLE)),
    "trained rows": (llama, LORA(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 1, 31])),
    "trained rows of two modules": (
        llama,
        LORA(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [0, 5], "lm_head": [7]}),
    ),
    "nothing but trained rows": (llama, peft.TrainableTokensConfig(token_indices=[4, 30])),
    "all biases": (
        lambda: llama(attention_bias=True),
        LORA(r=2, target_modules=["q_proj"], bias="all"),
    ),
    "biases of adapted layers": (gpt2, LORA(r=2, target_modules=["c_attn", "c_proj"], bias="lora_only")),
    "biases of B": (
        lambda: llama(attention_bias=True),
        LORA(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj"], lora_bias=True, use_rslora=True),
    ),
    "DoRA": (
        llama,
        LORA(r=3, lora_alpha=4, target_modules=["q_proj", "up_proj", "down_proj"], use_dora=True),
    ),
    "DoRA of embeddings": (llama, LORA(r=2, target_modules=["embed_tokens", "v_proj"], use_dora=True)),
    "DoRA of Conv1D": (gpt2, LORA(r=2, target_modules=["c_attn", "attn.c_proj", "wte"], use_dora=True)),
    "experts": (llama4, LORA(r=2, target_modules=[], target_parameters=EXPERTS)),
    "transposed experts": (
        gpt_oss,
        LORA(r=2, target_modules=["q_proj"], target_parameters=EXPERTS, rank_pattern={"experts.down_proj": 3}),
    ),
    "parameters that are matrices": (
        llama,
        LORA(r=2, target_modules=[], target_parameters=["q_proj.weight", "up_proj.weight"]),
    ),
    "VeRA": (llama, peft.VeraConfig(r=4, target_modules=["q_proj", "k_proj", "down_proj"])),
    "VeRA of Conv1D": (gpt2, peft.VeraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "SHiRA": (llama, peft.ShiraConfig(r=2, target_modules=["q_proj", "up_proj"])),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_merges_as_peft(tmp_path: Path, case: str, dtype: str) -> None:
    make, config = CASES[case]
    live = write_adapter(tmp_path, make(), config, getattr(torch, dtype))
    require_peft(tmp_path, live, tmp_path / "recipe.yaml")
