"""What is fuzzed: each target takes any bytes and returns, or raises what no input may cause.

A refusal has to be the error that the rules name, in one line; an input that is accepted has to be one that
`safetensors` accepts too, with the same tensors.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import safetensors

from safepatch_core.backends.contract import Bits, Lora
from safepatch_core.errors import InputError, IOFailure, SafepatchError, UsageError
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint
from safepatch_core.files.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX
from safepatch_core.files.parsing import BITS, Shard, read_shard
from safepatch_core.fixes.info import prove
from safepatch_core.fixes.reading import open_fix
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.recipe import load_recipe
from safepatch_core.merging.sources import open_source
from safepatch_core.merging.sources.contract import load_alone

SHM = Path("/dev/shm")
ROOT = Path(tempfile.mkdtemp(prefix="safepatch-fuzz-", dir=SHM if os.access(SHM, os.W_OK) else None))
atexit.register(shutil.rmtree, ROOT, ignore_errors=True)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Bytes that a framed input may ask for behind its header.
DATA_LIMIT = 1 << 16
# Entries of a tensor that a fuzzed fix may touch: its windows are held in memory.
MOST_ENTRIES = 1 << 20


class Violation(AssertionError):
    """An input did what none may do."""


def refused(error: SafepatchError, *allowed: type[SafepatchError]) -> None:
    """A refusal is of the right kind and one line that can't drive a terminal."""
    text = str(error)
    if not isinstance(error, allowed) or error.file is None or len(text) > 4000 or CONTROL.search(text):
        raise Violation(f"{type(error).__name__}: {text!r}")


def safetensors_file(tensors: dict[str, Any], data: bytes | int = b"") -> bytes:
    header = json.dumps(tensors).encode()
    return len(header).to_bytes(8, "little") + header + (bytes(data) if isinstance(data, int) else data)


def same_as_safetensors(raw: bytes, shard: Shard) -> None:
    """What was accepted is accepted by the format's own library, and it sees the same tensors."""
    try:
        theirs = dict(safetensors.deserialize(raw))  # type: ignore[no-untyped-call]
    except BaseException as error:
        raise Violation(f"accepted, but safetensors says: {error}") from error
    ours = {entry.name: (list(entry.shape), entry.nbytes) for entry in shard.tensors}
    if ours != {name: (list(t["shape"]), len(t["data"])) for name, t in theirs.items()}:
        raise Violation(f"other tensors than safetensors: {ours}")
    if any(entry.dtype not in BITS for entry in shard.tensors):
        raise Violation("an unknown dtype was accepted")


def header(data: bytes) -> None:
    """A safetensors file: as it is, or (first byte odd) a header that is framed, with so much data."""
    raw = data
    if data[:1] and data[0] & 1:
        nbytes, text = int.from_bytes(data[1:3], "little") % DATA_LIMIT, data[3:]
        raw = len(text).to_bytes(8, "little") + text + bytes(nbytes)
    path = ROOT / "fuzzed.safetensors"
    path.write_bytes(raw)
    try:
        shard = read_shard(path)
    except SafepatchError as error:
        refused(error, InputError)
        return
    same_as_safetensors(raw, shard)


def _two_shards() -> Path:
    folder = ROOT / "checkpoint"
    if not folder.exists():
        folder.mkdir()
        for i in (1, 2):
            tensor = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
            (folder / f"model-{i}.safetensors").write_bytes(safetensors_file({f"t{i}": tensor}, 2))
    return folder


def index(data: bytes) -> None:
    """The index of a checkpoint of two shards, with one tensor each."""
    folder = _two_shards()
    (folder / INDEX).write_bytes(data)
    try:
        found = open_checkpoint(folder)
    except SafepatchError as error:
        refused(error, InputError)
        return
    theirs = json.loads(data)["weight_map"]
    if {name: entry.file for name, entry in found.tensors.items()} != theirs:
        raise Violation(f"other tensors than the index: {theirs}")
    if any(entry.path.parent != folder.resolve() for entry in found.tensors.values()):
        raise Violation("a path out of the checkpoint")


def recipe(data: bytes) -> None:
    """A recipe file."""
    path = ROOT / "recipe.yaml"
    path.write_bytes(data)
    try:
        loaded = load_recipe(path)
    except SafepatchError as error:
        refused(error, UsageError)
        return
    json.dumps(loaded.resolved(), allow_nan=False)
    loaded.is_target("model.layers.0.weight", 2)


_BASE: list[Checkpoint] = []


def _base() -> Checkpoint:
    if not _BASE:
        path = ROOT / "base.safetensors"
        tensors, at = {}, 0
        shapes = {"m.q.weight": [4, 6], "m.k.weight": [2, 6], "embed.weight": [8, 4], "m.experts": [2, 4, 6]}
        for name, shape in {**shapes, "m.q.bias": [4]}.items():
            end = at + 2 * math.prod(shape)
            tensors[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
            at = end
        path.write_bytes(safetensors_file(tensors, at))
        _BASE.append(open_checkpoint(path))
    return _BASE[0]


def adapter(data: bytes) -> None:
    """An adapter: its config, then after a NUL byte a line of name, dtype, rows and columns per tensor."""
    text, _, table = data.partition(b"\0")
    folder = ROOT / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / ADAPTER_CONFIG).write_bytes(text)
    tensors, at = {}, 0
    for line in table.decode(errors="replace").splitlines()[:8]:
        name, dtype, rows, cols = (line.split(" ") + [""] * 4)[:4]
        shape = [int(n[:2]) for n in (rows, cols) if n.isascii() and n[:2].isdigit()]
        count = 1
        for size in shape:
            count *= size
        end = at + count * BITS.get(dtype, 8) // 8
        tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    (folder / ADAPTER_WEIGHTS).write_bytes(safetensors_file(tensors, at))
    base = _base()
    try:
        source = open_source("fuzzed", folder, None, base, relative_to=None)
        for name in source.shapes:
            entry = base.tensors.get(name)
            found = entry and source.lookup(entry, "error")
            if entry and found:
                with closing(Inputs((base, *source.checkpoints))) as inputs:
                    values = load_alone(found, inputs, 0, entry.entries)
                if isinstance(values, Lora) and (values.b.shape[0], values.a.shape[1]) != (1, *entry.shape)[-2:]:
                    raise Violation(f"factors of another shape than {name}")
                if isinstance(values, Bits) and len(values.data) != entry.entries:
                    raise Violation(f"another number of entries than {name}")
    except SafepatchError as error:
        refused(error, InputError, IOFailure)


def fix(data: bytes) -> None:
    """A fix file: all of it is read, and what it says is told apart in entries of zeros."""
    path = ROOT / "fuzzed-fix.safetensors"
    path.write_bytes(data)
    try:
        with open_fix(path) as opened:
            for touched in opened.tensors.values():
                if touched.entries <= MOST_ENTRIES:
                    prove(opened, touched)
    except SafepatchError as error:
        refused(error, InputError, IOFailure)


TARGETS: dict[str, Callable[[bytes], None]] = {f.__name__: f for f in (header, index, recipe, adapter, fix)}
