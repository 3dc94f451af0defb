"""Small quantised bases on disk, with patches and recipes for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from safepatch_core import merge
from tests import oracle, oracle_quantised
from tests.oracle import F32Array, Tensor, from_f32, load_checkpoint, save_file
from tests.oracle_quantised import NUMBERS

Q, FLOAT, UP = (f"model.layers.0.{m}.weight" for m in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"))
WIDE = {"survival": [-1e9, 1e9]}
# Scale tables by name: of a weight of 40 x 70, in blocks of 32 x 32 where there are blocks.
BLOCK = (32, 32)
SHAPE = (40, 70)
LAYOUTS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "blocks": ("weight_scale_inv", "F32", (2, 3)),
    "blocks of bf16": ("weight_scale_inv", "BF16", (2, 3)),
    "blocks of E8M0": ("scale", "F8_E8M0", (2, 3)),
    "groups of U8": ("weight_scale", "U8", (40, 3)),
    "channel": ("weight_scale", "BF16", (40, 1)),
    "channel of f16": ("weight_scale", "F16", (40, 1)),
    "row of channels": ("weight_scale", "F32", (40,)),
    "tensor": ("qscale_weight", "F32", ()),
    "tensor of one": ("weight_scale", "BF16", (1,)),
}


def scale_tensor(dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    n = int(np.prod(shape))
    if dtype in ("F8_E8M0", "U8"):
        return Tensor(dtype, shape, rng.integers(116, 122, n, np.uint8).tobytes())
    return Tensor(dtype, shape, from_f32((rng.random(n) * 0.01 + 0.001).astype(np.float32), dtype))


class Twin:
    """A small FP8 base on disk, its patches and recipe."""

    def __init__(self, root: Path, layout: str = "blocks", seed: int = 0, codes: Any = None) -> None:
        self.root, self.rng = root, np.random.default_rng(seed)
        root.mkdir(parents=True, exist_ok=True)
        self.end, self.scale_dtype, self.scale_shape = LAYOUTS[layout]
        self.block = (1, 32) if layout == "groups of U8" else BLOCK
        self.base: dict[str, Tensor] = {}
        for name in (Q, UP):
            drawn = self.rng.integers(0, 256, SHAPE, np.uint8)
            drawn[(drawn & 0x7F) == 0x7F] = 0
            module = name.removesuffix(".weight")
            self.base[name] = Tensor("F8_E4M3", SHAPE, (drawn if codes is None else codes).astype(np.uint8).tobytes())
            self.base[f"{module}.{self.end}"] = scale_tensor(self.scale_dtype, self.scale_shape, self.rng)
        self.base[FLOAT] = self.floats((8, 8))
        self.base["model.norm.weight"] = self.floats((8,))
        self.save_base(self.base)

    def floats(self, shape: tuple[int, ...], size: float = 0.05, dtype: str = "BF16") -> Tensor:
        values = self.rng.standard_normal(int(np.prod(shape))) * size
        return Tensor(dtype, shape, from_f32(values.astype(np.float32), dtype))

    def save_base(self, tensors: dict[str, Tensor], shards: int = 1) -> None:
        folder = self.root / "base"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(oracle_quantised.config(self.block))
        if shards == 1:
            save_file(folder / "model.safetensors", tensors)
            return
        (folder / "model.safetensors").unlink(missing_ok=True)
        # Codes and their scales in different shards.
        placed = {n: i % shards for i, n in enumerate(sorted(tensors, key=lambda n: n[::-1]))}
        files = {n: f"model-{i + 1:05}-of-{shards:05}.safetensors" for n, i in placed.items()}
        for file in set(files.values()):
            save_file(folder / file, {n: t for n, t in tensors.items() if files[n] == file})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))

    def values(self, name: str) -> F32Array:
        _, s = oracle_quantised.scales_of(name, self.base, self.block)
        return NUMBERS[np.frombuffer(self.base[name].data, np.uint8)] * s.reshape(-1).astype(np.float32)

    def original(self, dtype: str = "BF16") -> None:
        """The float model of which this is the quantised twin."""
        tensors = {FLOAT: self.base[FLOAT], "model.norm.weight": self.base["model.norm.weight"]}
        for name in (Q, UP):
            noise = 1 + self.rng.uniform(-0.03, 0.03, self.values(name).size)
            tensors[name] = Tensor(dtype, SHAPE, from_f32((self.values(name) * noise).astype(np.float32), dtype))
        (self.root / "original").mkdir()
        save_file(self.root / "original" / "model.safetensors", tensors)

    def patch(self, name: str, kind: str = "delta", size: float = 0.02, **keys: Any) -> dict[str, Any]:
        if kind == "lora":
            return {"name": name, "source": self.adapter(name), **keys}
        tensors = {FLOAT: self.floats((8, 8), size, "F32")}
        for target in (Q, UP):
            d = (self.rng.standard_normal(SHAPE) * size).astype(np.float32).reshape(-1)
            values = d if kind == "delta" else self.values(target) + d
            tensors[target] = Tensor("BF16", SHAPE, from_f32(values, "BF16"))
        save_file(self.root / f"{name}.safetensors", tensors)
        return {"name": name, "source": f"{name}.safetensors", "kind": kind, **keys}

    def adapter(self, name: str) -> str:
        folder = self.root / name
        folder.mkdir()
        tensors = {}
        for target in (Q, UP):
            module = f"base_model.model.{target.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = self.floats((4, SHAPE[1]), 0.1, "F32")
            tensors[f"{module}.lora_B.weight"] = self.floats((SHAPE[0], 4), 0.1, "F32")
        save_file(folder / "adapter_model.safetensors", tensors)
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
        return name

    def importance(self, name: str, weight: str | None = None) -> Any:
        tensors = {n: self.floats(SHAPE, 1, "F32") for n in (Q, UP)} | {FLOAT: self.floats((8, 8), 1, "F32")}
        if weight is None:
            tensors = {n: t._replace(data=np.abs(oracle.to_f32(t)).tobytes()) for n, t in tensors.items()}
        save_file(self.root / f"{name}-importance.safetensors", tensors)
        path = f"{name}-importance.safetensors"
        return {"scores": path} if weight is None else {"gradients": path, "weight": weight}

    def recipe(self, *patches: dict[str, Any], quantized: Any = WIDE, **options: Any) -> Path:
        path = self.root / "recipe.yaml"
        keys = {"base": "base", "patches": list(patches), "quantized": quantized} | options
        path.write_text(yaml.safe_dump({k: v for k, v in keys.items() if v is not None}))
        return path


def merged(twin: Twin, recipe: Path, out: str = "out", **engine: Any) -> dict[str, Tensor]:
    merge(recipe, twin.root / out, **{"backend": "reference", **engine})
    return load_checkpoint(twin.root / out)


def differing(before: Tensor, after: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.flatnonzero(np.frombuffer(before.data, np.uint8) != np.frombuffer(after.data, np.uint8))
