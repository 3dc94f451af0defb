"""Fix files of random recipes: built while streaming, built from base and merge, and what the oracle encodes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from safepatch_core import merge
from safepatch_core.commands.cli import cli
from safepatch_core.errors import InputError, SafepatchError
from safepatch_core.fixes.build import build, build_between
from safepatch_core.fixes.reading import open_fix
from safepatch_core.merging.api import plan
from safepatch_core.merging.recipe import load_recipe
from tests import fix_oracle
from tests.fix_cases import changed, random_tensor, write_both
from tests.oracle import Tensor, load_checkpoint, save_file
from tests.recipes import write_plain, write_working
from tests.test_ranks import ROOT, model, torchrun
from tests.test_ranks import recipe as rank_recipe

RECIPES = int(os.environ.get("SAFEPATCH_RANDOM_RECIPES", "60"))


def base_of(recipe: Path) -> Path:
    return recipe.parent / load_recipe(recipe).base


@pytest.mark.parametrize("seed", range(RECIPES // 2))
def test_random_recipes(tmp_path: Path, seed: int) -> None:
    """Built on any engine and in any chunks; from base and merge; and by the oracle: the same bytes."""
    recipe = write_working(tmp_path / "r", 5000 + seed)
    merge(recipe, tmp_path / "merged", backend="reference")
    chunk = None if seed % 3 else (64, 7, 1)[seed // 3 % 3]
    try:
        build(recipe, tmp_path / "cpu.safetensors", backend="cpu", threads=1, chunk_entries=chunk)
    except InputError as error:
        assert "nothing changes" in str(error)
        with pytest.raises(InputError, match="nothing changes"):
            build_between(base_of(recipe), tmp_path / "merged", tmp_path / "between.safetensors")
        return
    fix = (tmp_path / "cpu.safetensors").read_bytes()
    build(recipe, tmp_path / "reference.safetensors", backend="reference")
    build_between(base_of(recipe), tmp_path / "merged", tmp_path / "between.safetensors")
    with open_fix(tmp_path / "cpu.safetensors") as opened:
        expected = fix_oracle.encode(
            load_checkpoint(base_of(recipe)), load_checkpoint(tmp_path / "merged"), opened.recipe
        )
    assert fix == expected
    assert (tmp_path / "reference.safetensors").read_bytes() == expected
    assert (tmp_path / "between.safetensors").read_bytes() == expected
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"r", "merged", "cpu.safetensors", "reference.safetensors", "between.safetensors"}


def test_the_recipe_is_told(tmp_path: Path) -> None:
    recipe = write_working(tmp_path / "r", 5001)
    result = build(recipe, tmp_path / "fix.safetensors", backend="reference")
    with open_fix(result.out) as fix:
        assert fix.id == result.id and fix.changes == result.changes and len(fix.tensors) == result.tensors
        assert fix.recipe["seed"] == load_recipe(recipe).seed
        assert result.size == (tmp_path / "fix.safetensors").stat().st_size
        assert fix.base == fix_oracle.base_hash(load_checkpoint(base_of(recipe)))


def test_without_a_manifest_there_is_no_recipe(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = {"w": random_tensor(rng, "I32", 10, 10)}
    paths = write_both(tmp_path, base, {"w": changed(rng, base["w"], 0.5)})
    build_between(*paths, tmp_path / "fix.safetensors")
    with open_fix(tmp_path / "fix.safetensors") as fix:
        assert fix.recipe is None


@pytest.mark.parametrize(
    ("merged", "says"),
    [
        ({"a": Tensor("F16", (4,), bytes(8))}, "tensor 'b': only one of the two has it"),
        ({"a": Tensor("F16", (4,), bytes(8)), "b": Tensor("U8", (2,), b"ab"), "c": Tensor("U8", (), b"a")}, "'c'"),
        (
            {"a": Tensor("F16", (2, 2), bytes(8)), "b": Tensor("U8", (2,), b"ab")},
            "'a': the two differ in dtype or sh",
        ),
        ({"a": Tensor("BF16", (4,), bytes(8)), "b": Tensor("U8", (2,), b"ab")}, "found BF16 [4], expected F16 [4]"),
        ({"a": Tensor("F16", (4,), bytes(8)), "b": Tensor("U8", (2,), b"ab")}, "nothing changes"),
    ],
)
def test_two_checkpoints_of_one_table(tmp_path: Path, merged: dict[str, Tensor], says: str) -> None:
    paths = write_both(tmp_path, {"a": Tensor("F16", (4,), bytes(8)), "b": Tensor("U8", (2,), b"ab")}, merged)
    with pytest.raises(InputError) as refused:
        build_between(*paths, tmp_path / "fix.safetensors")
    assert says in str(refused.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "merged.safetensors"]


def test_wide_entries_are_refused_where_they_differ(tmp_path: Path) -> None:
    base = {"a": Tensor("I64", (1,), bytes(8)), "b": Tensor("U8", (1,), b"a")}
    paths = write_both(tmp_path, base, {**base, "b": Tensor("U8", (1,), b"b")})
    build_between(*paths, tmp_path / "fix.safetensors")
    save_file(paths[1], {**base, "a": Tensor("I64", (1,), b"\1" + bytes(7))})
    with pytest.raises(InputError, match="'a': differs, and entries of this type can't be fixed: found I64"):
        build_between(*paths, tmp_path / "other.safetensors")


def test_what_may_be_replaced(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    base = {"w": random_tensor(rng, "BF16", 10, 10)}
    paths = write_both(tmp_path, base, {"w": changed(rng, base["w"], 0.5)})
    out = tmp_path / "new" / "fix.safetensors"
    build_between(*paths, out)
    before = out.read_bytes()
    with pytest.raises(InputError, match="--force replaces it"):
        build_between(*paths, out)
    out.write_bytes(b"")
    build_between(*paths, out, force=True)
    assert out.read_bytes() == before and os.listdir(out.parent) == [out.name]
    link = tmp_path / "link.safetensors"
    link.symlink_to(out)
    for where, says in ((link, "symlink"), (tmp_path, "directory"), (paths[0], "is an input")):
        with pytest.raises(SafepatchError, match=says):
            build_between(*paths, where, force=True)
    assert out.read_bytes() == before and load_checkpoint(paths[0]) == base


def test_large_tensors_within_the_smallest_limit(tmp_path: Path) -> None:
    """Tensors that are done in chunks there, in both scopes."""
    rng, shape = np.random.default_rng(2), (3000, 1500)
    steps = {n: rng.standard_normal(shape).astype("f4").view("u4") >> 16 for n in ("a.weight", "b.weight")}
    base = {n: Tensor("BF16", shape, bytes(2 * 3000 * 1500)) for n in steps}
    patch = {n: Tensor("BF16", shape, bits.astype("u2").tobytes()) for n, bits in steps.items()}
    save_file(tmp_path / "base.safetensors", base)
    save_file(tmp_path / "patch.safetensors", patch)
    for scope in ("tensor", "model"):
        recipe = tmp_path / f"{scope}.yaml"
        recipe.write_text(
            f"{{base: base.safetensors, patches: [{{name: p, source: patch.safetensors, top: 0.05}}], "
            f"scope: {scope}}}"
        )
        streamed, between = tmp_path / f"{scope}.safetensors", tmp_path / f"{scope}-between.safetensors"
        merge(recipe, tmp_path / scope, backend="cpu", threads=1)
        build(recipe, streamed, backend="cpu", threads=1, memory_limit="32MiB")
        build_between(tmp_path / "base.safetensors", tmp_path / scope, between)
        assert streamed.read_bytes() == between.read_bytes()
    with pytest.raises(SafepatchError, match="at least 32MiB"):
        build(recipe, tmp_path / "x.safetensors", memory_limit="16MiB")


def test_what_lies_beside_the_merge_takes_the_other_half_of_the_limit(tmp_path: Path) -> None:
    """An adapter takes next to nothing, so that a tensor of more than a quarter of the limit is done whole."""
    rows, cols = 2400, 4096
    factors = {"lora_A": (2, cols), "lora_B": (rows, 2)}
    save_file(tmp_path / "base.safetensors", {"a.weight": Tensor("BF16", (rows, cols), bytes(2 * rows * cols))})
    (tmp_path / "adapter").mkdir()
    tensors = {
        f"base_model.model.a.{name}.weight": Tensor("F32", shape, np.ones(shape, "f4").tobytes())
        for name, shape in factors.items()
    }
    save_file(tmp_path / "adapter" / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{base: base.safetensors, patches: [{name: p, source: adapter, top: 0.02}]}")
    planned = plan(recipe, backend="cpu", threads=1, memory_limit="32MiB")
    assert planned.targets["a.weight"].whole and 2 * (2 * rows * cols) > 32 << 20
    build(recipe, tmp_path / "warm.safetensors", backend="cpu", threads=1)  # imports
    tracemalloc.start()
    try:
        build(recipe, tmp_path / "fix.safetensors", backend="cpu", threads=1, memory_limit="64MiB")
        peak = tracemalloc.get_traced_memory()[1]  # without the ring, which is not numpy's
    finally:
        tracemalloc.stop()
    assert 32 << 20 < peak < 40 << 20


@pytest.mark.parametrize(("scope", "ranks"), [("model", 2), ("tensor", 3)])
def test_any_number_of_ranks_gives_the_same_file(tmp_path: Path, scope: str, ranks: int) -> None:
    pytest.importorskip("torch", reason="ranks talk through torch.distributed")
    model(tmp_path, 300)
    made = rank_recipe(tmp_path, scope)
    build(made, tmp_path / "one.safetensors", backend="cpu", threads=1)
    command = torchrun(ranks, 64, made, "-o", tmp_path / "out" / "many.safetensors")
    command[command.index("merge")] = "build"
    subprocess.run([*command, "--backend", "cpu", "--threads", "1"], cwd=ROOT, check=True, timeout=240)
    assert (tmp_path / "out" / "many.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    assert os.listdir(tmp_path / "out") == ["many.safetensors"]


def test_what_merge_refuses_build_refuses(tmp_path: Path) -> None:
    """A patch without an effect, by the same line; nothing is left."""
    base = {"w.weight": Tensor("F32", (3, 2), np.arange(6, dtype="<f4").tobytes())}
    recipe = write_plain(tmp_path / "r", base, {"p": (base, {})})
    with pytest.raises(InputError) as merged:
        merge(recipe, tmp_path / "merged", backend="reference")
    with pytest.raises(InputError, match=re.escape(str(merged.value))):
        build(recipe, tmp_path / "fix.safetensors", backend="reference")
    assert os.listdir(tmp_path) == ["r"]


def test_a_mergekit_configuration_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for merge: what it changes, in the same bytes as from the recipe that import makes of it."""
    rng = np.random.default_rng(3)
    base, tuned = ({"m.0.up.weight": random_tensor(rng, "F16", 8, 9)} for _ in range(2))
    bits = {n: Tensor("F16", t.shape, bytes(b & 0x7B for b in t.data)) for n, t in base.items()}  # all finite
    moved = {n: Tensor("F16", t.shape, bytes(b & 0x7B for b in t.data)) for n, t in tuned.items()}
    for name, tensors in (("base", bits), ("tuned", moved)):
        (tmp_path / name).mkdir()
        save_file(tmp_path / name / "model.safetensors", tensors)
    monkeypatch.chdir(tmp_path)  # mergekit's paths start from there
    config = Path("mergekit.yml")
    config.write_text(
        "{merge_method: task_arithmetic, base_model: base, dtype: float32, out_dtype: float16, "
        "models: [{model: tuned, parameters: {weight: 0.5}}], parameters: {normalize: false}}"
    )
    for words in (("import", config, "-o", "r.yaml"), ("build", config, "-o", "a.safetensors")):
        result = CliRunner().invoke(cli, list(map(str, words)))
        assert result.exit_code == 0, result.output
    build("r.yaml", "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
