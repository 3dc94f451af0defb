"""Adapters in PEFT's layout: a table of their kinds, and the whole tensors that any kind may bring along."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.files.reading import Identity, TensorEntry, read_tensor
from safepatch_core.merging.names import Exchange, resolve
from safepatch_core.merging.sources.contract import Origin, PatchTensor
from safepatch_core.merging.sources.dense import Named, fitted
from safepatch_core.merging.sources.folder import INSTEAD, PREFIX, Folder, Found, Part, Shape, open_folder
from safepatch_core.merging.sources.foreign import refuse_kohya
from safepatch_core.merging.sources.fusions import Stored
from safepatch_core.merging.sources.lora import read_lora
from safepatch_core.merging.sources.rows import common, shapes_of
from safepatch_core.merging.sources.shira import read_shira
from safepatch_core.merging.sources.tokens import read_tokens
from safepatch_core.merging.sources.vera import read_vera
from safepatch_core.spec import Kind, Missing, Rows

# A new kind of adapter is a file beside these and a row here, by the `peft_type` of its config.
KINDS: dict[str, Callable[[Folder], Found]] = {
    "LORA": read_lora,
    "VERA": read_vera,
    "SHIRA": read_shira,
    "TRAINABLE_TOKENS": read_tokens,
}
# These change no weight, or another weight for every input.
_NEVER = frozenset(
    {
        *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT"),
        *("CARTRIDGE", "XLORA", "POLY"),
    }
)
_PIECE = 4 << 20  # bytes compared at a time


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """A patch that is an adapter, by the base's names: parts, and tensors that replace the base's."""

    name: str
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    exchange: Exchange
    parts: Mapping[str, Part]
    whole: Named
    kind: Kind = "lora"

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return (self.checkpoint,)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        everything: Mapping[str, Part | Stored] = {**self.parts, **self.whole.tensors}
        return {name: of.shape for name, of in everything.items()}

    @property
    def names(self) -> Mapping[str, str]:
        whole = {name: entry.name for name, entry in self.whole.tensors.items()}
        return {name: part.stored for name, part in self.parts.items()} | whole

    def lookup(self, entry: TensorEntry, missing: Missing) -> PatchTensor | None:
        if (part := self.parts.get(entry.name)) is not None:
            cut = self.whole.rows == "common" and common(entry.name, part.shape, entry.shape)
            return part.fit(entry, cut)
        return fitted(self.whole, entry, "checkpoint", "skip", f"patch '{self.name}'")


def open_adapter(origin: Origin) -> AdapterSource:
    """A folder with adapter_config.json and adapter_model.safetensors, checked against each other."""
    folder, base = open_folder(origin.path, origin.base), origin.base
    if folder.kind not in KINDS:
        raise folder.fault("unsupported peft_type", folder.config.get("peft_type"), _what_to_do(folder.kind))
    entries = {entry.name: entry for entry in folder.shard.tensors}
    checkpoint = Checkpoint(origin.ref, folder.file.parent, (folder.shard,), entries, None, origin.revision)
    found = KINDS[folder.kind](folder)
    if not found.fits:
        refuse_kohya(folder.file, entries)
        first = next(iter(entries), None)
        raise InputError(
            "no LoRA factors in the adapter",
            file=folder.file,
            tensor=first,
            expected="those of PEFT",
        )
    others = [(_model_name(folder, entry), entry) for entry in entries.values() if entry.name not in found.taken]
    exchange = resolve(_shapes(origin, found, others), base, origin.takes, origin.ref)
    there = {name: base.tensors[to] for name in found.fits if (to := exchange(name)) in base.tensors}
    parts = {exchange(name): part for name, part in found.parts(there).items()}
    whole = Named(checkpoint, exchange, _whole(folder, parts, others, exchange, origin.rows), origin.rows)
    return AdapterSource(origin.name, checkpoint, folder.config, exchange, parts, whole)


def _shapes(origin: Origin, found: Found, others: list[tuple[str, TensorEntry]]) -> Mapping[str, Sequence[Shape]]:
    """By the model's names, those that the base's tensors may have."""
    given = {name: [entry.shape] for name, entry in others} | dict(found.fits)
    if origin.rows == "all":  # the usual case, of which `shapes_of` would say the same name by name
        return given
    return {
        name: [shape for one in fits for shape in shapes_of(name, one, origin.base, origin.rows)]
        for name, fits in given.items()
    }


def _what_to_do(kind: str) -> str:
    known = ", ".join(KINDS)
    return f"{known}: such an adapter changes no weights" if kind in _NEVER else f"{known}; {INSTEAD}"


def _model_name(folder: Folder, entry: TensorEntry) -> str:
    """The model's name of a tensor that is no kind's own."""
    before = re.match(PREFIX, entry.name)
    if before is None:
        raise _stranger(folder, entry)
    return entry.name[before.end() :].replace(".base_layer.", ".")


def _whole(
    folder: Folder,
    parts: Mapping[str, Part],
    others: list[tuple[str, TensorEntry]],
    exchange: Exchange,
    rows: Rows,
) -> dict[str, TensorEntry]:
    """Of what is no kind's own, the tensors that replace the base's; the rest are copies of its embeddings."""
    trained = [f".{module}." for module in folder.names("modules_to_save")]
    whole: dict[str, TensorEntry] = {}
    for name, entry in others:
        target = exchange(name)
        if target in parts or target in whole:
            _require_copy(folder, entry, target, rows)
        elif target in folder.base.tensors or any(module in f".{name}" for module in trained):
            whole[target] = entry
        else:
            raise _stranger(folder, entry)
    return whole


def _stranger(folder: Folder, entry: TensorEntry) -> InputError:
    what = "not a LoRA factor" if folder.kind == "LORA" else f"not of a {folder.kind} adapter"
    return InputError(what, file=folder.file, tensor=entry.name, expected="what PEFT saves of one")


def _require_copy(folder: Folder, entry: TensorEntry, target: str, rows: Rows) -> None:
    """PEFT saves the base's embeddings along with an adapter of them: harmless as long as they are the base's."""
    base, original = folder.base, folder.base.tensors.get(target)
    if original is None or not _equal(entry, folder.shard.identity, original, base.identity_of(original), rows):
        raise InputError(
            "replaces a tensor of the base", file=folder.file, tensor=entry.name, expected="LoRA factors only"
        )


def _equal(entry: TensorEntry, identity: Identity, original: TensorEntry, base: Identity, rows: Rows) -> bool:
    """Whether both hold the same bytes, as far as the rule of rows asks."""
    cut = rows == "common" and common(original.name, entry.shape, original.shape)
    size = min(entry.nbytes, original.nbytes)
    return (
        entry.dtype == original.dtype
        and (cut or entry.shape == original.shape)
        and all(
            read_tensor(entry, identity, lo, min(lo + _PIECE, size))
            == read_tensor(original, base, lo, min(lo + _PIECE, size))
            for lo in range(0, size, _PIECE)
        )
    )
