"""Merge what is in memory: state dicts of torch tensors, with the bits that the same recipe gives on files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends import open_backend
from safepatch_core.backends.contract import Backend, Bits, Block, Cut, PatchData, Report
from safepatch_core.backends.select import Selection, TieCounter
from safepatch_core.errors import InputError, UsageError
from safepatch_core.merging.recipe import PatchSpec, Recipe, is_mask, match_targets, parse_recipe
from safepatch_core.spec import Dtype, keep_threshold, random_key

if TYPE_CHECKING:
    import torch

# By the names of torch's dtypes, so that torch is only imported by who has it.
_DTYPES: dict[str, Dtype] = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
_UNSIGNED = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}


def merge_state_dicts(
    base: Mapping[str, torch.Tensor],
    patches: Mapping[str, Mapping[str, torch.Tensor]],
    recipe: Mapping[str, Any] | None = None,
    *,
    threads: int | None = None,
) -> dict[str, torch.Tensor]:
    """Merge patches into a base in memory.

    Args:
        base: tensors by name, F32, F16 or BF16 where they are targets, on any device; left as they are.
        patches: by the name of each patch its tensors: patched values, or deltas with `kind: delta`.
        recipe: the keys of a recipe but `base` and `source`; its `patches` have a name, and top, retain, scale as far
            as they differ from the defaults. Importance is magnitude. Without it all patches have the defaults.
        threads: of the engine; by default all cores.

    Returns:
        All of base's tensors by name: new ones for the targets, base's own for the others.

    Raises:
        UsageError: a key of the recipe is wrong, or its patches are not those given.
        InputError: a tensor is missing, has another shape, or holds or becomes what is not finite.
    """
    checked = _recipe(patches, recipe or {})
    floats = {n: t.ndim for n, t in base.items() if str(t.dtype) in _DTYPES and not is_mask(n, tuple(t.shape))}
    targets = match_targets(checked, floats)
    engine = open_backend("cpu", threads=threads)
    blocks = {name: _block(checked, name, base[name], patches) for name in targets}
    return {**base, **_merged(engine, checked, base, blocks)}


def _recipe(patches: Mapping[str, Any], keys: Mapping[str, Any]) -> Recipe:
    given = keys.get("patches", [{"name": name} for name in patches])
    if not isinstance(given, list) or [of.get("name") for of in given] != list(patches):
        raise UsageError("patches of the recipe", found=given, expected=f"those given: {', '.join(patches)}")
    if any(of.get("importance", "magnitude") != "magnitude" or of.get("kind") == "lora" for of in given):
        raise UsageError("in memory, patches are checkpoints or deltas, and importance is magnitude")
    for key in ("minus", "gate", "agreement"):
        if any(of.get(key) for of in given):
            raise UsageError(f"in memory, patches have no {key}", expected="a merge of files")
    return parse_recipe({**keys, "base": "memory", "patches": [{**of, "source": "memory"} for of in given]})


def _bits(tensor: torch.Tensor) -> Bits:
    dtype = _DTYPES[str(tensor.dtype)]
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    raw: NDArray[Any] = plain.view(dtype=_integer(dtype)).numpy()
    return Bits(raw.view(_UNSIGNED[dtype]), dtype)


def _integer(dtype: Dtype) -> torch.dtype:
    import torch

    return torch.int32 if dtype == "F32" else torch.int16


def _block(recipe: Recipe, name: str, base: torch.Tensor, patches: Mapping[str, Mapping[str, torch.Tensor]]) -> Block:
    return Block(
        base=_bits(base),
        start=0,
        cols=base.shape[-1] if base.ndim else 1,
        patches=tuple(_patch(recipe, p, name, base, of) for p, of in enumerate(patches.values())),
        rule=recipe.rule,
        order=recipe.order,
        lambda_=recipe.lambda_,
    )


def _patch(
    recipe: Recipe, p: int, name: str, base: torch.Tensor, tensors: Mapping[str, torch.Tensor]
) -> PatchData | None:
    spec = recipe.patches[p].at(name)
    if name not in tensors:
        if recipe.missing == "skip":
            return None
        raise InputError(f"patch '{spec.name}' lacks this target", tensor=name, expected="it, or missing: skip")
    tensor = tensors[name]
    if tensor.shape != base.shape or str(tensor.dtype) not in _DTYPES:
        found, expected = (f"{tuple(t.shape)} of {t.dtype}" for t in (tensor, base))
        raise InputError(
            f"patch '{spec.name}' has another shape or dtype", tensor=name, found=found, expected=expected
        )
    return PatchData(
        kind=spec.kind or "checkpoint",
        values=_bits(tensor),
        importance="magnitude",
        scores=None,
        weight="patched",
        random_key=random_key(recipe.seed, spec.name, name),
        keep=keep_threshold(spec.retain),
        scale=spec.factor,
    )


def _merged(
    engine: Backend, recipe: Recipe, base: Mapping[str, torch.Tensor], blocks: Mapping[str, Block]
) -> dict[str, torch.Tensor]:
    import torch

    cuts = _model_cuts(engine, recipe, blocks) if recipe.scope == "model" else {}
    merged = {}
    for name, block in blocks.items():
        out = np.empty_like(block.base.data)
        if name in cuts:
            report = engine.apply(block, cuts[name], out)
        else:
            quotas, skips = _quotas(recipe, [spec.at(name) for spec in recipe.patches], len(block))
            _, report = engine.merge(block, quotas, out, skips)
        _require_finite(recipe, name, report)
        signed = out.view(np.int32 if block.base.dtype == "F32" else np.int16)
        old = base[name]
        merged[name] = torch.from_numpy(signed).view(old.dtype).reshape(old.shape).to(old.device)
    return merged


def _model_cuts(engine: Backend, recipe: Recipe, blocks: Mapping[str, Block]) -> dict[str, Sequence[Cut]]:
    """Each tensor's cuts of one threshold per patch for all of them."""
    entries = sum(map(len, blocks.values()))
    quotas, skips = _quotas(recipe, recipe.patches, entries)
    selection = Selection(list(blocks), quotas, entries, skips)
    while selection.pending:
        for name, block in blocks.items():
            engine.histogram(block, selection.windows(name))
        selection.advance()
    return {name: TieCounter(tallies).cuts(engine, blocks[name]) for name, tallies in selection.tallies().items()}


def _quotas(recipe: Recipe, specs: Sequence[PatchSpec], entries: int) -> tuple[list[int], list[int]]:
    """Per patch its quota, and how many of it are skipped."""
    both = [spec.quotas(entries, recipe.quota) for spec in specs]
    return [k for k, _ in both], [skip for _, skip in both]


def _require_finite(recipe: Recipe, name: str, report: Report) -> None:
    if report.overflow.count:
        raise InputError("an entry overflows", tensor=name, found=f"{report.overflow.count} entries")
    for spec, of in zip(recipe.patches, report.patches, strict=True):
        if recipe.nonfinite == "error" and of.bad_delta.count:
            found = f"{of.bad_delta.count} entries, the first at {of.bad_delta.first}"
            raise InputError(f"patch '{spec.name}' is NaN or infinite", tensor=name, found=found)
