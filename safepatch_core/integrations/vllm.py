"""Fixes in vLLM: a model loader (`--load-format safepatch`), and methods for the workers of a running server.

    vllm serve BASE --load-format safepatch --model-loader-extra-config '{"fixes": ["a.safetensors"]}'
    vllm serve BASE --worker-extension-cls safepatch_core.integrations.vllm.FixWorker

Both hand whole tensors under the checkpoint's names to the model's own loading, which fuses, shards and quantises.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from safepatch_core import FixedCheckpoint, InputError, UsageError, open_fix, open_fixed

try:
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
except ImportError as error:
    raise UsageError(f"vLLM is not installed, or another one: {error}", expected="pip install vllm") from None

FORMAT = "safepatch"


@cache
def register() -> None:
    """Make the loader known under its name. vLLM calls it in every process, perhaps more than once."""
    register_model_loader(FORMAT)(FixLoader)


class FixLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads safetensors as vLLM does, with fixes applied to what it reads."""

    def __init__(self, load_config: Any) -> None:
        """Raises UsageError unless the extra config has `fixes`; its other keys are the default loader's."""
        self._paths = _paths_of(load_config)
        inner, extra = copy.copy(load_config), load_config.model_loader_extra_config
        inner.load_format = "safetensors"
        inner.model_loader_extra_config = {key: value for key, value in extra.items() if key != "fixes"}
        super().__init__(inner)

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
        """Raises InputError where the base carries something else than the fixes expect: the server doesn't start."""
        with open_fixed(_base_of(model_config), self._paths) as fixed:
            for name, tensor in super().get_all_weights(model_config, model):
                if name in fixed.touched:
                    tensor = tensor.clone()  # what was read may be the file itself, mapped
                    fixed.patch(name, tensor)
                yield name, tensor
            fixed.require_effect()


class Served(NamedTuple):
    """A fix that a server carries."""

    id: str
    path: str


class FixWorker:
    """What `--worker-extension-cls` adds to each worker; `collective_rpc` calls it.

    The base is read from its files again, so it has to stay where it is. Pause the server first, and reset the prefix
    cache after.
    """

    _safepatch_fixes: list[Served]
    vllm_config: Any
    reload_weights: Any

    def apply_fix(self, path: str) -> list[dict[str, str]]:
        """Put a fix on top of those that are served, and list them.

        All that any fix touches is read and checked before a weight changes; if the reload fails, what was served
        before is loaded again.

        Raises:
            InputError: the fix is served already, or doesn't fit what is.
        """
        new, now = _served(path), _now(self)
        if new.id in [fix.id for fix in now]:
            raise InputError(f"fix {new.id} is served already", file=path)
        return _serve(self, [*now, new])

    def revert_fix(self, fix: str) -> list[dict[str, str]]:
        """Take out a fix, named by its id or the path that it was applied from, and list the others.

        Raises:
            InputError: it isn't served, or one above it touches the same entries.
        """
        now = _now(self)
        rest = [other for other in now if fix not in other]
        if len(rest) == len(now):
            raise InputError("no such fix is served", found=fix, expected=", ".join(f.id for f in now) or "none is")
        return _serve(self, rest)

    def list_fixes(self) -> list[dict[str, str]]:
        """The fixes that are served, the lowest first: `id` and `path` of each."""
        return [fix._asdict() for fix in _now(self)]


def _now(worker: Any) -> list[Served]:
    """What a worker serves; at first what its loader applied."""
    if not hasattr(worker, "_safepatch_fixes"):
        config = worker.vllm_config.load_config
        paths = _paths_of(config) if config.load_format == FORMAT else []
        worker._safepatch_fixes = [_served(path) for path in paths]
    found: list[Served] = worker._safepatch_fixes
    return found


def _serve(worker: Any, wanted: list[Served]) -> list[dict[str, str]]:
    before = _now(worker)
    with _open(worker, wanted) as fixed:
        fixed.check()
        try:
            _reload(worker, fixed)
        except BaseException:
            with _open(worker, before) as former:
                _reload(worker, former)
            raise
    worker._safepatch_fixes = wanted
    return [fix._asdict() for fix in wanted]


def _open(worker: Any, fixes: Sequence[Served]) -> FixedCheckpoint:
    fixed = open_fixed(_base_of(worker.vllm_config.model_config), [fix.path for fix in fixes])
    for fix, opened in zip(fixes, fixed.fixes, strict=True):
        if fix.id != opened.id:
            fixed.close()
            raise InputError("another fix than the one applied", file=fix.path, found=opened.id, expected=fix.id)
    return fixed


def _reload(worker: Any, fixed: FixedCheckpoint) -> None:
    worker.reload_weights(weights_iterator=fixed.tensors(), is_checkpoint_format=True)


def _served(path: str) -> Served:
    with open_fix(path) as fix:
        return Served(fix.id, path)


def _paths_of(load_config: Any) -> list[str]:
    extra = load_config.model_loader_extra_config
    paths = extra.get("fixes") if isinstance(extra, dict) else None
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        raise UsageError("--model-loader-extra-config", found=extra, expected='{"fixes": ["fix.safetensors", …]}')
    return paths


def _base_of(model_config: Any) -> str:
    """The checkpoint that vLLM loads, as this project names it."""
    model, revision = str(model_config.model), model_config.revision
    return model if revision is None or os.path.exists(model) else f"{model}@{revision}"
