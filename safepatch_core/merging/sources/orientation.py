"""How the base stores the weight of a linear layer: [out, in], or [in, out] as the Conv1D of GPT-2 does.

PEFT saves one flag `fan_in_fan_out` for all layers of an adapter, that of the layer it met last; so the layer is
asked and not the flag.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint, read_json
from safepatch_core.files.filenames import CONFIG

_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_CONV1D = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})  # layers of those families
_HEADS = frozenset({"lm_head", "score", "classifier"})  # linear layers also there

Shape = tuple[int, ...]


class Orientation:
    """Which layers of the base are stored transposed.

    Args:
        base: the base.
        layers: [out, in] of each adapted linear layer, by its tensor's name.
        flag: what the adapter's config says, for what nothing else tells.
    """

    def __init__(self, base: Checkpoint, layers: Mapping[str, tuple[int, int]], flag: bool) -> None:
        self._shapes = {name: base.tensors[name].shape for name in layers if name in base.tensors}
        self._base = base
        told = [self._by_shape(name, shape) for name, shape in layers.items()]
        self._some, self._all = True in told, True in told and False not in told
        self._none, self._flag = False in told and True not in told, flag

    def transposed(self, name: str, shape: tuple[int, int]) -> bool:
        """Whether the base's tensor `name`, whose factors give [out, in] = `shape`, is stored as [in, out]."""
        told, leaf = self._by_shape(name, shape), name.removesuffix(".weight").rpartition(".")[2]
        if told is not None:
            return told
        if name not in self._shapes or set(self._shapes[name]) != set(shape):
            return self._flag  # it fits neither way, or the base lacks it: the flag is for the message
        if model_type(self._base) in _FAMILIES or (self._some and leaf in _CONV1D):
            return leaf in _CONV1D
        if self._all:
            return leaf not in _HEADS
        return self._flag and not self._none

    def _by_shape(self, name: str, shape: tuple[int, int]) -> bool | None:
        """As far as the shape tells; None where it fits both ways, or none."""
        there = self._shapes.get(name)
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
