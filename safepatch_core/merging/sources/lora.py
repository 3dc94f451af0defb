"""LoRA as PEFT saves it: factors of linear layers, embeddings and experts, with what its options add to them.

An adapter is taken only where its config and its file ask for nothing else; that is refused by name.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from safepatch_core.errors import InputError
from safepatch_core.files.filenames import ADAPTER_CONFIG
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.sources.dora import Directions
from safepatch_core.merging.sources.factors import Bias, Factors
from safepatch_core.merging.sources.folder import PREFIX, Entries, Folder, Found, Part, Shape, together
from safepatch_core.merging.sources.foreign import refuse_ungathered
from safepatch_core.merging.sources.orientation import Orientation
from safepatch_core.merging.sources.parameters import Nested, Parameters, Scaled
from safepatch_core.merging.sources.tokens import trained_rows

USED = frozenset(
    {
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"),
        *("lora_bias", "use_dora", "target_parameters", "trainable_token_indices"),
    }
)
HARMLESS = frozenset(
    {
        *("lora_dropout", "megatron_core", "runtime_config", "qalora_group_size"),
        # Read only by the initialisations of the same name, which are refused where they alter the base.
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    }
)
# Variants that an empty object switches on, with their defaults.
VARIANTS = frozenset({"velora_config", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"})
# Initialisations that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's
# weights to make up for factors that do not start at zero: such an adapter belongs to another base.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
# Keys of PEFT's saved adapters; live state dicts have the adapter's name in them.
_KEY = re.compile(
    rf"{PREFIX}(?P<module>.+)\.lora_(?P<what>[AB]|embedding_[AB]|magnitude_vector)"
    r"(?P<adapter>\.[^.]+)??(?P<end>\.weight|\.bias)?"
)
_SIDES = {
    ("A", ".weight"): "A",
    ("B", ".weight"): "B",
    ("B", ".bias"): "bias",
    ("embedding_A", None): "embedding_A",
    ("embedding_B", None): "embedding_B",
    ("magnitude_vector", None): "magnitude",
    ("magnitude_vector", ".weight"): "magnitude",
}


class Pair(NamedTuple):
    """What the file has of one adapted module, by side: the values of _SIDES."""

    module: str
    sides: dict[str, TensorEntry]

    @property
    def target(self) -> str:
        return f"{self.module}.weight"

    @property
    def embedding(self) -> bool:
        return "embedding_A" in self.sides or "embedding_B" in self.sides


def read_lora(folder: Folder) -> Found:
    """What the adapter's factors change."""
    _check_config(folder)
    pairs, parameters, scaled = _sorted_out(folder), Parameters(folder), _scales(folder)
    adapted = {pair.module for pair in pairs if parameters.adapted(pair.module)}
    layers = [pair for pair in pairs if pair.module not in adapted]
    nested = [_nested(folder, pair) for pair in pairs if pair.module in adapted]
    rows = trained_rows(folder, folder.config.get("trainable_token_indices"), "trainable_token_indices")
    for pair in layers:
        if pair.target in rows.fits:
            raise InputError("both factors and trained rows", file=folder.file, tensor=pair.target)
    return together(_read_layers(folder, layers, scaled), parameters.read(nested, scaled), rows)


def _nested(folder: Folder, pair: Pair) -> Nested:
    """A pair of a parameter, which has nothing but its factors."""
    others = [entry for side, entry in pair.sides.items() if side in ("bias", "magnitude")]
    if others:
        raise InputError("not of a parameter's factors", file=folder.file, tensor=others[0].name)
    return (pair.module, *_halves(folder, pair))


def _read_layers(folder: Folder, pairs: list[Pair], scaled: Scaled) -> Found:
    """Linear layers and embeddings."""
    given = [_factors(folder, pair, *scaled(pair.module)) for pair in pairs]
    fits: dict[str, list[Shape]] = {}
    for pair, factors in zip(pairs, given, strict=True):
        shape = factors.shape
        fits[pair.target] = [shape] if pair.embedding else [shape, shape[::-1]]
        if "bias" in pair.sides:
            folder.require_shape(pair.sides["bias"], 1, "LoRA bias")
            fits[f"{pair.module}.bias"] = [pair.sides["bias"].shape]
    taken = frozenset(entry.name for pair in pairs for entry in pair.sides.values())

    def parts(there: Entries) -> dict[str, Part]:
        linear = {p.target: f.shape for p, f in zip(pairs, given, strict=True) if not p.embedding}
        layers = Orientation(folder.base, there, linear, folder.flag("fan_in_fan_out"))
        found: dict[str, Part] = {}
        dora = folder.flag("use_dora")
        for pair, factors in zip(pairs, given, strict=True):
            turned = pair.embedding or layers.transposed(pair.target)
            if factors.transposed != turned:
                factors = replace(factors, transposed=turned)
            found[pair.target] = _directions(folder, pair, factors) if dora else factors
            if "bias" in pair.sides:
                found[f"{pair.module}.bias"] = Bias(pair.sides["bias"], factors.scale)
        return found

    return Found(fits, taken, parts)


def _factors(folder: Folder, pair: Pair, rank: int, scale: float) -> Factors:
    """A module's factors, those of a linear layer as if it were stored [out, in]."""
    a, b = _halves(folder, pair)
    if not a.shape[0] == rank == b.shape[1]:
        for entry in (a, b):
            refuse_ungathered(folder.file, entry)
        raise InputError(
            "rank of the factors",
            file=folder.file,
            tensor=pair.target,
            found=f"lora_A {list(a.shape)} and lora_B {list(b.shape)}",
            expected=f"rank {rank} as in {ADAPTER_CONFIG}",
        )
    return Factors(a, b, rank, scale, pair.embedding)


def _directions(folder: Folder, pair: Pair, factors: Factors) -> Directions:
    magnitude = pair.sides.get("magnitude")
    if magnitude is None:
        raise InputError("no lora_magnitude_vector for a module with use_dora", file=folder.file, tensor=pair.target)
    folder.require_shape(magnitude, 1, "DoRA magnitude")
    return Directions(factors, magnitude)


def _check_config(folder: Folder) -> None:
    """Everything in the config is LoRA as it is read here."""
    folder.require_known(USED, HARMLESS, VARIANTS)
    init = folder.config.get("init_lora_weights")
    if not isinstance(init, bool | None) and str(init).lower() not in _PLAIN_INITS:
        known = ", ".join(_PLAIN_INITS)
        raise folder.fault("init_lora_weights alters the base", init, f"true, false or one of {known}")


def _scales(folder: Folder) -> Scaled:
    """Rank and scale of a module, the latter a float32 value."""
    rslora = folder.flag("use_rslora")
    ranks, alphas = folder.by_module("r", "rank_pattern"), folder.by_module("lora_alpha", "alpha_pattern")

    def of(module: str) -> tuple[int, float]:
        rank, alpha = ranks(module), alphas(module)
        return rank, float(np.float32(alpha / math.sqrt(rank) if rslora else alpha / rank))

    return of


def _sorted_out(folder: Folder) -> list[Pair]:
    """The file's factors by module, in the order of the file."""
    pairs: dict[str, Pair] = {}
    adapters: set[str] = set()
    unused = {side for side, key in (("bias", "lora_bias"), ("magnitude", "use_dora")) if not folder.flag(key)}
    for entry in folder.shard.tensors:
        key = _KEY.fullmatch(entry.name)
        side = key and _SIDES.get((key["what"], key["end"]))
        if not key or not side or side in unused:
            continue
        adapters.add(key["adapter"] or "")
        if (pair := pairs.get(module := key["module"])) is None:
            pair = pairs[module] = Pair(module, {})
        if pair.sides.setdefault(side, entry) is not entry or len(adapters) > 1:
            raise InputError("two adapters in one file", file=folder.file, tensor=entry.name)
    return list(pairs.values())


def _halves(folder: Folder, pair: Pair) -> tuple[TensorEntry, TensorEntry]:
    """A and B of one module, once both are matrices."""
    kind = "embedding_" if pair.embedding else ""
    there = [side for side in (f"{kind}A", f"{kind}B") if side in pair.sides]
    if len(there) < 2:
        side = (there or list(pair.sides))[0]
        raise InputError(f"lora_{side} without its other half", file=folder.file, tensor=pair.sides[side].name)
    if pair.embedding and {"A", "B"} & set(pair.sides):
        raise InputError("adapted both as an embedding and as a linear layer", file=folder.file, tensor=pair.target)
    a, b = pair.sides[f"{kind}A"], pair.sides[f"{kind}B"]
    for entry in (a, b):
        folder.require_shape(entry, 2, "LoRA factor")
    return a, b
