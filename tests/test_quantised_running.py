"""Merges into FP8 bases as they are run: planned, stopped and resumed, over ranks, verified, and as fix files."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from safepatch_core import apply, build, merge, revert, verify
from safepatch_core.errors import InputError, Stopped
from safepatch_core.files.parsing import BITS
from safepatch_core.fixes.build import build_between
from safepatch_core.merging.sink import CheckpointSink
from tests.oracle import Tensor, from_f32, load_checkpoint, save_file
from tests.test_cli import safepatch
from tests.test_ranks import ROOT, files, torchrun
from tests.twins import FLOAT, SHAPE, UP, WIDE, Q, Twin


def recipe(root: Path, **options: Any) -> tuple[Twin, Path]:
    """A twin in three shards, codes and scales apart, and a recipe of two patches."""
    twin = Twin(root, seed=11)
    patches = twin.patch("a", "checkpoint", top=0.4), twin.patch("b", "lora", top=0.2, retain=0.5)
    path = twin.recipe(*patches, **options)
    twin.save_base(twin.base, shards=3)
    return twin, path


def test_plan_merge_and_verify_agree(tmp_path: Path) -> None:
    twin, path = recipe(tmp_path)
    twin.original()
    for rule in (WIDE, WIDE | {"reference": "original", "rounding": "nearest"}):
        twin.recipe(twin.patch("a", "checkpoint", top=0.4), quantized=rule)
        planned = json.loads(safepatch("plan", path, "--json", "--tensors", "--backend", "cpu").stdout)
        assert [(t["name"], t["dtype"]) for t in planned["tensors"]] == [
            (UP, "F8_E4M3"),
            (FLOAT, "BF16"),
            (Q, "F8_E4M3"),
        ]
        done = safepatch("merge", path, "-o", tmp_path / "out", "--json", "--force", "--backend", "cpu")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["bytes_read"] == planned["bytes_read"] and told["bytes_written"] == planned["bytes_written"]
        manifest = json.loads((tmp_path / "out" / "safepatch.json").read_text())
        assert told["codes"]["a"] == manifest["patches"][0]["codes"] and told["codes"]["a"]["changed"] > 100
        assert manifest["recipe"]["quantized"] == {
            **{"reference": "dequantised", "reference_dtype": "bfloat16", "rounding": "stochastic"},
            **{"saturate": "clamp"},
            **rule,
        }
        assert safepatch("verify", tmp_path / "out", "--recipe", path, "--backend", "reference").returncode == 0
        assert "codes: 2 in FP8 E4M3, a scale per 32x32" in safepatch("plan", path).stdout
    text = safepatch("merge", path, "-o", tmp_path / "text").stdout
    assert "codes changed" in text and "survival" in text and "cosine" in text


def test_verify_finds_another_code(tmp_path: Path) -> None:
    _, path = recipe(tmp_path)
    merge(path, tmp_path / "out", backend="cpu")
    other = path.with_name("other.yaml")
    other.write_text(path.read_text().replace("base: base", "base: base\nseed: 1"))
    found = verify(tmp_path / "out", other, backend="cpu")
    assert not found.ok and "differs from the recipe" in found.problems[0]


def test_what_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = recipe(tmp_path)
    merge(path, tmp_path / "undisturbed", backend="cpu")
    end, ended = CheckpointSink.end, 0

    def stopped(self: CheckpointSink) -> None:
        nonlocal ended
        ended += 1
        if ended == 3:
            raise Stopped
        end(self)

    monkeypatch.setattr(CheckpointSink, "end", stopped)
    with pytest.raises(Stopped):
        merge(path, tmp_path / "out", backend="cpu")
    merge(path, tmp_path / "out", backend="cpu", resume=True)
    assert ended == 4 and files(tmp_path / "out") == files(tmp_path / "undisturbed")


def test_several_ranks_give_the_bytes_of_one(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="ranks talk through torch.distributed")
    _, path = recipe(tmp_path, scope="model")
    merge(path, tmp_path / "one", backend="reference")
    command = torchrun(2, 64, path, "-o", tmp_path / "many", "--backend", "cpu")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert files(tmp_path / "many") == files(tmp_path / "one")


@pytest.mark.parametrize("chunk", [None, 96])
def test_a_fix_file_changes_codes_and_takes_them_back(tmp_path: Path, chunk: int | None) -> None:
    twin, path = recipe(tmp_path)
    merge(path, tmp_path / "out", backend="cpu")
    fix = tmp_path / "fix.safetensors"
    made = build(path, fix, backend="cpu", chunk_entries=chunk)
    build_between(tmp_path / "base", tmp_path / "out", tmp_path / "between.safetensors")
    assert made.tensors == 3 and fix.read_bytes() == (tmp_path / "between.safetensors").read_bytes()
    apply(fix, tmp_path / "base", tmp_path / "applied")
    assert load_checkpoint(tmp_path / "applied") == load_checkpoint(tmp_path / "out")
    shutil.copytree(tmp_path / "base", tmp_path / "live")
    apply(fix, tmp_path / "live", in_place=True)
    assert load_checkpoint(tmp_path / "live") == load_checkpoint(tmp_path / "out")
    revert(fix, tmp_path / "live", in_place=True)
    assert load_checkpoint(tmp_path / "live") == twin.base


def test_a_fix_that_does_not_survive_is_not_written(tmp_path: Path) -> None:
    _, path = recipe(tmp_path, quantized={"survival": [5, 6]})
    with pytest.raises(InputError, match="does not keep the patch 'a'"):
        build(path, tmp_path / "fix.safetensors", backend="cpu")
    assert not (tmp_path / "fix.safetensors").exists()


CT = {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed"}


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (CT | {"transform_config": {"config_groups": {}}}, {}, "rotated"),
        (CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, {}, "sparse"),
        (CT | {"quantization_status": "frozen"}, {}, "quantization_status frozen"),
        (CT, {"weight_zero_point": ("I8", (40, 1))}, "asymmetric"),
        (CT, {"weight": ("F8_E5M2", SHAPE)}, "E5M2"),
        (CT, {"weight": ("F8_E4M3FNUZ", SHAPE)}, "E4M3FNUZ"),
        (CT, {"weight_scale_inv": None, "bias": ("BF16", (40,))}, "0 tensors of scales"),
        (CT, {"weight_scale": ("BF16", (40, 1))}, "2 tensors of scales"),
        (CT, {"weight_scale_inv": ("F32", (3, 3))}, r"scales \[3, 3\], which fit no blocks"),
        (CT, {"weight_scale_inv": ("I32", (2, 3))}, "scales of I32"),
        ({"quant_method": "gptq"}, {"weight": None, "qweight": ("I32", (5, 70)), "scales": ("F16", (1, 70))}, "gptq"),
        ({"quant_method": "awq"}, {"weight": None, "qweight": ("I32", (5, 70)), "scales": ("F16", (1, 70))}, "awq"),
        ({"quant_method": "bitsandbytes"}, {"weight": ("I8", SHAPE), "SCB": ("F32", (40,))}, "bitsandbytes"),
        ({"quant_method": "quanto"}, {}, "quanto"),
    ],
)
def test_what_is_not_accepted_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    twin = Twin(tmp_path)
    module = Q.removesuffix("weight")
    for end, what in change.items():
        twin.base.pop(module + end, None)
        if what is not None:
            dtype, shape = what
            twin.base[module + end] = Tensor(dtype, shape, bytes(BITS[dtype] // 8 * math.prod(shape)))
    path = twin.recipe(twin.patch("a"))
    twin.save_base(twin.base)
    (tmp_path / "base" / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(InputError, match=f"{words}.*expected FP8 E4M3"):
        merge(path, tmp_path / "out", backend="reference")
    assert not (tmp_path / "out").exists()


def test_a_patch_that_is_quantised_itself_is_refused(tmp_path: Path) -> None:
    twin, path = recipe(tmp_path)
    shutil.rmtree(tmp_path / "b")
    shutil.copytree(tmp_path / "base", tmp_path / "b")
    with pytest.raises(InputError, match=r"the patch 'b' is quantised \(fp8\)"):
        merge(path, tmp_path / "out", backend="reference")


def test_dora_needs_the_weights_themselves(tmp_path: Path) -> None:
    twin = Twin(tmp_path)
    path = twin.recipe(twin.patch("a", "lora"))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    tensors = load_checkpoint(tmp_path / "a" / "adapter_model.safetensors")
    for name in (Q, UP):
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector"
        tensors[key] = Tensor("F32", (SHAPE[0],), from_f32(twin.rng.random(SHAPE[0]).astype("f4"), "F32"))
    save_file(tmp_path / "a" / "adapter_model.safetensors", tensors)
    with pytest.raises(InputError, match="needs the entries of the base, which are quantised"):
        merge(path, tmp_path / "out", backend="reference")
