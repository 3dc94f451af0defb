"""An adapter's folder: its two files, opened and checked as far as every kind of adapter has it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.files.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from safepatch_core.files.parsing import Shard, read_json, read_shard
from safepatch_core.files.reading import TensorEntry, shown
from safepatch_core.merging.names import WRAPPERS
from safepatch_core.merging.sources.contract import PatchTensor
from safepatch_core.merging.sources.foreign import refuse_foreign, refuse_ungathered
from safepatch_core.spec import ITEMSIZE

# What PEFT puts before the model's names, with what wraps its model or the model in it.
_WRAPPED = rf"(?:(?:{'|'.join(sorted(WRAPPERS))})\.)*"
PREFIX = rf"{_WRAPPED}base_model\.{_WRAPPED}model\."
INSTEAD = "PEFT's merge_and_unload makes a checkpoint of any adapter that can be merged: name that as the source"
# Keys of PEFT's configs that do not change what a trained adapter does to a weight.
HARMLESS = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("_from_model_config", "_name_or_path", "transformers_version", "library_name", "base_model_class"),
    }
)
USED = frozenset({"peft_type", "bias", "modules_to_save", "fan_in_fan_out"})


Shape = tuple[int, ...]
Entries = Mapping[str, TensorEntry]  # the base's tensors by the model's names, as far as it has them


class Part(Protocol):
    """What an adapter says about one tensor, before it meets the base's."""

    @property
    def stored(self) -> str:
        """Its tensor in the adapter's file, or one of them."""

    @property
    def shape(self) -> Shape:
        """That of the base's tensor, as far as it is known."""

    def fit(self, entry: TensorEntry, cut: bool) -> PatchTensor:
        """For the base's tensor `entry`, with `cut` the rows that both have. Raises InputError if it doesn't fit."""


class Found(NamedTuple):
    """What the rule of one kind makes of an adapter's file, by the model's names."""

    fits: Mapping[str, Sequence[Shape]]  # of what it changes, the shapes that a tensor of the base may have
    taken: frozenset[str]  # the tensors of the file that it is made of
    parts: Callable[[Entries], Mapping[str, Part]]  # of what it changes, once the base's tensors are known


def together(*found: Found) -> Found:
    """All of it as one."""

    def parts(there: Entries) -> dict[str, Part]:
        return {name: part for one in found for name, part in one.parts(there).items()}

    fits = {name: shapes for one in found for name, shapes in one.fits.items()}
    return Found(fits, frozenset().union(*(one.taken for one in found)), parts)


@dataclass(frozen=True, slots=True)
class Folder:
    """An adapter as it lies on disk, and the base that it is for."""

    config: Mapping[str, Any]
    config_file: Path
    file: Path  # of its weights
    shard: Shard
    base: Checkpoint

    @property
    def kind(self) -> str:
        """PEFT's name of the method, or nothing."""
        kind = self.config.get("peft_type")
        return kind if isinstance(kind, str) else ""

    def shapes(self, nominal: Shape, fits: Callable[[Shape], bool]) -> list[Shape]:
        """The shapes among the base's that fit, or the nominal one."""
        return sorted({t.shape for t in self.base.tensors.values() if fits(t.shape)}) or [nominal]

    def fault(self, what: str, value: object, expected: str) -> InputError:
        """Something in the config."""
        return InputError(what[:200], file=self.config_file, found=shown(value), expected=expected)

    def require_known(
        self, used: frozenset[str], harmless: frozenset[str], variants: frozenset[str] = frozenset()
    ) -> None:
        """Raises InputError for a key that is switched on and none of these; `variants` are on even where empty."""
        for key, value in self.config.items():
            off = value is None or value is False or (not value and key not in variants)
            if not off and key not in HARMLESS | USED | used | harmless:
                raise self.fault(f"unsupported adapter option {key}", value, f"it switched off ({INSTEAD})")
        self.names("modules_to_save")
        bias = self.config.get("bias")
        if bias not in ("none", None, "all", f"{self.kind.lower()}_only"):
            raise self.fault("unsupported adapter option bias", bias, "none, all or those of the adapted layers")

    def flag(self, key: str) -> bool:
        """A key that is true, false or left out."""
        value = self.config.get(key)
        if not isinstance(value, bool | None):
            raise self.fault(key, value, "true or false")
        return bool(value)

    def names(self, key: str) -> list[str]:
        """A list of names, or nothing."""
        value = self.config.get(key) or []
        if not (isinstance(value, list) and all(isinstance(name, str) and name for name in value)):
            raise self.fault(key, value, "a list of names")
        return value

    def number(self, key: str, value: object, *, whole: bool = False) -> Any:
        """A finite float32 number, or with `whole` a count."""
        if whole and (type(value) is not int or value < 1):
            raise self.fault(key, value, "a whole number of at least 1")
        if type(value) not in (int, float) or not abs(value) <= float(np.finfo(np.float32).max):  # type: ignore[arg-type]
            raise self.fault(key, value, "a finite float32 number")
        return value

    def require_shape(self, entry: TensorEntry, dimensions: int, what: str) -> None:
        """Raises InputError unless `entry` is a float tensor of so many dimensions."""
        if len(entry.shape) != dimensions:
            refuse_ungathered(self.file, entry)
        if entry.dtype not in ITEMSIZE:
            raise InputError(
                what, file=self.file, tensor=entry.name, found=entry.dtype, expected=" or ".join(ITEMSIZE)
            )
        if len(entry.shape) != dimensions:
            conv = "factors of convolutions are not supported" if len(entry.shape) > 2 else what
            raise InputError(
                conv,
                file=self.file,
                tensor=entry.name,
                found=list(entry.shape),
                expected=f"{dimensions} dimension{'s' if dimensions > 1 else ''}",
            )

    def by_module(self, field: str, patterns: str) -> Callable[[str], Any]:
        """The value of `field` for a module, or that of the first of its patterns to match: PEFT's rule."""
        given = self.config.get(patterns) or {}
        if not isinstance(given, dict):
            raise self.fault(patterns, given, "an object")
        whole = field == "r"
        default = self.number(field, self.config.get(field, 8), whole=whole)
        for key, value in given.items():
            self.number(f"{patterns} {key}", value, whole=whole)
        regexes = [(key, self._pattern(patterns, key)) for key in given]

        def of(module: str) -> Any:
            key = next((key for key, regex in regexes if regex.match(module)), module)
            return given.get(key, default)

        return of

    def _pattern(self, patterns: str, key: str) -> re.Pattern[str]:
        # The file may be hostile: no pattern that could backtrack without end.
        plain = re.sub(r"\\.|\[[^]]*\]", "x", key).replace("(?", "(")
        if plain.count("(") > 4 or len(re.findall(r"[*+?{]", plain)) > 6 or re.search(r"\)[*+{]", plain):
            raise InputError(f"{patterns} '{key[:100]}' is too complex", file=self.config_file)
        try:
            return re.compile(rf"(.*\.)?({key})$")
        except re.error as error:
            raise InputError(
                f"{patterns} '{key[:100]}' is no regular expression: {error}", file=self.config_file
            ) from None


def open_folder(path: Path, base: Checkpoint) -> Folder:
    """The folder at `path`, or the one that the file at `path` lies in beside its config."""
    if not os.path.isdir(path) and os.path.lexists(path.parent / ADAPTER_CONFIG):
        path = path.parent
    refuse_foreign(path)
    shard = read_shard(path / ADAPTER_WEIGHTS, within=path)
    config = read_json(path / ADAPTER_CONFIG, within=path)
    if not isinstance(config, dict):
        raise InputError(
            "not an adapter's config", file=path / ADAPTER_CONFIG, found=shown(config), expected="an object"
        )
    return Folder(config, path / ADAPTER_CONFIG, path / ADAPTER_WEIGHTS, shard, base)
