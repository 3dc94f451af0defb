"""What a patch says about each tensor of the base: a patched tensor, a delta, or LoRA factors in PEFT's layout.

An adapter is taken only where base + scale * (B @ A) is all that PEFT would do with it; whatever else its
config or its file asks for is refused by name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Lora
from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import (
    FLOATS,
    Checkpoint,
    Identity,
    Shard,
    TensorEntry,
    locate,
    open_checkpoint,
    read_json,
    read_shard,
    read_tensor,
    shown,
)
from safepatch_core.files.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from safepatch_core.merging.quantised import quantised
from safepatch_core.spec import ITEMSIZE, Kind, Missing


@dataclass(frozen=True, slots=True)
class Factors:
    """LoRA factors of one base tensor, as they lie in the adapter file: delta = scale * (b @ a)."""

    a: TensorEntry  # [rank, in]
    b: TensorEntry  # [out, rank]
    rank: int
    scale: float  # a float32 value
    transposed: bool  # the base stores [in, out]
    identity: Identity  # of the adapter file

    def load(self) -> Lora:
        """Both factors as float32, laid out for the base's rows and columns. Raises IOFailure.

        The transpose of b @ a is a.T @ b.T with the same products in the same order, so nothing is rounded anew.
        """
        a, b = _float32(self.a, self.identity), _float32(self.b, self.identity)
        if self.transposed:
            a, b = np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
        return Lora(a, b, self.scale)


@dataclass(frozen=True, slots=True)
class Source:
    """One patch: its checkpoint and what of it changes the base."""

    name: str
    kind: Kind
    checkpoint: Checkpoint
    tensors: Mapping[str, TensorEntry | Factors]  # by base tensor name; float tensors only
    config: Mapping[str, Any] | None = None  # an adapter's adapter_config.json

    @property
    def names(self) -> Iterable[str]:
        """The tensors that it says something about, integers included, by the base's names."""
        return self.tensors if self.kind == "lora" else self.checkpoint.tensors


def open_source(
    name: str, ref: str | os.PathLike[str], kind: Kind | None, base: Checkpoint, *, relative_to: Path | None
) -> Source:
    """Open a fine-tuned checkpoint, a delta checkpoint or a LoRA adapter of `base`.

    With `kind` None a directory that has an adapter_config.json is a LoRA adapter, anything else a checkpoint.
    Raises InputError naming file and tensor; UsageError for a hub id without huggingface_hub.
    """
    path, revision = locate(ref, relative_to=relative_to)
    if kind is None:
        kind = "lora" if os.path.lexists(path / ADAPTER_CONFIG) else "checkpoint"
    if kind == "lora":
        shard, config = _open_adapter(path), _read_config(path / ADAPTER_CONFIG)
        entries = {entry.name: entry for entry in shard.tensors}
        checkpoint = Checkpoint(os.fspath(ref), path, (shard,), entries, None, revision)
        return Source(name, kind, checkpoint, _factors(path / ADAPTER_WEIGHTS, shard, config, base), config)
    checkpoint = replace(open_checkpoint(path), ref=os.fspath(ref), revision=revision)
    floats = {name: entry for name, entry in checkpoint.tensors.items() if entry.dtype in FLOATS}
    return Source(name, kind, checkpoint, floats)


def lookup(source: Source, entry: TensorEntry, *, missing: Missing) -> TensorEntry | Factors | None:
    """What `source` says about the base's tensor `entry`; None for no change.

    Raises InputError where it is missing (LoRA and `missing="skip"` aside), of another shape or not F32, F16, BF16.
    """
    if source.kind == "lora":
        return source.tensors.get(entry.name)
    return _matching(source.checkpoint, entry, missing, f"patch '{source.name}'")


def extras(source: Source, base: Checkpoint) -> list[str]:
    """Names of the float tensors that the patch has and the base lacks; their change would be lost."""
    return sorted(name for name in source.tensors if name not in base.tensors)


def open_importance(ref: str | os.PathLike[str], *, relative_to: Path | None) -> Checkpoint:
    """Open a checkpoint of scores or gradients, named as the base's tensors. Raises as `open_checkpoint`."""
    return open_checkpoint(ref, relative_to=relative_to)


def importance_of(checkpoint: Checkpoint, entry: TensorEntry, missing: Missing) -> TensorEntry | None:
    """The scores or gradients of the base's tensor `entry`; raises as `lookup`."""
    return _matching(checkpoint, entry, missing, "the importance")


def _matching(checkpoint: Checkpoint, entry: TensorEntry, missing: Missing, what: str) -> TensorEntry | None:
    found = checkpoint.tensors.get(entry.name)
    if found is None:
        if missing == "skip":
            return None
        raise InputError(
            f"missing from {what}",
            file=checkpoint.root or checkpoint.shards[0].path,
            tensor=entry.name,
            expected=f"{list(entry.shape)} as in the base (or missing: skip)",
        )
    file = found.path if checkpoint.root is None else checkpoint.root / found.file
    if found.shape != entry.shape:
        raise InputError(
            f"{what} has another shape than the base",
            file=file,
            tensor=entry.name,
            found=list(found.shape),
            expected=list(entry.shape),
        )
    if found.dtype not in ITEMSIZE:
        raise InputError(
            f"{what} has a dtype that can't be used",
            file=file,
            tensor=entry.name,
            found=found.dtype,
            expected=" or ".join(ITEMSIZE),
        )
    return found


# Fields of PEFT's LoraConfig that do not change what a trained adapter does to a weight.
_HARMLESS = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("lora_dropout", "megatron_core", "runtime_config", "qalora_group_size"),
        # Read only by the initialisations of the same name, which are refused where they alter the base.
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    }
)
_USED = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"),
        *("bias", "init_lora_weights"),
    }
)
# Variants that an empty object switches on, with their defaults.
_VARIANTS = frozenset({"velora_config", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"})
# Initialisations that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's
# weights to make up for factors that do not start at zero: such an adapter belongs to another base.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
# Keys of PEFT's saved adapters; live state dicts have the adapter's name before ".weight" or at the end.
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(?:([AB])((?:\.[^.]+)?)\.weight|embedding_([AB])((?:\.[^.]+)?))")
_PIECE = 4 << 20  # bytes compared at a time
_COPY = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)?\.weight")


def _open_adapter(path: Path) -> Shard:
    if not os.path.isdir(path):
        raise InputError(
            "not a LoRA adapter", file=path, expected=f"a directory with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
        )
    if not os.path.lexists(path / ADAPTER_WEIGHTS) and os.path.lexists(path / "adapter_model.bin"):
        raise InputError(
            "the adapter is a pickle, which is never loaded",
            file=path / "adapter_model.bin",
            expected=ADAPTER_WEIGHTS,
        )
    return read_shard(path / ADAPTER_WEIGHTS, within=path)


def _read_config(file: Path) -> dict[str, Any]:
    """adapter_config.json, once everything in it is plain LoRA."""

    def fault(what: str, value: object, expected: str) -> InputError:
        return InputError(what[:200], file=file, found=shown(value), expected=expected)

    config = read_json(file, within=file.parent)
    if not isinstance(config, dict):
        raise fault("not an adapter's config", config, "an object")
    if config.get("peft_type") != "LORA":
        raise fault("unsupported peft_type", config.get("peft_type"), "LORA")
    for key, value in config.items():
        off = value is None or value is False or (not value and key not in _VARIANTS)
        if key not in _HARMLESS and key not in _USED and not off:
            raise fault(f"unsupported adapter option {key}", value, "plain LoRA")
    bias = config.get("bias")
    if bias not in ("none", None):
        raise fault("unsupported adapter option bias", bias, "none")
    init = config.get("init_lora_weights")
    if not isinstance(init, bool | None) and str(init).lower() not in _PLAIN_INITS:
        raise fault("init_lora_weights alters the base", init, f"true, false or one of {', '.join(_PLAIN_INITS)}")
    for key in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(config.get(key), bool | None):
            raise fault(key, config[key], "true or false")
    for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        given = config.get(patterns) or {}
        if not isinstance(given, dict):
            raise fault(patterns, given, "an object")
        for name, value in [(key, config.get(key, 8)), *((f"{patterns} {name}", v) for name, v in given.items())]:
            if key == "r" and (type(value) is not int or value < 1):
                raise fault(name, value, "a whole number of at least 1")
            if type(value) not in (int, float) or not abs(value) <= float(np.finfo(np.float32).max):
                raise fault(name, value, "a finite float32 number")
    return config


def _factors(
    file: Path, shard: Shard, config: Mapping[str, Any], base: Checkpoint
) -> dict[str, TensorEntry | Factors]:
    """The factors of every base tensor that the adapter changes, checked against config and base."""
    ranks = _by_module(file.with_name(ADAPTER_CONFIG), config, "r", "rank_pattern")
    alphas = _by_module(file.with_name(ADAPTER_CONFIG), config, "lora_alpha", "alpha_pattern")
    sides: dict[tuple[str, bool], dict[str, TensorEntry]] = {}  # by module and whether it is an embedding
    adapters: set[str] = set()
    for entry in shard.tensors:
        key = _KEY.fullmatch(entry.name)
        if key is None:
            _require_copy(file, entry, shard, base)
            continue
        adapters.add(key[3] or key[5] or "")
        pair = sides.setdefault((key[1], key[4] is not None), {})
        if pair.setdefault(key[2] or key[4], entry) is not entry or len(adapters) > 1:
            raise InputError("two adapters in one file", file=file, tensor=entry.name)
    if not sides:
        raise InputError("no LoRA factors in the adapter", file=file)

    held = quantised(base)
    rslora, fan_in_fan_out = config.get("use_rslora"), config.get("fan_in_fan_out")
    factors: dict[str, TensorEntry | Factors] = {}
    for (module, embedding), pair in sides.items():
        if len(pair) == 1:
            (side, entry), *_ = pair.items()
            raise InputError(f"lora_{side} without its other half", file=file, tensor=entry.name)
        target = f"{module}.weight"
        if target in factors:
            raise InputError("adapted both as an embedding and as a linear layer", file=file, tensor=target)
        rank, alpha = ranks(module), alphas(module)
        scale = float(np.float32(alpha / math.sqrt(rank) if rslora else alpha / rank))
        transposed = embedding or bool(fan_in_fan_out)
        found = Factors(pair["A"], pair["B"], rank, scale, transposed, shard.identity)
        if held is None or target not in held:  # else the plan refuses it, or no target is there
            _check_factors(file, found, target, base)
        factors[target] = found
    return factors


def _check_factors(file: Path, factors: Factors, target: str, base: Checkpoint) -> None:
    a, b = factors.a, factors.b
    if target not in base.tensors:
        raise InputError("adapts what the base does not have", file=file, tensor=a.name, expected=f"'{target}'")
    for entry in (a, b):
        if entry.dtype not in ITEMSIZE:
            raise InputError(
                "LoRA factor", file=file, tensor=entry.name, found=entry.dtype, expected=" or ".join(ITEMSIZE)
            )
        if len(entry.shape) != 2:
            raise InputError(
                "factors of convolutions are not supported",
                file=file,
                tensor=entry.name,
                found=list(entry.shape),
                expected="two dimensions",
            )
    if a.shape[0] != factors.rank or b.shape[1] != factors.rank:
        raise InputError(
            "rank of the factors",
            file=file,
            tensor=target,
            found=f"lora_A {list(a.shape)} and lora_B {list(b.shape)}",
            expected=f"rank {factors.rank} as in {ADAPTER_CONFIG}",
        )
    entry = base.tensors[target]
    shape = (a.shape[1], b.shape[0]) if factors.transposed else (b.shape[0], a.shape[1])
    if shape != entry.shape:
        turned = " (transposed: fan_in_fan_out or an embedding)" if factors.transposed else ""
        raise InputError(
            "an adapter of another base",
            file=file,
            tensor=target,
            found=f"{list(shape)} from its factors{turned}",
            expected=f"{list(entry.shape)} as in the base",
        )
    if entry.dtype not in ITEMSIZE:
        raise InputError(
            "the adapted tensor of the base",
            file=file,
            tensor=target,
            found=entry.dtype,
            expected=" or ".join(ITEMSIZE),
        )


def _require_copy(file: Path, entry: TensorEntry, shard: Shard, base: Checkpoint) -> None:
    """PEFT saves the base's embeddings along with an adapter of them: harmless as long as they are the base's."""
    key = _COPY.fullmatch(entry.name)
    original = base.tensors.get(f"{key[1]}.weight") if key else None
    if original is None:
        raise InputError("not a LoRA factor", file=file, tensor=entry.name, expected="lora_A and lora_B only")
    same = (entry.dtype, entry.shape) == (original.dtype, original.shape) and all(
        read_tensor(entry, shard.identity, lo, lo + _PIECE)
        == read_tensor(original, base.identity_of(original), lo, lo + _PIECE)
        for lo in range(0, entry.nbytes, _PIECE)
    )
    if not same:
        raise InputError("replaces a tensor of the base", file=file, tensor=entry.name, expected="LoRA factors only")


def _by_module(file: Path, config: Mapping[str, Any], field: str, patterns: str) -> Callable[[str], Any]:
    """The value of `field` for a module, or that of the first of its patterns to match: PEFT's get_pattern_key."""
    given = config.get(patterns) or {}
    regexes = []
    for key in given:
        # The file may be hostile: no pattern that could backtrack without end.
        plain = re.sub(r"\\.|\[[^]]*\]", "x", key).replace("(?", "(")
        if plain.count("(") > 4 or len(re.findall(r"[*+?{]", plain)) > 6 or re.search(r"\)[*+{]", plain):
            raise InputError(f"{patterns} '{key[:100]}' is too complex", file=file)
        try:
            regexes.append((key, re.compile(rf"(.*\.)?({key})$")))
        except re.error as error:
            raise InputError(f"{patterns} '{key[:100]}' is no regular expression: {error}", file=file) from None

    def of(module: str) -> Any:
        key = next((key for key, regex in regexes if regex.match(module)), module)
        return given.get(key, config.get(field, 8))

    return of


def _float32(entry: TensorEntry, identity: Identity) -> NDArray[np.float32]:
    data = read_tensor(entry, identity)
    if entry.dtype == "BF16":
        wide = np.frombuffer(data, "<u2").astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32).reshape(entry.shape)
    return (
        np.frombuffer(data, "<f2" if entry.dtype == "F16" else "<f4")
        .astype(np.float32, copy=False)
        .reshape(entry.shape)
    )
