"""A training run that is killed at any moment resumes to the loss trace, and all other bytes, of one left alone."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.tiny_lm import write_lm, write_rows

KILLS = int(os.environ.get("SAFEPATCH_DERIVE_KILLS", "4"))


def child(where: Path, resume: bool, save_steps: int | None) -> int:
    """Fork a derive run: torch is imported once, so that a run is its training and nothing else."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        import torch

        from safepatch_core.deriving import DeriveConfig, derive

        torch.set_num_threads(1)
        steps = {"safety": {"max_steps": 12}, "over_safety": {"max_steps": 12}, "ascent_bound": 50.0, "batch_size": 2}
        places = {"model": where / "base", "data": where / "rows.jsonl", "out": where / "run"}
        given = {**places, **steps, "threads": 1, "save_steps": save_steps}
        derive(DeriveConfig.model_validate(given), resume=resume, quiet=True)
        status = 0
    finally:
        os._exit(status)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("save_steps", [None, 1], ids=["whole trainings", "checkpoints"])
def test_killed_at_random_moments_it_resumes_to_the_same_bytes(tmp_path: Path, save_steps: int | None) -> None:
    write_lm(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", 12)
    run = tmp_path / "run"
    began = time.monotonic()
    assert os.waitpid(child(tmp_path, False, save_steps), 0)[1] == 0
    seconds = time.monotonic() - began
    expected = content(run)
    assert {"trace-safety.jsonl", "derive.json"} < expected.keys()
    shutil.rmtree(run)

    chance, landed = random.Random(0), 0
    for _ in range(KILLS):
        pid = child(tmp_path, run.exists(), save_steps)
        time.sleep(chance.uniform(0.1, 0.9) * seconds)
        os.kill(pid, signal.SIGKILL)
        landed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert landed, "every run had ended before its kill"
    assert os.waitpid(child(tmp_path, run.exists(), save_steps), 0)[1] == 0
    found = content(run)
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []
