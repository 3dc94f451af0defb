"""Seeded random merges of adapters of every kind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from tests.oracle import Tensor
from tests.recipes import DTYPES, Generator

Tensors = dict[str, Tensor]
PREFIX = "base_model.model."


@dataclass
class AdapterGenerator(Generator):
    """As its parent; most patches are adapters, of any kind."""

    kinds: ClassVar[tuple[str, ...]] = ("checkpoint", "lora", "lora", "lora")

    def lora(self, name: str, base: Tensors) -> str:
        """An adapter directory for some of the base's tensors."""
        config: dict[str, Any] = {"base_model_name_or_path": None, "target_modules": [], "bias": "none"}
        kind = self.py.choice((self.layers, self.layers, self.vera, self.shira))
        tensors = {n if n.startswith("base_model.") else f"{PREFIX}{n}": t for n, t in kind(base, config).items()}
        folder = self.root / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        names = list(tensors)
        self.py.shuffle(names)
        self.save(folder / "adapter_model.safetensors", names, tensors)
        return name

    def matrices(self, base: Tensors, turned: bool) -> list[str]:
        """Some of the base's matrices; a head is never stored transposed."""
        found = [n for n, t in base.items() if n.endswith(".weight") and t.dtype in DTYPES and len(t.shape) == 2]
        found = [n for n in found if not (turned and n == "lm_head.weight")]
        return [n for n in found if self.chance(0.75)] or found[:1]

    def layers(self, base: Tensors, config: dict[str, Any]) -> Tensors:
        """Factors, with or without magnitudes, trained rows, whole tensors, and factors of experts."""
        turned, dora, rank = self.chance(0.25), self.chance(0.4), self.py.randint(1, 9)
        config |= {"peft_type": "LORA", "r": rank, "lora_alpha": self.py.choice((rank, 16, 0.3)), "use_dora": dora}
        config |= {"use_rslora": self.chance(0.3), "fan_in_fan_out": turned, "trainable_token_indices": {}}
        config |= {"target_parameters": [], "modules_to_save": []}
        tensors: Tensors = {}
        for name in self.matrices(base, turned):
            module, shape = name.removesuffix(".weight"), base[name].shape
            if self.chance(0.2) and shape[0]:
                tokens = self.py.sample(range(shape[0]), self.py.randint(1, shape[0]))
                config["trainable_token_indices"][module] = tokens
                rows = self.tensor(self.py.choice(DTYPES), (len(tokens), shape[1]))
                tensors[f"{module}.token_adapter.trainable_tokens_delta"] = rows
                continue
            tensors |= self.factors(module, shape[::-1] if turned else shape, rank)
            if dora:
                magnitude = self.tensor(self.py.choice(DTYPES), (shape[1 if turned else 0],))
                tensors[f"{module}.lora_magnitude_vector"] = magnitude
        for name, t in base.items():
            if t.dtype in DTYPES and len(t.shape) != 2 and self.chance(0.7):
                tensors |= self.other(name, t, config)
        return tensors

    def other(self, name: str, t: Tensor, config: dict[str, Any]) -> Tensors:
        """A tensor that is no matrix, whole or by factors of its experts."""
        module, _, leaf = name.rpartition(".")
        if len(t.shape) == 3 and t.shape[1] != t.shape[2] and module and t.data and not config["use_dora"]:
            config["target_parameters"].append(f"{module.rpartition('.')[2]}.{leaf}")
            shape = (t.shape[2], t.shape[1]) if self.chance(0.5) else (t.shape[1], t.shape[2])
            return self.factors(module, shape, config["r"], t.shape[0])
        config["modules_to_save"].append(module or leaf)
        return {name: self.moved(t, self.py.choice(DTYPES))}

    def factors(self, module: str, shape: tuple[int, ...], rank: int, experts: int = 1) -> Tensors:
        dtype, style = self.py.choice(DTYPES), self.py.choice(("steps", "normal", "normal", "bits"))
        return {
            f"{module}.lora_A.weight": self.tensor(dtype, (rank * experts, shape[1]), style),
            f"{module}.lora_B.weight": self.tensor(dtype, (shape[0], rank * experts), style),
        }

    def vera(self, base: Tensors, config: dict[str, Any]) -> Tensors:
        turned, rank = self.chance(0.25), self.py.randint(1, 9)
        config |= {"peft_type": "VERA", "r": rank, "fan_in_fan_out": turned, "save_projection": True}
        names = self.matrices(base, turned)
        shapes = [base[n].shape[::-1] if turned else base[n].shape for n in names]
        tensors: Tensors = {}
        for name, (out, _) in zip(names, shapes, strict=True):
            module = name.removesuffix(".weight")
            tensors[f"{module}.vera_lambda_b"] = self.tensor(self.py.choice(DTYPES), (out,))
            tensors[f"{module}.vera_lambda_d"] = self.tensor(self.py.choice(DTYPES), (rank,))
        wide, high = (max(s[i] for s in shapes) + self.py.randint(0, 2) for i in (1, 0))
        shared = {"A": (rank, wide), "B": (high, rank)}
        return tensors | {f"base_model.vera_{side}": self.tensor("F32", shape) for side, shape in shared.items()}

    def shira(self, base: Tensors, config: dict[str, Any]) -> Tensors:
        config |= {"peft_type": "SHIRA", "r": 1, "mask_type": "random"}
        tensors: Tensors = {}
        for name in self.matrices(base, False):
            module, (rows, cols) = name.removesuffix(".weight"), base[name].shape
            count = self.py.randint(1, 20) if rows and cols else 0
            flat = self.np.integers(0, max(rows * cols, 1), count)
            indices = [flat // max(cols, 1), flat % max(cols, 1)]
            data = b"".join(i.astype("<i4").tobytes() for i in indices)
            tensors[f"{module}.shira_indices"] = Tensor("I32", (2, count), data)
            tensors[f"{module}.shira_weight"] = self.tensor(self.py.choice(DTYPES), (count,))
        return tensors
