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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from safepatch_core.deriving.sharding import class_of, full_tensor
from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from safepatch_core.files.filenames import INDEX, SINGLE
from safepatch_core.files.header import make_header
from safepatch_core.ranks import Ranks

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
    """Writes the model's weights under exactly the base's names, in the model's dtypes; with its config.

    A tensor that the model doesn't use is the base's. Raises InputError if the model has a tensor without a
    counterpart in the base.
    """
    if ranks is None or ranks.rank == 0:
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [class_of(model).__name__]
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    state = _state(model)
    origins = _origins(model, base, base.tensors, state)
    _write(model, folder, base, origins, _layers(state), lambda _, tensor: tensor, read_tensor, ranks=ranks)


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

    state = _state(model)
    every = _origins(model, base, base.tensors, state)
    origins = {entry.name: every[entry.name] for entry in entries}
    _write(model, folder, base, origins, _layers(state), difference, unchanged, dtype, ranks)


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
    origins = _origins(model, base, [entry.name for entry in entries], parameters)

    def unused(entry: TensorEntry) -> Tensor:
        return torch.zeros(entry.shape)

    _write(model, folder, base, origins, layers, lambda _, scores: scores, unused, torch.float32, ranks)


def patched_tensors(folder: Path, entries: Sequence[TensorEntry], *, delta: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Each of the base's tensors `entries` with its patched values: as saved, or float32 of base + delta."""
    saved = open_checkpoint(folder).tensors
    for entry in entries:
        old, new = read_tensor(entry), read_tensor(saved[entry.name])
        yield old, old.float() + new.float() if delta else new


@contextmanager
def applied(delta: Path, base: Checkpoint, entries: Sequence[TensorEntry], folder: Path) -> Iterator[Path]:
    """base + delta as a checkpoint in `folder`, its targets `entries` in float32, while the context lasts."""
    assert base.root is not None
    folder.mkdir()
    try:
        shutil.copyfile(base.root / "config.json", folder / "config.json")
        codes = {name: entry.dtype for name, entry in base.tensors.items()} | {e.name: "F32" for e in entries}
        with _TensorFiles(folder, base.tensors.values(), codes) as files:
            pairs = patched_tensors(delta, entries, delta=True)
            for entry, (_, patched) in zip(entries, pairs, strict=True):
                files.write(entry.name, patched)
            for name in files.left():
                files.write(name, read_tensor(base.tensors[name]))
        yield folder
    finally:
        shutil.rmtree(folder)


class _Origin(NamedTuple):
    """What becomes a tensor of the base: its name as transformers saves it, and its dtype."""

    name: str
    dtype: torch.dtype


class _TensorFiles:
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

    def __enter__(self) -> _TensorFiles:
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
    model: Any,
    folder: Path,
    base: Checkpoint,
    origins: Mapping[str, _Origin | None],
    layers: Iterable[Layer],
    value: Callable[[TensorEntry, Tensor], Tensor],
    unused: Callable[[TensorEntry], Tensor],
    dtype: torch.dtype | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Writes `value` of every tensor of the base that has an origin, and what is `unused` of every other one."""
    from transformers.core_model_loading import revert_weight_conversion

    layers = ({name: full_tensor(tensor) for name, tensor in layer.items()} for layer in layers)
    if ranks is not None and ranks.rank > 0:
        for _ in layers:
            pass
        return
    codes, becomes = {}, dict[str, list[str]]()
    for name, origin in origins.items():
        chosen = dtype or (origin and origin.dtype)
        codes[name] = _CODES[chosen] if chosen else base.tensors[name].dtype
        if origin is not None:
            becomes.setdefault(origin.name, []).append(name)
    with _TensorFiles(folder, [base.tensors[name] for name in origins], codes) as files:
        for layer in layers:
            for saved, tensor in revert_weight_conversion(model, layer).items():
                for name in becomes.get(saved, ()):
                    files.write(name, value(base.tensors[name], tensor))
        for name, origin in origins.items():
            if origin is None:
                files.write(name, unused(base.tensors[name]))


def _state(model: Any) -> dict[str, Tensor]:
    """What transformers saves of a model, under the model's own names."""
    tied, ignored = _tied_names(model), model._keys_to_ignore_on_save or ()
    return {n: t for n, t in model.state_dict().items() if n not in tied and n not in ignored}


def _layers(state: Mapping[str, Tensor]) -> Iterator[Layer]:
    return ({name: state[name] for name in group} for group in by_layer(state))


def _origins(
    model: Any, base: Checkpoint, names: Iterable[str], state: Mapping[str, Tensor]
) -> dict[str, _Origin | None]:
    """For each of the base's tensors `names`, what of the model's tensors `state` becomes it; None if nothing does.

    transformers undoes the renamings and fusions of its own loading; what it leaves is settled here: a prefix that
    the base's names lack, and tied tensors that the base repeats. Raises InputError if a tensor of `state` becomes
    nothing, or something of another shape.
    """
    from transformers.core_model_loading import revert_weight_conversion

    shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in state.items()}
    saved = revert_weight_conversion(model, shapes)
    tied, prefix = _tied_names(model), model.base_model_prefix
    origins: dict[str, _Origin | None] = {}
    for name in names:
        candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        found = next((a for c in candidates for a in (c, tied.get(c)) if a in saved), None)
        origins[name] = None if found is None else _Origin(found, saved[found].dtype)
        if found is not None and saved[found].shape != base.tensors[name].shape:
            differ = {"found": list(saved[found].shape), "expected": list(base.tensors[name].shape)}
            raise InputError("trained tensor has another shape than the base's", file=base.ref, tensor=name, **differ)
    lost = saved.keys() - {origin.name for origin in origins.values() if origin is not None}
    if lost:
        raise InputError("trained tensor has no counterpart in the base", file=base.ref, tensor=min(lost))
    return origins


def _tied_names(model: Any) -> dict[str, str]:
    """Other names of shared parameters -> the name that comes first."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if name != first[id(parameter)]}
