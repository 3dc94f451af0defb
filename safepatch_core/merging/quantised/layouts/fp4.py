"""E2M1, two codes to a byte: MXFP4 of gpt-oss, compressed-tensors and DeepSeek, NVFP4 of compressed-tensors and
ModelOpt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safepatch_core.backends.contract import ScaleTable
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.quantised.grids import E2M1, F32
from safepatch_core.merging.quantised.layouts.contract import CodedWeight, Places, Scales, Tensors, Unfit
from safepatch_core.merging.quantised.layouts.packed import Packed, Turned
from safepatch_core.merging.quantised.layouts.scales import EXPONENTS, Blocks, read_scales
from safepatch_core.merging.sources.contract import Range

_METHODS = (None, "mxfp4", "compressed-tensors", "fp8", "modelopt")


@dataclass(frozen=True, slots=True)
class TwoLevels:
    """Scales of NVFP4: E4M3 of groups of 16, and one of the whole. A `layouts.packed.Factors`."""

    blocks: Blocks
    whole: TensorEntry
    divides: bool  # as compressed-tensors' does; ModelOpt's is a factor

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return (*self.blocks.entries, self.whole)

    def ranges(self, lo: int, hi: int) -> list[Range]:
        return [*self.blocks.ranges(lo, hi), (self.whole, 0, self.whole.nbytes)]

    def read(self, inputs: Inputs, lo: int, hi: int) -> Scaled:
        return Scaled(self.blocks.read(inputs, lo, hi), read_scales(inputs, self.whole, 0, 1), self.divides)


@dataclass(frozen=True, slots=True)
class Scaled:
    """A `layouts.contract.Scales`: a group's, over or times that of the whole, rounded once."""

    groups: Scales
    whole: F32  # [1]
    divides: bool

    def at(self, positions: Places) -> F32:
        return self._scaled(self.groups.at(positions))

    def run(self, lo: int, hi: int) -> F32:
        return self._scaled(self.groups.run(lo, hi))

    def table(self) -> ScaleTable:
        groups = self.groups.table()
        return groups._replace(values=self._scaled(groups.values))

    def _scaled(self, groups: F32) -> F32:
        return groups / self.whole if self.divides else groups * self.whole


def find(codes: TensorEntry, tensors: Tensors, config: Mapping[str, Any]) -> CodedWeight | None:
    """A `layouts.contract.Finder`."""
    if codes.dtype not in ("U8", "I8") or config.get("quant_method") not in _METHODS or len(codes.shape) < 2:
        return None
    if codes.name.endswith("_blocks"):
        return _gpt_oss(codes, tensors)
    stem = codes.name.removesuffix("_packed")
    if not stem.endswith("weight"):
        return None
    module = stem.removesuffix("weight")
    scales = next((tensors[n] for n in (f"{stem}_scale", f"{module}scale") if n in tensors), None)
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    wholes = {True: tensors.get(f"{stem}_global_scale"), False: tensors.get(f"{stem}_scale_2")}
    if scales is not None and scales.dtype == "F8_E4M3":
        return _nvfp4(codes, stem, shape, scales, wholes)
    if scales is None or scales.dtype not in EXPONENTS:
        return None
    return Packed(stem, shape, "MXFP4", codes, E2M1, _groups(scales, shape, 32, "MXFP4"))


def _nvfp4(
    codes: TensorEntry,
    name: str,
    shape: tuple[int, ...],
    scales: TensorEntry,
    wholes: Mapping[bool, TensorEntry | None],
) -> CodedWeight:
    found = [(divides, whole) for divides, whole in wholes.items() if whole is not None]
    if len(found) != 1:
        raise Unfit(f"NVFP4 with {len(found)} scales of the whole, not one")
    divides, whole = found[0]
    if whole.dtype != "F32" or whole.entries != 1:
        raise Unfit(f"NVFP4 with a scale of the whole that is {whole.dtype} {list(whole.shape)}")
    factors = TwoLevels(_groups(scales, shape, 16, "NVFP4"), whole, divides)
    return Packed(name, shape, "NVFP4", codes, E2M1, factors)


def _gpt_oss(codes: TensorEntry, tensors: Tensors) -> CodedWeight | None:
    """Experts, of which the float model has the transposes."""
    name = codes.name.removesuffix("_blocks")
    scales = tensors.get(f"{name}_scales")
    if scales is None or scales.dtype not in EXPONENTS:
        return None
    *batch, rows, groups, half = codes.shape
    if not batch or half != 16 or scales.shape != (*batch, rows, groups):
        raise Unfit(f"MXFP4 blocks {list(codes.shape)} with scales {list(scales.shape)}")
    shape = (*batch, rows, 32 * groups)
    blocks = _groups(scales, shape, 32, "MXFP4")
    return Turned(Packed(name, shape, "MXFP4", codes, E2M1, blocks), blocks)


def _groups(scales: TensorEntry, shape: tuple[int, ...], size: int, method: str) -> Blocks:
    """A scale for every so many entries of a row, which come out even."""
    *batch, cols = shape
    if cols % size or scales.shape != (*batch, cols // size):
        raise Unfit(f"{method} {list(shape)} with scales {list(scales.shape)}, which are no groups of {size}")
    return Blocks(scales, shape[-2], cols, (1, size))
