"""Models with fixes applied while they load: the same bits as from a merged checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safepatch_core import open_fixed
from safepatch_core.errors import InputError, UsageError
from safepatch_core.fixes.info import fix_card, info
from tests.fix_cases import changed, write_fix
from tests.oracle import Tensor, load_checkpoint, load_file, save_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safepatch_core.integrations.transformers import load  # noqa: E402
from safepatch_core.language.lazy import LazyWeights  # noqa: E402

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))


def mixture() -> Any:
    """Its file has a tensor per expert, in memory they are one."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **experts))


def written(model: Any, folder: Path) -> dict[str, Tensor]:
    model.to(torch.bfloat16).save_pretrained(folder)
    return load_checkpoint(folder)


def variant(seed: int, tensors: dict[str, Tensor], only: str = "") -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    return {n: changed(rng, t, 0.05, "small") if only in n and len(t.shape) > 1 else t for n, t in tensors.items()}


def merged_copy(base: Path, out: Path, tensors: dict[str, Tensor]) -> Path:
    shutil.copytree(base, out)
    path = out / "model.safetensors"
    save_file(path, tensors)
    # transformers wants to know who wrote a file.
    data, table = path.read_bytes(), b'{"__metadata__":{"format":"pt"},'
    end = 8 + int.from_bytes(data[:8], "little")
    header = table + data[9:end]
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    assert load_file(path) == tensors
    return out


def bits(model: Any) -> dict[str, Any]:
    return {
        n: (t.dtype, t.shape, t.contiguous().view(torch.uint8).numpy().tobytes())
        for n, t in model.state_dict().items()
    }


@pytest.fixture(params=[llama, mixture])
def case(request: Any, tmp_path: Path) -> dict[str, Any]:
    """A base, two fixes on top of each other, and what they make of it."""
    torch.manual_seed(0)
    base = tmp_path / "base"
    zero = written(request.param(), base)
    one = variant(1, zero)
    two = variant(2, one)
    return {
        "base": base,
        "fixes": [write_fix(tmp_path / "1.safetensors", zero, one), write_fix(tmp_path / "2.safetensors", one, two)],
        "merged": [merged_copy(base, tmp_path / f"merged{i}", t) for i, t in enumerate((one, two))],
        "class": request.param().__class__,
    }


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}, {"device_map": "cpu"}], ids=str)
def test_the_same_bits_as_the_merged_checkpoint(case: dict[str, Any], count: int, options: dict[str, Any]) -> None:
    model = load(case["base"], case["fixes"][:count], **options)
    expected = case["class"].from_pretrained(case["merged"][count - 1], **options)
    assert type(model) is type(expected)
    assert bits(model) == bits(expected)
    assert bits(model) != bits(case["class"].from_pretrained(case["base"], **options))
    assert model.name_or_path == str(case["base"]) and not model.training
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()


def test_no_fix_is_the_base(case: dict[str, Any]) -> None:
    assert bits(load(case["base"], [])) == bits(case["class"].from_pretrained(case["base"]))


def test_another_base_is_refused_by_its_tensor(case: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="carries something else where fix .* acts") as refused:
        load(case["base"], case["fixes"][1:])
    assert refused.value.tensor in load_checkpoint(case["base"])


def test_a_base_that_carries_the_fix_is_refused(case: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="carries fix .* already"):
        load(case["merged"][0], case["fixes"][:1])


def test_another_table_is_refused_before_anything_is_read(case: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 1}))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="is not there|is not the tensor|another table"):
        load(tmp_path / "other", case["fixes"])


def test_a_fix_of_nothing_that_was_loaded_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    zero = written(mixture(), base)
    fix = write_fix(tmp_path / "head.safetensors", zero, variant(1, zero, "lm_head"))
    with pytest.raises(InputError, match="no tensor that was loaded is touched"):
        load(base, [fix], model_class=transformers.Qwen3MoeModel)


def test_a_directory_with_a_fix_and_the_name_of_its_base(case: dict[str, Any], tmp_path: Path) -> None:
    home = tmp_path / "fix"
    home.mkdir()
    shutil.copy(case["fixes"][0], home / "fix.safetensors")
    card = fix_card(info(home / "fix.safetensors"), "fix.safetensors")
    card = card.replace("---\n", "---\nbase_model: ../base\n", 1)
    (home / "README.md").write_text(card)
    assert bits(load(home)) == bits(load(case["base"], case["fixes"][:1]))
    assert load(home).config.max_position_embeddings == 64
    own = (case["base"] / "config.json").read_text()
    (home / "config.json").write_text(own.replace('"max_position_embeddings": 64', '"max_position_embeddings": 128'))
    assert load(home).config.max_position_embeddings == 128


def test_a_directory_that_names_no_base_is_refused(case: dict[str, Any], tmp_path: Path) -> None:
    home = tmp_path / "fix"
    home.mkdir()
    with pytest.raises(InputError, match="no fixes given"):
        load(home)
    shutil.copy(case["fixes"][0], home)
    (home / "README.md").write_text("# A fix\n")
    with pytest.raises(InputError, match="README.md: does not name the fix's base"):
        load(home)
    with pytest.raises(InputError, match="not a fix file"):
        load(case["base"])


def test_slices_are_those_of_the_fixed_tensor(case: dict[str, Any]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    merged = load_checkpoint(case["merged"][0])[name]
    with open_fixed(case["base"], case["fixes"][:1]) as fixed:
        lazy = LazyWeights(fixed.base.tensors, fixed.dtype, fixed.read)[name]
        whole = lazy[...]
        part = lazy[4:8, 2:]
        assert whole.view(torch.uint8).numpy().tobytes() == merged.data
        assert lazy.get_shape() == list(whole.shape) and lazy.get_dtype() == "BF16"
        assert torch.equal(part, whole[4:8, 2:])
        assert part.untyped_storage().nbytes() == part.numel() * 2  # the rest is not held


@pytest.mark.parametrize("key", ["state_dict", "subfolder", "trust_remote_code"])
def test_what_the_base_decides_can_not_be_given(key: str) -> None:
    with pytest.raises(UsageError, match=f"'{key}' can't be given"):
        load("base", [], **{key: True})
