"""Quantised bases and patches: refused by method and tensor, never merged as if scales and codes were weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from safepatch_core import merge
from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.merging.quantised.modules import quantised
from tests.oracle import Tensor, load_checkpoint, save_file

SIZES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "U32": 4, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I64": 8}
Q = "model.layers.0.self_attn.q_proj"
Module = dict[str, tuple[str, tuple[int, ...]]]

# What lies in a quantised module, by the part of the name that follows it.
LAYOUTS: dict[str, tuple[dict[str, Any] | None, Module]] = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4},
        {
            **{".qweight": ("I32", (4, 32)), ".qzeros": ("I32", (4, 4))},
            **{".scales": ("F16", (4, 32)), ".g_idx": ("I32", (32,)), ".bias": ("F16", (32,))},
        },
    ),
    "awq": (
        {"quant_method": "awq"},
        {".qweight": ("I32", (32, 4)), ".qzeros": ("I32", (4, 4)), ".scales": ("F16", (4, 32))},
    ),
    "compressed-tensors int4": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {".weight_packed": ("I32", (32, 4)), ".weight_scale": ("BF16", (32, 4)), ".weight_shape": ("I64", (2,))},
    ),
    "compressed-tensors int8": (
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        {".weight": ("I8", (32, 32)), ".weight_scale": ("BF16", (32, 1))},
    ),
    "compressed-tensors fp8": (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {".weight": ("F8_E4M3", (32, 32)), ".weight_scale": ("BF16", (32, 1))},
    ),
    "nvfp4": (
        {"quant_method": "modelopt"},
        {".weight": ("U8", (32, 16)), ".weight_scale": ("F8_E4M3", (32, 2)), ".weight_scale_2": ("F32", ())},
    ),
    "fp8 blocks": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {".weight": ("F8_E4M3", (32, 32)), ".weight_scale_inv": ("F32", (1, 1))},
    ),
    "fp8 E8M0": (None, {".weight": ("F8_E4M3", (32, 32)), ".scale": ("F8_E8M0", (1, 1))}),
    "fp4 in I8": (None, {".weight": ("I8", (32, 16)), ".scale": ("F8_E8M0", (32, 1))}),
    "mxfp4": ({"quant_method": "mxfp4"}, {"_blocks": ("U8", (2, 32, 1, 16)), "_scales": ("U8", (2, 32, 1))}),
    "mlx": (
        {"group_size": 8, "bits": 4},
        {".weight": ("U32", (32, 4)), ".scales": ("BF16", (32, 4)), ".biases": ("BF16", (32, 4))},
    ),
    "bitsandbytes nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {
            **{".weight": ("U8", (512, 1)), ".weight.absmax": ("U8", (16,)), ".weight.quant_map": ("F32", (16,))},
            **{".weight.nested_absmax": ("F32", (1,)), ".weight.quant_state.bitsandbytes__nf4": ("U8", (60,))},
        },
    ),
    "bitsandbytes nf4 in bf16": (
        {"quant_method": "bitsandbytes", "bnb_4bit_quant_storage": "bfloat16"},
        {
            **{".weight": ("BF16", (512, 2)), ".weight.absmax": ("U8", (16,))},
            **{".weight.quant_map": ("F32", (16,)), ".weight.quant_state.bitsandbytes__nf4": ("U8", (60,))},
        },
    ),
    "bitsandbytes int8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {".weight": ("I8", (32, 32)), ".SCB": ("F32", (32,))},
    ),
    "hqq": (None, {".W_q": ("U8", (16, 32)), ".scale": ("F16", (32, 4)), ".zero": ("F16", (32, 4))}),
    "aqlm": (
        None,
        {".codes": ("I8", (32, 4, 2)), ".codebooks": ("F16", (2, 256, 1, 8)), ".scales": ("F16", (32, 1))},
    ),
    "of the future": ({"quant_method": "zipped"}, {".zip": ("U8", (99,)), ".fan": ("F16", (4, 4))}),
}


def tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    n = int(np.prod(shape)) * SIZES[dtype]
    return Tensor(dtype, shape, np.random.default_rng(seed).integers(0, 60, n, np.uint8).tobytes())


def quantised_module(layout: str, seed: int = 0, module: str = Q) -> dict[str, Tensor]:
    return {module + part: tensor(*what, seed) for part, what in LAYOUTS[layout][1].items()}


def plain(seed: int = 0) -> dict[str, Tensor]:
    """What every such model keeps as floats."""
    return {
        "model.embed_tokens.weight": tensor("BF16", (40, 32), seed),
        "model.layers.0.self_attn.o_proj.weight": tensor("BF16", (32, 32), seed),
        "model.norm.weight": tensor("BF16", (32,), seed),
        "position_ids": tensor("I64", (1, 8)),
    }


def save(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> None:
    folder.mkdir()
    save_file(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))


def recipe(root: Path, **options: Any) -> Path:
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base": "base", "patches": [{"name": "p", "source": "tuned"}]} | options))
    return path


def refused(root: Path, *words: str, **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        merge(recipe(root, **options), root / "out", backend="reference")
    message = str(caught.value)
    assert caught.value.status == 65 and "\n" not in message and not (root / "out").exists()
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("targets", ["linear", "all", {"include": ["*"]}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_quantised_patch_of_a_quantised_base_is_refused(tmp_path: Path, layout: str, targets: Any) -> None:
    config = LAYOUTS[layout][0]
    save(tmp_path / "base", plain() | quantised_module(layout), config)
    save(tmp_path / "tuned", plain(1) | quantised_module(layout, 1), config)
    method = (config or {}).get("quant_method", "mlx" if config else "")
    refused(tmp_path, f"quantised ({method}", f"tensor '{Q}", targets=targets)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "of the future"])
def test_the_layout_names_the_method_where_the_config_does_not(tmp_path: Path, layout: str) -> None:
    save(tmp_path / "base", plain() | quantised_module(layout))
    found = quantised(open_checkpoint(tmp_path / "base"))
    assert (
        found is not None and found.method and list(found.codes) == [Q if layout != "mxfp4" else Q.rpartition(".")[0]]
    )
    assert f"{Q}.weight" in found or layout == "mxfp4"
    assert "model.layers.0.self_attn.o_proj.weight" not in found or layout == "mxfp4"


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "mxfp4"])
def test_an_adapter_of_a_quantised_module_is_refused(tmp_path: Path, layout: str) -> None:
    save(tmp_path / "base", plain() | quantised_module(layout), LAYOUTS[layout][0])
    save_adapter(tmp_path / "tuned", Q)
    refused(tmp_path, "quantised (", f"tensor '{Q}.weight'", "quantised afterwards")


def save_adapter(folder: Path, module: str) -> None:
    folder.mkdir()
    pair = {"A": tensor("BF16", (2, 32), 1), "B": tensor("BF16", (32, 2), 2)}
    save_file(
        folder / "adapter_model.safetensors",
        {f"base_model.model.{module}.lora_{side}.weight": of for side, of in pair.items()},
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))


@pytest.mark.parametrize("kind", ["checkpoint", "lora"])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "mxfp4"])
def test_what_is_not_quantised_stays_mergeable(tmp_path: Path, layout: str, kind: str) -> None:
    base = plain() | quantised_module(layout)
    save(tmp_path / "base", base, LAYOUTS[layout][0])
    if kind == "lora":
        save_adapter(tmp_path / "tuned", "model.layers.0.self_attn.o_proj")
    else:
        save(tmp_path / "tuned", plain(1))
    merge(recipe(tmp_path), tmp_path / "out", backend="reference")
    out = load_checkpoint(tmp_path / "out")
    assert [name for name in base if out[name] != base[name]] == ["model.layers.0.self_attn.o_proj.weight"]


def test_targets_may_leave_the_quantised_modules_out(tmp_path: Path) -> None:
    experts = quantised_module("mxfp4", module="model.layers.0.mlp.experts.gate_up_proj")
    experts["model.layers.0.mlp.experts.gate_up_proj_bias"] = tensor("BF16", (2, 32))
    save(tmp_path / "base", plain() | experts, LAYOUTS["mxfp4"][0])
    save(tmp_path / "tuned", plain(1) | experts)
    refused(tmp_path, "quantised (mxfp4)", "gate_up_proj_blocks")
    merge(recipe(tmp_path, targets={"include": ["*self_attn*"]}), tmp_path / "out", backend="reference")
    assert (
        load_checkpoint(tmp_path / "out")["model.layers.0.mlp.experts.gate_up_proj_bias"].data
        == tensor("BF16", (2, 32)).data
    )


def test_a_base_of_which_all_is_quantised(tmp_path: Path) -> None:
    base = {n: t for n, t in plain().items() if "proj" not in n} | quantised_module("gptq")
    save(tmp_path / "base", base, LAYOUTS["gptq"][0])
    save(tmp_path / "tuned", {n: t for n, t in plain(1).items() if "proj" not in n})
    refused(tmp_path, "quantised (gptq)", f"{Q}.qweight", "1 quantised modules", missing="skip")


@pytest.mark.parametrize("layout", ["gptq", "fp8 blocks", "bitsandbytes nf4 in bf16", "compressed-tensors int8"])
def test_a_quantised_patch_of_a_float_base(tmp_path: Path, layout: str) -> None:
    save(tmp_path / "base", plain() | {f"{Q}.weight": tensor("BF16", (32, 32))})
    save(tmp_path / "tuned", plain(1) | quantised_module(layout), LAYOUTS[layout][0])
    method = (LAYOUTS[layout][0] or {})["quant_method"]
    refused(tmp_path, f"the patch 'p' is quantised ({method})", f"tensor '{Q}.", missing="skip")


def test_scales_of_a_cache_are_no_weights(tmp_path: Path) -> None:
    scale = f"{Q.rpartition('.')[0]}.k_scale"
    base = plain() | quantised_module("fp8 blocks") | {scale: tensor("BF16", ())}
    save(tmp_path / "base", base, LAYOUTS["fp8 blocks"][0])
    save(tmp_path / "tuned", plain(1))
    merge(recipe(tmp_path, targets="all"), tmp_path / "out", backend="reference")
    assert load_checkpoint(tmp_path / "out")[scale] == base[scale]


def test_integers_beside_weights_are_not_always_codes(tmp_path: Path) -> None:
    """Position ids, indexes of relative positions, masks and batch counters lie beside floats too."""
    tables = {
        "embeddings.position_ids": tensor("I64", (1, 8)),
        "embeddings.class_embedding": tensor("BF16", (32,)),
        "attn.relative_position_index": tensor("I64", (4, 4)),
        "attn.relative_position_bias_table": tensor("BF16", (7, 4)),
        "bn.num_batches_tracked": tensor("I64", ()),
        "bn.weight": tensor("BF16", (4,)),
        "mask.weight": tensor("U8", (4, 4)),
    }
    save(tmp_path / "base", plain() | tables)
    assert quantised(open_checkpoint(tmp_path / "base")) is None
