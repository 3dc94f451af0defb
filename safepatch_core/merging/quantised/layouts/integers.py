"""Symmetric integers of compressed-tensors: bytes (`int-quantized`), or packed into words (`pack-quantized`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from safepatch_core.errors import InputError
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.quantised.grids import INT4, INT8
from safepatch_core.merging.quantised.layouts.contract import CodedWeight, Tensors, Unfit
from safepatch_core.merging.quantised.layouts.packed import Packed
from safepatch_core.merging.quantised.layouts.scales import Blocks, BlockScales, laid_out
from safepatch_core.merging.sources.contract import Range
from safepatch_core.spec import ITEMSIZE

_SIGN = 0x80  # a packed byte is the number plus 128, the grid's code its two's complement


@dataclass(frozen=True, slots=True)
class Shaped:
    """Scales beside a tensor that says how the packed weight is shaped. A `layouts.packed.Factors`."""

    blocks: Blocks
    shape: TensorEntry
    expected: tuple[int, ...]

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return (*self.blocks.entries, self.shape)

    def ranges(self, lo: int, hi: int) -> list[Range]:
        return [*self.blocks.ranges(lo, hi), (self.shape, 0, self.shape.nbytes)]

    def read(self, inputs: Inputs, lo: int, hi: int) -> BlockScales:
        data = np.empty(self.shape.nbytes, np.uint8)
        inputs.read(self.shape, 0, data)
        found = data.view("<i8" if self.shape.dtype == "I64" else "<i4").tolist()
        if found != list(self.expected):
            raise InputError(
                "the packed weight has another shape",
                file=self.shape.path,
                tensor=self.shape.name,
                found=found,
                expected=f"{list(self.expected)}, rows that fill whole words",
            )
        return self.blocks.read(inputs, lo, hi)


def find(codes: TensorEntry, tensors: Tensors, config: Mapping[str, Any]) -> CodedWeight | None:
    """A `layouts.contract.Finder`."""
    name = codes.name.removesuffix("_packed")
    packed = name != codes.name
    scales = tensors.get(f"{name}_scale")
    known = codes.dtype == ("I32" if packed else "I8") and name.endswith("weight") and len(codes.shape) >= 2
    if not known or scales is None or scales.dtype not in ITEMSIZE:
        return None
    if config.get("quant_method") not in (None, "compressed-tensors"):
        return None
    _require_symmetric(name, tensors, config)
    if not packed:
        return Packed(name, codes.shape, "8-bit integers", codes, INT8, _blocks(scales, codes.shape, config))
    bits = _width(config)
    shape = (*codes.shape[:-1], codes.shape[-1] * 32 // bits)
    said = tensors.get(f"{name}_shape")
    if said is None or said.dtype not in ("I64", "I32") or said.entries != len(shape):
        raise Unfit("packed integers without their shape")
    factors = Shaped(_blocks(scales, shape, config), said, shape)
    grid, flip = (INT4, 0) if bits == 4 else (INT8, _SIGN)
    return Packed(name, shape, f"{bits}-bit integers", codes, grid, factors, flip)


def _require_symmetric(name: str, tensors: Tensors, config: Mapping[str, Any]) -> None:
    said = [of.get("symmetric") for of in _weights(config)]
    if f"{name}_zero_point" in tensors or (said and all(of is False for of in said)):
        raise Unfit("asymmetric integers")
    if f"{name}_g_idx" in tensors:
        raise Unfit("integers in another order (act-order)")
    format = config.get("format")
    if isinstance(format, str) and ("sparse" in format or "marlin" in format):
        raise Unfit(f"sparse integers ({format})")


def _weights(config: Mapping[str, Any], *formats: str) -> list[Mapping[str, Any]]:
    """What the groups of a config say of integer weights; of these formats, where a group names its own."""
    groups = config.get("config_groups")
    found = [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    asked = [g.get("weights") for g in found if not formats or g.get("format") in (None, *formats)]
    return [of for of in asked if isinstance(of, dict) and of.get("type") in (None, "int")]


def _width(config: Mapping[str, Any]) -> int:
    """How many bits a packed integer has; 4 where the config doesn't say. A wrong one shows by the shape."""
    widths = {of.get("num_bits") for of in _weights(config, "pack-quantized")} - {None} or {4}
    if widths not in ({4}, {8}):
        raise Unfit(f"packed integers of {', '.join(sorted(map(str, widths)))} bits")
    return 4 if widths == {4} else 8


def _blocks(scales: TensorEntry, shape: tuple[int, ...], config: Mapping[str, Any]) -> Blocks:
    """A scale for the tensor, a row, or a group of a row: of as many entries as there are scales in a row."""
    if len(scales.shape) == len(shape) and scales.shape[-1] and shape[-1] % scales.shape[-1] == 0:
        blocks = laid_out(scales, shape, ((1, shape[-1] // scales.shape[-1]),))
    else:
        blocks = laid_out(scales, shape, ())
    if blocks is None:
        raise Unfit(f"integers {list(shape)} with scales {list(scales.shape)}, which fit no groups of them")
    return blocks
