"""Adapters in PEFT's layout: a table of their kinds, and the whole tensors that any kind may bring along."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint, TensorEntry, read_tensor
from safepatch_core.merging.sources.contract import Origin, PatchTensor
from safepatch_core.merging.sources.dense import fitted
from safepatch_core.merging.sources.folder import INSTEAD, PREFIX, Folder, Found, Part, open_folder
from safepatch_core.merging.sources.foreign import refuse_kohya
from safepatch_core.merging.sources.lora import lora_parts
from safepatch_core.merging.sources.shira import shira_parts
from safepatch_core.merging.sources.tokens import token_parts
from safepatch_core.merging.sources.vera import vera_parts
from safepatch_core.spec import Kind, Missing

# A new kind of adapter is a file beside these and a row here, by the `peft_type` of its config.
KINDS: dict[str, Callable[[Folder], Found]] = {
    "LORA": lora_parts,
    "VERA": vera_parts,
    "SHIRA": shira_parts,
    "TRAINABLE_TOKENS": token_parts,
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
    """A patch that is an adapter: parts by the base's names."""

    name: str
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    parts: Mapping[str, Part]
    kind: Kind = "lora"

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return (self.checkpoint,)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: part.shape for name, part in self.parts.items()}

    @property
    def names(self) -> Mapping[str, str]:
        return {name: part.stored for name, part in self.parts.items()}

    def lookup(self, entry: TensorEntry, missing: Missing) -> PatchTensor | None:
        part = self.parts.get(entry.name)
        return None if part is None else part.fit(entry)


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor that replaces the base's: of a module trained in full, or a bias."""

    entry: TensorEntry
    checkpoint: Checkpoint
    patch: str

    @property
    def stored(self) -> str:
        return self.entry.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def fit(self, entry: TensorEntry) -> PatchTensor:
        found = fitted(self.checkpoint, self.entry, entry, "checkpoint", "error", f"patch '{self.patch}'")
        assert found is not None
        return found


def open_adapter(origin: Origin, base: Checkpoint) -> AdapterSource:
    """A folder with adapter_config.json and adapter_model.safetensors, checked against each other."""
    folder = open_folder(origin.path, base)
    kind = folder.kind
    if kind not in KINDS:
        raise folder.fault("unsupported peft_type", folder.config.get("peft_type"), _what_to_do(kind))
    entries = {entry.name: entry for entry in folder.shard.tensors}
    checkpoint = Checkpoint(origin.ref, folder.file.parent, (folder.shard,), entries, None, origin.revision)
    found = KINDS[kind](folder)
    if not found.parts:
        refuse_kohya(folder.file, list(entries))
        first = next(iter(entries), None)
        raise InputError("no LoRA factors in the adapter", file=folder.file, tensor=first, expected="those of PEFT")
    whole = _whole(folder, found, checkpoint, origin.name)
    return AdapterSource(origin.name, checkpoint, folder.config, {**found.parts, **whole})


def _what_to_do(kind: str) -> str:
    known = ", ".join(KINDS)
    return f"{known}: such an adapter changes no weights" if kind in _NEVER else f"{known}; {INSTEAD}"


def _whole(folder: Folder, found: Found, checkpoint: Checkpoint, patch: str) -> dict[str, Part]:
    """What of the file is no kind's own: tensors that replace the base's, and copies of the base's embeddings."""
    whole: dict[str, Part] = {}
    for entry in folder.shard.tensors:
        if entry.name in found.taken:
            continue
        target = _replaced(folder, entry)
        if target in found.parts or target in whole:
            _require_copy(folder, entry, target)
        else:
            whole[target] = Whole(entry, checkpoint, patch)
    return whole


def _replaced(folder: Folder, entry: TensorEntry) -> str:
    """The base's name of a tensor that is no factor: of a module trained in full, or a copy of an embedding."""
    name = entry.name.removeprefix(PREFIX).replace(".base_layer.", ".")
    trained = any(f".{module}." in f".{name}" for module in folder.names("modules_to_save"))
    if PREFIX not in entry.name or not (trained or name in folder.base.tensors):
        raise InputError("not a LoRA factor", file=folder.file, tensor=entry.name, expected="lora_A and lora_B only")
    return name


def _require_copy(folder: Folder, entry: TensorEntry, target: str) -> None:
    """PEFT saves the base's embeddings along with an adapter of them: harmless as long as they are the base's."""
    base, original = folder.base, folder.base.tensors.get(target)
    same = (
        original is not None
        and (entry.dtype, entry.shape) == (original.dtype, original.shape)
        and all(
            read_tensor(entry, folder.shard.identity, lo, lo + _PIECE)
            == read_tensor(original, base.identity_of(original), lo, lo + _PIECE)
            for lo in range(0, entry.nbytes, _PIECE)
        )
    )
    if not same:
        raise InputError(
            "replaces a tensor of the base", file=folder.file, tensor=entry.name, expected="LoRA factors only"
        )
