"""State dicts in memory are merged to the bits that the same recipe gives on files; mergekit can call it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from safepatch_core import InputError, UsageError, merge, merge_state_dicts

torch = pytest.importorskip("torch", reason="the tensors are torch's")
safetensors = pytest.importorskip("safetensors.torch", reason="writes the files")

NAMES = ("a.weight", "b.weight", "c.bias", "embed.weight")
PATCHES: list[dict[str, Any]] = [
    {
        "name": "one",
        "top": 0.3,
        "skip": 0.05,
        "retain": 0.7,
        "scale": 0.8,
        "overrides": [{"names": ["b.*"], "scale": 2.0}],
    },
    {"name": "two", "top": 0.5, "rescale": True, "retain": 0.5},
]
RECIPES: list[dict[str, Any]] = [
    {},
    {"scope": "model", "targets": "all", "seed": 7},
    {"combine": "ties", "order": "select-first", "elect": {"zero": "positive"}},
    {"combine": "sum", "accumulate": "deltas", "targets": {"include": ["*.weight"], "exclude": ["a*"]}},
]


def tensors(seed: int) -> dict[str, Any]:
    """bf16, f32 and f16 tensors whose differences are often equal."""
    random = torch.Generator().manual_seed(seed)
    shapes = ((30, 40), (50,), (9,), (20, 20))
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)
    return {
        name: (torch.randint(-8, 9, shape, generator=random) / 8).to(dtype)
        for name, shape, dtype in zip(NAMES, shapes, dtypes, strict=True)
    } | {"step": torch.tensor(3)}


@pytest.mark.parametrize("keys", RECIPES)
def test_equals_a_merge_of_files(tmp_path: Path, keys: dict[str, Any]) -> None:
    base, one, two = (tensors(seed) for seed in range(3))
    for name, of in (("base", base), ("one", one), ("two", two)):
        (tmp_path / name).mkdir()
        safetensors.save_file(of, tmp_path / name / "model.safetensors")
    recipe = {**keys, "base": "base", "patches": [{**p, "source": p["name"]} for p in PATCHES]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merge(tmp_path / "recipe.yaml", tmp_path / "out", backend="cpu")
    expected = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    kept = {name: tensor.clone() for name, tensor in base.items()}
    found = merge_state_dicts(base, {"one": one, "two": two}, {**keys, "patches": PATCHES}, threads=1)
    assert set(found) == set(expected) and found["step"] is base["step"]
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        assert torch.equal(base[name], kept[name])
    assert any(not torch.equal(found[name], base[name]) for name in found)


def test_what_does_not_fit_is_refused() -> None:
    base, one = tensors(0), tensors(1)
    with pytest.raises(UsageError, match="patches of the recipe"):
        merge_state_dicts(base, {"one": one}, {"patches": PATCHES})
    for key in ("minus", "gate", "agreement"):
        with pytest.raises(UsageError, match=f"in memory, patches have no {key}"):
            merge_state_dicts({}, {"p": {}}, {"patches": [{"name": "p", key: "x"}]})
    with pytest.raises(UsageError, match="importance is magnitude"):
        merge_state_dicts(base, {"one": one}, {"patches": [{"name": "one", "importance": {"scores": "x"}}]})
    with pytest.raises(InputError, match="'a.weight': patch 'one' lacks this target"):
        merge_state_dicts(base, {"one": {}})
    with pytest.raises(InputError, match="another shape or dtype"):
        merge_state_dicts(base, {"one": {**one, "a.weight": one["a.weight"][:3]}})
    one["a.weight"][2, 3] = float("nan")
    with pytest.raises(InputError, match="NaN or infinite: found 1 entries, the first at 83"):
        merge_state_dicts(base, {"one": one})
    assert torch.isfinite(merge_state_dicts(base, {"one": one}, {"nonfinite": "skip"})["a.weight"]).all()


@pytest.mark.skipif(find_spec("mergekit") is None, reason="mergekit is not installed (extra: peers)")
def test_mergekit_calls_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="makes the models")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    for name, seed in (("base", 0), ("one", 1)):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / name)
    theirs = {
        "merge_method": "safepatch",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "one"), "parameters": {"top": 0.2, "retain": 0.5}}],
        "parameters": {"seed": 5},
    }
    (tmp_path / "mergekit.yml").write_text(yaml.safe_dump(theirs))
    command = [sys.executable, "-m", "safepatch_core.integrations.mergekit_method", tmp_path / "mergekit.yml"]
    done = subprocess.run([*map(str, command), str(tmp_path / "out"), "--quiet", "--no-copy-tokenizer"], text=True)
    assert done.returncode == 0
    patch = {"name": "one", "source": str(tmp_path / "one"), "top": 0.2, "retain": 0.5}
    recipe = {"base": str(tmp_path / "base"), "patches": [patch], "seed": 5, "targets": "all"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merge(tmp_path / "recipe.yaml", tmp_path / "ours", backend="cpu")
    ours = safetensors.load_file(tmp_path / "ours" / "model.safetensors")
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    found = safetensors.load_file(shard)
    assert all(torch.equal(found[name], tensor) for name, tensor in ours.items())
