"""`rows: common`: a patch of another vocabulary acts on the rows that both have, and what is lost is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safepatch_core import merge, plan
from safepatch_core.errors import InputError
from tests.against_peft import llama, merged, peft, require_peft, torch, write_adapter, write_recipe
from tests.oracle import Tensor, from_f32, load_checkpoint, save_file, to_f32

pytestmark = pytest.mark.filterwarnings("ignore")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM = "model.norm.weight"


def random(rows: int, cols: int, dtype: str, seed: int) -> Tensor:
    x = np.random.default_rng([seed, rows]).standard_normal(rows * cols).astype(np.float32)
    return Tensor(dtype, (rows, cols), from_f32(x, dtype))


def tables(height: int, dtype: str, seed: int) -> dict[str, Tensor]:
    """A model whose embedding and head have so many rows."""
    return {name: random(1 if name == NORM else height, 5, dtype, seed) for name in (EMBED, HEAD, NORM)}


def write(root: Path, height: int, **patch: Any) -> Path:
    """A base of ten tokens, and a patch of so many."""
    save_file(root / "base.safetensors", tables(10, "BF16", 0))
    save_file(root / "tuned.safetensors", tables(height, "F32", 1))
    return write_recipe(root, base="base.safetensors", patch={"source": "tuned.safetensors", **patch})


@pytest.mark.parametrize("kind", ["checkpoint", "delta"])
@pytest.mark.parametrize("height", [13, 7])
@pytest.mark.parametrize("importance", [None, "scores", "gradients"])
def test_checkpoints_of_another_vocabulary(tmp_path: Path, height: int, kind: str, importance: str | None) -> None:
    options: dict[str, Any] = {"kind": kind, "rows": "common", "top": 0.6, "retain": 0.8}
    if importance:
        options["importance"] = {importance: "scores.safetensors"}
    recipe = write(tmp_path, height, **options)
    scores = tables(height, "F16", 2).items()
    save_file(
        tmp_path / "scores.safetensors", {n: t._replace(data=from_f32(np.abs(to_f32(t)), "F16")) for n, t in scores}
    )
    out, base = merged(recipe), load_checkpoint(tmp_path / "base.safetensors")
    kept = min(height, 10) * 5 * 2
    assert out[EMBED].data != base[EMBED].data and out[EMBED].data[kept:] == base[EMBED].data[kept:]
    told = [note for note in plan(recipe).notes if "rows" in note]
    left = [f"patch p: 3 rows of '{name}' beyond the base's 10 are left out" for name in (HEAD, EMBED)]
    assert told == ([f"{line}, as rows: common asks" for line in left] if height == 13 else [])


@pytest.mark.parametrize("height", [13, 7])
def test_measured_from_a_checkpoint_of_the_same_vocabulary(tmp_path: Path, height: int) -> None:
    recipe = write(tmp_path, height, minus="before.safetensors", rows="common")
    save_file(tmp_path / "before.safetensors", tables(height, "BF16", 3))
    merged(recipe)


@pytest.mark.parametrize("height", [13, 7])
def test_refused_by_default_with_the_way_out(tmp_path: Path, height: int) -> None:
    found = rf"found \[{height}, 5\], expected \[10, 5\] as in the base \(or rows: common\)"
    with pytest.raises(InputError, match=found):
        plan(write(tmp_path, height))


def test_only_embeddings_and_heads_are_cut(tmp_path: Path) -> None:
    recipe = write(tmp_path, 10, rows="common")
    tuned = load_checkpoint(tmp_path / "tuned.safetensors")
    save_file(tmp_path / "tuned.safetensors", {**tuned, NORM: random(2, 5, "F32", 1)})
    with pytest.raises(InputError, match=rf"'{NORM}': .* found \[2, 5\], expected \[1, 5\] as in the base$"):
        plan(recipe)


GROWN: dict[str, dict[str, Any]] = {
    "trained in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "factors": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "trained rows": {"trainable_token_indices": [1, 33]},
}


@pytest.mark.parametrize("grown", [True, False])
@pytest.mark.parametrize("case", GROWN)
def test_adapters_of_another_vocabulary(tmp_path: Path, case: str, grown: bool) -> None:
    """Trained on a model of 34 tokens; the base has 32 of them, or is that model."""
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **GROWN[case]})
    live = write_adapter(tmp_path, llama(vocab_size=34), config, torch.float32)
    recipe = write_recipe(tmp_path, patch={"rows": "common"})
    if not grown:
        require_peft(tmp_path, live, recipe)
        return
    base = load_checkpoint(tmp_path / "base" / "model.safetensors")
    cut = {n: Tensor(t.dtype, (32, 16), t.data[: 32 * 64]) if n in (EMBED, HEAD) else t for n, t in base.items()}
    save_file(tmp_path / "base" / "model.safetensors", cut)
    out = merged(recipe)
    state = live.merge_and_unload().state_dict()
    for name in (EMBED, HEAD):
        assert np.allclose(to_f32(out[name]), state[name][:32].detach().numpy().reshape(-1), atol=1e-5)
    assert out[EMBED].data != cut[EMBED].data
    assert any(f"2 rows of '{EMBED}' beyond the base's 32 are left out" in note for note in plan(recipe).notes)
    with pytest.raises(InputError):
        merge(write_recipe(tmp_path), tmp_path / "refused")
