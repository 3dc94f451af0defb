"""The order of an evaluation: read the data, hold the output, measure each model, publish."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from safepatch_core.errors import IOFailure
from safepatch_core.evaluate.config import EvalConfig
from safepatch_core.evaluate.data import load
from safepatch_core.evaluate.measure import measure
from safepatch_core.evaluate.report import build, files
from safepatch_core.evaluate.subject import locate
from safepatch_core.writer import Staging

# The report's own size hardly matters; a disk with less room than this is full.
ROOM = 1 << 20


def run(config: EvalConfig, *, quiet: bool, force: bool) -> dict[str, Any]:
    """Everything; returns the content of report.json."""
    data = load(config)
    refs = (
        {"model": config.model} if config.baseline is None else {"baseline": config.baseline, "model": config.model}
    )
    folders = {label: locate(ref) for label, ref in refs.items()}
    with (
        Staging(Path(config.out), [*folders.values(), *data.paths], {}, needed=ROOM, force=force) as staging,
        _discarded_on_failure(staging),
    ):
        with _environment(config):
            measured = {label: measure(folder, label, data, config, quiet=quiet) for label, folder in folders.items()}
        report = build(config, refs, data, measured)
        for name, content in files(report, data, measured).items():
            staging.add(name, content)
        staging.publish()
    return report


@contextlib.contextmanager
def _discarded_on_failure(staging: Staging) -> Iterator[None]:
    """An evaluation has nothing to resume from."""
    try:
        yield
    except BaseException:
        staging.discard()
        raise


@contextlib.contextmanager
def _environment(config: EvalConfig) -> Iterator[None]:
    """The run's threads, given back at the end; what a full memory makes the libraries raise becomes one line."""
    threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise IOFailure("out of memory: lower batch_size or max_length") from error
        raise
    finally:
        torch.set_num_threads(threads)
