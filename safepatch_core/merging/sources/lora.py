"""LoRA as PEFT saves it: factors of linear layers, embeddings and experts, with what its options add to them.

An adapter is taken only where its config and its file ask for nothing else; that is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import TensorEntry
from safepatch_core.files.filenames import ADAPTER_CONFIG
from safepatch_core.merging.sources.dora import Directions
from safepatch_core.merging.sources.experts import Parameters
from safepatch_core.merging.sources.factors import Bias, Factors
from safepatch_core.merging.sources.folder import PREFIX, Folder, Found, Part
from safepatch_core.merging.sources.foreign import refuse_ungathered
from safepatch_core.merging.sources.orientation import Orientation
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
    rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<what>[AB]|embedding_[AB]|magnitude_vector)"
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


def lora_parts(folder: Folder) -> Found:
    """What each tensor of the base gets from the adapter's factors, by the base's names."""
    _check_config(folder)
    pairs, parameters, scaled = _sorted_out(folder), Parameters(folder), _scales(folder)
    of_layers = [pair for pair in pairs if not parameters.adapted(pair.module)]
    parts = _layers(folder, of_layers, scaled)
    nested = [(pair.module, *_halves(folder, pair)) for pair in pairs if parameters.adapted(pair.module)]
    parts |= parameters.parts(nested, scaled)
    rows = trained_rows(folder, folder.config.get("trainable_token_indices"), "trainable_token_indices")
    taken = rows.taken.union(entry.name for pair in pairs for entry in pair.sides.values())
    return Found({**parts, **rows.parts}, taken)


def _layers(folder: Folder, pairs: list[Pair], scaled: Callable[[str], tuple[int, float]]) -> dict[str, Part]:
    """Linear layers and embeddings."""
    halves = {pair.target: _halves(folder, pair) for pair in pairs}
    linear = {pair.target: halves[pair.target] for pair in pairs if not pair.embedding}
    shapes = {target: (b.shape[0], a.shape[1]) for target, (a, b) in linear.items()}
    layers = Orientation(folder.base, shapes, folder.flag("fan_in_fan_out"))
    parts: dict[str, Part] = {}
    for pair in pairs:
        a, b = halves[pair.target]
        rank, scale = scaled(pair.module)
        _require_rank(folder, pair.target, a, b, rank)
        turned = pair.embedding or layers.transposed(pair.target, shapes[pair.target])
        factors = Factors(a, b, rank, scale, turned)
        parts[pair.target] = _directions(folder, pair, factors) if folder.flag("use_dora") else factors
        if "bias" in pair.sides:
            folder.require_shape(pair.sides["bias"], 1, "LoRA bias")
            parts[f"{pair.module}.bias"] = Bias(pair.sides["bias"], scale)
    return parts


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


def _scales(folder: Folder) -> Callable[[str], tuple[int, float]]:
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
        pair = pairs.setdefault(key["module"], Pair(key["module"], {}))
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


def _require_rank(folder: Folder, target: str, a: TensorEntry, b: TensorEntry, rank: int) -> None:
    fits = a.shape[0] == rank == b.shape[1]
    for entry in (a, b):
        refuse_ungathered(folder.file, entry, not fits)
    if not fits:
        raise InputError(
            "rank of the factors",
            file=folder.file,
            tensor=target,
            found=f"lora_A {list(a.shape)} and lora_B {list(b.shape)}",
            expected=f"rank {rank} as in {ADAPTER_CONFIG}",
        )
