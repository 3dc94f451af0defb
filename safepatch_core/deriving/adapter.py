"""LoRA adapters: trained on the model's own modules, written under the base's tensor names as whole patches are.

transformers renames modules, and fuses the experts of a layer into one parameter, while it loads a checkpoint. An
adapter of what it made would fit neither the base nor a merge; so the factors go the way back that weights go when
they are saved. A row of B belongs to a row of the weight: B is cut and renamed as the weight is, A goes with it.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from safepatch_core.deriving.config import DeriveConfig
from safepatch_core.deriving.names import BaseNames
from safepatch_core.deriving.sharding import full_tensor
from safepatch_core.errors import UsageError
from safepatch_core.files.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from safepatch_core.language.model import first_line
from safepatch_core.merging.recipe import NOT_LANGUAGE
from safepatch_core.ranks import Ranks

ADAPTER = "default"  # PEFT's name for the only adapter of a model
PREFIX = "base_model.model."


def add_adapter(model: Any, config: DeriveConfig) -> Any:
    """The model with a fresh LoRA adapter, which alone is trainable. Raises UsageError if it fits no module."""
    modules = config.target_modules
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of GPT-2's orientation, which PEFT sets right, and of patterns of its own
            return peft().get_peft_model(
                model,
                peft().LoraConfig(
                    r=config.lora_r,
                    lora_alpha=config.lora_alpha,
                    lora_dropout=config.lora_dropout,
                    target_modules=list(modules) if isinstance(modules, list) else modules,
                    exclude_modules=f".*({'|'.join(map(re.escape, NOT_LANGUAGE))}).*",
                    task_type="CAUSAL_LM",
                ),
            )
    except ValueError as error:
        raise UsageError(f"LoRA doesn't fit the model ({first_line(error)})") from error


def save_adapter(model: Any, folder: Path, names: BaseNames, base: str, ranks: Ranks) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, the same bytes in every process.

    Args:
        model: What `add_adapter` returned.
        folder: Where to write; it exists.
        names: Of the tensors of the base that the model was loaded from.
        base: What the config says that the adapter is of.
        ranks: Every rank calls it, and the first writes.

    Raises:
        UsageError: The adapter changes what has no counterpart in the base.
    """
    trained = list(_trained(model))
    if ranks.rank > 0:
        return
    adapted = [each for of in trained for each in of.in_base(names)]
    tensors = {f"{PREFIX}{each.path}.{side}": factor for each in adapted for side, factor in each.sides.items()}
    whole = {key: factor.cpu().contiguous().clone() for key, factor in tensors.items()}
    save_file(whole, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(model.peft_config[ADAPTER])
    config.inference_mode = True
    config.save_pretrained(folder)
    path = folder / ADAPTER_CONFIG
    written = json.loads(path.read_text("utf-8")) | _settings(adapted, names, config.r, config.lora_alpha)
    written["base_model_name_or_path"] = base
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", "utf-8")


class _Adapted(NamedTuple):
    """One tensor of the base with its factors in PEFT's layout."""

    name: str
    path: str  # of PEFT's layer
    sides: Mapping[str, Tensor]  # factors, by what PEFT calls them
    rank: int
    alpha: float

    @property
    def fused(self) -> bool:
        """Whether it is no module's weight, but a parameter of several experts."""
        return not self.name.endswith(".weight")


class _Trained(NamedTuple):
    """One parameter of the model with its factors: its delta is scale * left @ right, for each of its experts."""

    name: str
    layer: Any  # PEFT's
    depth: int  # PEFT's layers around this one, which adapt other parameters of the same module
    left: Tensor  # (rows, rank); of fused experts (experts, rows, rank)
    right: Tensor  # (rank, columns); (experts, rank, columns)

    def in_base(self, names: BaseNames) -> list[_Adapted]:
        """The tensors of the base that the parameter becomes, with their factors."""
        rank, alpha = self.layer.r[ADAPTER], self.layer.lora_alpha[ADAPTER]
        found = []
        for name, piece in names.convert({self.name: self._marked()}):
            fused = piece.ndim == 3
            right = self.right if fused or self.right.ndim == 2 else self.right[int(piece[0, -1])]
            left = piece[..., :-1].to(right.dtype)
            if (*left.shape, right.shape[-1]) != (*names.shapes[name][:-1], right.shape[-2], names.shapes[name][-1]):
                break
            path = name.rpartition(".")[0] + (".base_layer" * self.depth if fused else "")
            found.append(_Adapted(name, path, _sides(self.layer, left, right), rank, alpha))
        else:
            if found:
                return found
        module = self.name.removesuffix(".weight")
        raise UsageError(
            f"LoRA on '{module}' can't be written under the base's names", expected="target_modules without it"
        )

    def _marked(self) -> Tensor:
        """`left` with one more column, which goes where its row goes: the number of the expert."""
        left = self.left.float()
        experts = torch.arange(len(left) if left.ndim == 3 else 1, dtype=torch.float32, device=left.device)
        column = experts[:, None, None].expand(-1, left.shape[-2], 1)
        return torch.cat([left, column if left.ndim == 3 else column[0]], -1)


def _trained(model: Any) -> Iterator[_Trained]:
    """What the model's adapter changes. Every rank goes through all of it."""
    from peft.tuners.lora import LoraLayer

    modules: list[tuple[str, Any]] = list(model.get_base_model().named_modules())
    layers: list[tuple[str, Any]] = [(path, module) for path, module in modules if isinstance(module, LoraLayer)]
    for path, layer in layers:
        module = path.replace(".base_layer", "")
        name = f"{module}.{getattr(layer, 'parameter_name', 'weight')}"
        a, b = (full_tensor(factor.detach()) for factor in _factors(layer))
        if a.ndim != 2:
            raise UsageError(
                f"LoRA on the convolution '{module}' can't be merged", expected="target_modules without it"
            )
        if _fused(layer):
            a = a.view(layer.num_experts, -1, a.shape[-1])
            b = b.view(len(b), -1, layer.num_experts).permute(2, 0, 1)
        left, right = (a.mT, b.mT) if _turned(layer) else (b, a)
        yield _Trained(name, layer, path.count(".base_layer"), left, right)


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    if ADAPTER in layer.lora_embedding_A:
        return layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def _fused(layer: Any) -> bool:
    """Whether PEFT adapts one parameter of several experts."""
    return hasattr(layer, "parameter_name") and layer.get_param().ndim == 3


def _turned(layer: Any) -> bool:
    """Whether the parameter is stored as (in, out), and its delta is (B @ A).T."""
    if _fused(layer):
        return not layer._did_swap_in_out_features
    return ADAPTER in layer.lora_embedding_A or bool(getattr(layer, "fan_in_fan_out", False))


def _sides(layer: Any, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """The factors as PEFT calls and lays them out; those of several experts side by side."""
    a, b = (left.mT, right.mT) if _turned(layer) else (right, left)
    if a.ndim == 3:
        a, b = a.reshape(-1, a.shape[-1]), b.permute(1, 2, 0).reshape(b.shape[1], -1)
    if ADAPTER in layer.lora_embedding_A:
        return {"lora_embedding_A": a, "lora_embedding_B": b}
    return {"lora_A.weight": a, "lora_B.weight": b}


def _settings(adapted: Sequence[_Adapted], names: BaseNames, rank: int, alpha: float) -> dict[str, Any]:
    """What the adapter's config says of the base's modules, and of its tensors of fused experts."""
    every = {name.removesuffix(".weight") for name, shape in names.shapes.items() if len(shape) > 1}
    own = {each.name.removesuffix(".weight"): (each.rank, each.alpha) for each in adapted}
    fused = {each.name for each in adapted if each.fused}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for odd in sorted({*own.values()} - {(rank, alpha)}):
        modules = {module for module, given in own.items() if given == odd}
        for key in short_names(modules, own.keys() - modules):
            ranks[key], alphas[key] = odd
    return {
        "target_modules": short_names(own.keys() - fused, every - own.keys()),
        "target_parameters": sorted({".".join(name.split(".")[-2:]) for name in fused}) or None,
        "exclude_modules": None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def short_names(modules: Set[str], others: Set[str]) -> list[str]:
    """What PEFT takes for `modules` and none of the `others`: the last parts of their names, where that will do."""
    taken = {name.rpartition(".")[2] for name in others}
    return sorted({name if (last := name.rpartition(".")[2]) in taken else last for name in modules})


def peft() -> Any:
    """The library, which imports bitsandbytes where it is installed; and that would fetch `kernels` from the hub."""
    there = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # importing it fails
    try:
        import peft
    finally:
        del sys.modules["kernels"]
        if there is not None:
            sys.modules["kernels"] = there
    return peft
