"""A base whose weights are stored as codes, as the float model would have it: its names, shapes and targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.quantised.layouts import ACCEPTED, CodedWeight, Unfit, recognise
from safepatch_core.merging.quantised.modules import Quantised, module_of, quantisation_config, quantised
from safepatch_core.merging.recipe import Recipe

# What a quantization_config says of weights that no decoder of ours can tell apart from plain ones.
_REFUSED = {
    "transform_config": "rotated (transform_config)",
    "sparsity_config": "sparse (sparsity_config)",
}
_KEY = "; or `quantized:` in the recipe, to merge into the codes"


@dataclass(frozen=True, slots=True)
class Twin:
    """What of a base is quantised, and which of it can be merged into.

    Attributes:
        base: the checkpoint with logical weights in place of their codes and scales. These entries have names and
            shapes alone: their bytes are codes.
        held: its quantised modules, None where it has none.
        weights: the logical weights that can be merged into, by name.
        closed: the codes of the modules that the recipe can't merge into, by module.
        reasons: why, where it is known, by the name of the codes.
        also: what else a refused recipe may ask for.
    """

    base: Checkpoint
    held: Quantised | None
    weights: Mapping[str, CodedWeight] = field(default_factory=dict)
    closed: Mapping[str, TensorEntry] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    also: str = ""

    def lost(self, recipe: Recipe, name: str) -> TensorEntry | None:
        """The codes that a patch of the tensor `name` would have to change and can't; None where there are none."""
        if self.held is None or name in self.weights or not self.held.targeted(recipe, name):
            return None
        return self.closed.get(module_of(name))


def twin_of(recipe: Recipe, base: Checkpoint) -> Twin:
    """The base as the recipe's patches and targets see it.

    Raises:
        InputError: the recipe has `quantized:`, and the base is not quantised.
    """
    held = quantised(base)
    if held is None:
        if recipe.quantized is not None:
            raise InputError("the base is not quantised", file=base.ref, expected="a recipe without `quantized:`")
        return Twin(base, None)
    twin = recognised(base, held)
    if recipe.quantized is None:
        return Twin(base, held, closed=held.codes, also=_KEY if twin.weights else "")
    return twin


def recognised(base: Checkpoint, held: Quantised) -> Twin:
    """The base as the float model has it, as far as its layouts can be merged into."""
    weights, reasons = _recognised(base, held)
    open_ = {module_of(weight.codes.name) for weight in weights.values()} - set(map(module_of, reasons))
    stored = {entry.name for weight in weights.values() for entry in (weight.codes, *weight.companions)}
    tensors = {name: entry for name, entry in base.tensors.items() if name not in stored}
    tensors |= {name: _logical(weight) for name, weight in weights.items()}
    closed = {module: codes for module, codes in held.codes.items() if module not in open_}
    return Twin(replace(base, tensors=tensors), held, weights, closed, reasons)


def _recognised(base: Checkpoint, held: Quantised) -> tuple[dict[str, CodedWeight], dict[str, str]]:
    config = quantisation_config(base)
    whole = _refused_whole(config)
    if whole is not None:
        return {}, {codes.name: whole for codes in held.codes.values()}
    weights: dict[str, CodedWeight] = {}
    reasons: dict[str, str] = {}
    for entry in base.tensors.values():
        if entry.name in held and entry.name not in base.beyond:
            try:
                if (weight := recognise(entry, base.tensors, config)) is not None:
                    weights[weight.name] = weight
            except Unfit as unfit:
                reasons[entry.name] = str(unfit)
    return weights, reasons


def _refused_whole(config: Mapping[str, Any]) -> str | None:
    """Why nothing of such a base can be merged into, if so."""
    for key, reason in _REFUSED.items():
        of = config.get(key)
        if of and not (isinstance(of, dict) and of.get("format") == "dense"):
            return reason
    status = config.get("quantization_status", "compressed")
    return None if status == "compressed" else f"quantization_status {status}"


def _logical(weight: CodedWeight) -> TensorEntry:
    return weight.codes._replace(name=weight.name, shape=weight.shape, dtype="F32")


def refuse_weight(twin: Twin, codes: TensorEntry, base: Checkpoint) -> InputError:
    """A weight that the recipe's rule takes is of no layout that can be merged into."""
    assert twin.held is not None
    return InputError(
        "the base is quantised in a way that can't be merged into",
        file=codes.path if base.root is None else base.root / codes.file,
        tensor=codes.name,
        found=twin.reasons.get(codes.name, twin.held.method),
        expected=f"{ACCEPTED} (or targets that leave it out)",
    )
