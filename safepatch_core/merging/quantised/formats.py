"""How compressed-tensors quantises a weight: a grid, blocks that share a scale, and the rule that finds it.

Scales are computed in the dtype of the checkpoint, as they are stored in the end; values are divided by them in
float32, one rounding per operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from safepatch_core.backends.contract import Bits
from safepatch_core.backends.reference import from_float32, to_float32
from safepatch_core.errors import UsageError
from safepatch_core.merging.quantised.grids import E2M1, E4M3, E8M0, F32, INT4, INT8, Grid
from safepatch_core.spec import Dtype

# What stands for a scale of zero: the machine epsilon of its dtype.
_EPSILON = {"F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7, "F8_E4M3": 2.0**-3}
_TINY = {"F32": 2.0**-126, "F16": 2.0**-14, "BF16": 2.0**-126}
# The mantissa that takes a block's power of two one up: 1.75, from which values round to the next binade of E2M1.
_UP = {"F32": (np.uint32(1 << 21), np.uint32(0x7F80_0000)), "F16": (np.uint32(1 << 8), np.uint32(0x7C00))}


def stored(values: F32, dtype: Dtype) -> F32:
    """Values rounded into a dtype of scales, a copy; beyond its range, infinite."""
    with np.errstate(over="ignore"):
        return to_float32(Bits(from_float32(values.copy(), dtype), dtype))


def divided(grid: Grid, maxima: F32, dtype: Dtype, highest: float) -> F32:
    """The largest size over half the grid's span: 127.5 of 8-bit integers, 7.5 of 4-bit ones."""
    scales = stored(maxima / np.float32((grid.highest - grid.lowest) / 2), dtype)
    scales[scales == 0] = _EPSILON[dtype]
    return scales


def power_of_two(grid: Grid, maxima: F32, dtype: Dtype, highest: float) -> F32:
    """The largest size rounded to a power of two, over 4: an E8M0 scale of MXFP4."""
    half = dtype == "F16"
    bits = from_float32(maxima, "F16" if half else "F32").astype(np.uint32)
    add, mask = _UP["F16" if half else "F32"]
    bits = (bits + add) & mask
    power = to_float32(Bits(bits.astype(np.uint16) if half else bits, "F16" if half else "F32"))
    exponents = np.where(power > 0, np.frexp(power)[1] - 1, -256)
    scales = stored(E8M0[np.clip(exponents + 127 - 2, 0, 254)], dtype)
    scales[scales == 0] = 1
    return scales


def two_levels(grid: Grid, maxima: F32, dtype: Dtype, highest: float) -> F32:
    """An E4M3 scale over one of the whole matrix, whose largest size is `highest`, as NVFP4 has them."""
    top = np.array([max(highest, _TINY[dtype])], np.float32)
    # A number over a tensor is, in torch, the number times the tensor's reciprocal: rounded twice.
    with np.errstate(over="ignore"):
        whole = stored(np.float32(E4M3.highest * grid.highest) * stored(np.float32(1) / top, dtype), dtype)
    whole = np.where(np.isfinite(whole), whole, np.float32(1))
    scales = E4M3.round(whole * stored(maxima / np.float32(grid.highest), dtype))
    scales[scales == 0] = _EPSILON["F8_E4M3"]
    return scales / whole


@dataclass(frozen=True)
class Format:
    """A format of quantised weights.

    Attributes:
        grid: of the codes.
        rows, cols: of a block that shares a scale; cols is None where that is a whole row.
        scaling: from the largest size in each block to its scale.
    """

    grid: Grid
    rows: int
    cols: int | None
    scaling: Callable[[Grid, F32, Dtype, float], F32]

    @property
    def of_the_whole(self) -> bool:
        """Whether scales depend on the largest size in the whole matrix."""
        return self.scaling is two_levels

    def takes(self, cols: int) -> bool:
        """Whether a matrix with rows of that length can be quantised: groups have to come out even, blocks don't."""
        return self.cols is None or self.rows > 1 or cols % self.cols == 0

    def maxima(self, sizes: F32) -> F32:
        """The largest entry of each block; sizes: [rows, cols], of which the first row begins a block."""
        cols = sizes.shape[1] if self.cols is None else self.cols
        if self.rows > 1:
            sizes = np.maximum.reduceat(sizes, np.arange(0, sizes.shape[0], self.rows), axis=0)
        if sizes.shape[1] % cols:
            largest: F32 = np.maximum.reduceat(sizes, np.arange(0, sizes.shape[1], cols), axis=1)
        else:
            largest = sizes.reshape(sizes.shape[0], -1, cols).max(axis=2)
        return largest

    def scales(self, maxima: F32, dtype: Dtype, highest: float) -> F32:
        """The scale of each block.

        Args:
            maxima: [blocks down, blocks across], the largest size in each, finite.
            dtype: of the checkpoint.
            highest: the largest size in the whole matrix; only NVFP4 asks.
        """
        return self.scaling(self.grid, maxima, dtype, highest)


FORMATS = {
    "fp8-block": Format(E4M3, 128, 128, divided),
    "fp8-channel": Format(E4M3, 1, None, divided),
    "int8-channel": Format(INT8, 1, None, divided),
    "int4-g128": Format(INT4, 1, 128, divided),
    "int4-g32": Format(INT4, 1, 32, divided),
    "mxfp4": Format(E2M1, 1, 32, power_of_two),
    "nvfp4": Format(E2M1, 1, 16, two_levels),
}


def format_names(text: str | None) -> tuple[str, ...]:
    """Names as an option has them, with commas between; all of them where it is not given."""
    return tuple(FORMATS) if text is None else tuple(name.strip() for name in text.split(","))


def chosen(names: Sequence[str]) -> dict[str, Format]:
    """The formats of these names. Raises UsageError for a name that is none, and for none at all."""
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise UsageError(
            "unknown format" if unknown else "no format",
            found=repr(unknown[0]) if unknown else None,
            expected=", ".join(FORMATS),
        )
    return {name: FORMATS[name] for name in dict.fromkeys(names)}
