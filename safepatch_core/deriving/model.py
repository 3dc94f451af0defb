"""The backbone: open it, load it, and measure what became of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safepatch_core.deriving.adapter import peft
from safepatch_core.deriving.config import DeriveConfig
from safepatch_core.deriving.saving import DTYPES
from safepatch_core.deriving.twin import float_copy, is_quantised
from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint
from safepatch_core.files.parsing import FLOATS, read_json
from safepatch_core.files.reading import TensorEntry
from safepatch_core.language import model as language_model

Target = Callable[[str, int], bool]  # (tensor name, dimensions) -> whether the recipe patches it
_PIECE = 1 << 22  # entries that are compared at a time


class Backbone(NamedTuple):
    """What is trained, and what the patches are merged into.

    Attributes:
        base: The checkpoint to train: floats.
        root: Its directory.
        named: The checkpoint that the settings name: the same, or one of codes.
    """

    base: Checkpoint
    root: Path
    named: Checkpoint


def open_backbone(ref: str, out: Path) -> Backbone:
    """The backbone, checked but not loaded; of a quantised one the float copy beside the run directory `out`.

    Raises InputError if it isn't a directory with a config, or it is quantised in a way that can't be merged into;
    OutputError if the copy can't be written.
    """
    named = open_checkpoint(ref)
    if named.root is None:
        raise InputError("training needs a directory with config and tokenizer", file=ref, found="a single file")
    if is_quantised(named):
        folder = float_copy(named, out)
        return Backbone(open_checkpoint(folder), folder, named)
    require_floats(named.root)
    return Backbone(named, named.root, named)


def require_floats(root: Path) -> None:
    """Raises InputError if the checkpoint in `root` is quantised: no gradient moves a code."""
    config = read_json(root / "config.json", within=root)
    if isinstance(config, dict) and config.get("quantization_config"):
        raise InputError("quantised weights can't be trained", file=root / "config.json")


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
    peft()
    model = language_model.load_model(folder, config.dtype, device or config.device, quantization_config=quantised)
    for module in model.modules():
        # Once asked for an answer on a CPU with AVX512-BF16, a 4-bit layer would be packed, and have wrong gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


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
