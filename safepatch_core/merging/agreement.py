"""Agreement: which entries of a patch may be chosen, by the signs of its delta and another patch's.

The engines know nothing of it: they are handed scores that are zero where the signs do not fit, and what has no score
is not eligible.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from safepatch_core.files.reading import TensorEntry
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
    deltas = [as_delta(of.delta, entry) for of in (patch, other) if of is not None]
    same = rule.signs == "same"
    if patch.scores is None:
        scores = Computed(entry, (*deltas,), partial(_sizes, same))
    else:
        scores = Computed(entry, (_scores(patch.scores, patch, weight, entry), *deltas), partial(_fitting, same))
    return replace(patch, scores=scores, importance="scores")


def _scores(given: PatchTensor, patch: PatchInput, weight: Weight, entry: TensorEntry) -> PatchTensor:
    """s of each entry, as an engine would find it of scores or gradients."""
    if patch.importance == "scores":
        return given
    return scores_of(given, weight, patch.delta, Dense(entry, "checkpoint"), entry)


def _sizes(same: bool, d: F32Array, *other: F32Array) -> F32Array:
    """The same of importance by magnitude."""
    return _fitting(same, np.abs(d), d, *other)


def _fitting(same: bool, scores: F32Array, d: F32Array, *other: F32Array) -> F32Array:
    """The scores of entries whose signs fit; of the others, those that break a rule."""
    keep = ~np.isfinite(scores) | (scores < 0)
    for theirs in other:
        up, down = (theirs > 0, theirs < 0) if same else (theirs < 0, theirs > 0)
        keep |= ((d > 0) & up) | ((d < 0) & down)
    return np.where(keep, scores, np.float32(0))
