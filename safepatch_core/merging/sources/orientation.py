"""How the base stores the weight of a linear layer: [out, in], or [in, out] as the Conv1D of GPT-2 does.

PEFT saves one flag `fan_in_fan_out` for all layers of an adapter, that of the layer it met last; so the layer is
asked and not the flag.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.files.filenames import CONFIG
from safepatch_core.files.parsing import read_json
from safepatch_core.files.reading import TensorEntry

_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_CONV1D = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})  # layers of those families
_HEADS = frozenset({"lm_head", "score", "classifier"})  # linear layers also there


class Orientation:
    """Which layers of the base are stored transposed.

    Args:
        base: the base.
        there: its tensors, by the model's names.
        layers: [out, in] of each adapted linear layer, by its tensor's name.
        flag: what the adapter's config says, for what nothing else tells.
    """

    def __init__(
        self, base: Checkpoint, there: Mapping[str, TensorEntry], layers: Mapping[str, tuple[int, int]], flag: bool
    ) -> None:
        self._base, self._there, self._layers, self._flag = base, there, layers, flag
        self._shapes = {name: self._by_shape(name) for name in layers}
        self._told = set(self._shapes.values()) - {None}

    def transposed(self, name: str) -> bool:
        """Whether the base stores the layer as [in, out]."""
        told = self._shapes[name]
        if told is not None:
            return told
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        if name not in self._there or set(self._there[name].shape) != set(self._layers[name]):
            return self._flag  # it fits neither way, or the base lacks it: the flag is for the message
        if model_type(self._base) in _FAMILIES or (True in self._told and leaf in _CONV1D):
            return leaf in _CONV1D
        if self._told == {True}:
            return leaf not in _HEADS
        return self._flag and self._told != {False}

    def _by_shape(self, name: str) -> bool | None:
        """As far as the shape tells; None where it fits both ways, or none."""
        shape = self._layers[name]
        there = self._there[name].shape if name in self._there else ()
        if shape[0] == shape[1] or there not in (shape, shape[::-1]):
            return None
        return there != shape


def model_type(base: Checkpoint) -> str | None:
    """`model_type` of the base's config, where there is one that says so."""
    if base.root is None or not os.path.isfile(base.root / CONFIG):
        return None
    try:
        config = read_json(base.root / CONFIG)
    except InputError:
        return None
    found = config.get("model_type") if isinstance(config, dict) else None
    return found if isinstance(found, str) else None
