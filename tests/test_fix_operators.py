"""The operators behind `apply_` and `revert_`: torch's own checks of them, and models that are compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from safepatch_core import apply_, revert_
from safepatch_core.fixes import operators
from safepatch_core.fixes.reference import NEW, OLD, Broken
from tests.fix_cases import BLOCK, changed, write_fix
from tests.test_fix_codec import pair, run_of
from tests.test_fix_memory import file_of

WAYS = {"codec": operators.by_codec, "index": operators.by_index}


def window(seed: int) -> tuple[Any, Any, tuple[Any, ...]]:
    """Entries of either side as torch has them, and what a fix says of them from its fourth change on."""
    rng = np.random.default_rng(seed)
    old, new = pair(rng, (1, 2, 4)[seed % 3], BLOCK + 700, 0.02)
    run = run_of(rng, old, new, (255, 65535)[seed // 3 % 2])

    def tensor(array: Any) -> Any:
        return torch.from_numpy(array if array.itemsize == 1 else array.view(f"i{array.itemsize}"))

    rows = torch.from_numpy((run.rows - run.rows[0]).astype(np.int64))
    planes = [None if plane is None else tensor(plane) for plane in run.planes]
    shift = int(run.rows[0, 1]) % 8
    return tensor(old), tensor(new), (tensor(run.gap), rows, tensor(run.side), planes, run.changes, shift)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(6))
def test_torch_finds_nothing_wrong_with_them(seed: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "way", lambda entries: WAYS[way])
    old, new, given = window(seed)
    for args in ((old, *given), (new, *given)):
        assert set(torch.library.opcheck(torch.ops.safepatch.tell, args).values()) == {"SUCCESS"}
        for goal in (OLD, NEW):
            checked = torch.library.opcheck(torch.ops.safepatch.settle_, (*args, goal))
            assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(6))
def test_they_tell_and_settle(seed: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "way", lambda entries: WAYS[way])
    old, new, given = window(seed)
    live, changes, version = old.clone(), given[4], old._version
    for goal, expected, was_old in ((NEW, new, changes), (NEW, new, 0), (OLD, old, 0), (OLD, old, changes)):
        before = live.clone()
        told = torch.ops.safepatch.tell(live, *given)
        assert torch.equal(live, before)
        settled = torch.ops.safepatch.settle_(live, *given, goal)
        assert torch.equal(live, expected) and settled[2][0] == was_old
        assert all(torch.equal(a, b) for a, b in zip(told, settled, strict=True))
        assert torch.equal(told[0], old[old != new]) and torch.equal(told[1], new[old != new])
    assert live._version > version


def test_a_broken_window_is_refused() -> None:
    old, _, (gap, *given) = window(1)
    gap[-1] = 255
    before = old.clone()
    with pytest.raises(Broken):
        torch.ops.safepatch.settle_(old, gap, *given, NEW)
    assert torch.equal(old, before)


def test_a_graph_may_hold_them() -> None:
    """Traced whole, with the change in place seen by what follows."""
    old, new, given = window(1)

    def settle(entries: Any) -> Any:
        torch.ops.safepatch.settle_(entries, *given, NEW)
        return entries + 0

    live = old.clone()
    compiled = torch.compile(settle, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(live), new) and torch.equal(live, new)


class Net(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(16, 48, dtype=torch.bfloat16)
        self.down = torch.nn.Linear(48, 16, dtype=torch.bfloat16)

    def forward(self, x: Any) -> Any:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_between_its_calls(tmp_path: Path, backend: str) -> None:
    """It answers as the plain model with the same weights does, and is not compiled again."""
    torch.manual_seed(0)
    plain, graphs = Net(), []
    base = file_of(plain)
    merged = {n: changed(np.random.default_rng(0), t, 0.1, "small") for n, t in base.items()}
    fix = write_fix(tmp_path / "fix.safetensors", base, merged)

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    model, x = torch.compile(plain, backend=counting), torch.randn(5, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        first = model(x)
        assert torch.equal(first, plain(x))
        apply_(model, fix)
        assert file_of(plain) == merged
        assert torch.equal(model(x), plain(x)) and not torch.equal(model(x), first)
        revert_(model, fix)
        assert torch.equal(model(x), first) and file_of(plain) == base
    assert len(graphs) == 1
