"""Bit patterns to float32 and back, exactly, and sets of entries as bits of an integer.

Entries travel as integers and are rounded by rule. A thread holds eight neighbours (16 bytes of 16-bit
entries), so eight truth values fit one register: what a pass must remember of a patch is a register or two,
and unions, differences and counts cost one instruction where masks cost eight.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl


# reference.py: to_float32
@triton.jit
def to_float(bits, dtype: tl.constexpr):
    """The exact float32 value of F32, F16 or BF16 bit patterns (uint32 or uint16)."""
    if dtype == "F32":
        return bits.to(tl.float32, bitcast=True)
    elif dtype == "F16":
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


# reference.py: from_float32
@triton.jit
def from_float(values, dtype: tl.constexpr):
    """Round to nearest even into `dtype`. What NaN becomes is of no matter: no caller writes it."""
    bits = values.to(tl.uint32, bitcast=True)
    if dtype == "F32":
        return bits
    elif dtype == "F16":
        return values.to(tl.float16).to(tl.uint16, bitcast=True)
    else:
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)


@triton.jit
def magnitude(values):
    """The bits of |values|: ordered like them, and from 0x7F800000 on not finite."""
    return values.to(tl.uint32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def finite(values):
    return magnitude(values) < 0x7F800000


@triton.jit
def pack(mask):
    """Truth values [n] as sets [n / 8]: entry i is bit i % 8."""
    shape: tl.constexpr = [mask.shape[0] // 8, 8]
    return tl.sum(tl.reshape(mask.to(tl.int32), shape) << tl.arange(0, 8)[None, :], axis=1)


@triton.jit
def unpack(sets):
    """The inverse of `pack`."""
    bits = (sets[:, None] >> tl.arange(0, 8)[None, :]) & 1
    return tl.reshape(bits, [sets.shape[0] * 8]) != 0


@triton.jit
def any_from(keys, bound):
    """Which sets of eight have a key of at least `bound`: 1 or 0 each."""
    return (tl.max(tl.reshape(keys, [keys.shape[0] // 8, 8]), axis=1) >= bound).to(tl.int32)


@triton.jit
def below(bound, BLOCK: tl.constexpr):
    """The sets of a block's first `bound` entries; any int64, also negative."""
    left = bound - tl.arange(0, BLOCK // 8) * 8
    return (1 << tl.minimum(tl.maximum(left, 0), 8).to(tl.int32)) - 1


@triton.jit
def members(sets):
    """How many entries each set of eight holds."""
    pairs = sets - ((sets >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0xF
