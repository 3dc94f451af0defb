"""What the kernel for fixes compiles to, without a GPU, beside what test_triton_compile.py says of every kernel."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from safepatch_core.bench.triton_compile import TARGETS, compile_launch, launches, make_fix
from safepatch_core.kernels.fix import NEW
from safepatch_core.kernels.launch import INTERPRETED

if INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

FIXES = {name: launch for name, launch in launches().items() if name.startswith("fix")}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FIXES)
def test_nobody_queues(target: str, name: str) -> None:
    found = compile_launch(FIXES[name], target)
    assert not re.search(r"atom|red\.global|_atomic_", found.text)
    assert found.registers <= 96


@pytest.mark.parametrize("target", TARGETS)
def test_argument_types_are_those_annotated_whatever_the_values(target: str) -> None:
    found = {compile_launch(make_fix(2, 1, NEW, shift), target).types for shift in (0, 1, 7)}
    assert len(found) == 1 and {"i64"} == {kind for kind in found.pop() if not kind.startswith(("*", "("))}
