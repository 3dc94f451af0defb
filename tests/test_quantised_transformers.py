"""What transformers makes of codes: the values that our decoding gives, and of merges into FP8 logits of its own."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from safepatch_core import merge, open_checkpoint
from safepatch_core.backends.contract import Bits
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.quantised.layouts import recognise
from safepatch_core.merging.quantised.values import Dequantised
from safepatch_core.merging.sources.contract import load_alone
from tests import oracle_quantised
from tests.oracle import load_checkpoint, to_f32

try:
    from transformers import FineGrainedFP8Config
except ImportError:
    pytest.skip("transformers knows no fine-grained FP8", allow_module_level=True)

BLOCK = 32


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and a scale per block, as fine-grained FP8 has them."""
    rows, cols = weight.shape
    blocks = weight.float().reshape(rows // BLOCK, BLOCK, cols // BLOCK, BLOCK).transpose(1, 2)
    scales = blocks.abs().amax(dim=(2, 3)) / 448
    codes = (blocks / scales[:, :, None, None]).to(torch.float8_e4m3fn)
    return codes.transpose(1, 2).reshape(rows, cols).contiguous(), scales


def write_twin(root: Path, vocab_size: int = 64) -> None:
    """A float model, and its FP8 twin."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    shape |= {"vocab_size": vocab_size}
    model: Any = LlamaForCausalLM(LlamaConfig(**shape))
    model.to(torch.bfloat16).save_pretrained(root / "float")
    tensors = load_file(root / "float" / "model.safetensors")
    twin = {}
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            twin[name], twin[name + "_scale_inv"] = quantised(tensor)
        else:
            twin[name] = tensor
    (root / "base").mkdir()
    save_file(twin, root / "base" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((root / "float" / "config.json").read_text())
    config["quantization_config"] = {
        **{"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
        **{"modules_to_not_convert": ["lm_head"]},
    }
    (root / "base" / "config.json").write_text(json.dumps(config))
    patched = {n: t + (0.01 * torch.randn(t.shape)).to(t.dtype) if "proj" in n else t for n, t in tensors.items()}
    save_file(patched, root / "tuned.safetensors")


def loaded(folder: Path) -> Any:
    dequantised = FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK), dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=dequantised, dtype=torch.float32)


@pytest.mark.parametrize("reference", ["dequantised", "float"])
def test_transformers_loads_what_was_merged(tmp_path: Path, reference: str) -> None:
    write_twin(tmp_path)
    rule = {"reference": reference, "rounding": "stochastic" if reference == "dequantised" else "nearest"}
    patch = {"name": "p", "source": "tuned.safetensors", "top": 0.3}
    recipe = {"base": "base", "quantized": rule, "patches": [patch]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merge(tmp_path / "recipe.yaml", tmp_path / "out", backend="cpu")
    stored, before = load_checkpoint(tmp_path / "out"), load_checkpoint(tmp_path / "base")
    model = loaded(tmp_path / "out")
    changed = 0
    for name, parameter in model.named_parameters():
        if not name.endswith("proj.weight"):
            continue
        _, s = oracle_quantised.scales_of(name, stored, (BLOCK, BLOCK))
        codes = np.frombuffer(stored[name].data, np.uint8)
        values = oracle_quantised.NUMBERS[codes] * s.reshape(-1)
        assert np.array_equal(values, parameter.detach().numpy().reshape(-1)), name
        changed += stored[name] != before[name]
    assert changed == 14 and to_f32(stored["lm_head.weight"]).size
    logits = [loaded(tmp_path / of)(torch.arange(8)[None]).logits for of in ("base", "out")]
    assert torch.isfinite(logits[1]).all() and not torch.equal(*logits)


def test_transformers_reads_the_experts_of_gpt_oss_as_we_do(tmp_path: Path) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    random = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (2, 12, 3, 16), generator=random, dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 12, 3), generator=random, dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.down_proj"
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, tmp_path / "m.safetensors")
    base = open_checkpoint(tmp_path / "m.safetensors")
    weight = recognise(base.tensors[f"{name}_blocks"], base.tensors, {"quant_method": "mxfp4"})
    assert weight is not None and (weight.name, weight.shape) == (name, (2, 96, 12))
    with closing(Inputs((base,))) as inputs:
        values = load_alone(Dequantised(weight), inputs, 0, 2 * 96 * 12)
    assert isinstance(values, Bits)
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert np.array_equal(values.data, theirs.contiguous().numpy().reshape(-1).view(np.uint32))
