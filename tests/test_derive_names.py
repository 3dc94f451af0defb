"""Patches in the base's own names and files, and what couldn't be saved or merged refused before a step is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from safepatch_core.deriving import DeriveConfig, DeriveResult, derive
from safepatch_core.deriving.adapter import add_adapter, save_adapter
from safepatch_core.deriving.model import load_model
from safepatch_core.deriving.names import BaseNames
from safepatch_core.deriving.saving import applied
from safepatch_core.errors import InputError, UsageError
from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.merging.api import merge
from safepatch_core.ranks import Alone
from tests.tiny_lm import CHATML, tiny_tokenizer, write_lm, write_rows

FAST: dict[str, Any] = {"threads": 1, "batch_size": 3, "ascent_bound": None, "importance_samples": 2}
FAST |= {"safety": {"max_steps": 1}, "over_safety": {"max_steps": 1}}


@pytest.fixture
def where(tmp_path: Path) -> Path:
    write_lm(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def settings(where: Path, **changes: Any) -> DeriveConfig:
    places = {"model": where / "base", "data": where / "rows.jsonl", "out": where / "run"}
    return DeriveConfig.model_validate({**places, **FAST, **changes})


def go(where: Path, **changes: Any) -> DeriveResult:
    return derive(settings(where, **changes), quiet=True)


def rename(file: Path, name_of: Callable[[str], str | None]) -> None:
    """Gives a checkpoint's tensors other names, and drops those that get none."""
    named = {name_of(name): tensor for name, tensor in load_file(file).items()}
    save_file({name: t for name, t in named.items() if name}, file, metadata={"format": "pt"})


def write_mixtral(folder: Path) -> None:
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 264}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
    MixtralForCausalLM(MixtralConfig(**shape, **heads, max_position_embeddings=256)).save_pretrained(folder)


def write_fused(folder: Path) -> None:
    """Experts in one tensor, as newer checkpoints have them."""
    write_mixtral(folder)
    model = MixtralForCausalLM.from_pretrained(folder)
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})


def write_gpt2(folder: Path) -> None:
    """As the hub's gpt2: names without the model's prefix."""
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=264, n_positions=256)).save_pretrained(
        folder
    )
    rename(folder / "model.safetensors", lambda name: name.removeprefix("transformer."))


@pytest.mark.parametrize("write", [write_mixtral, write_fused, write_gpt2, write_lm])
def test_an_adapter_in_the_bases_names_is_what_was_trained(tmp_path: Path, write: Callable[[Path], object]) -> None:
    torch.manual_seed(0)
    write(tmp_path / "base")
    config = settings(tmp_path, method="lora", lora_r=3, lora_alpha=5)
    base = open_checkpoint(tmp_path / "base")
    adapted = add_adapter(load_model(tmp_path / "base", config), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    (tmp_path / "adapter").mkdir()
    names = BaseNames(load_model(tmp_path / "base", config, "meta"), base)
    save_adapter(adapted, tmp_path / "adapter", names, "somebody/base", Alone())
    trained = adapted.merge_and_unload().state_dict()
    with applied(tmp_path / "adapter", "lora", base, list(base.tensors.values()), tmp_path / "again") as checkpoint:
        again = load_model(checkpoint, config).state_dict()
    plain = load_model(tmp_path / "base", config).state_dict()
    assert any(not torch.equal(plain[name], again[name]) for name in again)
    for name, tensor in trained.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    modules = {
        name.removesuffix(".weight").rpartition(".")[2] for name, e in base.tensors.items() if len(e.shape) == 2
    }
    assert set(written["target_modules"]) <= modules
    assert written["base_model_name_or_path"] == "somebody/base"
    experts = ["experts.down_proj", "experts.gate_up_proj"]
    assert written["target_parameters"] == (experts if write is write_fused else None)


def test_an_adapter_of_fused_experts_merges_by_its_own_recipe(where: Path) -> None:
    torch.manual_seed(0)
    write_mixtral(where / "experts")
    tiny_tokenizer().save_pretrained(where / "experts")
    result = go(where, model=where / "experts", method="lora")
    merged = merge(result.recipe, where / "merged", backend="reference")
    before, after = load_file(where / "experts/model.safetensors"), load_file(where / "merged/model.safetensors")
    assert before.keys() == after.keys() and merged
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".experts." in name for name in moved) and any("q_proj" in name for name in moved)


def test_an_adapter_that_could_not_be_merged_is_refused_before_a_step(where: Path) -> None:
    def refused(message: str, *modules: str) -> None:
        with pytest.raises(UsageError, match=message):
            go(where, method="lora", target_modules=list(modules))
        assert not (where / "run").exists()

    refused("LoRA on 'lm_head' can't be written under the base's names", "q_proj", "lm_head")  # it is tied
    refused("changes nothing that a merge patches", "embed_tokens")
    refused("LoRA doesn't fit", "nothing")


def test_named_chat_templates_travel_with_a_patch(where: Path) -> None:
    file = where / "base/tokenizer_config.json"
    (where / "base/chat_template.jinja").unlink()
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": CHATML + "!"}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": named}))
    for method in ("full", "lora"):
        go(where, method=method, out=where / method)
        for patch in ("safety", "over-safety"):
            tokenizer: Any = AutoTokenizer.from_pretrained(where / method / patch)
            assert tokenizer.chat_template == {"default": CHATML, "tool_use": CHATML + "!"}
            modes = {p.stat().st_mode & 0o777 for p in (where / method / patch).rglob("*") if p.is_file()}
            assert len(modes) == 1


def test_a_tokenizer_that_cannot_be_saved_costs_no_training(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, folder: object, **_: object) -> None:
        raise ValueError("two templates of one name\nand more")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", broken)
    for method in ("full", "lora"):
        with pytest.raises(InputError, match=r"base: tokenizer can't be saved \(two templates of one name\)$"):
            go(where, method=method)
        assert not (where / "run").exists()
    go(where, save_as="delta")  # which has none


def test_generation_settings_that_contradict_themselves_are_copied(where: Path) -> None:
    contradictory = '{"eos_token_id": [257, 258], "do_sample": false, "temperature": 0.9}'
    (where / "base/generation_config.json").write_text(contradictory)
    go(where, dtype="bfloat16")
    assert (where / "run/safety/generation_config.json").read_text() == contradictory
    config, base = (json.loads((where / f / "config.json").read_text()) for f in ("run/safety", "base"))
    assert config == base | {"dtype": "bfloat16"}


def test_a_tensor_that_the_base_lacks_is_found_before_the_run_begins(where: Path) -> None:
    rename(where / "base/model.safetensors", lambda name: None if name == "model.norm.weight" else name)
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        go(where)
    assert not (where / "run").exists()
