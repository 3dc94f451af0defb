"""Model families end to end: two patches, their merge by the recipe that comes with them, a look at the outcome."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from safepatch_core.deriving import DeriveConfig, derive
from safepatch_core.errors import InputError, UsageError
from safepatch_core.evaluating import EvalConfig, evaluate
from safepatch_core.language.model import load_model
from safepatch_core.merging.api import merge
from safepatch_core.merging.recipe import of_language
from safepatch_core.merging.verification import verify
from tests.tiny_lm import tiny_tokenizer, write_rows

Tensors = dict[str, torch.Tensor]

SHAPE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 264}
ENDS: dict[str, Any] = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
DECODER: dict[str, Any] = {**SHAPE, **ENDS, "num_attention_heads": 2, "num_key_value_heads": 2}
DECODER |= {"max_position_embeddings": 128, "initializer_range": 0.2}
WINDOW: dict[str, Any] = {**DECODER, "head_dim": 8, "sliding_window": 16}
EXPERTS: dict[str, Any] = {**DECODER, "head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 8}
OLD: dict[str, Any] = {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 264, **ENDS}
OPT: dict[str, Any] = {**DECODER, "ffn_dim": 24, "word_embed_proj_dim": 16}
SIGLIP: dict[str, Any] = {"model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 12}
SIGLIP |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
CLIP = SIGLIP | {"model_type": "clip_vision_model", "projection_dim": 8}
GEMMA3: dict[str, Any] = {"text_config": WINDOW, "vision_config": SIGLIP, "mm_tokens_per_image": 4}
GEMMA3 |= {"image_token_index": 260, "boi_token_index": 261, "eoi_token_index": 262}
QWEN2VL: dict[str, Any] = {"depth": 1, "embed_dim": 8, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
QWEN2VL |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
LLAMA4: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 32, "patch_size": 8, "vision_output_dim": 8}
LLAMA4 |= {"projector_input_dim": 8, "projector_output_dim": 8}
DEEPSEEK: dict[str, Any] = {**DECODER, "moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK |= {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "kv_lora_rank": 4}
DEEPSEEK |= {"q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
LINEAR: dict[str, Any] = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 4}
LINEAR |= {"linear_value_head_dim": 4, "layer_types": ["linear_attention", "full_attention"]}

# Class of the model → its config.
FAMILIES: dict[str, Any] = {
    "LlamaForCausalLM": DECODER | {"tie_word_embeddings": True},
    "MistralForCausalLM": DECODER | {"sliding_window": 16},
    "Qwen2ForCausalLM": DECODER,
    "Qwen3ForCausalLM": DECODER | {"head_dim": 8},
    "Gemma2ForCausalLM": WINDOW,
    "Gemma3ForCausalLM": WINDOW,
    "Phi3ForCausalLM": DECODER,
    "Olmo2ForCausalLM": DECODER,
    "Starcoder2ForCausalLM": DECODER,
    "GPT2LMHeadModel": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 264, "n_positions": 128, **ENDS},
    "GPTNeoXForCausalLM": {k: v for k, v in DECODER.items() if k != "num_key_value_heads"},
    "OPTForCausalLM": OPT,
    "BloomForCausalLM": OLD,
    "FalconForCausalLM": {**SHAPE, **ENDS, "num_attention_heads": 2},
    "MambaForCausalLM": {**SHAPE, **ENDS, "state_size": 4},
    "MixtralForCausalLM": DECODER | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "Qwen3MoeForCausalLM": EXPERTS | {"decoder_sparse_step": 1},
    "Qwen3NextForCausalLM": EXPERTS | LINEAR | {"shared_expert_intermediate_size": 8},
    "DeepseekV3ForCausalLM": DEEPSEEK,
    "GptOssForCausalLM": WINDOW | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "Gemma3ForConditionalGeneration": GEMMA3,
    "Llama4ForConditionalGeneration": {
        "text_config": DECODER | {"intermediate_size_mlp": 24, "num_local_experts": 2, "head_dim": 8},
        "vision_config": LLAMA4 | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16},
    },
    "Qwen2VLForConditionalGeneration": {
        "text_config": DECODER | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        "vision_config": QWEN2VL,
    },
    "LlavaForConditionalGeneration": {
        "text_config": DECODER | {"model_type": "llama"},
        "vision_config": CLIP,
        "image_token_index": 260,
    },
}


def gemma3_of_the_hub(name: str) -> str:
    for new, old in (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")):
        name = old + name.removeprefix(new) if name.startswith(new) else name
    return name.removeprefix("model.")


# Checkpoints of the hub that have other names than transformers saves today.
RENAMED: dict[str, Callable[[str], str]] = {
    "GPT2LMHeadModel": lambda name: name.removeprefix("transformer."),
    "BloomForCausalLM": lambda name: name.removeprefix("transformer."),
    "OPTForCausalLM": lambda name: name.removeprefix("model."),
    "Gemma3ForConditionalGeneration": gemma3_of_the_hub,
}
# PEFT refuses to adapt what Mamba's kernels read by themselves, and breaks Llama 4's routers.
MODULES = {"MambaForCausalLM": ["in_proj", "x_proj"], "Llama4ForConditionalGeneration": ["q_proj", "o_proj"]}


@pytest.fixture(scope="module", autouse=True)
def _without_pictures() -> Iterator[None]:
    """They are the same for every family, and took a quarter of the time; another was that of walks over the garbage
    that every family's classes are."""
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safepatch_core.deriving.steps.picture", lambda draw, data: b"")
        patch.setattr("safepatch_core.evaluating.page.can_draw", lambda: False)
        yield
    gc.unfreeze()


def write(folder: Path, family: str, names: Callable[[str], str] | None = None) -> Path:
    torch.manual_seed(0)
    kind: Any = getattr(transformers, family)
    kind(kind.config_class(**FAMILIES[family])).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if names is not None:
        file = folder / "model.safetensors"
        tensors = {names(name): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def settings(where: Path, **changes: Any) -> DeriveConfig:
    write_rows(where / "rows.jsonl", 2)
    given: dict[str, Any] = {"model": where / "base", "data": where / "rows.jsonl", "out": where / "run"}
    given |= {"safety": {"max_steps": 1, "top": 0.5}, "over_safety": {"max_steps": 1, "top": 0.5}, "threads": 1}
    given |= {"importance_samples": 1, "ascent_bound": None, "learning_rate": 0.01, "lora_r": 2}
    return DeriveConfig.model_validate(given | changes)


def look(where: Path, merged: Path, family: str) -> None:
    """The merged model opens as the base did, and has other weights in the language model alone."""
    before, after = load_file(where / "base/model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(map(of_language, moved))
    _, found = getattr(transformers, family).from_pretrained(merged, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]


def measure(where: Path, model: Path, *others: Path) -> Any:
    given: dict[str, Any] = {"model": model, "more_models": [*others], "out": where / "report", "threads": 1}
    given |= {"harmful": where / "rows.jsonl", "answer_column": "answer", "max_new_tokens": 2}
    return evaluate(EvalConfig.model_validate(given | {"max_length": 96, "stride": 48}), quiet=True).data["metrics"]


EVERY = [*((family, None) for family in FAMILIES), *RENAMED.items()]
IDS = [family if names is None else f"{family} of the hub" for family, names in EVERY]


@pytest.mark.parametrize(("family", "names"), EVERY, ids=IDS)
def test_a_family_end_to_end(tmp_path: Path, family: str, names: Callable[[str], str] | None) -> None:
    write(tmp_path / "base", family, names)
    for method in ("full", "lora"):
        changes: dict[str, Any] = {"method": method, "out": tmp_path / method}
        if method == "lora" and family in MODULES:
            changes |= {"target_modules": MODULES[family]}
        recipe = derive(settings(tmp_path, **changes), quiet=True).recipe
        merged = tmp_path / f"{method}-merged"
        merge(recipe, merged, backend="reference")
        assert verify(merged, recipe=recipe).ok
        look(tmp_path, merged, family)
    found = measure(tmp_path, tmp_path / "full-merged", tmp_path / "lora-merged")
    assert all({"model", "model_2"} <= metric.keys() for metric in found if metric["set"] == "harmful") and found


def test_an_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    config: Any = transformers.T5Config
    shape = {"d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 264}
    transformers.T5ForConditionalGeneration(config(**shape)).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    message = "found t5, an encoder-decoder, expected a decoder-only model"
    with pytest.raises(InputError, match=message):
        derive(settings(tmp_path), quiet=True)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "base", "auto", "cpu")


@pytest.mark.parametrize(
    ("family", "message"),
    [("MambaForCausalLM", "out_proj"), ("Llama4ForConditionalGeneration", "can't be run.*other target_modules")],
)
def test_modules_that_lora_can_not_adapt_are_refused_before_a_step(tmp_path: Path, family: str, message: str) -> None:
    write(tmp_path / "base", family)
    with pytest.raises((InputError, UsageError), match=message):
        derive(settings(tmp_path, method="lora"), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_model_that_can_not_be_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AttributeError("'dict' object has no attribute 'ndim'")

    write(tmp_path / "base", "LlamaForCausalLM")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", broken)
    with pytest.raises(InputError, match=r"base: model can't be run \('dict' object has no attribute 'ndim'\)$"):
        derive(settings(tmp_path), quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="model can't be run"):
        measure(tmp_path, tmp_path / "base")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.endswith("ConditionalGeneration")])
def test_all_of_a_model_that_sees_is_its_language_model(tmp_path: Path, family: str) -> None:
    write(tmp_path / "base", family)
    derive(settings(tmp_path, trainable="all", importance="none"), quiet=True)
    before, after = (
        load_file(tmp_path / "base/model.safetensors"),
        load_file(tmp_path / "run/safety/model.safetensors"),
    )
    moved = {name for name in before if not torch.equal(before[name].float(), after[name])}
    assert all(map(of_language, moved)) and any("norm" in name for name in moved)
    assert not all(map(of_language, before))
