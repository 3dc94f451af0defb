"""The kinds of patches. A new kind is a file beside these and a row of `KINDS`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from safepatch_core.errors import InputError, UsageError
from safepatch_core.files.checkpoint import Checkpoint, locate, open_checkpoint
from safepatch_core.files.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from safepatch_core.merging.names import Takes
from safepatch_core.merging.sources.contract import Origin, Source
from safepatch_core.merging.sources.dense import open_checkpoints, open_deltas
from safepatch_core.merging.sources.foreign import is_adapter, refuse_kohya
from safepatch_core.spec import Kind, Rows


def _open_adapter(origin: Origin) -> Source:
    from safepatch_core.merging.sources.adapter import open_adapter  # and eleven files that checkpoints need not

    return open_adapter(origin)


KINDS: dict[Kind, Callable[[Origin], Source]] = {
    "checkpoint": open_checkpoints,
    "delta": open_deltas,
    "lora": _open_adapter,
}

_FACTOR = re.compile(r"[._](lora_(A|B|up|down|embedding_[AB])|alpha)\b")


def open_source(
    name: str,
    ref: str | os.PathLike[str],
    kind: Kind | None,
    base: Checkpoint,
    *,
    relative_to: Path | None,
    minus: str | None = None,
    takes: Takes = lambda name, dimensions: True,
    rows: Rows = "all",
) -> Source:
    """Open the patch `name` of `base`: a fine-tuned checkpoint, a delta checkpoint or a LoRA adapter.

    With `kind` None a directory that has an adapter_config.json is an adapter (unless only the weights of a full
    model lie beside it), and so is its file of weights; anything else is a checkpoint. The change of a checkpoint is
    measured from the checkpoint `minus`, or from the base. Names are resolved with what the rule `takes` in view.
    With `rows` common, embeddings and heads may have more or fewer rows than the base's.
    Raises InputError naming file and tensor; UsageError for a hub id without huggingface_hub, or a `minus` that does
    not go with the kind.
    """
    path, revision = locate(ref, relative_to=relative_to)
    guessed, kind = kind is None, kind or ("lora" if is_adapter(path) else "checkpoint")
    if minus is not None and kind != "checkpoint":
        raise UsageError(f"patch '{name}': minus goes with checkpoints", file=path, found=f"kind {kind}")
    reference = None if minus is None else open_checkpoint(minus, relative_to=relative_to)
    source = KINDS[kind](Origin(name, os.fspath(ref), path, revision, reference, base, takes, rows))
    if kind == "checkpoint":
        _refuse_factors(source, guessed)
    return source


def _refuse_factors(source: Source, guessed: bool) -> None:
    """A file of factors alone is an adapter that lost its config, or one of another layout (kohya's)."""
    file = source.checkpoints[0]
    factors = [name for name in source.shapes if _FACTOR.search(name)]
    if guessed:
        refuse_kohya(file.shards[0].path, source.shapes)
    if guessed and factors and len(factors) == len(source.shapes):
        raise InputError(
            "the factors of an adapter without its config",
            file=file.ref,
            tensor=factors[0],
            expected=f"a directory with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, as PEFT saves adapters",
        )
    if factors and any(".base_layer." in name for name in source.shapes):
        raise InputError(
            "a model with an adapter that was not merged into it",
            file=file.ref,
            tensor=factors[0],
            expected="what PEFT's merge_and_unload makes of it, or the adapter alone, as PEFT saves it",
        )
