"""What a later quantisation would leave of a merge, per patch and tensor. The function behind `survive`.

Both sides are quantised, each with its own scales. Nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Unpack

from safepatch_core.errors import InputError, UsageError
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint, require_same_table
from safepatch_core.files.filenames import MANIFEST
from safepatch_core.merging import owners
from safepatch_core.merging.api import plan as make_plan
from safepatch_core.merging.engine import EngineOptions
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.manifest import read_manifest
from safepatch_core.merging.plan import DEFAULT_LIMIT, SMALLEST_LIMIT, Plan
from safepatch_core.merging.quantised.comparison import Comparison, Progress, SurviveResult
from safepatch_core.merging.quantised.formats import FORMATS, chosen
from safepatch_core.merging.quantised.modules import quantised
from safepatch_core.merging.recipe import Recipe, load_recipe, parse_recipe
from safepatch_core.sizes import size


def survive(
    out: str | os.PathLike[str],
    base: str | os.PathLike[str],
    formats: Sequence[str] = tuple(FORMATS),
    *,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    progress: Progress | None = None,
    **engine: Unpack[EngineOptions],
) -> SurviveResult:
    """What a later quantisation, by the rules of compressed-tensors, would leave of a merge. Writes nothing.

    Args:
        out: the merged checkpoint, of floats.
        base: what it was merged from.
        formats: of fp8-block, fp8-channel, int8-channel, int4-g128, int4-g32, mxfp4 and nvfp4; all by default.
        recipe: what the merge was made from; its patches are told apart by merging again. By default the manifest's,
            if what that names lies beside `out`. A merge of one patch needs none.
        progress: called with (bytes of the base done, bytes in all).
        **engine: what merges again, see `EngineOptions`; its `threads` quantise, too.

    Raises:
        UsageError: an unknown format, or the recipe or an option is wrong.
        InputError: the two have not the same table, one of them is quantised already, they don't differ, or `out` is
            not what the recipe gives.
        IOFailure: reading failed.
    """
    wanted = chosen(formats)
    old, new = open_checkpoint(base), open_checkpoint(out)
    require_floats(old)
    require_floats(new)
    require_same_table(old, new)
    limit = require_room(engine)
    threads = min(engine.get("threads") or os.cpu_count() or 1, len(wanted))
    with closing(Inputs((old, new))) as files, ThreadPoolExecutor(threads) as pool:

        def compared(plan: Plan | None, patches: Sequence[str]) -> SurviveResult:
            room = limit if plan is None else limit // 2 - owners.bytes_of(plan)
            job = Comparison(
                *(old, new, wanted, patches), files=files, pool=pool, threads=threads, room=room, progress=progress
            )
            if plan is not None:
                owners.find_owners(plan, new, job.add)
            for name, entry in old.tensors.items():
                if plan is None or name not in plan.targets:
                    job.add(entry)
            return job.result()

        result = _per_patch(compared, old, new, recipe, {**engine, "memory_limit": limit // 2})
        files.check_unchanged()
    return result


def require_room(engine: EngineOptions) -> int:
    """The host's memory limit in bytes. Raises UsageError where it is too small to merge beside what is compared."""
    limit = size(engine.get("memory_limit")) or DEFAULT_LIMIT
    if limit < 2 * SMALLEST_LIMIT:
        raise UsageError("--memory-limit is too small", found=f"{limit} bytes", expected="at least 32MiB")
    return limit


def require_floats(checkpoint: Checkpoint) -> None:
    """Raises InputError for a checkpoint that holds codes."""
    held = quantised(checkpoint)
    if held is not None:
        entry = next(iter(held.codes.values()))
        raise InputError(
            f"is quantised already ({held.method}): no later quantisation can be foreseen",
            file=entry.path,
            tensor=entry.name,
            expected="a merge of floats and its base",
        )


def _per_patch(
    compared: Callable[[Plan | None, Sequence[str]], SurviveResult],
    old: Checkpoint,
    new: Checkpoint,
    recipe: str | os.PathLike[str] | Recipe | None,
    engine: EngineOptions,
) -> SurviveResult:
    """The comparison, for each patch where they can be told apart; else what is in the way is noted."""

    def by(recipe: Recipe) -> SurviveResult:
        names = [patch.name for patch in recipe.patches]
        return compared(None if len(names) == 1 else _plan(recipe, old, engine), names)

    if recipe is not None:
        return by(recipe if isinstance(recipe, Recipe) else load_recipe(recipe))
    found = _recipe_of(new)
    reason = "the manifest names no recipe whose patches lie beside the merge"
    if found is not None:
        try:
            return by(found)
        except (InputError, UsageError) as error:
            reason = str(error)
    result = compared(None, ())
    result.notes.append(f"patches are not told apart without --recipe: {reason}")
    return result


def _plan(recipe: Recipe, base: Checkpoint, engine: EngineOptions) -> Plan:
    """The merge again, from the base that is compared with."""
    ref = os.path.abspath(base.ref) if os.path.exists(base.ref) else base.ref
    return make_plan(recipe.model_copy(update={"base": ref}), **engine)


def _recipe_of(out: Checkpoint) -> Recipe | None:
    """The recipe in a merge's manifest, unless its patches have to be told apart and don't lie beside the merge."""
    folder = out.root
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    try:
        made = read_manifest(folder / MANIFEST).recipe.model_dump()
        recipe = parse_recipe(made, origin=folder.resolve().parent)
    except (InputError, UsageError):
        return None
    needed = [path for p in recipe.patches for path in (p.source, p.minus, p.importance_path) if path is not None]
    here = all((recipe.origin / path).exists() for path in needed)
    return recipe if here or len(recipe.patches) == 1 else None
