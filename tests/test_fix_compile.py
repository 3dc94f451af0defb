"""What the kernel for fixes compiles to, read without a GPU."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch

from safepatch_core.bench.triton_compile import TARGETS, Code, compile_launch
from safepatch_core.kernels.fix import KEEP, NEW, OLD, fix
from safepatch_core.kernels.launch import INTERPRETED

if INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def compiled(target: str, width: int, gap: int, goal: int, shift: int = 3) -> Code:
    n, changes = 70000, 500
    entries = torch.empty(n, dtype=TYPES[width])
    told, side = torch.empty((2, 2), dtype=torch.int32), torch.empty(100, dtype=torch.uint8)
    planes = tuple(torch.empty(changes, dtype=torch.uint8) if k != 1 else None for k in range(width))
    rows, codes = torch.empty((3, 2), dtype=torch.int64), torch.empty(600, dtype=TYPES[gap])
    olds = torch.empty(changes, dtype=TYPES[width])
    return compile_launch(fix(entries, codes, rows, side, planes, olds, told, shift, goal), target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("width", "gap", "goal"), [(1, 1, OLD), (2, 1, KEEP), (2, 1, NEW), (2, 2, NEW), (4, 1, NEW)])
def test_nothing_is_spilled_and_nobody_queues(target: str, width: int, gap: int, goal: int) -> None:
    found = compiled(target, width, gap, goal)
    assert found.spilled == 0 and not re.search(r"atom|red\.global|_atomic_", found.text)
    assert found.registers <= 96


@pytest.mark.parametrize("target", TARGETS)
def test_argument_types_are_those_annotated_whatever_the_values(target: str) -> None:
    found = {compiled(target, 2, 1, NEW, shift).types for shift in (0, 1, 7)}
    assert len(found) == 1 and {"i64"} == {kind for kind in found.pop() if not kind.startswith(("*", "("))}
