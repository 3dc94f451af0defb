"""The base's names: which tensors of the checkpoint a model's own tensors become when they are saved.

transformers renames, fuses and splits tensors while it loads them, and undoes that when it saves them. What it leaves
is settled here: a prefix that the base's names lack, and tied tensors that the base repeats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint


class BaseNames:
    """Turns tensors under the model's names into tensors under the base's.

    Args:
        model: The model as transformers loaded it from `base`; on the device meta, without weights, will do.
        base: The checkpoint, which has the names.
        names: The base's tensors that may be asked for; None for all.
        state: The model's tensors that must all become one of them; None for what transformers saves of it.

    Attributes:
        dtypes: Of each of the base's tensors `names`, as the model holds it; None for what the model doesn't use.
        shapes: Of each of the base's tensors.

    Raises:
        InputError: A tensor of `state` becomes none of the base's, or one of another shape.
    """

    def __init__(
        self,
        model: Any,
        base: Checkpoint,
        names: Iterable[str] | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model = model
        self.shapes = {name: entry.shape for name, entry in base.tensors.items()}
        state = saved_state(model) if state is None else state
        shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in state.items()}
        saved = _saved(model, shapes)
        tied, prefix = _tied_names(model), model.base_model_prefix
        self.dtypes: dict[str, torch.dtype | None] = {}
        self._becomes: dict[str, list[str]] = {}  # name as transformers saves it -> the base's
        for name in base.tensors if names is None else names:
            candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
            found = next((a for c in candidates for a in (c, tied.get(c)) if a in saved), None)
            self.dtypes[name] = None if found is None else saved[found].dtype
            if found is None:
                continue
            self._becomes.setdefault(found, []).append(name)
            if saved[found].shape != base.tensors[name].shape:
                differ = {"found": list(saved[found].shape), "expected": list(base.tensors[name].shape)}
                raise InputError(
                    "trained tensor has another shape than the base's", file=base.ref, tensor=name, **differ
                )
        lost = saved.keys() - self._becomes.keys()
        if lost:
            raise InputError("trained tensor has no counterpart in the base", file=base.ref, tensor=min(lost))

    def keep(self, names: Iterable[str]) -> None:
        """Asks for no other of the base's tensors from now on."""
        kept = set(names)
        self.dtypes = {name: dtype for name, dtype in self.dtypes.items() if name in kept}
        self._becomes = {saved: [n for n in became if n in kept] for saved, became in self._becomes.items()}

    def convert(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The base's (name, tensor) pairs that tensors under the model's names become.

        A tensor that others are fused with must come together with them: give a layer at a time.
        """
        for saved, tensor in _saved(self._model, tensors).items():
            for name in self._becomes.get(saved, ()):
                yield name, tensor


def saved_state(model: Any) -> dict[str, Tensor]:
    """What transformers saves of a model, under the model's own names."""
    tied, ignored = _tied_names(model), model._keys_to_ignore_on_save or ()
    return {n: t for n, t in model.state_dict().items() if n not in tied and n not in ignored}


def _saved(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    saved: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return saved


def _tied_names(model: Any) -> dict[str, str]:
    """Other names of shared parameters -> the name that comes first."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if name != first[id(parameter)]}
