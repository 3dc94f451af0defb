"""Adapters that other tools wrote, and files that hold nothing: named for what they are, with what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from safepatch_core.errors import InputError
from safepatch_core.files.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from safepatch_core.merging.sources.fusions import Stored

_MLX = "adapters.safetensors"
_PICKLE = "adapter_model.bin"
_KOHYA = re.compile(r"lora_(unet|te|te1|te2|transformer)_.+\.(lora_(down|up)\.weight|alpha|hada_.+|lokr_.+)")
_PLAIN = f"a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"


def is_adapter(path: Path) -> bool:
    """Whether the folder at `path` holds an adapter, or the file at `path` is the weights of one beside its config.

    A config alone may lie beside the checkpoint that the adapter was merged into.
    """
    adapters = (ADAPTER_WEIGHTS, _PICKLE, _MLX)
    if not os.path.isdir(path):
        return path.name in adapters and os.path.lexists(path.parent / ADAPTER_CONFIG)
    if not os.path.lexists(path / ADAPTER_CONFIG):
        return False
    weights = [name for name in os.listdir(path) if name.endswith((".safetensors", ".safetensors.index.json"))]
    return not weights or any(os.path.lexists(path / name) for name in adapters)


def refuse_foreign(path: Path) -> None:
    """Raises InputError unless `path` is a folder that may hold a PEFT adapter."""
    if not os.path.isdir(path):
        raise InputError("not a LoRA adapter", file=path, expected=_PLAIN)
    if os.path.lexists(path / ADAPTER_WEIGHTS):
        return
    if os.path.lexists(path / _MLX):
        raise InputError(
            "an adapter of mlx-lm, not of PEFT",
            file=path / _MLX,
            expected="the model that `mlx_lm.fuse --dequantize` makes with it, as a checkpoint",
        )
    if os.path.lexists(path / _PICKLE):
        raise InputError(
            "the adapter is a pickle, which is never loaded",
            file=path / _PICKLE,
            expected=f"{ADAPTER_WEIGHTS}, as PEFT's save_pretrained writes it",
        )


def refuse_kohya(file: Path, names: Iterable[str]) -> None:
    """Raises InputError for the tensors of a kohya-ss file."""
    for name in names:
        if _KOHYA.fullmatch(name):
            raise InputError(
                "an adapter in the layout of kohya-ss, not of PEFT",
                file=file,
                tensor=name,
                expected="the model that diffusers' load_lora_weights and fuse_lora make with it, as a checkpoint",
            )


def refuse_ungathered(file: Path, entry: Stored) -> None:
    """Raises InputError for a tensor that does not fit because it is empty."""
    if 0 in entry.shape:
        raise InputError(
            "an empty tensor: saved from DeepSpeed ZeRO-3 without gathering the weights",
            file=file,
            tensor=entry.name,
            found=list(entry.shape),
            expected="the output of zero_to_fp32.py, or a save with stage3_gather_16bit_weights_on_model_save",
        )
