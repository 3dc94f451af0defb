"""The merge contract once more, by brute force: whole tensors, full sorts, no code of the product.

Read beside SPEC section 2, whose words name the variables: `w`, `d`, `r`, `s`, `e`, `k`, `T`, `c`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import yaml

from tests.oracle_adapters import Adapter, Change, Misfit, model_type, with_rows

F32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
U64Array = npt.NDArray[np.uint64]

WIDTH = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
MERGED = ("F32", "F16", "BF16")
FLOATS = (*MERGED, "F64")


class OracleError(Exception):
    """The contract says that this recipe must fail with `status`."""

    status = 65


class BadRecipe(OracleError):
    status = 64


class BadInput(OracleError):
    status = 65


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Counts(NamedTuple):
    entries: int
    eligible: int
    selected: int
    applied: int
    cosine: float | None = None  # of a patch with a gate


class Selection(NamedTuple):
    """One patch's delta, eligible entries and chosen entries, per target."""

    d: dict[str, F32Array]
    e: dict[str, BoolArray]
    T: dict[str, BoolArray]


class Result(NamedTuple):
    tensors: dict[str, Tensor]
    counts: dict[str, dict[str, Counts]]


# Files


def load_file(path: Path) -> dict[str, Tensor]:
    blob = path.read_bytes()
    (size,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        data = blob[8 + size + begin : 8 + size + end]
        tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), data)
    return tensors


def save_file(path: Path, tensors: Mapping[str, Tensor], pad: int = 0) -> None:
    """`tensors` in their given order; `pad` blanks end the header, so that data may start at any offset."""
    header, end = {}, 0
    for name, t in tensors.items():
        begin, end = end, end + len(t.data)
        header[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False).encode() + b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t.data for t in tensors.values()))


def load_checkpoint(path: Path) -> dict[str, Tensor]:
    """One file, or a directory with an index or with one file."""
    if path.is_file():
        return load_file(path)
    if not path.is_dir():
        raise BadInput(f"{path} is missing")
    index = path / "model.safetensors.index.json"
    files = [path / "model.safetensors"]
    if index.exists():
        files = [path / f for f in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    elif not files[0].exists():
        files = sorted(path.glob("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(load_file(file))
    return tensors


# Numbers


def to_f32(t: Tensor) -> F32Array:
    if t.dtype == "F32":
        return np.frombuffer(t.data, "<f4").astype(np.float32)
    if t.dtype == "F16":
        return np.frombuffer(t.data, "<f2").astype(np.float32)
    if t.dtype == "BF16":
        return (np.frombuffer(t.data, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    raise BadInput(f"{t.dtype} is no dtype that a merge can read")


def from_f32(x: F32Array, dtype: str) -> bytes:
    """`x` rounded to nearest, ties to even. A NaN does not survive the round trip bit for bit."""
    if dtype == "F32":
        return x.astype("<f4").tobytes()
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return x.astype("<f2").tobytes()
    assert dtype == "BF16"
    bits = x.view(np.uint32)
    kept, cut = bits >> np.uint32(16), bits & np.uint32(0xFFFF)
    up = (cut > 0x8000) | ((cut == 0x8000) & (kept % 2 == 1))
    rounded = np.where(np.isnan(x), np.uint32(0x7FC0), kept + up)
    return rounded.astype("<u2").tobytes()


def philox(counter: Iterable[npt.ArrayLike], key: tuple[int, int]) -> list[U64Array]:
    """Philox4x32-10: four 32-bit lanes, each held in a uint64."""
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = key
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> half) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> half) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def random_key(seed: int, patch: str, tensor: str) -> tuple[int, int]:
    message = b"safepatch\0" + struct.pack("<Q", seed) + patch.encode() + b"\0" + tensor.encode()
    key = int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")
    return key % 2**32, key >> 32


def retained(n: int, p: float, key: tuple[int, int]) -> BoolArray:
    if p >= 1:
        return np.ones(n, bool)
    block = np.arange((n + 3) // 4, dtype=np.uint64)
    lanes = philox((block & np.uint64(0xFFFFFFFF), block >> np.uint64(32), 0, 0), key)
    u = np.stack(np.broadcast_arrays(*lanes), axis=1).reshape(-1)[:n]
    return u < np.uint64(math.floor(p * 2**32))


def count_of_top(top: float, n: int) -> int:
    return round(float(top) * float(n))


def k_of(top: float, n: int, recipe: Mapping[str, Any]) -> int:
    if recipe.get("quota", "even") == "even":
        return count_of_top(top, n)
    return max(1, math.floor(float(top) * float(n))) if top > 0 and n > 0 else 0


def top_k(s: F32Array, e: BoolArray, k: int) -> BoolArray:
    """The k eligible entries of largest score; a full stable sort leaves equal scores in order of position."""
    positions = np.flatnonzero(e)
    best = positions[np.argsort(-s[positions], kind="stable")][:k]
    chosen = np.zeros(len(s), bool)
    chosen[best] = True
    return chosen


# Patches


def band(p: Patch, s: F32Array, e: BoolArray, recipe: Mapping[str, Any]) -> BoolArray:
    """The entries that belong to the best share `skip + top`, less the best share `skip`."""
    both, best = (top_k(s, e, k_of(share, len(s), recipe)) for share in (p.skip + p.top, p.skip))
    return both & ~best


@dataclass
class Patch:
    name: str
    kind: str
    tensors: dict[str, Tensor]
    adapter: Adapter | None
    weight: str
    importance: dict[str, Tensor]
    top: float
    skip: float
    retain: float
    c: np.float32
    minus: dict[str, Tensor] | None
    rows: str
    entry: Mapping[str, Any]

    def at(self, name: str) -> Patch:
        """With the numbers of the first override that names this tensor."""
        for other in self.entry.get("overrides", []):
            if any(fnmatchcase(name, glob) for glob in other["names"]):
                merged = {**self.entry, **{key: value for key, value in other.items() if key != "names"}}
                top, skip, retain, c = rates(merged)
                return replace(self, top=top, skip=skip, retain=retain, c=c)
        return self

    def touches(self, name: str) -> bool:
        if self.adapter is not None:
            return name in self.adapter.modules()
        return name in self.tensors and (self.minus is None or name in self.minus)

    def ranks(self, name: str) -> bool:
        return self.weight == "magnitude" or name in self.importance

    def touched(self) -> dict[str, Tensor]:
        """All float tensors that this patch would change by the base's names; of an adapter, their dimensions."""
        if self.adapter is None:
            return {n: t for n, t in self.tensors.items() if t.dtype in FLOATS}
        return {n: Tensor("F32", (0,) if n.endswith(".bias") else (0, 0), b"") for n in self.adapter.modules()}

    def change(self, name: str, base: Tensor) -> Change:
        """Patched values, or a delta, flat."""
        if self.adapter is not None:
            try:
                found = self.adapter.change(name, to_f32(base).reshape(base.shape))
            except Misfit as error:
                raise BadInput(f"{name}: does not fit {base.shape}") from error
            assert found is not None
            return Change(found.patched, found.values.reshape(-1))
        values = self.fitted(name, self.tensors[name], base, self.kind == "checkpoint")
        if self.kind == "delta" or self.minus is None:
            return Change(self.kind == "checkpoint", values)
        return Change(False, values - self.fitted(name, self.minus[name], base, True))

    def fitted(self, name: str, t: Tensor, base: Tensor, absolute: bool) -> F32Array:
        """Flat; with `rows: common` the rows that both have, the others the base's, or zero."""
        x = to_f32(t).reshape(t.shape)
        if self.rows == "common" and any(word in name for word in NOT_LINEAR):
            rest = to_f32(base).reshape(base.shape)
            x = with_rows(x, rest if absolute else np.zeros_like(rest))
        if x.shape != base.shape:
            raise BadInput(f"{name}: shape {t.shape}, the base has {base.shape}")
        return x.reshape(-1)

    def delta(self, name: str, base: Tensor) -> F32Array:
        change = self.change(name, base)
        return change.values - to_f32(base) if change.patched else change.values

    def score(self, name: str, base: Tensor, d: F32Array) -> F32Array:
        if self.weight == "magnitude":
            return np.abs(d)
        if name not in self.importance:
            raise BadInput(f"{name}: missing from the importance")
        t = self.importance[name]
        x = self.fitted(name, t, base, False)
        if self.weight == "scores":
            if np.any((x < 0) & np.isfinite(x)):
                raise BadInput(f"{name}: negative score")
            return x
        w = to_f32(base)
        factor = {"base": w, "delta": d}.get(self.weight)
        if factor is None:
            change = self.change(name, base)
            factor = change.values if change.patched else w + d
        product: F32Array = factor * x
        return np.abs(product)


def shapes_in(base: Path) -> dict[str, tuple[int, ...]]:
    files = [base] if base.is_file() else sorted(base.glob("*.safetensors"))
    return {name: t.shape for file in files for name, t in load_file(file).items()}


def load_adapter(folder: Path, base: Path, rows: str) -> Adapter:
    tensors: dict[str, Any] = {}
    for name, t in load_file(folder / "adapter_model.safetensors").items():
        tensors[name] = (np.frombuffer(t.data, "<i4") if t.dtype == "I32" else to_f32(t)).reshape(t.shape)
    return Adapter(
        json.loads((folder / "adapter_config.json").read_text()), tensors, model_type(base), rows, shapes_in(base)
    )


def load_patch(entry: Mapping[str, Any], root: Path, base: Path) -> Patch:
    source = root / entry["source"]
    is_adapter = (source / "adapter_config.json").is_file()
    kind = entry.get("kind", "lora" if is_adapter else "checkpoint")
    rows = entry.get("rows", "all")
    adapter = load_adapter(source, base, rows) if kind == "lora" else None
    tensors = {} if kind == "lora" else load_checkpoint(source)
    importance = entry.get("importance", "magnitude")
    weight, scores = "magnitude", {}
    if isinstance(importance, dict):
        given = "scores" if "scores" in importance else "gradients"
        weight = "scores" if given == "scores" else importance.get("weight", "patched")
        scores = load_checkpoint(root / importance[given])
    minus = load_checkpoint(root / entry["minus"]) if entry.get("minus") else None
    return Patch(entry["name"], kind, tensors, adapter, weight, scores, *rates(entry), minus, rows, entry)


def rates(entry: Mapping[str, Any]) -> tuple[float, float, float, np.float32]:
    """Top, skip, retain and c of a patch or of an override in it."""
    retain, scale = float(entry.get("retain", 1.0)), float(entry.get("scale", 1.0))
    c = np.float32(scale / retain) if entry.get("rescale", False) else np.float32(scale)
    return float(entry.get("top", 1.0)), float(entry.get("skip", 0.0)), retain, c


# The merge

ONE = np.float32(1)
# Who acts where several patches hold an entry, and what becomes of their changes.
NOT_LINEAR = ("embed", "lm_head", "wte", "wpe", "shared.weight")
RULES = {"difference": ("alone", "sum"), "sum": ("all", "sum"), "ties": ("elected", "mean")}


def rule_of(recipe: Mapping[str, Any]) -> tuple[str, str]:
    acts, join = RULES[recipe.get("combine", "difference")]
    elect = recipe.get("elect") or {}
    if elect.get("zero") == "positive":
        acts = "elected_up"
    if recipe.get("accumulate") == "deltas":
        join = "total"
    return acts, {"weights": "weighted", "none": "total"}.get(elect.get("divide", ""), join)


def is_target(name: str, t: Tensor, rule: Any) -> bool:
    mask = re.search(r"(^|\.)(attn|attention)\.(masked_)?bias$", name) and (t.shape[:2] in ((), (1, 1)))
    if t.dtype not in FLOATS or mask:
        return False
    if rule == "all":
        return True
    if rule == "linear":
        return len(t.shape) >= 2 and not any(word in name for word in NOT_LINEAR)
    included = any(fnmatchcase(name, glob) for glob in rule.get("include", ["*"]))
    return included and not any(fnmatchcase(name, glob) for glob in rule.get("exclude", []))


def merge(recipe_path: Path) -> Result:
    """All output tensors of the recipe at `recipe_path`, and the counts per patch and target tensor.

    Raises OracleError where the contract says that the merge must fail.
    """
    with np.errstate(all="ignore"):
        return _merge(recipe_path)


def _merge(recipe_path: Path) -> Result:
    recipe = yaml.safe_load(recipe_path.read_text())
    root = recipe_path.parent
    base = load_checkpoint(root / recipe["base"])
    patches = [load_patch(entry, root, root / recipe["base"]) for entry in recipe["patches"]]
    targets = sorted(
        (n for n, t in base.items() if is_target(n, t, recipe.get("targets", "linear"))),
        key=lambda n: n.encode(),
    )
    for name in targets:
        if base[name].dtype not in MERGED:
            raise BadInput(f"{name}: a target of dtype {base[name].dtype}")
    skip_missing = recipe.get("missing", "error") == "skip"
    for p in patches:
        rule = recipe.get("targets", "linear")
        extra = [n for n, t in p.touched().items() if n not in base and is_target(n, t, rule)]
        if not any(p.touches(n) and p.ranks(n) for n in targets):
            raise BadInput(f"{p.name}: nothing of it is a target")
        missing = [n for n in targets if p.kind != "lora" and not p.touches(n)]
        if (extra or missing) and not skip_missing:
            raise BadInput(f"{p.name}: extra {extra}, missing {missing}")

    deltas = {p.name: deltas_of(p, base, targets, skip_missing) for p in patches}
    chosen = {p.name: select(p, base, targets, recipe, deltas) for p in patches}
    tensors = dict(base)
    counts: dict[str, dict[str, Counts]] = {p.name: {} for p in patches}
    for name in targets:
        held = [chosen[p.name].T[name] for p in patches]
        cd = [p.at(name).c * chosen[p.name].d[name] for p in patches]
        factor = np.float32(recipe.get("lambda", 1.0))
        c = [p.at(name).c for p in patches]
        acc, acts = combine(*rule_of(recipe), to_f32(base[name]), held, cd, c, factor)
        tensors[name] = write(name, base[name], acc, np.any(acts, axis=0))
        for p, T, acting in zip(patches, held, acts, strict=True):
            found = angle(p, name, len(acc), deltas)
            eligible = int(chosen[p.name].e[name].sum())
            counts[p.name][name] = Counts(len(acc), eligible, int(T.sum()), int(acting.sum()), found and found.cosine)
    return Result(tensors, counts)


Deltas = Mapping[str, Mapping[str, F32Array]]  # by patch and tensor, of what a patch has


def deltas_of(p: Patch, base: Mapping[str, Tensor], targets: list[str], skip_missing: bool) -> dict[str, F32Array]:
    there = [n for n in targets if p.touches(n) and (p.ranks(n) or not skip_missing)]
    for n in there:
        if not p.ranks(n):
            raise BadInput(f"{n}: missing from the importance")
    return {n: p.delta(n, base[n]) for n in there}


def lane_sum(terms: npt.NDArray[np.float64]) -> float:
    lanes = [0.0] * 4096
    for i, term in enumerate(terms.tolist()):
        lanes[i % 4096] += term
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [lanes[j] + lanes[j + half] for j in range(half)]
    return lanes[0]


class Angle(NamedTuple):
    cosine: float
    moves: bool


def angle(p: Patch, n: str, size: int, deltas: Deltas) -> Angle | None:
    """What the patch's gate is told of a tensor."""
    gate = p.entry.get("gate")
    if gate is None:
        return None
    mine, other = (deltas[name].get(n, np.zeros(size, np.float32)) for name in (p.name, gate["patch"]))
    a, b = (np.where(np.isfinite(d), d, np.float32(0)).astype(np.float64) for d in (mine, other))
    product, first, second = lane_sum(a * b), lane_sum(a * a), lane_sum(b * b)
    return Angle(product / math.sqrt(first * second) if first and second else 0.0, first > 0)


def is_open(p: Patch, found: Angle | None) -> bool:
    """Whether the patch's gate lets it have the tensor."""
    if found is None:
        return True
    gate = p.entry["gate"]
    return found.moves and bool(gate.get("least", -np.inf) <= found.cosine < gate.get("below", np.inf))


def signs_fit(p: Patch, n: str, d: F32Array, deltas: Deltas) -> BoolArray:
    """Where the patch's agreement lets it be chosen."""
    rule = p.entry.get("agreement")
    if rule is None:
        return np.ones(len(d), bool)
    other = deltas[rule["patch"]].get(n, np.zeros_like(d))
    if rule["signs"] == "same":
        return ((d > 0) & (other > 0)) | ((d < 0) & (other < 0))
    return ((d > 0) & (other < 0)) | ((d < 0) & (other > 0))


def select(
    p: Patch, base: Mapping[str, Tensor], targets: list[str], recipe: Mapping[str, Any], deltas: Deltas
) -> Selection:
    d: dict[str, F32Array] = {}
    s: dict[str, F32Array] = {}
    e: dict[str, BoolArray] = {}
    r: dict[str, BoolArray] = {}
    shut: dict[str, bool] = {}
    retain_first = recipe.get("order", "retain-first") == "retain-first"
    for name in targets:
        n = math.prod(base[name].shape)
        r[name] = retained(n, p.at(name).retain, random_key(recipe.get("seed", 0), p.name, name))
        d[name], s[name], e[name] = np.zeros(n, np.float32), np.zeros(n, np.float32), np.zeros(n, bool)
        if name not in deltas[p.name]:
            continue
        d[name] = deltas[p.name][name]
        shut[name] = not is_open(p, angle(p, name, n, deltas))
        if not shut[name]:
            s[name] = p.score(name, base[name], d[name])
        finite = np.isfinite(d[name]) & np.isfinite(s[name])
        if recipe.get("nonfinite", "error") == "error" and not finite.all():
            raise BadInput(f"{p.name}: {name}: not finite at {np.flatnonzero(~finite)[0]}")
        e[name] = finite & (s[name] > 0) & signs_fit(p, name, d[name], deltas)
        if retain_first:
            e[name] &= r[name]

    if not any(np.any(np.isfinite(x) & (x != 0)) for x in d.values()):
        raise BadInput(f"{p.name}: every delta is zero")
    asks = bool(p.entry.get("overrides")) or (p.top > 0 and p.skip < 1 and p.retain > 0 and p.c != 0)
    if asks and not all(shut.values()) and not any(np.any(x) for x in e.values()):
        raise BadInput(f"{p.name}: nothing is eligible")
    if recipe.get("scope", "tensor") == "tensor":
        T = {n: band(p.at(n), s[n], e[n], recipe) for n in targets}
    else:
        T = {}
        if targets:
            scores, able = np.concatenate([s[n] for n in targets]), np.concatenate([e[n] for n in targets])
            chosen = band(p, scores, able, recipe)
            cuts = np.cumsum([len(s[n]) for n in targets])[:-1]
            T = dict(zip(targets, np.split(chosen, cuts), strict=True))
    if not retain_first:
        T = {n: T[n] & r[n] for n in targets}
    return Selection(d, e, T)


def combine(
    acts: str,
    join: str,
    w: F32Array,
    held: list[BoolArray],
    cd: list[F32Array],
    c: list[np.float32],
    factor: np.float32 = ONE,
) -> tuple[F32Array, list[BoolArray]]:
    """What each entry becomes in float32, and where each patch acts on it."""
    who = {"alone": alone, "all": lambda held, cd: held, "elected": elected, "elected_up": elected_up}
    acting = who[acts](held, cd)
    total, number = w if join == "sum" else np.zeros_like(w), np.zeros_like(w)
    for mine, change, weight in zip(acting, cd, c, strict=True):
        total = np.where(mine, total + change, total)
        number = np.where(mine, number + (weight if join == "weighted" else np.float32(1)), number)
    if join in ("mean", "weighted"):
        total = np.divide(total, np.where(number == 0, np.float32(1), number), dtype=np.float32)
    if join != "sum":
        total = np.where(np.any(acting, axis=0), w + total * factor, w)
    return total, acting


def alone(held: list[BoolArray], cd: list[F32Array]) -> list[BoolArray]:
    holders = np.sum(held, axis=0)
    return [T & (holders == 1) for T in held]


def elected(held: list[BoolArray], cd: list[F32Array]) -> list[BoolArray]:
    total = np.zeros_like(cd[0])
    for T, change in zip(held, cd, strict=True):
        total = np.where(T, total + change, total)
    return [
        T & (((total > 0) & (change > 0)) | ((total < 0) & (change < 0)) | np.isnan(total))
        for T, change in zip(held, cd, strict=True)
    ]


def elected_up(held: list[BoolArray], cd: list[F32Array]) -> list[BoolArray]:
    """The same, and where the sum is zero those that go up."""
    even = np.zeros_like(cd[0])
    for T, change in zip(held, cd, strict=True):
        even = np.where(T, even + change, even)
    tied = [T & (change > 0) & (even == 0) for T, change in zip(held, cd, strict=True)]
    return [a | b for a, b in zip(elected(held, cd), tied, strict=True)]


def write(name: str, base: Tensor, acc: F32Array, acting: BoolArray) -> Tensor:
    new = from_f32(acc, base.dtype)
    finite_base = np.isfinite(to_f32(base))
    overflow = acting & finite_base & ~np.isfinite(to_f32(Tensor(base.dtype, base.shape, new)))
    if overflow.any():
        raise BadInput(f"{name}: overflow at {np.flatnonzero(overflow)[0]}")
    unit = f"<u{WIDTH[base.dtype]}"
    out = np.where(acting & finite_base, np.frombuffer(new, unit), np.frombuffer(base.data, unit))
    return Tensor(base.dtype, base.shape, out.tobytes())
