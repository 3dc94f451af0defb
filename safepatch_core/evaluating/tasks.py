"""Utility as others measure it: tasks of EleutherAI's lm-eval, on the model that is loaded already."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import random
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from safepatch_core.errors import InputError, UsageError
from safepatch_core.evaluating.config import EvalConfig
from safepatch_core.files.disk import hash_file
from safepatch_core.language.model import first_line

if TYPE_CHECKING:
    from safepatch_core.evaluating.subject import Subject

# Of metrics that have no standard error in closed form; lm-eval's own 100,000 take minutes.
BOOTSTRAP = 1000
LARGEST = 1e300


class Score(BaseModel):
    """One metric of one task. `values` are its documents' own, where the metric is their mean."""

    model_config = ConfigDict(frozen=True)

    task: str
    metric: str  # with lm-eval's filter, if it has one: exact_match,strict
    value: float
    error: float | None  # the standard error
    n: int
    higher_is_better: bool | None
    values: list[float] | None


class Tasks:
    """The tasks that a configuration names, found and their data loaded.

    Raises UsageError if lm-eval is missing or knows no such task, InputError if a task's data can't be loaded.
    """

    def __init__(self, config: EvalConfig) -> None:
        self._names = config.tasks
        with _quiet(True), _random_state_kept():
            try:
                from lm_eval.tasks import TaskManager
            except ImportError as error:
                raise UsageError("lm_eval needs lm-eval", expected="pip install 'safepatch[lm-eval]'") from error
            include = config.lm_eval_include
            if include is not None and not Path(include).is_dir():
                raise InputError("no such directory", file=include)
            # Reading lm-eval's own ten thousand task files takes seconds.
            self._manager = TaskManager(include_path=include, include_defaults=include is None)
            if not set(self._names) <= set(self._manager.all_tasks):
                self._manager = TaskManager(include_path=include)
            unknown = sorted(set(self._names) - set(self._manager.all_tasks))
            if unknown:
                raise UsageError("lm_eval: no such task", found=", ".join(unknown))
            with _failures("can't be loaded", self._names):
                self._manager.load(self._names)
        self.about = {
            "tasks": self._names,
            "lm_eval": version("lm_eval"),
            **({} if include is None else {"include_sha256": _tree(Path(include))}),
        }

    def score(self, subject: Subject, config: EvalConfig, *, quiet: bool) -> list[Score]:
        """Every metric of every task. Raises InputError if lm-eval fails."""
        # `simple_evaluate` would also describe the machine: seconds of subprocesses, and git's complaint outside of
        # a checkout.
        import torch
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        with _quiet(quiet), _random_state_kept(), _failures("failed", self._names):
            adapter = HFLM(
                pretrained=subject.model,
                tokenizer=subject.tokenizer,
                batch_size=config.batch_size,
                max_length=subject.positions,
            )
            random.seed(config.seed)
            np.random.seed(config.seed % 2**32)
            torch.manual_seed(config.seed)
            loaded = self._manager.load(self._names)
            for task in loaded["tasks"].values():
                own = task.get_config("num_fewshot")
                wanted = own if config.lm_eval_fewshot is None else config.lm_eval_fewshot
                # A task that says 0 can't have examples.
                task.set_config(key="num_fewshot", value=0 if own == 0 else wanted or 0)
                task.set_fewshot_seed(seed=config.seed)
            found = evaluate(adapter, loaded, limit=config.lm_eval_limit, bootstrap_iters=BOOTSTRAP)
        return scores(found, self._names)


def scores(found: Mapping[str, Any], names: list[str]) -> list[Score]:
    """What lm-eval's `evaluate` returned for the tasks and groups `names`; for a tag, for each of its tasks."""
    results = found["results"]
    listed = [name for name in names if name in results]
    result = []
    for task in listed if len(listed) == len(names) else results:
        for key, value in results[task].items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = results[task].get(f"{metric}_stderr,{chosen}")
            documents = [d for d in found["samples"].get(task, []) if d["filter"] == chosen and metric in d]
            values = [d[metric] for d in sorted(documents, key=lambda d: d["doc_id"])]
            mean = all(isinstance(v, int | float) and math.isfinite(v) for v in values) and bool(values)
            if mean and abs(float(np.mean(values)) - value) > 1e-6 * max(1.0, abs(value)):
                mean = False  # the metric is some other function of the documents
            result.append(
                Score(
                    task=task,
                    metric=metric if chosen == "none" else key,
                    value=_finite(task, metric, value),
                    error=float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
                    n=_documents(found, task),
                    higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
                    values=list(map(float, values)) if mean else None,
                )
            )
    return result


def _finite(task: str, metric: str, value: float) -> float:
    """What fits a report; a perplexity out of range is merely very bad."""
    if math.isnan(value):
        raise InputError("lm-eval gave no number", found=f"{task}, {metric}")
    return max(-LARGEST, min(LARGEST, float(value)))


def _documents(found: Mapping[str, Any], task: str) -> int:
    counts = found["n-samples"]
    if task in counts:
        return int(counts[task]["effective"])
    return sum(_documents(found, part) for part in found["group_subtasks"].get(task, []))


def _tree(root: Path) -> str:
    """One digest of all files of a directory."""
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(root)}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _failures(what: str, names: list[str]) -> Iterator[None]:
    try:
        yield
    except (MemoryError, InputError, UsageError):
        raise
    except Exception as error:  # datasets, downloads and the tasks' own code raise anything
        if "out of memory" in str(error).lower() or "DefaultCPUAllocator" in str(error):
            raise
        raise InputError(f"lm-eval {what} ({first_line(error)})", found=", ".join(names)) from error


@contextlib.contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Only errors are logged; with `quiet` no progress bar either."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """lm-eval and datasets seed and use every generator of the process; its caller's go on as if they had not."""
    import torch

    own, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(own)
        np.random.set_state(numpys)
