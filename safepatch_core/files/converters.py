"""Checkpoints that other programs write and this one does not read: what they are, and who converts them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

_SAVE = "a checkpoint that transformers' save_pretrained wrote"
_FSDP = ("a distributed checkpoint of PyTorch (FSDP)", "what `accelerate merge-weights` makes of it")
_ZERO = ("a checkpoint of DeepSpeed", "what its zero_to_fp32.py writes with --safe_serialization")
_PICKLE = ("a pickle, which is never loaded", f"{_SAVE} (it writes safetensors)")
# A file's or folder's name, what it tells, and what to do. The first that fits counts.
_KINDS: tuple[tuple[str, str, str], ...] = (
    ("*.distcp", *_FSDP),
    (
        "pytorch_model_fsdp*",
        "a distributed checkpoint of PyTorch (FSDP)",
        "what `accelerate merge-weights` makes of it",
    ),
    ("global_step*", *_ZERO),
    ("zero_pp_rank*", *_ZERO),
    ("mp_rank_*", "a checkpoint of DeepSpeed or Megatron", _SAVE),
    ("iter_*", "a checkpoint of Megatron", f"{_SAVE}, after Megatron Bridge has converted it"),
    ("*.nemo", "a checkpoint of NeMo", f"{_SAVE}, after NeMo has exported it"),
    ("adapters.npz", "an adapter of mlx-lm", "the model that `mlx_lm.fuse --dequantize` writes"),
    ("adapter_model.bin", "an adapter that is a pickle, which is never loaded", "one that PEFT saved as safetensors"),
    ("*.gguf", "a GGUF file, whose weights are quantised", "the float model that it was made from"),
    ("*.incomplete", "a download that was not finished", "the whole file: download it again"),
    ("*.bin.index.json", "the index of a pickle, which is never loaded", f"{_SAVE} (it writes safetensors)"),
    ("*.bin", *_PICKLE),
    ("*.pt", *_PICKLE),
    ("*.pth", *_PICKLE),
    ("*.ckpt", *_PICKLE),
    ("*.pkl", *_PICKLE),
    ("flax_model*.msgpack", "weights of Flax", f"{_SAVE}, with from_flax=True"),
    ("tf_model*.h5", "weights of TensorFlow", f"{_SAVE}, with from_tf=True"),
)


def foreign(root: Path, names: Sequence[str]) -> tuple[str, str] | None:
    """What lies in a directory without safetensors files, and what is expected in its place."""
    for glob, what, expected in _KINDS:
        found = next((name for name in names if fnmatchcase(name, glob)), None)
        if found is not None:
            return f"{found}: {what}", expected
    for folder in names:
        held = sorted((root / folder).glob("*.safetensors")) + sorted((root / folder).glob("*/*.safetensors"))
        if held and not folder.startswith("."):
            return f"{held[0].relative_to(root)}", f"the folder that holds the weights, such as {held[0].parent}"
    return None


def kind_by_name(name: str) -> str | None:
    """What a file is by its name."""
    return next((what for glob, what, _ in _KINDS if fnmatchcase(os.path.basename(name), glob)), None)
