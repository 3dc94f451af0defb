"""The numbers that a code can stand for, and how a value finds its code. Plain numpy, entry by entry.

A grid knows no scales: what it is given is a weight already divided by its scale. Values must not be NaN; those
beyond the grid's range, infinities included, go to its end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import GridName

F32 = NDArray[np.float32]
Codes = NDArray[np.uint8]  # one code per entry, whatever its width in files


class Grid(ABC):
    """A set of numbers with codes.

    Attributes:
        name: what engines call it.
        bits: the width of a code: 8, or 4 for two codes in a byte.
        numbers: float32 [2^bits], what each code stands for; NaN where that is none.
    """

    name: GridName
    bits: int
    numbers: F32

    @abstractmethod
    def round(self, values: F32) -> F32:
        """The nearest number of the grid, of two as near the one with the even code. Keeps a zero's sign."""

    @abstractmethod
    def encode(self, values: F32) -> Codes:
        """The code of the nearest number. Zero is +0, also what comes near it from below."""

    @cached_property
    def _row(self) -> tuple[F32, Codes]:
        """The numbers in ascending order, up to infinity, and their codes; of zero, +0's."""
        codes = np.flatnonzero(np.isfinite(self.numbers) & ~((self.numbers == 0) & np.signbit(self.numbers)))
        codes = codes[np.argsort(self.numbers[codes])]
        return np.append(self.numbers[codes], np.float32(np.inf)), codes.astype(np.uint8)

    @cached_property
    def lowest(self) -> float:
        return float(self._row[0][0])

    @cached_property
    def highest(self) -> float:
        return float(self._row[0][-2])

    def decode(self, codes: Codes) -> F32:
        """The number of each code."""
        return self.numbers[codes]

    def neighbours(self, values: F32) -> Neighbours:
        """The numbers on either side of each value: a <= value < b. Above the highest b is infinite."""
        row, codes = self._row
        y = np.clip(values, self.lowest, self.highest)
        below = np.searchsorted(row, y, side="right") - 1
        above = np.minimum(below + 1, len(codes) - 1)
        return Neighbours(y, row[below], row[below + 1], codes[below], codes[above])

    def stochastic(self, values: F32, random: NDArray[np.uint32]) -> Codes:
        """The code above or below, by chance, so that the mean of many draws is the value.

        Args:
            values: float32 [n]
            random: [n], each uniform in 0..2^32-1.
        """
        near = self.neighbours(values)
        up = random < np.floor(near.share.astype(np.float64) * 2.0**32)
        return np.where(up, near.code_b, near.code_a)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Values, saturated to their grid, between its numbers: a <= y < b. All arrays are [n]."""

    y: F32
    a: F32
    b: F32
    code_a: Codes
    code_b: Codes

    @property
    def share(self) -> F32:
        """How far y is on its way from a to b, in float32; 0 at the grid's upper end."""
        return (self.y - self.a) / (self.b - self.a)


class Integers(Grid):
    """-2^(bits-1) to 2^(bits-1)-1.

    A code of 8 bits is the number in two's complement; one of 4 bits is the number plus 8, as pack-quantized has it.
    """

    def __init__(self, name: GridName, bits: int) -> None:
        self.name, self.bits = name, bits
        self._zero = 0 if bits == 8 else 1 << (bits - 1)
        half = 1 << (bits - 1)
        numbers = np.arange(-half, half, dtype=np.float32)
        self.numbers = np.roll(numbers, self._zero - half)

    def round(self, values: F32) -> F32:
        nearest: F32 = np.rint(np.clip(values, self.lowest, self.highest))
        return nearest

    def encode(self, values: F32) -> Codes:
        return (self.round(values).astype(np.int16) + self._zero).astype(np.uint8)


class Minifloats(Grid):
    """Sign, exponent and mantissa, with subnormal numbers and without infinities.

    With `nan` the code of all ones is not a number.
    """

    def __init__(self, name: GridName, bits: int, mantissa: int, lowest_exponent: int, *, nan: bool) -> None:
        self.name, self.bits = name, bits
        self._mantissa, self._bottom = mantissa, lowest_exponent
        code = np.arange(1 << (bits - 1))
        exponent, fraction = code >> mantissa, code & ((1 << mantissa) - 1)
        whole = np.where(exponent > 0, fraction + (1 << mantissa), fraction)
        positive = np.ldexp(whole.astype(np.float32), np.maximum(exponent - 1, 0) + lowest_exponent - mantissa)
        if nan:
            positive[-1] = np.nan
        self.numbers = np.concatenate([positive, -positive]).astype(np.float32)

    def _scaled(self, values: F32) -> tuple[F32, NDArray[np.int32]]:
        """|value| in steps of its binade (or of the subnormals), rounded, and that binade's exponent."""
        size = np.minimum(np.abs(values), np.float32(self.highest))
        exponent = np.maximum((size.view(np.int32) >> 23) - 127, self._bottom)
        steps: F32 = np.rint(size * _power(self._mantissa - exponent))
        return steps, exponent

    def round(self, values: F32) -> F32:
        steps, exponent = self._scaled(values)
        nearest: F32 = np.copysign(steps * _power(exponent - self._mantissa), values)
        return nearest

    def encode(self, values: F32, *, signed_zero: bool = False) -> Codes:
        """As `Grid.encode`; with `signed_zero`, what rounds to zero from below is -0, as a cast has it."""
        steps, exponent = self._scaled(values)
        # The step after the last of a binade is the first of the next one: codes run on.
        code = ((exponent - self._bottom) << self._mantissa) + steps.astype(np.int32)
        negative = np.signbit(values) & (signed_zero | (code > 0))
        return (code | (negative.astype(np.int32) << (self.bits - 1))).astype(np.uint8)


def _power(exponent: NDArray[np.int32]) -> F32:
    """2^exponent, for exponents of normal float32 numbers."""
    bits: NDArray[np.int32] = (exponent + 127) << 23
    return bits.view(np.float32)


E4M3 = Minifloats("E4M3", 8, 3, -6, nan=True)
E2M1 = Minifloats("E2M1", 4, 1, 0, nan=False)
INT8 = Integers("INT8", 8)
INT4 = Integers("INT4", 4)

# The powers of two that an E8M0 scale can be; 255 is not a number, and 0 a subnormal float32.
E8M0: F32 = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)).astype(np.float32), np.float32(np.nan))


def split(packed: NDArray[np.uint8]) -> Codes:
    """The codes of 4 bits in bytes [..., n]: [..., 2n], the low one first. Little-endian words are bytes, too."""
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def join(codes: Codes) -> NDArray[np.uint8]:
    """The inverse of `split`."""
    low, high = codes[..., ::2], codes[..., 1::2]
    return low | np.left_shift(high, 4, dtype=np.uint8)
