"""safepatch: safety patches for language models, merged bit for bit without loading the model.

The names below are the public API; they are imported on first use, so that the command line starts at once.
Training and evaluation are `safepatch_core.derive.derive` and `safepatch_core.evaluate.evaluate`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from safepatch_core.api import MergeResult as MergeResult
    from safepatch_core.api import merge as merge
    from safepatch_core.api import prepare as prepare
    from safepatch_core.backends import open_backend as open_backend
    from safepatch_core.checkpoint import open_checkpoint as open_checkpoint
    from safepatch_core.errors import SafepatchError as SafepatchError
    from safepatch_core.recipe import Recipe as Recipe
    from safepatch_core.recipe import load_recipe as load_recipe
    from safepatch_core.verification import verify as verify

_HOMES = {
    "MergeResult": "api",
    "Recipe": "recipe",
    "SafepatchError": "errors",
    "load_recipe": "recipe",
    "merge": "api",
    "open_backend": "backends",
    "open_checkpoint": "checkpoint",
    "prepare": "api",
    "verify": "verification",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
