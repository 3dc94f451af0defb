"""`merge` as a whole: the Triton engine writes the bytes that the C++ engine writes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from safepatch_core import merge, open_checkpoint
from safepatch_core.backends import open_backend
from safepatch_core.backends.triton import TritonBackend
from safepatch_core.bench import models
from safepatch_core.errors import SafepatchError
from tests.faults.harness import write_model, write_recipe
from tests.oracle import Tensor, from_f32, save_file, to_f32
from tests.recipes import write_random
from tests.twins import Twin


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("seed", range(12))
def test_random_recipes_give_the_same_files(tmp_path: Path, seed: int) -> None:
    recipe = write_random(tmp_path / "in", seed, hostile=seed % 4 == 3)
    found: list[object] = []
    for engine in ("cpu", "triton"):
        try:
            done = merge(
                recipe, tmp_path / engine, backend=engine, threads=1, memory_limit="64MiB", vram_limit="64MiB"
            )
            found.append((contents(tmp_path / engine), done.acted, done.changed))
        except SafepatchError as error:
            found.append(str(error))
    assert found[0] == found[1]


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_codes_of_a_quantised_base(tmp_path: Path, scope: str) -> None:
    twin = Twin(tmp_path, seed=2)
    patches = [
        twin.patch("a", "checkpoint", top=0.3, importance=twin.importance("a", "patched")),
        twin.patch("b", "lora", top=0.2, retain=0.5),
    ]
    assert both_engines(twin.recipe(*patches, scope=scope), tmp_path) > 100


def both_engines(recipe: Path, folder: Path) -> int:
    """Entries that a merge changed, the same bytes by both engines."""
    done = [merge(recipe, folder / name, backend=name, threads=1, vram_limit="256MiB") for name in ("cpu", "triton")]
    assert contents(folder / "cpu") == contents(folder / "triton")
    assert done[0].counts == done[1].counts and done[0].changed == done[1].changed > 0
    return done[0].changed


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_one_layer_of_the_demos_model(tmp_path: Path, scope: str) -> None:
    """SmolLM2-135M's shapes with random weights, its feed-forward layer cut to a third: 1.8 million target entries.

    With scope `model` the 0.9 million of its attention, which are swept and then read again.
    """
    shape = replace(models.SHAPES["SmolLM2-135M"], layers=1, intermediate=512, vocab=64)
    models.write_set(tmp_path, shape)
    targets = "linear" if scope == "tensor" else {"include": ["*self_attn*"]}
    recipe = models.write_recipe(tmp_path / "recipe.yaml", scope=scope, targets=targets)
    assert both_engines(recipe, tmp_path) > 0


@pytest.mark.skipif("SAFEPATCH_PEER_MODEL" not in os.environ, reason="SAFEPATCH_PEER_MODEL names no model")
def test_the_first_layers_of_a_real_model(tmp_path: Path) -> None:
    """Its first layer's weights as they are, and two patches that move them as fine-tuning does."""
    draw = np.random.default_rng(0)
    parts: dict[str, dict[str, Tensor]] = {"base": {}, "safety": {}, "over-safety": {}}
    for name, entry in open_checkpoint(Path(os.environ["SAFEPATCH_PEER_MODEL"])).tensors.items():
        if ".layers.0." not in name:
            continue
        data = np.fromfile(entry.path, np.uint8, entry.nbytes, offset=entry.start).tobytes()
        parts["base"][name] = Tensor(entry.dtype, entry.shape, data)
        for patch in models.PATCHES:
            weights = to_f32(parts["base"][name])
            step = (1e-4 * draw.standard_normal(entry.entries) * draw.standard_normal(entry.entries)).astype(
                np.float32
            )
            moved = weights if len(entry.shape) < 2 else weights + step
            parts[patch][name] = Tensor(entry.dtype, entry.shape, from_f32(moved, entry.dtype))
    for part, tensors in parts.items():
        (tmp_path / part).mkdir()
        save_file(tmp_path / part / "model.safetensors", tensors)
    assert both_engines(models.write_recipe(tmp_path / "recipe.yaml"), tmp_path) > 0


def test_the_engine_is_opened_by_name() -> None:
    engine = open_backend("triton", vram_limit=1 << 20)
    assert isinstance(engine, TritonBackend) and "interpreter" in engine.describe()


@pytest.mark.parametrize("seed", [0, 3])
def test_inputs_read_past_the_page_cache(tmp_path: Path, seed: int, read_past_cache: None) -> None:
    """They come to lie in the pinned ring as in their files, at no multiple of 64 bytes."""
    for number, name in enumerate(("base", "safety", "over-safety")):
        write_model(tmp_path / name, number, rows=40 + seed, cols=36)
    assert both_engines(write_recipe(tmp_path, seed=seed), tmp_path) > 0
