"""What a merge did to a measured model: what its manifest counts, and how much of that rounding left."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint
from safepatch_core.files.reading import TensorEntry, read_tensor
from safepatch_core.merging.manifest import Manifest
from safepatch_core.merging.survive import survive
from safepatch_core.spec import ITEMSIZE

PIECE = 8 << 20  # bytes of each checkpoint in memory at once
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def layers_of(manifest: Manifest) -> list[dict[str, Any]]:
    """Per patch, how many entries of each layer there are, were selected and applied."""
    return [
        {"name": patch.name, "layers": _by_layer((t, of.model_dump()) for t, of in patch.tensors.items())}
        for patch in manifest.patches
    ]


def survivals(
    manifests: Mapping[str, Manifest],
    folders: Mapping[str, Path],
    models: Mapping[str, Mapping[str, Any]],
    formats: Sequence[str] = (),
) -> dict[str, Any]:
    """Label of a merged model → its `survival`, where the baseline can be seen to be its base.

    With `formats` also `later`, what these quantisations would leave of it.

    Of its base a manifest says no more than what it is called. That is not enough where the baseline is a merge too:
    the model may be merged from a later one of the same name, which differs from both in few entries.
    """
    if "baseline" not in folders or "baseline" in manifests:
        return {}
    baseline = folders["baseline"]
    called = {_last(models["baseline"]["name"]), baseline.name}
    found = {
        label: survival(manifest, folders[label], baseline)
        for label, manifest in manifests.items()
        if _last(manifest.recipe.base) in called
    }
    known = {label: of for label, of in found.items() if of is not None}
    return {label: of | later(folders[label], baseline, formats) for label, of in known.items()}


def later(merged: Path, baseline: Path, formats: Sequence[str]) -> dict[str, Any]:
    """Per format, what it leaves of the whole change and of each patch; nothing where no format is asked for."""
    if not formats:
        return {}
    found = survive(merged, baseline, formats)
    return {
        "later": {
            name: {"whole": of.whole.total.facts(), "patches": {p: s.total.facts() for p, s in of.patches.items()}}
            for name, of in found.formats.items()
        }
    }


def _last(ref: str) -> str:
    """The last part of a path or hub id, without a revision."""
    return Path(ref).name.partition("@")[0]


def survival(manifest: Manifest, merged: Path, baseline: Path) -> dict[str, Any] | None:
    """Of the entries that patches act on, those whose stored bits are not the baseline's: the others' steps are lost.

    Args:
        manifest: Of the merged checkpoint.
        merged: Its directory.
        baseline: The directory of what it is compared with.

    Returns:
        `acted`, `changed` and `surviving` as `merge` told them, here also per layer. None where the two checkpoints
        don't show them: their tensors have other names, shapes or dtypes, or the baseline is not the merge's base, so
        that bits differ where no patch acted.
    """
    base, out, acted = open_checkpoint(baseline), open_checkpoint(merged), manifest.acted()
    if not acted or not any(acted.values()):
        return None
    if _layout(base) != _layout(out) or not acted.keys() <= base.tensors.keys():
        return None
    changed = {}
    for name, entry in base.tensors.items():
        changed[name] = _differing(base, entry, out, out.tensors[name])
        if changed[name] > acted.get(name, 0):
            return None
    targets = {t: {"entries": base.tensors[t].entries, "acted": n, "changed": changed[t]} for t, n in acted.items()}
    sums = {key: sum(of[key] for of in targets.values()) for key in ("acted", "changed")}
    return {
        **sums,
        "surviving": sums["changed"] / sums["acted"],
        "dtypes": sorted({DTYPES.get(base.tensors[t].dtype, base.tensors[t].dtype) for t, n in acted.items() if n}),
        "layers": _by_layer(targets.items()),
    }


def _layout(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (entry.dtype, entry.shape) for name, entry in checkpoint.tensors.items()}


def _differing(base: Checkpoint, entry: TensorEntry, out: Checkpoint, other: TensorEntry) -> int:
    """Entries that are not stored alike; bytes, of a dtype that is never patched."""
    kind = f"<u{ITEMSIZE.get(entry.dtype, 1)}"
    identities, count = (base.identity_of(entry), out.identity_of(other)), 0
    for lo in range(0, entry.nbytes, PIECE):
        a, b = (
            np.frombuffer(read_tensor(of, identity, lo, lo + PIECE), kind)
            for of, identity in zip((entry, other), identities, strict=True)
        )
        count += int(np.count_nonzero(a != b))
    return count


def _by_layer(tensors: Iterable[tuple[str, Mapping[str, int]]]) -> list[dict[str, Any]]:
    """Counts per layer: the first number in a tensor's name, or null for what is outside the layers."""
    layers: dict[int | None, Counter[str]] = {}
    for tensor, counts in tensors:
        number = re.search(r"(?<![^.])\d+(?![^.])", tensor)
        layers.setdefault(int(number[0]) if number else None, Counter()).update(counts)
    return [{"layer": at, **layers[at]} for at in sorted(layers, key=lambda layer: (layer is None, layer))]
