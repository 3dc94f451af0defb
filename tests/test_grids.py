"""The numbers that codes stand for, against their definitions: exact fractions, every code, every tie."""

from __future__ import annotations

import bisect
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from safepatch_core.merging.quantised import grids
from safepatch_core.merging.quantised.grids import E2M1, E4M3, E8M0, INT4, INT8

GRIDS = {"e4m3": E4M3, "e2m1": E2M1, "int8": INT8, "int4": INT4}


def e4m3(code: int) -> Fraction | None:
    exponent, mantissa = code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return None
    size = Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7) if exponent else Fraction(mantissa, 512)
    return -size if code & 128 else size


def e2m1(code: int) -> Fraction:
    size = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)][code & 7]
    return -size if code & 8 else size


MEANING: dict[str, Any] = {
    "e4m3": [e4m3(code) for code in range(256)],
    "e2m1": [e2m1(code) for code in range(16)],
    "int8": [Fraction(code - 256 if code > 127 else code) for code in range(256)],
    "int4": [Fraction(code - 8) for code in range(16)],
}

# Numbers and their codes, ascending; of the two zeros, +0.
ROWS = {
    name: sorted((n, c) for c, n in enumerate(of) if n is not None and (n or of.index(0) == c))
    for name, of in MEANING.items()
}


def nearest(name: str, value: float) -> int:
    """The code by the definition: of all numbers, the nearest; of two, the one with the even code; never -0."""
    row = ROWS[name]
    exact = Fraction(float(np.clip(value, -1e9, 1e9)))
    at = bisect.bisect(row, (exact,))
    # A number of the integers is even where its code is: 4-bit codes are shifted by 8, an even number.
    return min(row[max(at - 1, 0) : at + 2], key=lambda pair: (abs(pair[0] - exact), pair[1] % 2))[1]


def values(name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Every number, every tie, what lies beside both, and what lies beyond."""
    numbers = sorted({float(n) for n in MEANING[name] if n is not None})
    ties = [(a + b) / 2 for a, b in zip(numbers, numbers[1:], strict=False)]
    at = np.array([*numbers, *ties, numbers[-1] * 1.03, numbers[-1] * 1.1, 1e9, 3e38, np.inf], np.float32)
    at = np.concatenate([at, -at])
    beside = [np.nextafter(at, np.float32(way)) for way in (-np.inf, np.inf)]
    tiny = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-30, -1e-30], np.float32)
    random = np.random.default_rng(7).standard_normal(500).astype(np.float32) * np.float32(numbers[-1] / 2)
    return np.concatenate([at, *beside, tiny, random])


@pytest.mark.parametrize("name", GRIDS)
def test_every_code_is_its_number(name: str) -> None:
    numbers = GRIDS[name].decode(np.arange(len(MEANING[name]), dtype=np.uint8))
    for code, (found, expected) in enumerate(zip(numbers, MEANING[name], strict=True)):
        assert np.isnan(found) if expected is None else Fraction(float(found)) == expected, code
        if expected == 0:
            assert np.signbit(found) == (code != MEANING[name].index(0))
    finite = [n for n in MEANING[name] if n is not None]
    assert (GRIDS[name].lowest, GRIDS[name].highest) == (min(finite), max(finite))


@pytest.mark.parametrize("name", GRIDS)
def test_the_nearest_number(name: str) -> None:
    given = values(name)
    found = GRIDS[name].encode(given)
    assert found.tolist() == [nearest(name, value) for value in given]
    rounded = GRIDS[name].round(given)
    assert np.array_equal(rounded, GRIDS[name].decode(found))
    assert np.array_equal(np.signbit(rounded[rounded == 0]), np.signbit(given[rounded == 0]))


@pytest.mark.parametrize("name", GRIDS)
def test_neighbours(name: str) -> None:
    grid, given = GRIDS[name], values(name)
    near = grid.neighbours(given)
    numbers = sorted({float(n) for n in MEANING[name] if n is not None})
    for i, value in enumerate(np.clip(given, numbers[0], numbers[-1])):
        below = max(n for n in numbers if n <= value)
        above = min((n for n in numbers if n > value), default=np.inf)
        assert (near.y[i], near.a[i], near.b[i]) == (value, below, above)
    assert np.array_equal(grid.decode(near.code_a), near.a)
    inside = np.isfinite(near.b)
    assert np.array_equal(grid.decode(near.code_b)[inside], near.b[inside])
    found = grid.decode(np.concatenate([near.code_a, near.code_b]))
    assert not np.signbit(found[found == 0]).any()


@pytest.mark.parametrize("name", GRIDS)
def test_stochastic_rounding_goes_up_below_its_share(name: str) -> None:
    """b iff u < floor(share * 2^32), at the share's edge and at both ends of what u can be."""
    grid, given = GRIDS[name], values(name)
    near = grid.neighbours(given)
    edge = np.floor(((near.y - near.a) / (near.b - near.a)).astype(np.float64) * 2**32).astype(np.int64)
    for u in (np.zeros_like(edge), edge - 1, edge, edge + 1, np.full_like(edge, 2**32 - 1)):
        u = np.clip(u, 0, 2**32 - 1)
        found = grid.stochastic(given, u.astype(np.uint32))
        assert np.array_equal(found, np.where(u < edge, near.code_b, near.code_a))
    on = np.array([float(n) for n in MEANING[name] if n is not None], np.float32)
    assert np.array_equal(grid.decode(grid.stochastic(on, np.zeros(len(on), np.uint32))), on)


def test_stochastic_rounding_of_known_values() -> None:
    y = np.array([2.5, 2.5, 5.0, -0.125, -0.125, 7.0, -7.0], np.float32)
    u = np.array([2**31 - 1, 2**31, 0, 3 * 2**30 - 1, 3 * 2**30, 0, 0], np.uint32)
    assert E2M1.decode(E2M1.stochastic(y, u)).tolist() == [3, 2, 6, 0, -0.5, 6, -6]
    assert E2M1.stochastic(y, u)[3] == 0  # +0


def test_the_mean_of_many_draws_is_the_value() -> None:
    y = np.full(1 << 16, 0.3, np.float32)
    draws = E2M1.decode(E2M1.stochastic(y, np.random.default_rng(1).integers(0, 2**32, len(y), np.uint32)))
    assert set(draws.tolist()) == {0.0, 0.5}
    assert abs(draws.mean() - 0.3) < 0.004


@pytest.mark.parametrize("name", GRIDS)
def test_a_code_times_its_scale_gives_the_code_again(name: str) -> None:
    """What a value stored on the grid is divided by, it was multiplied with: nothing moves by itself."""
    grid = GRIDS[name]
    codes = np.array([c for c, n in enumerate(MEANING[name]) if n is not None], np.uint8)
    numbers = grid.decode(codes)
    random = np.random.default_rng(3)
    for scale in np.exp2(random.uniform(-100, 60, 400)).astype(np.float32):
        assert np.array_equal(grid.decode(grid.encode((numbers * scale) / scale)), numbers)


def test_powers_of_two() -> None:
    assert [Fraction(float(x)) for x in E8M0[:255]] == [Fraction(2) ** (b - 127) for b in range(255)]
    assert np.isnan(E8M0[255]) and E8M0.dtype == np.float32


def test_a_cast_to_e4m3_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(codes, E4M3.numbers, equal_nan=True)
    random = np.random.default_rng(5)
    wide = (random.standard_normal(200_000) * np.exp2(random.uniform(-14, 10, 200_000))).astype(np.float32)
    given = np.clip(np.concatenate([values("e4m3"), wide]), -448, 448)
    cast = torch.from_numpy(given).to(torch.float8_e4m3fn)
    assert np.array_equal(cast.view(torch.uint8).numpy(), E4M3.encode(given, signed_zero=True))
    assert np.array_equal(cast.float().numpy().view(np.uint32), E4M3.round(given).view(np.uint32))


def test_two_codes_in_a_byte() -> None:
    """The low one first; words of the same bits are -8..7 as pack-quantized stores them."""
    packed = np.array([[0x10, 0x32, 0xFE]], np.uint8)
    assert grids.split(packed).tolist() == [[0, 1, 2, 3, 14, 15]]
    assert np.array_equal(grids.join(grids.split(packed)), packed)
    words = np.array([0x76543210, 0xFEDCBA98], "<u4").view(np.uint8)
    assert INT4.decode(grids.split(words)).tolist() == list(range(-8, 8))
