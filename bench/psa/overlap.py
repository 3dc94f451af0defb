"""Do data sets and seeds agree on which weights matter? How much their top sets overlap, tensor by tensor.

That such regions overlap little between data sets is what arXiv 2602.17696 found. Importance is SNIP at the backbone,
on answers to orders, to questions, to the demo's requests, and, as a control, to ordinary questions: what those share
with the others is not about safety.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safepatch_core.deriving import SafetyPatch, derive
from safepatch_core.deriving.saving import read_tensor
from safepatch_core.evaluating.config import DEMO, DEMO_FILES, DEMO_TO_DERIVE
from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.spec import quota

from .compared import answered_questions
from .data import TRAINED
from .measures import replace
from .steps import PLAIN, WITH_UTILITY, Evidence, settings

SHARES = (0.01, 0.03, 0.1)
SAMPLES = 32  # rows; each seed draws its own

ORDERS, QUESTIONS, REQUESTS, CONTROL = "orders, AdvBench", "questions, CatQA", "requests, demo", "ordinary questions"
AT_BACKBONE = (ORDERS, QUESTIONS, REQUESTS, CONTROL)
PATCHED = {"safety patch": "safety", "over-safety patch": "over-safety"}  # at the models of the utility term


class Scored(NamedTuple):
    """One importance: of which rows or patch, and of which seed."""

    of: str
    seed: int


def _data(job: Evidence, of: str) -> dict[str, Any]:
    plain = {"question_column": "question", "answer_column": "answer"}
    found: dict[str, dict[str, Any]] = {
        ORDERS: {"rows": TRAINED},
        QUESTIONS: plain | {"data": str(answered_questions(job)), "rows": None},
        REQUESTS: plain | {"data": str(DEMO / DEMO_FILES["harmful"]), "rows": DEMO_TO_DERIVE["harmful"]},
        CONTROL: plain | {"data": str(job.utility), "rows": None},
    }
    return found[of]


def scores(job: Evidence, of: Scored) -> Path | None:
    """The folder of an importance; that of a patch is left out where nobody has derived it."""
    if of.of in PATCHED:
        folder = job.run_of(WITH_UTILITY, of.seed) / "importance" / PATCHED[of.of]
        return folder if folder.exists() else None
    run = job.out / "overlap" / f"{of.of.replace(', ', '-').replace(' ', '-')}-{of.seed}"
    if not (run / "recipe.yaml").exists():
        job.say(f"importance: {of.of}, seed {of.seed}")
        changes = _data(job, of.of) | {
            # A step has to be taken; importance is of the backbone, and knows nothing of it.
            "patches": "safety",
            "safety": SafetyPatch(max_steps=1),
            "batch_size": 1,
            "save_as": "delta",
            "importance": "backbone",
            "importance_samples": SAMPLES,
        }
        derive(settings(job, PLAIN, of.seed, run, **changes), resume=run.exists(), quiet=True)
    return run / "importance" / "backbone"


def top_set(values: NDArray[np.float32], share: float) -> NDArray[np.bool_]:
    """The contract's: so many entries of the largest scores above zero, of equal ones the lower positions."""
    k = min(quota(share, values.size, "even"), int(np.count_nonzero(values > 0)))
    if k == 0:
        return np.zeros(values.shape, np.bool_)
    last = np.partition(values, values.size - k)[values.size - k]
    chosen: NDArray[np.bool_] = values > last
    chosen[np.flatnonzero(values == last)[: k - int(chosen.sum())]] = True
    return chosen


def _sets(folders: Mapping[Scored, Path], share: float) -> Iterator[dict[Scored, NDArray[np.bool_]]]:
    """The top sets of every importance, one tensor at a time."""
    opened = {of: open_checkpoint(folder).tensors for of, folder in folders.items()}
    for name in sorted(set.intersection(*(set(tensors) for tensors in opened.values()))):
        yield {
            of: top_set(read_tensor(tensors[name]).float().numpy().ravel(), share) for of, tensors in opened.items()
        }


def overlaps(folders: Mapping[Scored, Path], share: float) -> list[dict[str, Any]]:
    """IoU of every pair's top sets, their tensors taken together."""
    pairs = list(combinations(folders, 2))
    both, either = dict.fromkeys(pairs, 0), dict.fromkeys(pairs, 0)
    for sets in _sets(folders, share):
        for a, b in pairs:
            both[a, b] += int(np.count_nonzero(sets[a] & sets[b]))
            either[a, b] += int(np.count_nonzero(sets[a] | sets[b]))
    return [
        {"share": share, "a": list(a), "b": list(b), "iou": both[a, b] / either[a, b]}
        for a, b in pairs
        if either[a, b]
    ]


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: per share the mean IoU of each pair of data sets; on the diagonal, of one data set's seeds."""
    names = [of for of in (*AT_BACKBONE, *PATCHED) if any(of in (pair["a"][0], pair["b"][0]) for pair in found)]
    parts = []
    for share in sorted({pair["share"] for pair in found}):
        rows = [["", *names], ["---"] * (len(names) + 1)]
        for one in names:
            rows.append([one, *(_mean(found, share, one, other) for other in names)])
        chance = share / (2 - share)
        text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(f"Top {share:.0%} of each matrix; sets drawn at random share {chance:.3f}.\n\n{text}")
    return "\n\n".join(parts) + "\n"


def _mean(found: Sequence[Mapping[str, Any]], share: float, one: str, other: str) -> str:
    """Of two data sets the same seeds are compared, of one all pairs of seeds."""
    values = [
        pair["iou"]
        for pair in found
        if pair["share"] == share
        and {pair["a"][0], pair["b"][0]} == {one, other}
        and (one == other or pair["a"][1] == pair["b"][1])
    ]
    return f"{sum(values) / len(values):.3f}" if values else ""


def run(job: Evidence, size: str, seeds: Sequence[int]) -> None:
    """OUT/results/overlap.{json,md}. The size has no say: all of it is cheap."""
    wanted = [Scored(of, seed) for of in (*AT_BACKBONE, *PATCHED) for seed in seeds]
    folders = {of: folder for of in wanted if (folder := scores(job, of)) is not None}
    job.say(f"overlap of {len(folders)} importances")
    found = [pair for share in SHARES for pair in overlaps(folders, share)]
    results = job.out / "results"
    results.mkdir(parents=True, exist_ok=True)
    replace(results / "overlap.json", json.dumps(found, indent=1) + "\n")
    replace(results / "overlap.md", table(found))
