"""FP8 E4M3: a byte per entry, with scales per tensor, channel or block, as fine-grained FP8 and compressed-tensors
write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.quantised.grids import E4M3, Codes, Grid
from safepatch_core.merging.quantised.layouts.contract import Bytes, CodedWeight, Places, Tensors, Unfit
from safepatch_core.merging.quantised.layouts.scales import BLOCKS, DTYPES, Blocks, BlockScales, laid_out
from safepatch_core.merging.sources.contract import Range

_METHODS = (None, "fp8", "mxfp8", "compressed-tensors", "modelopt", "fbgemm_fp8")


@dataclass(frozen=True, slots=True)
class Fp8:
    """A `layouts.contract.CodedWeight`."""

    codes: TensorEntry
    blocks: Blocks
    grid: ClassVar[Grid] = E4M3
    flip: ClassVar[int] = 0
    step: ClassVar[int] = 1

    @property
    def name(self) -> str:
        return self.codes.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def method(self) -> str:
        down, across = self.blocks.block
        return f"FP8 E4M3, a scale per {down}x{across}"

    @property
    def companions(self) -> tuple[TensorEntry, ...]:
        return (self.blocks.entry,)

    def stored(self, lo: int, hi: int) -> tuple[int, int]:
        return lo, hi

    def ranges(self, lo: int, hi: int) -> list[Range]:
        return self.blocks.ranges(lo, hi)

    def scales(self, inputs: Inputs, lo: int, hi: int) -> BlockScales:
        return self.blocks.read(inputs, lo, hi)

    def unpack(self, data: Bytes) -> Codes:
        return data

    def get(self, data: Bytes, at: Places) -> Codes:
        return data[at]

    def put(self, data: Bytes, at: Places, codes: Codes) -> None:
        data[at] = codes


def find(codes: TensorEntry, tensors: Tensors, config: Mapping[str, Any]) -> CodedWeight | None:
    """A `layouts.contract.Finder`."""
    if not codes.dtype.startswith("F8_E") or codes.dtype == "F8_E8M0" or _is_scale(codes.name):
        return None
    if codes.dtype != "F8_E4M3":
        raise Unfit(f"FP8 {codes.dtype.removeprefix('F8_')}")
    if config.get("quant_method") not in _METHODS:
        return None
    stem = codes.name.removesuffix("weight")
    if f"{stem}weight_zero_point" in tensors:
        raise Unfit("asymmetric FP8")
    scales = [tensors[name] for name in _scales_of(codes.name) if name in tensors]
    if len(scales) != 1:
        raise Unfit(f"FP8 with {len(scales)} tensors of scales, not one")
    if scales[0].dtype not in DTYPES:
        raise Unfit(f"FP8 with scales of {scales[0].dtype}")
    blocks = laid_out(scales[0], codes.shape, (*_said(config), *BLOCKS)) if len(codes.shape) > 1 else None
    if blocks is None:
        raise Unfit(f"FP8 {list(codes.shape)} with scales {list(scales[0].shape)}, which fit no blocks of it")
    return Fp8(codes, blocks)


def _scales_of(name: str) -> tuple[str, ...]:
    """What the scales of a weight may be called."""
    plain = (f"{name}_scale_inv", f"{name}_scale")
    if not name.endswith(".weight"):
        return plain
    module = name.removesuffix(".weight")
    return (*plain, f"{module}.scale", f"{module}.qscale_weight")


def _is_scale(name: str) -> bool:
    return name.endswith(("scale", "scale_inv", "scale_2"))


def _said(config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """The blocks that the config names."""
    groups = config.get("config_groups")
    weights = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    named = [config.get("weight_block_size"), *(w.get("block_structure") for w in weights if isinstance(w, dict))]
    return tuple((b[0], b[1]) for b in named if isinstance(b, list) and _is_block(b))


def _is_block(block: list[object]) -> bool:
    return len(block) == 2 and all(type(n) is int and n > 0 for n in block)
