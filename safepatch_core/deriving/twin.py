"""A quantised backbone as floats: what transformers would hand a trainer, written once beside the run.

Patches are trained on that copy and merged into the codes: the recipe names the quantised model, with `quantized:`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from safepatch_core.deriving.saving import CONFIG, TensorFiles, read_patch, read_tensor, with_dtype
from safepatch_core.errors import InputError, OutputError
from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.files.companions import companions
from safepatch_core.files.disk import failures_named, hash_file, removed_on_failure, staged_name, sync_directory
from safepatch_core.files.parsing import read_json
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.quantised.modules import CONFIG_KEYS, quantised
from safepatch_core.merging.quantised.twin import Twin, recognised, refuse_weight
from safepatch_core.merging.quantised.values import DTYPES, Dequantised

DTYPE = "bfloat16"  # of dequantised weights, as transformers and compressed-tensors hand them out
_ORIGIN = "dequantised.json"  # in the copy: what it was made from


def is_quantised(base: Checkpoint) -> bool:
    """Whether a backbone holds codes."""
    return quantised(base) is not None


def float_copy(base: Checkpoint, out: Path) -> Path:
    """The folder beside the run directory `out` where the backbone's weights lie as floats; made if it is not there.

    Raises:
        InputError: a weight is quantised in a way that can't be merged into, or the folder holds a copy of another
            model.
        OutputError: the folder can't be made.
    """
    held = quantised(base)
    assert held is not None and base.root is not None
    twin = recognised(base, held)
    if twin.closed:
        raise refuse_weight(twin, next(iter(twin.closed.values())), base)
    folder = out.with_name(f"{out.name}.backbone")
    origin = _origin(base)
    if folder.exists():
        _require_origin(folder, origin)
        return folder
    staging = staged_name(folder)
    with failures_named(folder, what="cannot write the backbone's floats", kind=OutputError, go_on=""):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        with removed_on_failure(staging):
            write_floats(twin, base, staging, DTYPE)
            (staging / _ORIGIN).write_text(json.dumps(origin) + "\n")
            staging.rename(folder)
            sync_directory(folder.parent)
    return folder


def write_floats(twin: Twin, base: Checkpoint, folder: Path, dtype: str) -> None:
    """Config, companions and all tensors of a quantised model into an empty folder, what was codes as `dtype`."""
    assert base.root is not None
    for path in companions(base):
        if path.name != CONFIG:
            shutil.copyfile(path, folder / path.name)
    config = read_json(base.root / CONFIG, within=base.root)
    floats = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    (folder / CONFIG).write_text(json.dumps(with_dtype({"dtype": dtype} | floats, dtype), indent=2) + "\n")
    stored = {entry.name: entry.dtype for entry in twin.base.tensors.values()}
    dtypes = stored | dict.fromkeys(twin.weights, DTYPES[dtype])
    entries = twin.base.tensors.values()
    with TensorFiles(folder, entries, dtypes) as files, closing(Inputs((base,))) as inputs:
        for entry in entries:
            files.write(entry.name, _floats(twin, inputs, entry, getattr(torch, dtype)))
        inputs.check_unchanged()


def _floats(twin: Twin, inputs: Inputs, entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
    """One tensor: dequantised, or as it is stored."""
    weight = twin.weights.get(entry.name)
    if weight is None:
        return read_tensor(entry)
    return read_patch(Dequantised(weight), inputs, entry).to(dtype)


def _origin(base: Checkpoint) -> dict[str, Any]:
    """What tells one quantised model from another: its config and every byte of its files."""
    assert base.root is not None
    digest = hashlib.sha256((base.root / CONFIG).read_bytes())
    for shard in base.shards:
        digest.update(bytes.fromhex(hash_file(shard.path)))
    return {"sha256": digest.hexdigest(), "dtype": DTYPE}


def _require_origin(folder: Path, origin: dict[str, Any]) -> None:
    file = folder / _ORIGIN
    if not file.is_file() or read_json(file) != origin:
        raise InputError("is no float copy of this backbone", file=folder, expected="none there, or another `out`")
