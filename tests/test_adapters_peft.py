"""Every kind of adapter that is taken gives PEFT's merge, on every engine, whole and in chunks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safepatch_core import merge
from tests.against_peft import (
    HOSTS,
    gpt2,
    llama,
    merged,
    peft,
    require_peft,
    torch,
    transformers,
    write_adapter,
    write_recipe,
)
from tests.oracle import Tensor, load_checkpoint, save_file, to_f32

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
    "experts by the names of their parameters": (
        llama4,
        LORA(r=2, target_modules=["q_proj", "router"], target_parameters=["gate_up_proj", "down_proj"]),
    ),
    "experts by longer names": (
        gpt_oss,
        LORA(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "down_proj"]),
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


def qwen3_moe() -> Any:
    config = transformers.Qwen3MoeConfig(
        **SMALL, **HEADS, intermediate_size=24, moe_intermediate_size=8, num_experts=4, mlp_only_layers=[]
    )
    return transformers.Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize("named", [EXPERTS, ["gate_up_proj", "down_proj"]])
@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_experts_that_the_base_keeps_apart(tmp_path: Path, named: list[str], prefix: str) -> None:
    """The file has them one by one, and in memory they are joined, where PEFT adapts them."""
    config = LORA(r=2, target_modules=["q_proj"], target_parameters=named, rank_pattern={"experts.down_proj": 3})
    live = write_adapter(tmp_path, qwen3_moe(), config, torch.float32)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(file, {n.replace("model.model.", f"model.{prefix}"): t for n, t in load_checkpoint(file).items()})
    for i, options in enumerate(HOSTS):
        merge(tmp_path / "recipe.yaml", tmp_path / f"out-{i}", **options)
    live.merge_and_unload().save_pretrained(tmp_path / "peft")
    base, theirs, *ours = (load_checkpoint(tmp_path / name) for name in ("base", "peft", "out-0", "out-1", "out-2"))
    assert ours[0] == ours[1] == ours[2] and theirs.keys() == base.keys()
    changed = [name for name in base if "experts." in name or "q_proj" in name]
    assert len(changed) == 13
    for name in base:
        assert np.allclose(to_f32(ours[0][name]), to_f32(theirs[name]), rtol=2e-5, atol=2e-6), name
        assert (ours[0][name] != base[name]) == (name in changed)


def test_transposed_experts_that_the_base_keeps_apart(tmp_path: Path) -> None:
    """gpt-oss with a linear layer for each expert gets the same bits as with its experts joined."""
    write_adapter(tmp_path, gpt_oss(), LORA(r=2, target_modules=["q_proj"], target_parameters=EXPERTS), torch.float32)

    def single(joined: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {name: t for name, t in joined.items() if ".experts." not in name}
        for name in joined.keys() - found.keys():
            head, _, leaf = name.rpartition(".")
            end = "bias" if leaf.endswith("_bias") else "weight"
            parts = ("gate_proj", "up_proj") if "gate_up" in leaf else ("down_proj",)
            for e, expert in enumerate(to_f32(joined[name]).reshape(joined[name].shape).swapaxes(1, -1)):
                for i, part in enumerate(parts):
                    values = np.ascontiguousarray(expert[i :: len(parts)])
                    found[f"{head}.{e}.{part}.{end}"] = Tensor("F32", values.shape, values.tobytes())
        return found

    merge(tmp_path / "recipe.yaml", tmp_path / "joined", backend="cpu")
    base = load_checkpoint(tmp_path / "base")
    save_file(tmp_path / "base" / "model.safetensors", single(base))
    for i, options in enumerate(HOSTS):
        merge(tmp_path / "recipe.yaml", tmp_path / f"out-{i}", **options)
        assert load_checkpoint(tmp_path / f"out-{i}") == single(load_checkpoint(tmp_path / "joined")) != single(base)


def test_experts_apart_have_the_sums_of_single_layers(tmp_path: Path) -> None:
    """Bit by bit what an adapter with a pair of factors for every expert gives."""
    write_adapter(tmp_path, qwen3_moe(), LORA(r=3, target_modules=[], target_parameters=EXPERTS), torch.bfloat16)
    merge(tmp_path / "recipe.yaml", tmp_path / "out", backend="cpu")
    single = {}
    for name, t in load_checkpoint(tmp_path / "adapter" / "adapter_model.safetensors").items():
        values, prefix = to_f32(t).reshape(t.shape), name.split(".base_layer")[0].split(".lora_")[0]
        for e in range(4):
            joined = ".base_layer." in name  # gate and up, which are the inner pair
            part = values[3 * e : 3 * e + 3] if "lora_A" in name else values[:, e::4]
            halves = np.split(part, 2) if joined and "lora_B" in name else [part] * 2
            for leaf, half in zip(("gate_proj", "up_proj") if joined else ("down_proj",), halves, strict=False):
                key = f"{prefix}.{e}.{leaf}.lora_{'A' if 'lora_A' in name else 'B'}.weight"
                single[key] = Tensor("F32", half.shape, np.ascontiguousarray(half).tobytes())
    (tmp_path / "single").mkdir()
    save_file(tmp_path / "single" / "adapter_model.safetensors", single)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 8}
    (tmp_path / "single" / "adapter_config.json").write_text(json.dumps(config))
    expected = merged(write_recipe(tmp_path, patch={"source": "single"}), "single-out")
    assert load_checkpoint(tmp_path / "out") == expected
