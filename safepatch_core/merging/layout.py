"""The files of the output: the base's own, or new shards, and the index that names them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.files.filenames import DIFFUSERS, DIFFUSERS_INDEX, INDEX, SINGLE
from safepatch_core.files.header import make_header
from safepatch_core.files.reading import TensorEntry
from safepatch_core.sizes import parse_size


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One safetensors file of the output: its header bytes and, in order, where each base tensor goes."""

    name: str
    header: bytes
    tensors: tuple[TensorEntry, ...]
    sparse: bool = False  # zeros are left out as holes, because the base's file has holes

    @property
    def size(self) -> int:
        return len(self.header) + sum(t.nbytes for t in self.tensors)


@dataclass(frozen=True, slots=True)
class OutputPart:
    """Bytes [lo, hi) of an output file and the tensors in them; the header belongs to the part that starts at 0."""

    output: OutputFile
    tensors: tuple[TensorEntry, ...]
    lo: int
    hi: int


@dataclass(frozen=True, slots=True)
class IndexFile:
    """The output's index. Its text is made when it is written, as a plan needs none."""

    name: str
    outputs: tuple[OutputFile, ...]
    metadata: Mapping[str, Any]  # the base's own

    @property
    def data(self) -> bytes:
        tensors = {t.name: (o.name, t.nbytes) for o in self.outputs for t in o.tensors}
        data = {
            "metadata": {**self.metadata, "total_size": sum(nbytes for _, nbytes in tensors.values())},
            "weight_map": {name: file for name, (file, _) in sorted(tensors.items())},
        }
        return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def lay_out(base: Checkpoint, max_shard_size: str | int | None) -> tuple[tuple[OutputFile, ...], IndexFile | None]:
    """The output's files, and its index where there are several (or the base has one).

    Both get names that loaders look for: those of the base's kind, without a variant's.
    """
    if max_shard_size is not None:
        return _resharded(base, parse_size(max_shard_size))
    if len(base.shards) == 1 and base.index is None:
        shard = base.shards[0]
        return (OutputFile(_single(base), shard.header, shard.tensors, shard.sparse),), None
    outputs = tuple(OutputFile(s.file, s.header, s.tensors, s.sparse) for s in base.shards)
    return outputs, _index(outputs, base)


def _single(base: Checkpoint) -> str:
    """The name of a checkpoint in one file: diffusers looks for its own."""
    stem = Path(DIFFUSERS).stem
    return DIFFUSERS if (base.index_name or base.shards[0].file).startswith(stem) else SINGLE


def _resharded(base: Checkpoint, room: int) -> tuple[tuple[OutputFile, ...], IndexFile | None]:
    groups: list[list[TensorEntry]] = [[]]
    for entry in (t for shard in base.shards for t in shard.tensors):
        if groups[-1] and sum(t.nbytes for t in groups[-1]) + entry.nbytes > room:
            groups.append([])
        groups[-1].append(entry)
    metadata = {k: v for shard in reversed(base.shards) for k, v in shard.metadata.items()}
    sparse = any(shard.sparse for shard in base.shards)
    if len(groups) == 1:
        return (_output_file(_single(base), groups[0], metadata, sparse),), None
    stem = Path(_single(base)).stem
    outputs = tuple(
        _output_file(f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors", group, metadata, sparse)
        for i, group in enumerate(groups, 1)
    )
    return outputs, _index(outputs, base)


def _output_file(name: str, tensors: Sequence[TensorEntry], metadata: dict[str, str], sparse: bool) -> OutputFile:
    header, ranges = make_header(((t.name, t.dtype, t.shape) for t in tensors), metadata)
    entries = {t.name: t for t in tensors}
    return OutputFile(name, header, tuple(entries[name] for name in ranges), sparse)


def _index(outputs: tuple[OutputFile, ...], base: Checkpoint) -> IndexFile:
    known = base.index.get("metadata") if base.index else None
    name = DIFFUSERS_INDEX if _single(base) == DIFFUSERS else INDEX
    return IndexFile(name, outputs, known if isinstance(known, dict) else {})
