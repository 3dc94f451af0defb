"""LoRA adapters in PEFT's layout: factors, and tensors that replace the base's.

An adapter is taken only where base + scale * (B @ A) is all that PEFT would do with it; whatever else its
config or its file asks for is refused by name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Bits, Lora
from safepatch_core.backends.reference import to_float32
from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import (
    Checkpoint,
    Shard,
    TensorEntry,
    read_json,
    read_shard,
    read_tensor,
    shown,
)
from safepatch_core.files.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.names import Exchange, resolve
from safepatch_core.merging.sources.contract import Origin, PatchTensor, Range, align
from safepatch_core.merging.sources.dense import Named, fitted
from safepatch_core.spec import ITEMSIZE, Dtype, Kind, Missing


@dataclass(frozen=True, slots=True)
class Factors:
    """LoRA factors of one base tensor, as they lie in the adapter file: delta = scale * (b @ a)."""

    a: TensorEntry  # [rank, in]
    b: TensorEntry  # [out, rank]
    rank: int
    scale: float  # a float32 value
    transposed: bool  # the base stores [in, out]
    form: Kind = "lora"
    entry_bytes: int = 0
    ring_bytes: int = 0

    @property
    def path(self) -> Path:
        return self.a.path

    @property
    def shape(self) -> tuple[int, int]:
        """That of the delta."""
        out, into = self.b.shape[0], self.a.shape[1]
        return (into, out) if self.transposed else (out, into)

    @property
    def once_bytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    @property
    def held_bytes(self) -> int:
        return align(4 * self.a.entries) + align(4 * self.b.entries)

    def ranges(self, lo: int, hi: int) -> list[Range]:
        """Both factors, with the first of the tensor's chunks."""
        return [(factor, 0, factor.nbytes) for factor in (self.a, self.b)] if lo == 0 else []

    def load(self, inputs: Inputs, lo: int, hi: int, memory: NDArray[np.uint8]) -> Lora:
        """Both factors as float32, laid out for the base's rows and columns.

        The transpose of b @ a is a.T @ b.T with the same products in the same order, so nothing is rounded anew.
        """
        given = [_float32(self.a, inputs), _float32(self.b, inputs)]
        if self.transposed:
            given = [given[1].T, given[0].T]
        placed, used = [], 0
        for matrix in given:
            view = memory[used : used + matrix.nbytes].view(np.float32).reshape(matrix.shape)
            view[:] = matrix
            used += align(matrix.nbytes)
            placed.append(view)
        return Lora(placed[0], placed[1], self.scale)


def _float32(entry: TensorEntry, inputs: Inputs) -> NDArray[np.float32]:
    data = np.empty(entry.nbytes, np.uint8)
    inputs.read(entry, 0, data)
    bits = Bits(data.view(np.uint32 if entry.dtype == "F32" else np.uint16), cast(Dtype, entry.dtype))
    return to_float32(bits).reshape(entry.shape)


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """A patch that is an adapter: by the base's names, factors or tensors that replace the base's."""

    name: str
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    exchange: Exchange
    factors: Mapping[str, Factors]
    replaced: Named
    kind: Kind = "lora"

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return (self.checkpoint,)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        tensors: Mapping[str, Factors | TensorEntry] = {**self.factors, **self.replaced.tensors}
        return {name: of.shape for name, of in tensors.items()}

    @property
    def names(self) -> Mapping[str, str]:
        whole = {name: entry.name for name, entry in self.replaced.tensors.items()}
        return {name: factors.a.name for name, factors in self.factors.items()} | whole

    def lookup(self, entry: TensorEntry, missing: Missing) -> PatchTensor | None:
        if (factors := self.factors.get(entry.name)) is not None:
            _require_fit(factors, entry)
            return factors
        return fitted(self.replaced, entry, "checkpoint", "skip", f"patch '{self.name}'")


def open_adapter(origin: Origin) -> AdapterSource:
    """A directory with adapter_config.json and adapter_model.safetensors, checked against each other."""
    path, base = origin.path, origin.base
    shard, config = _open_weights(path), _read_config(path / ADAPTER_CONFIG)
    checkpoint = Checkpoint(origin.ref, path, (shard,), {t.name: t for t in shard.tensors}, None, origin.revision)
    factors, others = _read_tensors(path / ADAPTER_WEIGHTS, shard, config)
    # Which way round a base stores its matrices is for `lookup` to say.
    shapes: dict[str, Sequence[tuple[int, ...]]] = {name: (of.shape, of.shape[::-1]) for name, of in factors.items()}
    shapes |= {name: (entry.shape,) for name, entry in others if name not in shapes}
    exchange = resolve(shapes, base, origin.takes, origin.ref)
    replaced: dict[str, TensorEntry] = {}
    for name, entry in others:
        if name in factors or exchange(name) in replaced:
            _require_copy(path / ADAPTER_WEIGHTS, entry, shard, base, exchange(name))
        elif exchange(name) in base.tensors or _trained_in_full(name, config):
            replaced[exchange(name)] = entry
        else:
            raise _no_factor(path / ADAPTER_WEIGHTS, entry)
    by_base = {exchange(name): of for name, of in factors.items()}
    return AdapterSource(origin.name, checkpoint, config, exchange, by_base, Named(checkpoint, exchange, replaced))


def _require_fit(factors: Factors, entry: TensorEntry) -> None:
    """Factors of the base's tensor `entry` give its shape, and it has a dtype that can be patched."""
    if factors.shape != entry.shape:
        turned = " (transposed: fan_in_fan_out or an embedding)" if factors.transposed else ""
        raise InputError(
            "an adapter of another base",
            file=factors.path,
            tensor=entry.name,
            found=f"{list(factors.shape)} from its factors{turned}",
            expected=f"{list(entry.shape)} as in the base",
        )
    if entry.dtype not in ITEMSIZE:
        raise InputError(
            "the adapted tensor of the base",
            file=factors.path,
            tensor=entry.name,
            found=entry.dtype,
            expected=" or ".join(ITEMSIZE),
        )


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
        *("bias", "init_lora_weights", "modules_to_save"),
    }
)
_ELSEWHERE = "plain LoRA (PEFT's merge_and_unload makes a checkpoint of any adapter)"
# Variants that an empty object switches on, with their defaults.
_VARIANTS = frozenset({"velora_config", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"})
# Initialisations that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's
# weights to make up for factors that do not start at zero: such an adapter belongs to another base.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
# Keys of PEFT's saved adapters; live state dicts have the adapter's name before ".weight" or at the end.
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(?:([AB])((?:\.[^.]+)?)\.weight|embedding_([AB])((?:\.[^.]+)?))")
_PIECE = 4 << 20  # bytes compared at a time


def _open_weights(path: Path) -> Shard:
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
            raise fault(f"unsupported adapter option {key}", value, _ELSEWHERE)
    bias = config.get("bias")
    if bias not in ("none", None):
        raise fault("unsupported adapter option bias", bias, f"none, or {_ELSEWHERE}")
    init = config.get("init_lora_weights")
    if not isinstance(init, bool | None) and str(init).lower() not in _PLAIN_INITS:
        raise fault("init_lora_weights alters the base", init, f"true, false or one of {', '.join(_PLAIN_INITS)}")
    for key in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(config.get(key), bool | None):
            raise fault(key, config[key], "true or false")
    modules = config.get("modules_to_save")
    if modules is not None and not (isinstance(modules, list) and all(isinstance(m, str) and m for m in modules)):
        raise fault("modules_to_save", modules, "a list of names")
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


def _read_tensors(
    file: Path, shard: Shard, config: Mapping[str, Any]
) -> tuple[dict[str, Factors], list[tuple[str, TensorEntry]]]:
    """By the model's names: factors, checked against the adapter's config, and all that would replace the base's."""
    pairs, others = _sorted_out(file, shard)
    ranks = _by_module(file.with_name(ADAPTER_CONFIG), config, "r", "rank_pattern")
    alphas = _by_module(file.with_name(ADAPTER_CONFIG), config, "lora_alpha", "alpha_pattern")
    factors: dict[str, Factors] = {}
    for (module, embedding), pair in pairs.items():
        target = f"{module}.weight"
        if target in factors:
            raise InputError("adapted both as an embedding and as a linear layer", file=file, tensor=target)
        rank, alpha = ranks(module), alphas(module)
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        transposed = embedding or bool(config.get("fan_in_fan_out"))
        a, b = _halves(file, target, pair, rank)
        factors[target] = Factors(a, b, rank, float(np.float32(scale)), transposed)
    return factors, [(_replaced(file, entry), entry) for entry in others]


def _sorted_out(file: Path, shard: Shard) -> tuple[dict[tuple[str, bool], dict[str, TensorEntry]], list[TensorEntry]]:
    """Pairs of factors, by module and whether it is an embedding, and all that is no factor."""
    pairs: dict[tuple[str, bool], dict[str, TensorEntry]] = {}
    adapters: set[str] = set()
    others = []
    for entry in shard.tensors:
        key = _KEY.fullmatch(entry.name)
        if key is None:
            others.append(entry)
            continue
        adapters.add(key[3] or key[5] or "")
        pair = pairs.setdefault((key[1], key[4] is not None), {})
        if pair.setdefault(key[2] or key[4], entry) is not entry or len(adapters) > 1:
            raise InputError("two adapters in one file", file=file, tensor=entry.name)
    if not pairs:
        first = others[0].name if others else None
        raise InputError("no LoRA factors in the adapter", file=file, tensor=first, expected="those of PEFT")
    return pairs, others


def _halves(file: Path, target: str, pair: Mapping[str, TensorEntry], rank: int) -> tuple[TensorEntry, TensorEntry]:
    """A and B of one module, once both are matrices of the rank that the config gives it."""
    if len(pair) == 1:
        (side, entry), *_ = pair.items()
        raise InputError(f"lora_{side} without its other half", file=file, tensor=entry.name)
    for entry in pair.values():
        _require_matrix(file, entry)
    a, b = pair["A"], pair["B"]
    if a.shape[0] != rank or b.shape[1] != rank:
        raise InputError(
            "rank of the factors",
            file=file,
            tensor=target,
            found=f"lora_A {list(a.shape)} and lora_B {list(b.shape)}",
            expected=f"rank {rank} as in {ADAPTER_CONFIG}",
        )
    return a, b


def _require_matrix(file: Path, entry: TensorEntry) -> None:
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


def _replaced(file: Path, entry: TensorEntry) -> str:
    """The model's name of a tensor that is no factor: of a module trained in full, or a copy of an embedding."""
    name = entry.name.removeprefix("base_model.model.")
    if name == entry.name:
        raise _no_factor(file, entry)
    return name.replace(".base_layer.", ".")


def _trained_in_full(name: str, config: Mapping[str, Any]) -> bool:
    return any(f".{module}." in f".{name}" for module in config.get("modules_to_save") or ())


def _no_factor(file: Path, entry: TensorEntry) -> InputError:
    return InputError("not a LoRA factor", file=file, tensor=entry.name, expected="lora_A and lora_B only")


def _require_copy(file: Path, entry: TensorEntry, shard: Shard, base: Checkpoint, target: str) -> None:
    """PEFT saves the base's embeddings along with an adapter of them: harmless as long as they are the base's."""
    original = base.tensors.get(target)
    same = (
        original is not None
        and (entry.dtype, entry.shape) == (original.dtype, original.shape)
        and all(
            read_tensor(entry, shard.identity, lo, lo + _PIECE)
            == read_tensor(original, base.identity_of(original), lo, lo + _PIECE)
            for lo in range(0, entry.nbytes, _PIECE)
        )
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
