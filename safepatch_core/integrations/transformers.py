"""A transformers model with fixes applied while it loads.

The fixes act on the tensors of the files, before these are renamed, fused, sharded or quantised, so all of that stays
right.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from safepatch_core import FixedCheckpoint, InputError, UsageError, open_fix, open_fixed
from safepatch_core.language.lazy import LazyWeights

# What from_pretrained would take from a path; here the base decides.
_FROM_BASE = ("gguf_file", "revision", "state_dict", "subfolder", "trust_remote_code", "variant")
Ref = str | os.PathLike[str]


def load(base: Ref, fixes: Iterable[Ref] | None = None, *, model_class: Any = None, **kwargs: Any) -> Any:
    """A model as `from_pretrained` gives it for the base with the fixes applied, which is never written.

    Every tensor is read once, checked, changed and handed on: no second copy of the weights is made. A rank of a
    tensor-parallel run reads all of a tensor and keeps its slice.

    Args:
        base: a checkpoint, or a directory with one fix, a README.md whose metadata name the `base_model`, and
            perhaps a config.json of its own.
        fixes: fix files, in the order in which they are applied; None for the one in the directory.
        model_class: a model class of transformers; None for the one that the config names.
        **kwargs: for the class's `from_pretrained`, such as `dtype`, `device_map` or `quantization_config`.

    Raises:
        InputError: the base carries something else than the fixes expect, or they touch nothing that was loaded.
        UsageError: an argument that the base decides; or transformers is missing.
    """
    unknown = [key for key in _FROM_BASE if key in kwargs]
    if unknown:
        raise UsageError(f"'{unknown[0]}' can't be given: files, names and code are those of the base")
    about = Path(base)
    if fixes is None:
        base, fixes = _fix_and_base(about)
    with open_fixed(base, fixes) as fixed:
        root = _root_of(fixed)
        home = about if (about / "config.json").is_file() else root
        config = kwargs.pop("config", None) or _config_of(home)
        weights = LazyWeights(fixed.base.tensors, fixed.dtype, fixed.read)
        found, given = model_class or _class_of(config, home), _generation(home, kwargs)
        model = weights.loaded_by(lambda: found.from_pretrained(None, config=config, state_dict=weights, **given))
        fixed.require_effect()
    model.name_or_path = model.config.name_or_path = str(base)
    return model


def _fix_and_base(folder: Path) -> tuple[Ref, list[Ref]]:
    """What a directory that holds a fix says: the base's name, and its fix."""
    found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if len(found) != 1:
        raise InputError(
            "no fixes given, and not a directory with one", file=folder, found=f"{len(found)} safetensors files"
        )
    with open_fix(found[0]):
        pass  # refuses a file that is none
    base = _card(folder / "README.md").get("base_model")
    if not isinstance(base, str) or not base:
        raise InputError("does not name the fix's base", file=folder / "README.md", expected="base_model: MODEL")
    beside = folder / base
    return (beside if beside.exists() else base), [found[0]]


def _card(path: Path) -> dict[str, Any]:
    """The metadata at the head of a model card."""
    try:
        parts = path.read_text(encoding="utf-8").split("---\n", 2)
        data = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        data = None
    return data if isinstance(data, dict) else {}


def _root_of(fixed: FixedCheckpoint) -> Path:
    if fixed.base.root is None:
        raise InputError("a file without a config.json beside it", file=fixed.base.ref, expected="a directory")
    return fixed.base.root


def _library() -> Any:
    try:
        import transformers
    except ImportError:
        raise UsageError("transformers is not installed", expected="pip install 'safepatch[derive]'") from None
    return transformers


def _config_of(home: Path) -> Any:
    try:
        return _library().AutoConfig.from_pretrained(home)
    except (OSError, ValueError) as error:
        raise InputError(f"transformers can't read the config: {error}", file=home / "config.json") from None


def _class_of(config: Any, home: Path) -> Any:
    """The class that a config names. Code that comes with a model is not run."""
    named = (config.architectures or [None])[0]
    found = getattr(_library(), named, None) if named else None
    if found is None:
        raise InputError(
            "no class of transformers",
            file=home / "config.json",
            found=f"architectures: {named}",
            expected="model_class",
        )
    return found


def _generation(home: Path, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the generation config that lies beside the config."""
    if (home / "generation_config.json").is_file():
        kwargs.setdefault("generation_config", _library().GenerationConfig.from_pretrained(home))
    return kwargs
