"""Merging into codes once more, by brute force and from the contract alone: no code of the product.

Read beside SPEC section 7, whose words name the variables: `v`, `w`, `acc`, `s`, `y`, `a`, `b`, `u`.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from tests import oracle
from tests.oracle import BadInput, BadRecipe, BoolArray, F32Array, Patch, Tensor

SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
ROUNDED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class Kept(NamedTuple):
    acted: int
    changed: int
    saturated: int
    survival: float | None
    cosine: float | None


class Result(NamedTuple):
    tensors: dict[str, Tensor]
    kept: dict[str, Kept]


def number(code: int) -> float:
    """What a code of E4M3 stands for: sign, four bits of exponent (bias 7), three of mantissa; all ones is NaN."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


NUMBERS = np.array([number(code) for code in range(256)], np.float32)


@dataclass
class Weight:
    """A logical weight: a code and a scale for each entry, and how codes are put back into the stored tensor."""

    codes: Any
    scales: F32Array
    shape: tuple[int, ...]
    numbers: F32Array  # what each code stands for
    stored: str
    put: Callable[[Any], bytes]
    companions: list[str]

    @property
    def order(self) -> Any:
        """One code for each number, ascending; +0 for zero."""
        finite = [c for c, x in enumerate(self.numbers) if math.isfinite(x) and not (x == 0 and np.signbit(x))]
        return np.array(sorted(finite, key=lambda c: self.numbers[c]))

    @property
    def ends(self) -> tuple[Any, Any]:
        return self.numbers[self.order[0]], self.numbers[self.order[-1]]

    @property
    def values(self) -> F32Array:
        found: F32Array = self.numbers[self.codes] * self.scales
        return found


Unpack = Callable[[dict[str, Tensor]], dict[str, Weight]]


def fp8(block: tuple[int, int]) -> Unpack:
    """Every E4M3 weight with the scales beside it."""

    def weights(tensors: dict[str, Tensor]) -> dict[str, Weight]:
        found = {}
        for name in [n for n, t in tensors.items() if t.dtype == "F8_E4M3"]:
            companion, s = scales_of(name, tensors, block)
            codes = np.frombuffer(tensors[name].data, np.uint8)
            flat = s.reshape(-1).astype(np.float32)
            shape = tensors[name].shape
            found[name] = Weight(codes, flat, shape, NUMBERS, name, lambda new: bytes(new.tobytes()), [companion])
        return found

    return weights


@dataclass
class OnTwin(Patch):
    """A patch whose deltas are taken from the values that a trainer was handed, by name."""

    handed: dict[str, Tensor] = field(default_factory=dict)

    def delta(self, name: str, base: Tensor) -> F32Array:
        return super().delta(name, self.handed.get(name, base))


def scales_of(name: str, tensors: dict[str, Tensor], block: tuple[int, int]) -> tuple[str, F32Array]:
    """The scale of each entry of a weight, [rows, cols]."""
    module = name.removesuffix(".weight")
    (found,) = (n for n in (f"{module}.{end}" for end in SCALES) if n in tensors)
    t, (rows, cols) = tensors[found], tensors[name].shape
    if t.dtype in ("F8_E8M0", "U8"):
        flat = np.array([math.nan if b == 255 else 2.0 ** (b - 127) for b in t.data], np.float32)
    else:
        flat = oracle.to_f32(t)
    if flat.size == 1:
        return found, np.full((rows, cols), flat.reshape(-1)[0])
    table = flat.reshape(t.shape)
    if table.shape in ((rows, 1), (rows,)):
        return found, np.broadcast_to(table.reshape(rows, 1), (rows, cols))
    wide = np.repeat(np.repeat(table, block[0], axis=0), block[1], axis=1)
    return found, wide[:rows, :cols]


def nearest(y: F32Array, weight: Weight) -> np.ndarray[Any, np.dtype[np.uint8]]:
    out = np.empty(len(y), np.uint8)
    order = weight.order
    for i, value in enumerate(y.astype(np.float64)):
        far = np.abs(weight.numbers[order].astype(np.float64) - value)
        best = order[far == far.min()]
        out[i] = best[0] if len(best) == 1 else next(code for code in best if code % 2 == 0)
    return out


def stochastic(y: F32Array, weight: Weight, seed: int, name: str, at: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    message = b"safepatch-round\0" + struct.pack("<Q", seed) + b"\0" + name.encode()
    key = int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")
    order, numbers = weight.order, weight.numbers
    out = np.empty(len(y), np.uint8)
    for j, (value, i) in enumerate(zip(y, at, strict=True)):
        below = int(np.flatnonzero(numbers[order] <= value)[-1])
        out[j] = order[below]
        if below + 1 < len(order):
            a, b = numbers[order[below]], numbers[order[below + 1]]
            share = np.float32(np.float32(value - a) / np.float32(b - a))
            block = int(i) // 4
            u = oracle.philox([block % 2**32, block >> 32, 0, 0], (key % 2**32, key >> 32))[int(i) % 4]
            if int(u) < math.floor(float(share) * 2**32):
                out[j] = order[below + 1]
    return out


def merge(recipe_path: Path, block: tuple[int, int] = (128, 128), unpack: Unpack | None = None) -> Result:
    """All output tensors, and what is left of each patch; of FP8 in blocks, unless weights are unpacked otherwise."""
    with np.errstate(all="ignore"):
        return _merge(recipe_path, unpack or fp8(block))


def _merge(recipe_path: Path, unpack: Unpack) -> Result:
    recipe = yaml.safe_load(recipe_path.read_text())
    rule: dict[str, Any] = {"reference": "dequantised", "reference_dtype": "bfloat16", "rounding": "stochastic"}
    rule |= {"saturate": "clamp", "survival": [0.8, 1.25]} | recipe["quantized"]
    root = recipe_path.parent
    stored = oracle.load_checkpoint(root / recipe["base"])
    from_file = rule["reference"] != "dequantised"
    if rule["rounding"] == "nearest" and not from_file:
        raise BadRecipe("nearest without a reference")
    original = oracle.load_checkpoint(root / rule["reference"]) if from_file else {}
    weights, logical = unpack(stored), dict(stored)
    for name, weight in weights.items():
        for companion in (weight.stored, *weight.companions):
            logical.pop(companion, None)
        w = oracle.to_f32(original[name]) if from_file else weight.values
        logical[name] = Tensor("F32", weight.shape, w.astype("<f4").tobytes())
    handed = {
        n: Tensor("F32", t.shape, oracle.to_f32(as_dtype(t, ROUNDED[rule["reference_dtype"]])).tobytes())
        for n, t in logical.items()
        if n in weights
    }
    plain = [oracle.load_patch(entry, root, root / recipe["base"]) for entry in recipe["patches"]]
    patches = [OnTwin(**{f.name: getattr(p, f.name) for f in fields(Patch)}, handed=handed) for p in plain]
    targets = sorted(
        (n for n, t in logical.items() if oracle.is_target(n, t, recipe.get("targets", "linear"))), key=str.encode
    )
    deltas = {p.name: oracle.deltas_of(p, logical, targets, False) for p in patches}
    chosen = {p.name: oracle.select(p, logical, targets, recipe, deltas) for p in patches}
    tensors, sums = dict(stored), {p.name: np.zeros(6) for p in patches}
    for name in targets:
        w = oracle.to_f32(logical[name])
        held = [chosen[p.name].T[name] for p in patches]
        cd = [p.at(name).c * chosen[p.name].d[name] for p in patches]
        c, factor = [p.at(name).c for p in patches], np.float32(recipe.get("lambda", 1.0))
        acc, acts = oracle.combine(*oracle.rule_of(recipe), w, held, cd, c, factor)
        if name not in weights:
            tensors[name] = oracle.write(name, stored[name], acc, np.any(acts, axis=0))
            continue
        weight = weights[name]
        new = _write(name, weight, w, acc, np.any(acts, axis=0), recipe.get("seed", 0), rule)
        tensors[weight.stored] = stored[weight.stored]._replace(data=weight.put(new))
        for p, mine in zip(patches, acts, strict=True):
            alone = mine & (np.sum(acts, axis=0) == 1)
            sums[p.name] += _sums(alone, weight, new, w, acc)
    kept = {name: _kept(*of) for name, of in sums.items()}
    low, high = rule["survival"]
    for name, found in kept.items():
        if found.survival is not None and not low <= found.survival <= high:
            raise BadInput(f"{name}: survival {found.survival}")
    return Result(tensors, kept)


def as_dtype(t: Tensor, dtype: str) -> Tensor:
    return Tensor(dtype, t.shape, oracle.from_f32(oracle.to_f32(t), dtype))


def _write(
    name: str, weight: Weight, w: F32Array, acc: F32Array, acts: BoolArray, seed: int, rule: dict[str, Any]
) -> Any:
    old, s, numbers = weight.codes, weight.scales, weight.numbers
    lowest, highest = weight.ends
    at = np.flatnonzero(acts & np.isfinite(w) & np.isfinite(weight.values))
    if np.any(~(s[acts] > 0) | ~np.isfinite(s[acts]) | (s[acts] < 2.0**-100)):
        raise BadInput(f"{name}: a scale")
    if not np.all(np.isfinite(acc[at])):
        raise BadInput(f"{name}: overflow")
    y = acc[at] / s[at]
    if rule["saturate"] == "error" and np.any((y < lowest) | (y > highest)):
        raise BadInput(f"{name}: saturated")
    y = np.minimum(np.maximum(y, lowest), highest)
    codes = nearest(y, weight) if rule["rounding"] == "nearest" else stochastic(y, weight, seed, name, at)
    new = old.copy()
    new[at] = np.where(numbers[codes] == numbers[old[at]], old[at], codes)
    return new


def _sums(alone: BoolArray, weight: Weight, new: Any, w: F32Array, acc: F32Array) -> Any:
    old, s, numbers = weight.codes, weight.scales, weight.numbers
    at = np.flatnonzero(alone & np.isfinite(w) & np.isfinite(weight.values))
    moved = (numbers[new] * s)[at].astype(np.float64) - weight.values[at]
    asked = acc[at].astype(np.float64) - w[at]
    y, (lowest, highest) = acc[at] / s[at], weight.ends
    saturated = (y < lowest) | (y > highest)
    counts = [len(at), np.sum(new[at] != old[at]), np.sum(saturated)]
    return np.array([*counts, np.sum(moved * asked), np.sum(asked**2), np.sum(moved**2)])


def _kept(acted: float, changed: float, saturated: float, along: float, asked: float, moved: float) -> Kept:
    survival = float(along / asked) if asked else None
    cosine = float(along / math.sqrt(asked * moved)) if asked and moved else None
    return Kept(int(acted), int(changed), int(saturated), survival, cosine)


def config(block: tuple[int, int]) -> str:
    """config.json of a fine-grained FP8 model."""
    return json.dumps({"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}})
