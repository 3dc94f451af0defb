"""Models, deltas and scores on disk: under the names of the base's tensors, in shards cut as the base's.

Tensors are renamed layer by layer and written one by one into files of known layout, so that memory never holds a
second copy of a model. Of a model that is sharded over ranks each layer is made whole in turn, on every rank, and
written by the first: every rank calls what saves it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from safepatch_core.backends.contract import Lora
from safepatch_core.deriving.names import BaseNames, saved_state
from safepatch_core.deriving.sharding import full_tensor
from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.files.filenames import INDEX, SINGLE
from safepatch_core.files.header import make_header
from safepatch_core.files.parsing import read_json
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.sources import open_source
from safepatch_core.merging.sources.contract import PatchTensor, load_alone
from safepatch_core.ranks import Ranks
from safepatch_core.spec import Kind

CONFIG, GENERATION = "config.json", "generation_config.json"

Layer = dict[str, Tensor]  # tensors of one layer, by their names in the model
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {
    **{dtype: code for code, dtype in DTYPES.items()},
    **{torch.float64: "F64", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}
_LAYER = re.compile(r".*?\.\d+(?=\.)")


def by_layer(names: Iterable[str]) -> list[list[str]]:
    """Names grouped by what comes up to their first number, as in `model.layers.7`; those without one are a group."""
    groups: dict[str, list[str]] = {}
    for name in names:
        found = _LAYER.match(name)
        groups.setdefault(found[0] if found else "", []).append(name)
    return list(groups.values())


def read_tensor(entry: TensorEntry) -> Tensor:
    """One tensor of a checkpoint, on the CPU."""
    with safe_open(entry.path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(entry.name)
    return tensor


def save_model(model: Any, folder: Path, base: Checkpoint, ranks: Ranks | None = None) -> None:
    """Writes the model's weights under exactly the base's names, in the model's dtypes.

    A tensor that the model doesn't use is the base's. Raises InputError if the model has a tensor without a
    counterpart in the base.
    """
    state, names = saved_state(model), BaseNames(model, base)
    _write(folder, base, names, _layers(state), lambda _, tensor: tensor, read_tensor, ranks=ranks)


def save_config(folder: Path, base: Checkpoint, dtype: torch.dtype) -> None:
    """Writes the base's config, with the dtype that the saved weights have, and its generation settings.

    transformers refuses to save settings that contradict themselves, and many a base has some: they are copied.
    """
    assert base.root is not None
    name = str(dtype).removeprefix("torch.")
    config = with_dtype({"dtype": name} | read_json(base.root / CONFIG, within=base.root), name)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if (base.root / GENERATION).is_file():
        shutil.copyfile(base.root / GENERATION, folder / GENERATION)


def with_dtype(config: Any, name: str) -> Any:
    """The config with `name` wherever it, or the config of a part of it, gives a dtype."""
    if not isinstance(config, dict):
        return config
    return {k: name if k in ("dtype", "torch_dtype") else with_dtype(v, name) for k, v in config.items()}


def save_delta(
    model: Any,
    folder: Path,
    base: Checkpoint,
    entries: Sequence[TensorEntry],
    dtype: torch.dtype,
    ranks: Ranks | None = None,
) -> None:
    """Writes model - base for the base's tensors `entries` and nothing else, in `dtype` (float32 or bfloat16).

    A value is f32(model) - f32(base), rounded once to float32: the delta that a merge takes from a checkpoint. In
    bfloat16 it is rounded once more, to nearest even. Raises as `save_model`.
    """

    def difference(entry: TensorEntry, tensor: Tensor) -> Tensor:
        return (tensor.cpu().float() - read_tensor(entry).float()).to(dtype)

    def unchanged(entry: TensorEntry) -> Tensor:
        return torch.zeros(entry.shape, dtype=dtype)

    names = BaseNames(model, base)
    names.keep(entry.name for entry in entries)
    _write(folder, base, names, _layers(saved_state(model)), difference, unchanged, dtype, ranks)


def save_scores(
    model: Any,
    folder: Path,
    base: Checkpoint,
    entries: Sequence[TensorEntry],
    parameters: Mapping[str, Tensor],
    layers: Iterable[Layer],
    ranks: Ranks | None = None,
) -> None:
    """Writes float32 scores of the model's `parameters`, for exactly the base's tensors `entries`.

    `layers`, the scores named and shaped as the parameters, is read once and one layer at a time. A tensor that the
    model doesn't use has score 0. Raises InputError if a parameter has no counterpart among `entries`.
    """
    names = BaseNames(model, base, [entry.name for entry in entries], parameters)

    def unused(entry: TensorEntry) -> Tensor:
        return torch.zeros(entry.shape)

    _write(folder, base, names, layers, lambda _, scores: scores, unused, torch.float32, ranks)


def patched_tensors(
    folder: Path, kind: Kind, base: Checkpoint, entries: Iterable[TensorEntry]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the patch saved in `folder` makes of the base's tensors `entries`, read as a merge reads it.

    Yields:
        The base's tensor in its own dtype, and the patched one: as saved, or float32 of base + delta. What an adapter
        leaves alone is the base's.
    """
    source = open_source(folder.name, folder, kind, base, relative_to=None)
    with closing(Inputs((base, *source.checkpoints))) as inputs:
        for entry in entries:
            old, found = read_tensor(entry), source.lookup(entry, "skip")
            if found is None:
                yield old, old
                continue
            given = read_patch(found, inputs, entry)
            yield old, given if found.form == "checkpoint" else old.float() + given.float()


def read_patch(found: PatchTensor, inputs: Inputs, entry: TensorEntry) -> Tensor:
    """What a patch brings to the base's tensor `entry`: its patched values as saved, or its delta."""
    given = load_alone(found, inputs, 0, entry.entries)
    if isinstance(given, Lora):
        return given.scale * torch.from_numpy(given.b @ given.a)
    signed = given.data.view(np.int32 if given.dtype == "F32" else np.int16)  # torch's views start from these
    return torch.from_numpy(signed).view(DTYPES[given.dtype]).view(entry.shape)


@contextmanager
def applied(
    patch: Path, kind: Kind, base: Checkpoint, entries: Sequence[TensorEntry], folder: Path
) -> Iterator[Path]:
    """base + the patch as a checkpoint in `folder`, its targets `entries` in float32, while the context lasts."""
    assert base.root is not None
    folder.mkdir()
    try:
        shutil.copyfile(base.root / CONFIG, folder / CONFIG)
        codes = {name: entry.dtype for name, entry in base.tensors.items()} | {e.name: "F32" for e in entries}
        with TensorFiles(folder, base.tensors.values(), codes) as files:
            pairs = patched_tensors(patch, kind, base, entries)
            for entry, (_, patched) in zip(entries, pairs, strict=True):
                files.write(entry.name, patched.float())
            for name in files.left():
                files.write(name, read_tensor(base.tensors[name]))
        yield folder
    finally:
        shutil.rmtree(folder)


class TensorFiles:
    """Safetensors files whose tensors may be written in any order, one at a time; with an index if there are several.

    `entries` are tensors of the base, which give names, shapes and the cut into files; `codes` their dtypes.
    """

    def __init__(self, folder: Path, entries: Iterable[TensorEntry], codes: Mapping[str, str]) -> None:
        self._folder, self._codes, self._open = folder, codes, ExitStack()
        self._places: dict[str, tuple[BinaryIO, int, int]] = {}  # name -> file, offset, size in bytes
        self._shards: dict[str, list[TensorEntry]] = {}
        for entry in entries:
            self._shards.setdefault(entry.file, []).append(entry)
        self._written: set[str] = set()

    def __enter__(self) -> TensorFiles:
        weight_map: dict[str, str] = {}
        total = 0
        with self._open:  # closes what is open if a file can't be made
            for number, (_, entries) in enumerate(sorted(self._shards.items()), 1):
                count = len(self._shards)
                target = SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
                total += self._create(self._folder / target, entries)
                weight_map |= {entry.name: target for entry in entries}
            if len(self._shards) > 1:
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
            self._open = self._open.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._open.close()
        assert kind is not None or not self.left()

    def left(self) -> list[str]:
        """What has not been written."""
        return [name for name in self._places if name not in self._written]

    def write(self, name: str, tensor: Tensor) -> None:
        """The tensor's bytes; its dtype and size are those of the layout."""
        file, offset, nbytes = self._places[name]
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        assert _CODES[tensor.dtype] == self._codes[name] and data.nbytes == nbytes, name
        file.seek(offset)
        file.write(data.data)
        self._written.add(name)

    def _create(self, path: Path, entries: Sequence[TensorEntry]) -> int:
        """A file with its header and room for its data; returns the bytes of the data."""
        tensors = [(entry.name, self._codes[entry.name], entry.shape) for entry in entries]
        header, ranges = make_header(sorted(tensors), {"format": "pt"})
        total = sum(hi - lo for lo, hi in ranges.values())
        file = self._open.enter_context(open(path, "wb"))
        os.posix_fallocate(file.fileno(), 0, len(header) + total)
        file.write(header)
        for name, (lo, hi) in ranges.items():
            self._places[name] = (file, len(header) + lo, hi - lo)
        return total


def _write(
    folder: Path,
    base: Checkpoint,
    names: BaseNames,
    layers: Iterable[Layer],
    value: Callable[[TensorEntry, Tensor], Tensor],
    unused: Callable[[TensorEntry], Tensor],
    dtype: torch.dtype | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Writes `value` of every tensor of the base that the model has, and what is `unused` of every other one."""
    layers = ({name: full_tensor(tensor) for name, tensor in layer.items()} for layer in layers)
    if ranks is not None and ranks.rank > 0:
        for _ in layers:
            pass
        return
    codes = {}
    for name, own in names.dtypes.items():
        chosen = dtype or own
        codes[name] = _CODES[chosen] if chosen else base.tensors[name].dtype
    with TensorFiles(folder, [base.tensors[name] for name in names.dtypes], codes) as files:
        for layer in layers:
            for name, tensor in names.convert(layer):
                files.write(name, value(base.tensors[name], tensor))
        for name, own in names.dtypes.items():
            if own is None:
                files.write(name, unused(base.tensors[name]))


def _layers(state: Mapping[str, Tensor]) -> Iterator[Layer]:
    return ({name: state[name] for name in group} for group in by_layer(state))
