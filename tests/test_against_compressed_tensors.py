"""Scales, codes and values of every format, to the bit those of the library that writes such checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from safepatch_core.merging.quantised.formats import FORMATS, Format
from safepatch_core.merging.quantised.grids import F32
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


def extremes(weight: Any, format: Format) -> tuple[Any, Any]:
    """The least and the largest entry of each block, which is filled up with zeros."""
    rows, cols = weight.shape
    across = format.cols or cols
    padded = torch.nn.functional.pad(weight, (0, -cols % across, 0, -rows % format.rows))
    blocks = padded.reshape(-1, format.rows, padded.shape[1] // across, across)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_scales_codes_and_values(name: str, dtype: Dtype) -> None:
    format, asked = FORMATS[name], library.QuantizationArgs(**ARGUMENTS[name])
    for seed in range(6):
        weight = weights(seed, dtype)
        least, largest = extremes(weight, format)
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
