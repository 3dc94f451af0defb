"""What tests of fix files share: random changes, and a fix written from two tables of tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.fix_oracle import BITS, encode
from tests.oracle import Tensor, save_file

BLOCK = 65536
STEM = "model-0000{}-of-00002.safetensors"


def unsigned(t: Tensor) -> np.ndarray[Any, Any]:
    return np.frombuffer(t.data, f"<u{BITS[t.dtype] // 8}")


def random_tensor(rng: np.random.Generator, dtype: str, *shape: int) -> Tensor:
    n = int(np.prod(shape))
    high = 2 if dtype == "BOOL" else 256
    return Tensor(dtype, shape, rng.integers(0, high, n * BITS[dtype] // 8, dtype=np.uint8).tobytes())


def changed(rng: np.random.Generator, t: Tensor, where: Any, style: str = "any") -> Tensor:
    """`t` with other entries `where` (a share, or positions); `small` changes leave high bytes alone."""
    entries = unsigned(t).copy()
    at = np.flatnonzero(rng.random(len(entries)) < where) if isinstance(where, float) else np.asarray(where, int)
    bits = 8 * entries.itemsize
    if style == "any":
        x = rng.integers(1, 1 << bits, len(at), dtype=np.uint64)
    elif style == "small":
        x = rng.integers(1, 64, len(at), dtype=np.uint64)
        rare = rng.random(len(at)) < 0.1
        x[rare] = rng.integers(1, 1 << bits, int(rare.sum()), dtype=np.uint64)
    else:  # one high bit
        x = np.full(len(at), 1 << (bits - 1), np.uint64)
    if t.dtype == "BOOL":
        x = np.ones(len(at), np.uint64)
    entries[at] ^= x.astype(entries.dtype)
    return Tensor(t.dtype, t.shape, entries.tobytes())


def write_fix(path: Path, base: Mapping[str, Tensor], merged: Mapping[str, Tensor], recipe: Any = None) -> Path:
    """The fix file that the oracle gives."""
    path.write_bytes(encode(base, merged, recipe))
    return path


def write_both(root: Path, base: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> tuple[Path, Path]:
    """Two checkpoints of one file each."""
    paths = root / "base.safetensors", root / "merged.safetensors"
    for path, tensors in zip(paths, (base, merged), strict=True):
        save_file(path, tensors)
    return paths


def write_checkpoint(root: Path, tensors: Mapping[str, Tensor], *, config: bool = True) -> Path:
    """Two shards, an index and small files."""
    root.mkdir()
    names = sorted(tensors)
    half = len(names) // 2
    weight_map = {}
    for shard, part in ((1, names[:half]), (2, names[half:])):
        save_aligned(root / STEM.format(shard), {n: tensors[n] for n in part})
        weight_map.update(dict.fromkeys(part, STEM.format(shard)))
    index = {"metadata": {"total_size": sum(len(t.data) for t in tensors.values())}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    if config:
        (root / "config.json").write_text('{"model_type": "llama"}\n')
    return root


def save_aligned(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Data start at a multiple of 8, as other writers lay them out."""
    for pad in range(8):
        save_file(path, tensors, pad)
        if int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0:
            return
