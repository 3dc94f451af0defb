"""A sparse patch as one would write it with torch: flat places and values of the entries that differ.

`python torch_sparse.py make BASE MERGED PATCH` or `apply BASE PATCH OUT`, on bfloat16 checkpoints. It is a peer to
measure against and shares no code with safepatch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def make(base: Path, merged: Path, patch: Path) -> None:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(base.glob("*.safetensors")):
        new = load_file(merged / path.name)
        for name, tensor in load_file(path).items():
            old = tensor.flatten().view(torch.int16)
            index = (old != new[name].flatten().view(torch.int16)).nonzero().flatten()
            if len(index):
                place = torch.int32 if len(old) < 1 << 31 else torch.int64
                found |= {f"{name}::index": index.to(place), f"{name}::value": new[name].flatten()[index]}
    save_file(found, patch)


def apply(base: Path, patch: Path, out: Path) -> None:
    changes = load_file(patch)
    out.mkdir(exist_ok=True)
    for path in sorted(base.glob("*.safetensors")):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if (index := changes.get(f"{name}::index")) is not None:
                tensor.view(-1).index_put_((index.long(),), changes[f"{name}::value"])
        with safe_open(path, "pt") as file:
            save_file(tensors, out / path.name, metadata=file.metadata())


if __name__ == "__main__":
    {"make": make, "apply": apply}[sys.argv[1]](*map(Path, sys.argv[2:]))
