"""Adapters of tiny random models, merged by PEFT's merge_and_unload and by every engine here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from safepatch_core import merge
from tests import oracle
from tests.oracle import Tensor, load_checkpoint, to_f32

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

HOSTS: list[dict[str, Any]] = [
    {"backend": "reference"},
    {"backend": "cpu"},
    {"backend": "cpu", "chunk_entries": 37},
    {"backend": "reference", "chunk_entries": 100},
]


def llama(**options: Any) -> Any:
    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**small, **heads, **options}))


def gpt2(**options: Any) -> Any:
    small = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**small, **options}))


def write_adapter(root: Path, model: Any, config: Any, dtype: Any) -> Any:
    """`base`, `adapter` with random values, and a recipe that adds it up; the live adapted model."""
    torch.manual_seed(0)
    model = model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    model.save_pretrained(root / "base")
    live = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if parameter.requires_grad or "vera_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    live.save_pretrained(root / "adapter")
    write_recipe(root)
    return live


def write_recipe(root: Path, **keys: Any) -> Path:
    patch = {"name": "p", "source": "adapter", **keys.pop("patch", {})}
    recipe = {"base": "base", "patches": [patch], "combine": "sum", "targets": "all", **keys}
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    return root / "recipe.yaml"


def merged(recipe: Path, out: str = "out") -> dict[str, Tensor]:
    """The output, the same for the brute-force oracle and all engines, whole and in chunks."""
    expected = oracle.merge(recipe).tensors
    for i, options in enumerate(HOSTS):
        merge(recipe, recipe.parent / f"{out}-{i}", **options)
        got = load_checkpoint(recipe.parent / f"{out}-{i}")
        assert [name for name in expected if got[name] != expected[name]] == [], options
    return expected


def ordered(t: Tensor) -> NDArray[np.int64]:
    """bfloat16 as integers in the order of their values, so that neighbours differ by one."""
    raw = np.frombuffer(t.data, "<u2").astype(np.int64)
    return np.where(raw & 0x8000, 0x8000 - raw, raw)


def require_peft(root: Path, live: Any, recipe: Path) -> dict[str, Tensor]:
    """What is merged here is PEFT's float32 merge, rounded into the base's dtype, within one step of it."""
    before, ours = load_checkpoint(root / "base"), merged(recipe)
    state = live.float().merge_and_unload().state_dict()
    changed = [name for name in before if ours[name] != before[name]]
    assert changed
    for name, theirs in state.items():
        if name not in ours:
            continue
        values, mine = theirs.detach().numpy().astype(np.float32).reshape(-1), to_f32(ours[name])
        assert theirs.shape == ours[name].shape
        close = np.isclose(mine, values, rtol=2e-5, atol=2e-6)
        if ours[name].dtype == "BF16":
            rounded = Tensor("BF16", tuple(theirs.shape), oracle.from_f32(values, "BF16"))
            close |= np.abs(ordered(ours[name]) - ordered(rounded)) <= 1
        assert close.all(), (name, float(np.abs(mine - values).max()))
        if name in changed:
            assert not np.array_equal(to_f32(before[name]), values), name
    return ours


Make = Callable[[], Any]
