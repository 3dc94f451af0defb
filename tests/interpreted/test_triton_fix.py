"""The kernel for fixes beside the codec in numpy, on good runs and on broken ones; and `apply_` with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from safepatch_core import apply_, revert_
from safepatch_core.fixes import memory, operators, reference
from safepatch_core.fixes.reference import Broken, Run
from tests.fix_cases import BLOCK
from tests.test_fix_codec import GOALS, outcome, pair, run_of, spoiled
from tests.test_fix_memory import BASE, MERGED, as_torch, data, fix

__all__ = ["fix"]  # a fixture
SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def on_device(run: Run, entries: Any, goal: int, old: Any, new: Any) -> Any:
    """`settle` of a tensor in the device's memory; `entries` is changed like it."""
    kind = entries if entries.itemsize == 1 else entries.view(f"i{entries.itemsize}")
    tensor = torch.from_numpy(kind.copy())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "way", lambda entries: operators.by_kernel)
        tally = memory.live_of("w", tensor).settle(0, goal, run, old, new)
    kind[:] = tensor.numpy()
    return tally


@pytest.mark.parametrize("seed", range(10))
def test_the_kernel_is_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.choice([1, 100, BLOCK - 1, BLOCK, 2 * BLOCK + 77]))
    old, new = pair(rng, (1, 2, 4)[seed % 3], n, float(rng.choice([0.0001, 0.01, 0.3, 1.0])))
    run = run_of(rng, old, new, (255, 65535)[seed // 3 % 2])
    mixed = np.where(rng.random(n) < rng.random(), old, new)
    for goal in GOALS:
        assert outcome(on_device, run, mixed, goal) == outcome(reference.settle, run, mixed, goal)


@pytest.mark.parametrize("seed", range(25))
def test_broken_runs_are_refused_within_the_entries(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.choice([50, BLOCK - 1, BLOCK + 77]))
    old, new = pair(rng, int(rng.choice([1, 2, 4])), n, float(rng.choice([0.0005, 0.02, 0.3])))
    new[0] = old[0] ^ 1
    run = spoiled(rng, run_of(rng, old, new, int(rng.choice([255, 65535]))))
    room = [np.zeros(run.changes, old.dtype) for _ in range(4)]
    try:
        expected: Any = reference.settle(run, old.copy(), 0, *room[:2])
    except Broken:
        with pytest.raises(Broken):
            on_device(run, old.copy(), 0, *room[2:])
        return
    assert on_device(run, old.copy(), 0, *room[2:]) == expected


def test_live_tensors(fix: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "way", lambda entries: operators.by_kernel)
    tensors = as_torch(BASE)
    apply_(tensors, fix)
    assert data(tensors) == {name: t.data for name, t in MERGED.items()}
    revert_(tensors, fix)
    assert data(tensors) == {name: t.data for name, t in BASE.items()}
