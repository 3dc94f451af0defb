"""Fixes in a running SGLang server, through its hook for custom weight loaders. Imports nothing of SGLang.

    … --model-path BASE --custom-weight-loader safepatch_core.integrations.sglang.load_fixes

    engine.update_weights_from_tensor(request(BASE, ["a.safetensors"]), load_format=LOADER)

A request says which fixes the server shall carry from then on, so one call applies, stacks and takes out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from safepatch_core import FixedCheckpoint, UsageError, open_fixed

LOADER = "safepatch_core.integrations.sglang.load_fixes"
_NAME = "safepatch"


def request(base: str | os.PathLike[str], fixes: Iterable[str | os.PathLike[str]]) -> list[tuple[str, Any]]:
    """What to send to the server, as named tensors.

    Args:
        base: the checkpoint that it serves; this and the fixes are paths on the server's machine.
        fixes: all that it shall carry, the lowest first; none for the base itself.
    """
    import torch

    text = json.dumps({"base": os.fspath(base), "fixes": [os.fspath(path) for path in fixes]})
    return [(_NAME, torch.tensor(list(text.encode()), dtype=torch.uint8))]


def load_fixes(model: Any, named_tensors: Sequence[tuple[str, Any]]) -> None:
    """What the server calls on every rank: load the base again, with the fixes of a request.

    All that the fixes touch is read and checked before a weight changes; if loading fails, what this hook loaded
    before is loaded again, at first the base.

    Raises:
        InputError: the fixes don't fit the base.
        UsageError: not a `request`, or the model is quantised: its weights were laid out anew after they were loaded.
    """
    if getattr(model, "quant_config", None) is not None:
        raise UsageError("a quantised model can't take fixes while it runs: apply them to the files, and load those")
    base, fixes = _parsed(named_tensors)
    with open_fixed(base, fixes) as fixed:
        fixed.check()
        try:
            _load(model, fixed)
        except BaseException:
            with open_fixed(base, getattr(model, "safepatch_fixes", [])) as former:
                _load(model, former)
            raise
    model.safepatch_fixes = fixes


def _load(model: Any, fixed: FixedCheckpoint) -> None:
    model.load_weights(fixed.tensors())


def _parsed(named_tensors: Sequence[tuple[str, Any]]) -> tuple[str, list[str]]:
    names = [name for name, _ in named_tensors]
    if names != [_NAME]:
        raise UsageError("not a request", found=names, expected="what `request` gives")
    data = json.loads(bytes(named_tensors[0][1].cpu().tolist()))
    return data["base"], data["fixes"]
