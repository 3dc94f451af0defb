"""The backbone: load it, adapt it, and measure what became of it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safepatch_core.deriving.config import DeriveConfig
from safepatch_core.deriving.saving import DTYPES, read_tensor
from safepatch_core.deriving.sharding import full_tensor, trained_whole
from safepatch_core.errors import InputError, UsageError
from safepatch_core.files.checkpoint import FLOATS, Checkpoint, TensorEntry, open_checkpoint, read_json
from safepatch_core.language import model as language_model
from safepatch_core.language.model import first_line
from safepatch_core.ranks import Ranks

Target = Callable[[str, int], bool]  # (tensor name, dimensions) -> whether the recipe patches it
_PIECE = 1 << 22  # entries that are compared at a time


def open_backbone(ref: str) -> tuple[Checkpoint, Path]:
    """The checkpoint to train and its directory, checked but not loaded.

    Raises InputError if it isn't a directory with a config, or its weights are quantised.
    """
    base = open_checkpoint(ref)
    if base.root is None:
        raise InputError("training needs a directory with config and tokenizer", file=ref, found="a single file")
    config = read_json(base.root / "config.json", within=base.root)
    if isinstance(config, dict) and config.get("quantization_config"):
        raise InputError("quantised weights can't be trained", file=base.root / "config.json")
    return base, base.root


def targets(base: Checkpoint, is_target: Target) -> list[TensorEntry]:
    """The tensors that the recipe will patch. Raises InputError if there is none, or a merge wouldn't take one."""
    found = [e for e in base.tensors.values() if e.dtype in FLOATS and is_target(e.name, len(e.shape))]
    for entry in found:
        if entry.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise InputError("dtype", file=entry.path, tensor=entry.name, found=entry.dtype, expected=known)
    if not found:
        raise InputError("no float tensor with two dimensions or more to patch", file=base.ref)
    return found


def load_model(folder: Path, config: DeriveConfig, device: str | None = None) -> Any:
    """The backbone in the run's dtype, on its device or another. Raises as `language_model.load_model`."""
    return language_model.load_model(folder, config.dtype, device or config.device)


def load_frozen(folder: Path, config: DeriveConfig, device: str | None = None) -> Any:
    """The backbone as an adapter is trained on it: quantised, if the run says so. Raises as `load_model`."""
    if config.quantization == "none":
        return load_model(folder, config, device)
    from transformers import BitsAndBytesConfig

    dtype = getattr(torch, config.dtype)
    untyped: Any = BitsAndBytesConfig
    if config.quantization == "int8":
        quantised = untyped(load_in_8bit=True)
    else:
        quantised = untyped(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    _peft()
    model = language_model.load_model(folder, config.dtype, device or config.device, quantization_config=quantised)
    for module in model.modules():
        # Once asked for an answer on a CPU with AVX512-BF16, a 4-bit layer would be packed, and have wrong gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def add_adapter(model: Any, config: DeriveConfig) -> Any:
    """The model with a fresh LoRA adapter, which alone is trainable. Raises UsageError if it fits no module."""
    peft = _peft()
    modules = config.target_modules
    try:
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=config.lora_r,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                target_modules=list(modules) if isinstance(modules, list) else modules,
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise UsageError(f"LoRA doesn't fit the model ({first_line(error)})") from error


def merge_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapter in `folder` added to its weights."""
    return _peft().PeftModel.from_pretrained(model, folder, torch_device=str(model.device)).merge_and_unload()


def save_adapter(model: Any, folder: Path, base: str, ranks: Ranks) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, the same bytes in every process. Every rank calls it,
    and the first writes."""
    adapter = None
    if ranks.size > 1:
        adapter = {
            name: full_tensor(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
        }
    if ranks.rank > 0:
        return
    model.save_pretrained(folder, safe_serialization=True, state_dict=adapter)
    (folder / "README.md").unlink(missing_ok=True)  # an empty form
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["base_model_name_or_path"] = base
    # peft keeps these as sets, whose order changes from process to process
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


class Changed(NamedTuple):
    """What a patch changes: as trained, and once rounded to the base's dtype.

    `exact` and `rounded` count the entries that differ from the base. With d the change as trained and r the change
    that rounding leaves, `kept_l1` is the share of the sum of |d| that lies in entries where r is not 0, and
    `error_l2` is |r - d| / |d| in Euclidean norms: 0 where all survives, 1 where nothing does.
    """

    exact: int
    rounded: int
    kept_l1: float
    error_l2: float


def changed_entries(pairs: Iterable[tuple[Tensor, Tensor]]) -> Changed:
    """Measures (base tensor in its own dtype, patched tensor) pairs; sums are taken in float64."""
    exact = rounded = 0
    total = kept = squares = errors = 0.0
    for pair in pairs:
        for old, new in zip(*(torch.split(tensor.flatten(), _PIECE) for tensor in pair), strict=True):
            after = new.to(old.dtype)
            survives = after != old
            delta, left = new.double() - old.double(), after.double() - old.double()
            exact += int(torch.count_nonzero(delta))
            rounded += int(torch.count_nonzero(survives))
            total += float(delta.abs().sum())
            kept += float(delta[survives].abs().sum())
            squares += float(delta.square().sum())
            errors += float((left - delta).square().sum())
    if not total:
        return Changed(exact, rounded, 1.0, 0.0)
    return Changed(exact, rounded, kept / total, math.sqrt(errors / squares))


def adapted(model: Any, entries: Sequence[TensorEntry]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each of the base's tensors `entries` that the model's adapter changes, with float32 of base + adapter.

    The base's own tensors are read: the model's may be in another dtype, or quantised. Every rank goes through all.
    """
    from peft.tuners.lora import LoraLayer

    plain = model.get_base_model()
    by_name = {entry.name: entry for entry in entries}
    layers: list[tuple[str, Any]] = [(n, m) for n, m in plain.named_modules() if isinstance(m, LoraLayer)]
    for module, layer in layers:
        name, prefix = f"{module}.weight", plain.base_model_prefix
        names = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        entry = next((by_name[n] for n in names if n in by_name), None)
        if entry is not None:
            old = read_tensor(entry)
            with trained_whole(layer):
                delta = layer.get_delta_weight("default").detach()
            yield old, old.float() + delta.cpu().float()


def _peft() -> Any:
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
