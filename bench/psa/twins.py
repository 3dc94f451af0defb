"""Quantised twins of a float checkpoint, by the rules and in the layouts of those who publish them; and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from safepatch_core.deriving.saving import CONFIG
from safepatch_core.deriving.twin import write_floats
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint
from safepatch_core.files.companions import companions
from safepatch_core.merging.quantised.formats import FORMATS, Format
from safepatch_core.merging.quantised.grids import F32, Codes, join
from safepatch_core.merging.quantised.modules import quantised
from safepatch_core.merging.quantised.twin import recognised
from safepatch_core.merging.recipe import Recipe

Stored = dict[str, Tensor]


def _fp8(name: str, codes: Codes, scales: F32) -> Stored:
    return {name: _tensor(codes).view(torch.float8_e4m3fn), f"{name}_scale_inv": _tensor(scales)}


def _int8(name: str, codes: Codes, scales: F32) -> Stored:
    return {name: _tensor(codes).view(torch.int8), f"{name}_scale": _tensor(scales)}


def _int4(name: str, codes: Codes, scales: F32) -> Stored:
    packed = {f"{name}_packed": _tensor(join(codes)).view(torch.int32), f"{name}_scale": _tensor(scales)}
    return packed | {f"{name}_shape": torch.tensor(codes.shape)}


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _compressed(format: str, **weights: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True} | weights}
    about = {"quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed"}
    return {**about, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


class Layout(NamedTuple):
    """How a weight's codes [rows, cols] and scales lie in files, and what config.json says of them."""

    stored: Callable[[str, Codes, F32], Stored]
    config: Mapping[str, Any]


_FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
# Each named as its rules are in `FORMATS`.
LAYOUTS: dict[str, Layout] = {
    "fp8-block": Layout(_fp8, _FP8_CONFIG | {"modules_to_not_convert": ["lm_head"]}),
    "int8-channel": Layout(_int8, _compressed("int-quantized", num_bits=8, strategy="channel")),
    "int4-g32": Layout(_int4, _compressed("pack-quantized", num_bits=4, strategy="group", group_size=32)),
}


def quantise(model: Path, out: Path, name: str) -> None:
    """The twin of the checkpoint directory `model` in one of the `LAYOUTS`: linear weights to the nearest codes.

    Scales are float32, as the weights are: what is lost is lost to the codes alone.
    """
    base, layout, format = open_checkpoint(model), LAYOUTS[name], FORMATS[name]
    is_target = Recipe.model_validate({"base": str(model), "patches": [{"name": "any", "source": "any"}]}).is_target
    tensors: Stored = {}
    for shard in base.shards:
        for tensor, values in load_file(shard.path).items():
            if is_target(tensor, values.ndim) and format.takes(values.shape[1]):
                tensors |= layout.stored(tensor, *_coded(format, values.float().numpy()))
            else:
                tensors[tensor] = values
    staged = out.with_name(f".{out.name}.part")
    _carry(base, staged)
    config = json.loads((model / CONFIG).read_text("utf-8")) | {"quantization_config": layout.config}
    (staged / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_file(tensors, staged / "model.safetensors", metadata={"format": "pt"})
    staged.rename(out)


def _carry(base: Checkpoint, folder: Path) -> None:
    """Everything that is no weight, into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in companions(base):
        shutil.copyfile(path, folder / path.name)


def _coded(format: Format, weight: F32) -> tuple[Codes, F32]:
    """Codes and scales of a matrix."""
    sizes = np.abs(weight)
    scales = format.scales(format.maxima(sizes), "F32", float(sizes.max()))
    rows, cols = weight.shape
    each = np.repeat(np.repeat(scales, format.rows, axis=0)[:rows], format.cols or cols, axis=1)[:, :cols]
    return format.grid.encode(weight / each), scales


def as_floats(model: Path, out: Path) -> None:
    """What a quantised checkpoint stands for, in float32: no rounding lies between its codes and what is measured."""
    base = open_checkpoint(model)
    held = quantised(base)
    assert held is not None
    out.mkdir(parents=True)
    write_floats(recognised(base, held), base, out, "float32")
