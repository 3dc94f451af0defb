"""Agreement: which entries of a patch may be chosen, by the signs of its delta and another patch's.

The engines know nothing of it: they are handed scores that are zero where the signs do not fit, and what has no score
is not eligible.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from safepatch_core.files.checkpoint import TensorEntry
from safepatch_core.merging.recipe import Agreement
from safepatch_core.merging.sources.computed import Computed, as_delta, scores_of
from safepatch_core.merging.sources.contract import PatchTensor
from safepatch_core.merging.sources.decoding import F32Array
from safepatch_core.merging.sources.dense import Dense
from safepatch_core.merging.work import PatchInput
from safepatch_core.spec import Weight


def agreed(
    patch: PatchInput, other: PatchInput | None, rule: Agreement, weight: Weight, entry: TensorEntry
) -> PatchInput:
    """The patch with scores where the rule lets it be chosen: nowhere, if the other has nothing for the tensor."""
    deltas = () if other is None else (as_delta(patch.delta, entry), as_delta(other.delta, entry))
    fitting = partial(_fitting, rule.signs == "same")
    return replace(
        patch, scores=Computed(entry, (_scores(patch, weight, entry), *deltas), fitting), importance="scores"
    )


def _scores(patch: PatchInput, weight: Weight, entry: TensorEntry) -> PatchTensor:
    """s of each entry, as an engine would find it."""
    if patch.scores is None:
        return Computed(entry, (as_delta(patch.delta, entry),), np.abs)
    if patch.importance == "scores":
        return patch.scores
    return scores_of(patch.scores, weight, patch.delta, Dense(entry, "checkpoint"), entry)


def _fitting(same: bool, scores: F32Array, *deltas: F32Array) -> F32Array:
    """The scores of entries whose signs fit; of the others, those that break a rule."""
    keep = ~np.isfinite(scores) | (scores < 0)
    if deltas:
        d, other = deltas if same else (deltas[0], -deltas[1])
        keep |= ((d > 0) & (other > 0)) | ((d < 0) & (other < 0))
    return np.where(keep, scores, np.float32(0))
