"""Adapters by brute force: what each kind makes of a base's tensor, whole, beside SPEC's table of adapters."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
CONV1D = ("c_attn", "q_attn", "c_proj", "c_fc")
HEADS = ("lm_head", "score", "classifier")
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt")
EXPERTS_TURNED = ("gpt_oss", "aria")


class Misfit(Exception):
    """An adapter of another base."""


class Change(NamedTuple):
    """Patched values, or a delta."""

    patched: bool
    values: F32


class Adapter:
    """`tensors`: name -> float32 array (or int32 indices) of the adapter's file; `base` likewise."""

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, Any],
        model_type: str | None,
        rows: str,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.shapes = shapes  # of the base
        self.config, self.model_type, self.common = config, model_type, rows == "common"
        self.tensors = {name.removeprefix("base_model.model."): t for name, t in tensors.items()}
        self.kind = config["peft_type"]

    def modules(self) -> dict[str, str]:
        """The base's names of what is changed -> the name in the file that says so."""
        found = {}
        for name in self.tensors:
            if match := re.fullmatch(r"(.+)\.(lora_A\.weight|lora_embedding_A|vera_lambda_b|shira_weight)", name):
                found[self.parameter(match[1]) or f"{match[1]}.weight"] = name
            elif match := re.fullmatch(r"(.+?)(\.token_adapter)?\.trainable_tokens_delta", name):
                found[f"{match[1]}.weight"] = name
            elif match := re.fullmatch(r"(.+)\.lora_B\.bias", name):
                found[f"{match[1]}.bias"] = name
        for name in self.tensors:
            bare = name.replace(".base_layer.", ".")
            if not re.search(r"lora_|vera_|shira_|trainable_tokens", name):
                found.setdefault(bare, name)
        return found

    def parameter(self, module: str) -> str | None:
        """Which parameter a wrapper of the module is for: the outermost of several is the one named last."""
        bare = module.replace(".base_layer", "")
        named = [t.rpartition(".") for t in self.config.get("target_parameters") or []]
        # One without a module is any module's; here only experts have such parameters.
        targets = [t[2] for t in named if f".{bare}".endswith(f".{t[0] or 'experts'}")]
        if not targets:
            return None
        return f"{bare}.{targets[len(targets) - 1 - module.count('.base_layer')]}"

    def change(self, name: str, base: F32) -> Change | None:
        """What becomes of the base's tensor `name`; None where the adapter leaves it alone."""
        stored = self.modules().get(name)
        if stored is None:
            return None
        module = stored.rpartition(".lora_")[0] or stored.rpartition(".")[0]
        given = self.tensors[stored]
        if stored.endswith("trainable_tokens_delta"):
            return Change(True, self.rows(module.removesuffix(".token_adapter"), base, given))
        if stored.endswith("shira_weight"):
            return Change(False, self.scattered(module, base, given))
        if stored.endswith("lora_B.bias"):
            return Change(False, self.scale(module, self.rank(module)) * (np.float32(0) + np.float32(1) * given))
        if "lora_" not in stored and "vera_" not in stored:
            given = with_rows(given, base) if self.common else given
            if given.shape != base.shape:
                raise Misfit(name)
            return Change(True, given)
        if base.ndim == 3:
            return Change(False, self.experts(name, module, base))
        return self.matrix(name, module, base)

    def matrix(self, name: str, module: str, base: F32) -> Change:
        a, b, scale, embedding = self.factors(name, module, base)
        turned = embedding or self.turned(name, base.shape, (b.shape[0], a.shape[1]))
        delta = scale * in_order(b, a)
        magnitude = self.tensors.get(f"{module}.lora_magnitude_vector")
        fitted = delta.T if turned else delta
        if self.common and magnitude is None:
            fitted = with_rows(fitted, np.zeros_like(base))
        if fitted.shape != base.shape:
            raise Misfit(name)
        if magnitude is None:
            return Change(False, fitted)
        moved = (base.T if turned else base) + delta
        norms = np.zeros(len(moved), np.float64)
        for column in moved.T.astype(np.float64):
            norms = norms + column * column
        patched = (magnitude / np.sqrt(norms).astype(np.float32))[:, None] * moved
        return Change(True, patched.T if turned else patched)

    def factors(self, name: str, module: str, base: F32) -> tuple[F32, F32, np.float32, bool]:
        """A, B, scale, and whether it is an embedding."""
        if self.kind == "VERA":
            shared = {side: next(t for n, t in self.tensors.items() if f"vera_{side}" in n) for side in "AB"}
            lambda_b, lambda_d = self.tensors[f"{module}.vera_lambda_b"], self.tensors[f"{module}.vera_lambda_d"]
            out = len(lambda_b)
            into = base.shape[1] if base.shape[0] == out else base.shape[0]
            a, b = lambda_d[:, None] * shared["A"][:, :into], lambda_b[:, None] * shared["B"][:out]
            return a, b, np.float32(1), False
        embedding = f"{module}.lora_embedding_A" in self.tensors
        sides = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        a, b = (self.tensors[f"{module}.{side}"] for side in sides)
        rank = self.rank(module)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise Misfit(name)
        return a, b, self.scale(module, rank), embedding

    def turned(self, name: str, shape: tuple[int, ...], given: tuple[int, int]) -> bool:
        """Whether the base stores [in, out]: as its shape says, its architecture, the other layers, or the flag."""
        if given[0] != given[1]:
            return shape == given[::-1]
        if self.model_type in CONV1D_MODELS:
            return name.split(".")[-2] in CONV1D
        others = self.others()
        if True in others and name.split(".")[-2] in CONV1D:
            return True
        if len(others) == 1:
            return True in others and name.split(".")[-2] not in HEADS
        return bool(self.config.get("fan_in_fan_out"))

    def others(self) -> set[bool]:
        """Which ways round those linear layers of the adapter lie that fit only one way."""
        found = set()
        for name, stored in self.modules().items():
            if stored.endswith(".lora_A.weight"):
                a, b = self.tensors[stored], self.tensors[stored.replace("lora_A", "lora_B")]
                given, shape = (b.shape[0], a.shape[-1]), self.shapes.get(name, ())
                if given[0] != given[1] and shape in (given, given[::-1]):
                    found.add(shape != given)
        return found

    def experts(self, name: str, module: str, base: F32) -> F32:
        count, rank = len(base), self.rank(name)
        scale = self.scale(name, rank)
        a, b = self.tensors[f"{module}.lora_A.weight"], self.tensors[f"{module}.lora_B.weight"]
        turned = base.shape[1:] != (b.shape[0], a.shape[1])
        if b.shape[0] == a.shape[1]:
            turned = self.model_type in EXPERTS_TURNED
        deltas = []
        for e in range(count):
            delta = scale * in_order(b[:, e::count], a[e * rank : (e + 1) * rank])
            deltas.append(delta.T if turned else delta)
        return np.stack(deltas)

    def rows(self, module: str, base: F32, given: F32) -> F32:
        indices = self.config.get("token_indices") or self.config["trainable_token_indices"]
        if isinstance(indices, dict):
            indices = next(of for key, of in indices.items() if f".{module}".endswith(f".{key}"))
        patched = base.copy()
        for index, row in zip(indices, given, strict=True):
            if index < len(base) or not self.common:
                patched[index] = row
        return patched

    def scattered(self, module: str, base: F32, given: F32) -> F32:
        delta = np.zeros_like(base)
        for row, col, value in zip(*self.tensors[f"{module}.shira_indices"], given, strict=True):
            delta[row, col] = delta[row, col] + value
        return delta

    def rank(self, module: str) -> int:
        return int(self.pattern("rank_pattern", module, self.config["r"]))

    def scale(self, module: str, rank: int) -> np.float32:
        alpha = self.pattern("alpha_pattern", module, self.config["lora_alpha"])
        return np.float32(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def pattern(self, table: str, module: str, default: Any) -> Any:
        """PEFT's rule: the first key that is the module's name or a dotted tail of it, as a regular expression."""
        for key, value in (self.config.get(table) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return default


def with_rows(given: F32, rest: F32) -> F32:
    """As many rows as `rest` has, the missing ones from there."""
    return np.concatenate([given[: len(rest)], rest[len(given) :]]) if given.shape[1:] == rest.shape[1:] else given


def in_order(left: F32, right: F32) -> F32:
    """left @ right, rank by rank from +0."""
    acc = np.zeros((left.shape[0], right.shape[1]), np.float32)
    for r in range(left.shape[1]):
        acc = acc + left[:, r : r + 1] * right[r : r + 1, :]
    return acc


def model_type(base: Path) -> str | None:
    config = base / "config.json"
    return json.loads(config.read_text()).get("model_type") if config.is_file() else None
