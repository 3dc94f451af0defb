"""Scales, codes and values of every format, to the bit those of the library that writes such checkpoints."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from safepatch_core.backends.contract import Bits
from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.quantised.formats import FORMATS
from safepatch_core.merging.quantised.grids import F32
from safepatch_core.merging.quantised.layouts import recognise
from safepatch_core.merging.quantised.values import Dequantised
from safepatch_core.merging.sources.contract import load_alone
from safepatch_core.spec import Dtype

torch = pytest.importorskip("torch")
library = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors isn't installed")

E4M3, BYTE = torch.float8_e4m3fn, torch.uint8
ARGUMENTS: dict[str, dict[str, Any]] = {
    "fp8-block": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    "fp8-channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "int8-channel": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "int4-g128": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
    "int4-g32": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": BYTE},
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": E4M3},
}
DTYPES: dict[Dtype, Any] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def weights(seed: int, dtype: Dtype) -> Any:
    """Rows of very different sizes, zeros of both signs and a row of them; for odd seeds on a coarse grid: ties."""
    random = np.random.default_rng(seed)
    w = random.standard_normal((200, 256)) * np.exp2(random.uniform(-8 if dtype == "F16" else -30, 3, (200, 1)))
    w = np.round(w * 8) / 32 if seed % 2 else w * random.choice([1e-3, 1, 30])
    w[3:6] = 0
    w[7, :40] = -0.0
    return torch.from_numpy(w.astype(np.float32)).to(DTYPES[dtype])


def extremes(weight: Any, down: int, across: int) -> tuple[Any, Any]:
    """The least and the largest entry of each block, which is filled up with zeros."""
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -cols % across, 0, -rows % down))
    blocks = padded.reshape(-1, down, padded.shape[1] // across, across)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_scales_codes_and_values(name: str, dtype: Dtype) -> None:
    format, asked = FORMATS[name], library.QuantizationArgs(**ARGUMENTS[name])
    for seed in range(6):
        weight = weights(seed, dtype)
        least, largest = extremes(weight, format.rows, format.cols or weight.shape[1])
        whole = library.utils.generate_gparam(weight.amin(), weight.amax()) if name == "nvfp4" else None
        scale, zero = library.utils.calculate_qparams(least, largest, asked, global_scale=whole)
        x: F32 = weight.float().numpy()
        mine = format.scales(format.maxima(np.abs(x)), dtype, float(np.abs(x).max()))
        theirs = scale.float() if whole is None else scale.float() / whole
        assert np.array_equal(mine.view(np.uint32), theirs.numpy().view(np.uint32))

        codes = library.quantize(weight.float(), scale.float(), 0 * zero.float(), asked, global_scale=whole)
        values = library.dequantize(codes, scale.float(), None, asked, global_scale=whole)
        across = format.cols or x.shape[1]
        each = np.repeat(np.repeat(mine, format.rows, axis=0)[: len(x)], across, axis=1)[:, : x.shape[1]]
        rounded = format.grid.round(x / each)
        assert np.array_equal(rounded, codes.float().numpy())
        assert np.array_equal(rounded * each, values.float().numpy())


# A scheme's block, if it is neither the whole nor a row.
SCHEMES: dict[str, tuple[int, int] | None] = {
    "FP8": None,
    "FP8_DYNAMIC": (1, 256),
    "FP8_BLOCK": (128, 128),
    "W8A8": (1, 256),
    "W8A16": (1, 256),
    "W4A16": (1, 128),
    "NVFP4A16": (1, 16),
    "MXFP4A16": (1, 32),
    "MXFP8A16": (1, 32),
}


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_the_library_writes_is_read(tmp_path: Path, scheme: str, dtype: Dtype) -> None:
    """A module as its compressor packs it: ours and its own make the same values of it."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    asked = library.preset_name_to_scheme(scheme, ["Linear"])
    weight = weights(2, dtype)
    least, largest = extremes(weight, *(SCHEMES[scheme] or weight.shape))
    whole = library.utils.generate_gparam(weight.amin(), weight.amax()) if scheme == "NVFP4A16" else None
    flat = SCHEMES[scheme] is None
    scale, zero = library.utils.calculate_qparams(
        least.reshape(-1) if flat else least, largest.reshape(-1) if flat else largest, asked.weights, whole
    )
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    state |= {} if whole is None else {"weight_global_scale": whole}
    form = compressors.format.infer_module_format(torch.nn.Linear, asked)
    packer = compressors.BaseCompressor.get_value_from_registry(form.value)
    stored = packer.compress(state, asked)
    theirs = packer.decompress(dict(stored), asked)["weight"]

    file = tmp_path / "m.safetensors"
    save_file({f"m.{name}": tensor.contiguous() for name, tensor in stored.items()}, file)
    said = {"weights": asked.weights.model_dump(mode="json")}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": said}}
    base = open_checkpoint(file)
    found = [w for t in base.tensors.values() if (w := recognise(t, base.tensors, config)) is not None]
    assert [(w.name, w.shape) for w in found] == [("m.weight", tuple(weight.shape))]
    with closing(Inputs((base,))) as inputs:
        values = load_alone(Dequantised(found[0]), inputs, 0, weight.numel())
    assert isinstance(values, Bits)
    mine = torch.from_numpy(values.data.view(np.float32).reshape(weight.shape)).to(theirs.dtype)
    assert torch.equal(mine, theirs)
