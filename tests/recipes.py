"""Seeded random merges: a small base, patches of every kind, importance files and a recipe, on disk."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml

from safepatch_core.spec import COMBINE, Acts
from tests.oracle import FLOATS, WIDTH, F32Array, OracleError, Tensor, from_f32, is_target, merge, save_file, to_f32

# Bytewise order is neither the order of files nor that of humans: "10" < "2", "Z" < "a" < "é".
LINEAR = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.10.self_attn.q_proj.weight",
    "model.layers.2.mlp.up_proj.weight",
    "model.layers.2.mlp.down_proj.weight",
    "Z.weight",
    "a.weight",
    "\u00e9t\u00e9.weight",
    "\U0001f600.weight",
    "\uffee.weight",
    "x[0].weight",
    "a-b.weight",
)
NAMED_APART = ("model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight", "shared.weight")
OTHER_FLOATS = ("model.norm.weight", "model.layers.0.mlp.experts", "conv.weight", "logit_scale", "bias")
INTEGERS = ("position_ids", "mask.weight", "qzeros.weight")
GLOBS = (
    "*",
    "model.*",
    "*.weight",
    "*q_proj*",
    "*.LAYERS.*",
    "x[0]*",
    "x[[]0]*",
    "?.weight",
    "[a-z]*",
    "[!m]*",
)
DTYPES = ("BF16", "F16", "F32")


@dataclass
class Generator:
    """Draws everything from one seed; `size` scales dimensions; a `hostile` merge may have to fail."""

    root: Path
    seed: int
    size: int = 24
    hostile: bool = False
    kinds: ClassVar[tuple[str, ...]] = ("checkpoint", "checkpoint", "delta", "lora")
    py: random.Random = field(init=False)
    np: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.py = random.Random(self.seed)
        self.np = np.random.default_rng(self.seed)

    def chance(self, p: float) -> bool:
        return self.py.random() < p

    # Shapes and numbers

    def dim(self) -> int:
        return self.py.choice((1, 2, 3, 5, 7, 8, self.py.randint(1, self.size), self.py.randint(1, self.size)))

    def shape(self, ndim: int) -> tuple[int, ...]:
        dims = [self.dim() for _ in range(ndim)]
        if ndim and self.chance(0.08):
            dims[self.py.randrange(ndim)] = 0
        return tuple(dims)

    def values(self, n: int, style: str | None = None) -> F32Array:
        """Finite float32: few distinct steps, normal numbers, tiny ones, or any bits of moderate size."""
        style = style or self.py.choice(("steps", "steps", "normal", "tiny", "bits"))
        if style == "steps":
            step = 2.0 ** self.py.randint(-8, 2)
            x = self.np.integers(-3, 4, n) * step
        elif style == "normal":
            x = self.np.standard_normal(n) * 0.05
        elif style == "tiny":
            x = self.np.integers(-4, 5, n) * self.py.choice((2.0**-149, 2.0**-133, 2.0**-126, 2.0**-24))
        else:
            x = np.ldexp(self.np.uniform(-2, 2, n), self.np.integers(-20, 4, n))
        y = np.asarray(x, np.float32)
        y[self.np.random(n) < 0.1] = np.float32(-0.0)
        return y

    def tensor(self, dtype: str, shape: Sequence[int], style: str | None = None) -> Tensor:
        n = math.prod(shape)
        if dtype in DTYPES:
            return Tensor(dtype, tuple(shape), from_f32(self.values(n, style), dtype))
        data = self.np.integers(0, 2 if dtype == "BOOL" else 256, n * WIDTH[dtype], dtype=np.uint8)
        return Tensor(dtype, tuple(shape), data.tobytes())

    def poison(self, t: Tensor, share: float) -> Tensor:
        """NaNs with payloads, quiet and signalling, and infinities at random entries."""
        unit = np.dtype(f"<u{WIDTH[t.dtype]}")
        infinity, payload = {"F32": (0x7F800000, 23), "BF16": (0x7F80, 7), "F16": (0x7C00, 10)}[t.dtype]
        bits = np.frombuffer(t.data, unit).copy()
        at = self.np.random(len(bits)) < share
        junk = infinity + self.np.integers(0, 2**payload, len(bits)) * (self.np.random(len(bits)) < 0.6)
        junk |= self.np.integers(0, 2, len(bits)) << (8 * WIDTH[t.dtype] - 1)
        bits[at] = junk.astype(unit)[at]
        return Tensor(t.dtype, t.shape, bits.tobytes())

    # Files

    def store(self, name: str, tensors: dict[str, Tensor], layout: str | None = None) -> str:
        """Writes a checkpoint in some layout and shuffled order; its path relative to the recipe."""
        layout = layout or self.py.choice(("file", "single", "sharded"))
        names = list(tensors)
        self.py.shuffle(names)
        if layout == "file":
            self.save(self.root / f"{name}.safetensors", names, tensors)
            return f"{name}.safetensors"
        folder = self.root / name
        folder.mkdir()
        if layout == "single":
            self.save(folder / "model.safetensors", names, tensors)
            return self.py.choice((name, f"./{name}", str(folder)))
        shards = self.py.randint(1, 3)
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = names[shard::shards]
            if part:
                self.save(folder / file, part, tensors)
                weight_map.update(dict.fromkeys(part, file))
        total = sum(len(t.data) for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return name

    def save(self, path: Path, names: Sequence[str], tensors: dict[str, Tensor]) -> None:
        save_file(path, {n: tensors[n] for n in names}, pad=self.py.randint(0, 9))

    # The parts of a merge

    def base(self) -> dict[str, Tensor]:
        mixed, common = self.chance(0.3), self.py.choice(DTYPES)

        def dtype() -> str:
            return self.py.choice(DTYPES) if mixed else common

        tensors = {}
        for name in self.py.sample(LINEAR, self.py.randint(1, 4)):
            tensors[name] = self.tensor(dtype(), self.shape(2))
        for name in self.py.sample(NAMED_APART, self.py.randint(0, 1)):
            tensors[name] = self.tensor(dtype(), self.shape(2))
        for name in self.py.sample(OTHER_FLOATS, self.py.randint(0, 2)):
            ndim = {"logit_scale": 0, "conv.weight": 3, "model.layers.0.mlp.experts": 3}.get(name, 1)
            tensors[name] = self.tensor(dtype(), self.shape(ndim))
        for name in self.py.sample(INTEGERS, self.py.randint(0, 1)):
            tensors[name] = self.tensor(self.py.choice(("I64", "I32", "U8", "BOOL")), self.shape(2))
        return tensors

    def moved(self, t: Tensor, dtype: str) -> Tensor:
        """A fine-tuned version of `t`, off by few distinct steps or by noise."""
        w = to_f32(t)
        with np.errstate(all="ignore"):
            moved = w + self.values(len(w)) * np.float32(self.py.choice((1.0, 0.25, 2.0**-7)))
            return Tensor(dtype, t.shape, from_f32(moved, dtype))

    def full_patch(self, kind: str, base: dict[str, Tensor]) -> dict[str, Tensor]:
        other = self.py.choice(DTYPES) if self.chance(0.3) else None
        tensors = {}
        for name, t in base.items():
            if t.dtype not in DTYPES:
                tensors[name] = self.tensor(t.dtype, t.shape)
            elif kind == "checkpoint":
                tensors[name] = self.moved(t, other or t.dtype)
            else:
                tensors[name] = self.tensor(other or t.dtype, t.shape)
        return tensors

    def lora(self, name: str, base: dict[str, Tensor]) -> str:
        """An adapter directory in PEFT's layout for some of the base's matrices."""
        transposed = self.chance(0.25)
        r = self.py.randint(1, 9)
        alpha = self.py.choice((r, 2 * r, 16, 5, 0.3))
        config: dict[str, Any] = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "bias": "none"}
        config |= {"use_rslora": self.chance(0.3), "fan_in_fan_out": transposed}
        config |= {"base_model_name_or_path": None, "target_modules": []}
        matrices = [n for n, t in base.items() if n.endswith(".weight") and t.dtype in FLOATS and len(t.shape) == 2]
        matrices = [n for n in matrices if self.chance(0.75)] or matrices[:1]
        ranks, alphas, tensors = {}, {}, {}
        dtype, style = self.py.choice(DTYPES), self.py.choice(("steps", "normal", "normal", "bits"))
        for matrix in matrices:
            module = matrix.removesuffix(".weight")
            rank = r
            plain = module.isascii() and "[" not in module
            if plain and self.chance(0.3):
                rank = self.py.randint(1, 6)
                ranks[module] = rank
            if plain and self.chance(0.3):
                alphas[self.py.choice((module, module.rsplit(".", 1)[-1]))] = self.py.choice((1, 3, 24))
            out, into = base[matrix].shape[::-1] if transposed else base[matrix].shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = self.tensor(dtype, (rank, into), style)
            tensors[f"base_model.model.{module}.lora_B.weight"] = self.tensor(dtype, (out, rank), style)
            config["target_modules"].append(module)
        config |= {"rank_pattern": ranks, "alpha_pattern": alphas}
        folder = self.root / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        names = list(tensors)
        self.py.shuffle(names)
        self.save(folder / "adapter_model.safetensors", names, tensors)
        return name

    def importance(self, name: str, base: dict[str, Tensor]) -> Any:
        kind = self.py.choice(("magnitude", "magnitude", "scores", "gradients"))
        if kind == "magnitude":
            return "magnitude"
        tensors = {}
        same = self.chance(0.5)
        dtype = self.py.choice(DTYPES)
        for n, t in base.items():
            if t.dtype in FLOATS:
                x = self.tensor(dtype if same else self.py.choice(DTYPES), t.shape)
                if kind == "scores":
                    x = Tensor(x.dtype, x.shape, from_f32(np.abs(to_f32(x)), x.dtype))
                    if self.chance(0.3):
                        x = self.minus_zeros(x)
                tensors[n] = x
        if self.hostile and self.chance(0.2):
            tensors = {n: self.poison(t, 0.05) for n, t in tensors.items()}
        elif self.hostile and self.chance(0.2):
            tensors = {n: self.tensor(t.dtype, t.shape) for n, t in tensors.items()}
        if self.hostile and self.chance(0.2):
            del tensors[self.py.choice(list(tensors))]
        if self.chance(0.1):
            tensors["not.in.the.base.weight"] = self.tensor("F32", (2, 2))
        path = self.store(f"{name}-importance", tensors)
        if kind == "scores":
            return {"scores": path}
        weight = self.py.choice(("patched", "base", "delta", None))
        return {"gradients": path} | ({"weight": weight} if weight else {})

    def minus_zeros(self, t: Tensor) -> Tensor:
        x = to_f32(t)
        x[x == 0] = np.float32(-0.0)
        return Tensor(t.dtype, t.shape, from_f32(x, t.dtype))

    def patch(self, name: str, base: dict[str, Tensor]) -> dict[str, Any]:
        kind = self.py.choice(self.kinds)
        entry: dict[str, Any] = {"name": name}
        if kind == "lora" and any(n.endswith(".weight") and len(t.shape) == 2 for n, t in base.items()):
            entry["source"] = self.lora(f"adapter-{name}", base)
        else:
            kind = "delta" if kind == "lora" else kind
            tensors = self.full_patch(kind, base)
            if self.hostile:
                tensors = self.spoil(tensors, base)
            entry["source"] = self.store(f"patch-{name}", tensors)
            if kind == "checkpoint" and self.chance(0.3):
                minus = self.full_patch(kind, base)
                entry["minus"] = self.store(f"minus-{name}", self.spoil(minus, base) if self.hostile else minus)
        if kind == "delta" or self.chance(0.3):
            entry["kind"] = kind
        importance = self.importance(name, base)
        if importance != "magnitude" or self.chance(0.3):
            entry["importance"] = importance
        n = self.py.choice([math.prod(t.shape) for t in base.values()]) or 1
        half = min(1.0, (self.py.randrange(n) + 0.5) / n)
        tops: tuple[float, ...] = (1, 1.0, 0.5, 0.1, 0.03, half, half, self.py.random(), self.py.random())
        retains: tuple[float, ...] = (1, 1.0, 1.0, 0.5, 0.3, 0.9, self.py.random())
        scales: tuple[float, ...] = (1, 1.0, -1, 0.5, 0.3, 1.7, 2, -0.1)
        if self.chance(0.1):
            tops, retains, scales = (0, 1e-9, 1), (0, 2.0**-20, 1), (0, 1)
        options = {
            "top": self.py.choice(tops),
            "skip": self.py.choice((0.0, 0.0, 0.0, 0.01, 0.1, half, self.py.random())),
            "retain": self.py.choice(retains),
            "scale": self.py.choice(scales),
            "rescale": self.chance(0.3),
        }
        options["rescale"] = options["rescale"] and options["retain"] > 0
        defaults = {"top": 1, "skip": 0, "retain": 1, "scale": 1, "rescale": False}
        entry.update({k: v for k, v in options.items() if v != defaults[k] or self.chance(0.3)})
        if self.chance(0.25):
            globs = (["*.weight"], [self.py.choice(list(base))], ["*a*", "*.bias"])
            rates = {"scale": self.py.choice((-1, 0.5, 2)), "retain": self.py.choice((1, 0.5, 0.3))}
            some = self.py.sample(sorted(rates), self.py.choice((1, 2)))
            entry["overrides"] = [{"names": self.py.choice(globs), **{key: rates[key] for key in some}}]
        return entry

    def opposed(self, base: dict[str, Tensor]) -> list[dict[str, Any]]:
        """Two patches of the same deltas, up to 32, blown up until they overflow: one to +Inf, the other to -Inf."""
        deltas = {n: self.tensor(t.dtype, t.shape, "bits" if t.dtype in DTYPES else None) for n, t in base.items()}
        entry = {"source": self.store("opposed", deltas), "kind": "delta", "top": self.py.choice((1, 0.3, 0.05))}
        return [entry | {"name": "up", "scale": 3e38}, entry | {"name": "down", "scale": -3e38}]

    def spoil(self, tensors: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
        """A full patch with tensors missing, too many, or with entries that are not finite."""
        how = self.py.choice(("missing", "extra", "poison", "poison", "huge"))
        tensors = dict(tensors)
        name = self.py.choice([n for n in tensors if tensors[n].dtype in DTYPES])
        t = tensors[name]
        if how == "missing" and len(tensors) > 1:
            del tensors[name]
        elif how == "extra":
            tensors["not.in.the.base.weight"] = self.tensor(t.dtype, (2, 3))
        elif how == "poison":
            tensors[name] = self.poison(t, 0.1)
        elif how == "huge" and t.data:
            x = to_f32(t)
            x[self.np.integers(len(x))] = {"F32": 3.3e38, "BF16": 3.3e38, "F16": 65504.0}[t.dtype]
            tensors[name] = Tensor(t.dtype, t.shape, from_f32(x, t.dtype))
        return tensors

    def looks_at(self, patches: list[dict[str, Any]]) -> None:
        """Some patches' gates and agreements with other ones."""
        for entry in patches:
            others = [of["name"] for of in patches if of is not entry]
            if others and self.chance(0.15):
                signs = self.py.choice(("same", "opposite"))
                entry["agreement"] = {"patch": self.py.choice(others), "signs": signs}
            if others and self.chance(0.15):
                ends = [("below", 0.1), ("least", -0.1), ("below", -1.0), ("least", 0.0)]
                entry["gate"] = {"patch": self.py.choice(others), **dict([self.py.choice(ends)])}

    def targets(self, base: dict[str, Tensor]) -> Any:
        rule = self.py.choice(("linear", "linear", "all", "globs"))
        if rule != "globs":
            return rule
        include = self.py.sample(GLOBS, self.py.randint(1, 3))
        exclude = self.py.sample(GLOBS[1:], self.py.randint(0, 1))
        globs = {"include": include, "exclude": exclude} if exclude else {"include": include}
        return globs if any(is_target(n, t, globs) for n, t in base.items()) else "all"

    def write(self) -> Path:
        """Everything on disk under `root`; the recipe's path."""
        self.root.mkdir(parents=True, exist_ok=True)
        skip = self.chance(0.6 if self.hostile else 0.3)
        opposed = self.hostile and self.chance(0.3)
        self.hostile &= not opposed  # one fault at a time
        base = self.base()
        names = self.py.sample(("safety", "over-safety", "p_3", "0"), self.py.choice((1, 2, 2, 3, 3, 4)))
        patches = [self.patch(name, base) for name in names]
        self.looks_at(patches)
        combines = ["difference", *COMBINE]
        if opposed:
            patches += self.opposed(base)
            combines += [name for name, rule in COMBINE.items() if rule.acts == Acts.ELECTED] * 4
        if skip:
            base = {n: self.poison(t, 0.05) if t.dtype in DTYPES else t for n, t in base.items()}
        recipe: dict[str, Any] = {"base": self.store("base", base), "patches": patches}
        options = {
            "combine": self.py.choice(combines),
            "scope": self.py.choice(("tensor", "model")),
            "order": self.py.choice(("retain-first", "select-first")),
            "targets": self.targets(base),
            "seed": self.py.choice((0, 1, 2**64 - 1, self.py.getrandbits(64))),
            "nonfinite": "skip" if skip else "error",
            "missing": self.py.choice(("error", "skip")),
            "quota": self.py.choice(("even", "even", "floor")),
            "max_shard_size": self.py.choice((None, None, "1KB", "3KB", "5GB")),
        }
        defaults: dict[str, Any] = {
            "combine": "difference",
            "scope": "tensor",
            "order": "retain-first",
            "targets": "linear",
        }
        scaled = True
        if COMBINE[options["combine"]].acts != Acts.ELECTED:
            options["accumulate"] = self.py.choice(("base", "base", "deltas"))
            scaled = options["accumulate"] == "deltas"
        elif self.chance(0.6):
            zero, divide = self.py.choice(("leave", "positive")), self.py.choice(("count", "weights", "none"))
            options["elect"] = {"zero": zero, "divide": divide}
        options["lambda"] = self.py.choice((1.0, 0.5, 1.3, -0.7, 0.0)) if scaled else 1.0
        defaults |= {"quota": "even", "accumulate": "base", "lambda": 1.0, "elect": None}
        defaults |= {"seed": 0, "nonfinite": "error", "missing": "error", "max_shard_size": None}
        if options["scope"] == "tensor":
            for other in (other for entry in patches for other in entry.get("overrides", [])):
                other["top"] = self.py.choice((1.0, 0.5, 0.1, 0.03))
                if self.chance(0.5):
                    other["skip"] = self.py.choice((0.0, 0.02, 0.3))
        recipe.update({k: v for k, v in options.items() if v != defaults[k] or self.chance(0.2)})
        path = self.root / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=self.chance(0.5), allow_unicode=True))
        return path


def write_random(root: Path, seed: int, size: int = 24, hostile: bool = False) -> Path:
    """A random merge under `root`, the same for the same arguments; the path of its recipe."""
    return Generator(root, seed, size, hostile).write()


def write_working(root: Path, seed: int) -> Path:
    """As `write_random`, but a merge that succeeds: a few have a patch without any effect."""
    while True:
        recipe = write_random(root, seed)
        try:
            merge(recipe)
            return recipe
        except OracleError:
            shutil.rmtree(root)
            seed += 100_000


def write_plain(root: Path, base: dict[str, Tensor], patches: dict[str, Any], **options: Any) -> Path:
    """The merge of `patches` into `base`, in single files; the recipe's path.

    Each patch is a pair: its tensors (none where `source` names what is there already) and further keys of
    its entry, among which `scores` or `gradients` may hold tensors too.
    """
    root.mkdir(parents=True, exist_ok=True)
    save_file(root / "base.safetensors", base)
    entries = []
    for name, (tensors, keys) in patches.items():
        if tensors is not None:
            save_file(root / f"{name}.safetensors", tensors)
        entry = {"name": name, "source": f"{name}.safetensors"} | keys
        for kind in ("scores", "gradients"):
            if kind in keys:
                save_file(root / f"{name}-{kind}.safetensors", entry.pop(kind))
                entry["importance"] = {kind: f"{name}-{kind}.safetensors"}
                entry["importance"] |= {"weight": entry.pop("weight")} if "weight" in keys else {}
        entries.append(entry)
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base": "base.safetensors", "patches": entries} | options))
    return path
