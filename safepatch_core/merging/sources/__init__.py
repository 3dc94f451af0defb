"""The kinds of patches. A new kind is a file beside these and a row of `KINDS`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from safepatch_core.errors import UsageError
from safepatch_core.files.checkpoint import Checkpoint, locate, open_checkpoint
from safepatch_core.files.filenames import ADAPTER_CONFIG
from safepatch_core.merging.names import Takes
from safepatch_core.merging.sources.adapter import open_adapter
from safepatch_core.merging.sources.contract import Origin, Source
from safepatch_core.merging.sources.dense import open_checkpoints, open_deltas
from safepatch_core.spec import Kind

KINDS: dict[Kind, Callable[[Origin], Source]] = {
    "checkpoint": open_checkpoints,
    "delta": open_deltas,
    "lora": open_adapter,
}


def open_source(
    name: str,
    ref: str | os.PathLike[str],
    kind: Kind | None,
    base: Checkpoint,
    *,
    relative_to: Path | None,
    minus: str | None = None,
    takes: Takes = lambda name, dimensions: True,
) -> Source:
    """Open the patch `name` of `base`: a fine-tuned checkpoint, a delta checkpoint or a LoRA adapter.

    With `kind` None a directory that has an adapter_config.json is a LoRA adapter, anything else a checkpoint. The
    change of a checkpoint is measured from the checkpoint `minus`, or from the base. Names are resolved with what the
    rule `takes` in view.
    Raises InputError naming file and tensor; UsageError for a hub id without huggingface_hub, or a `minus` that does
    not go with the kind.
    """
    path, revision = locate(ref, relative_to=relative_to)
    if kind is None:
        kind = "lora" if os.path.lexists(path / ADAPTER_CONFIG) else "checkpoint"
    if minus is not None and kind != "checkpoint":
        raise UsageError(f"patch '{name}': minus goes with checkpoints", file=path, found=f"kind {kind}")
    reference = None if minus is None else open_checkpoint(minus, relative_to=relative_to)
    return KINDS[kind](Origin(name, os.fspath(ref), path, revision, reference, base, takes))
