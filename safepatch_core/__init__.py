"""safepatch: safety patches for language models, merged bit for bit without loading the model.

The names below are the public API; they are imported on first use, so that the command line starts at once.
Training and evaluation are `safepatch_core.deriving.derive` and `safepatch_core.evaluating.evaluate`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from safepatch_core.version import __version__

if TYPE_CHECKING:
    from safepatch_core.backends import open_backend as open_backend
    from safepatch_core.errors import SafepatchError as SafepatchError
    from safepatch_core.files.checkpoint import open_checkpoint as open_checkpoint
    from safepatch_core.merging.api import MergeResult as MergeResult
    from safepatch_core.merging.api import merge as merge
    from safepatch_core.merging.api import prepare as prepare
    from safepatch_core.merging.recipe import Recipe as Recipe
    from safepatch_core.merging.recipe import load_recipe as load_recipe
    from safepatch_core.merging.verification import verify as verify

_HOMES = {
    "MergeResult": "merging.api",
    "Recipe": "merging.recipe",
    "SafepatchError": "errors",
    "load_recipe": "merging.recipe",
    "merge": "merging.api",
    "open_backend": "backends",
    "open_checkpoint": "files.checkpoint",
    "prepare": "merging.api",
    "verify": "merging.verification",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
