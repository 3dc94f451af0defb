"""`merge` as a whole: the Triton engine writes the bytes that the C++ engine writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from safepatch_core import merge
from safepatch_core.backends import open_backend
from safepatch_core.errors import SafepatchError
from tests.recipes import write_random


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("seed", range(12))
def test_random_recipes_give_the_same_files(tmp_path: Path, seed: int) -> None:
    recipe = write_random(tmp_path / "in", seed, hostile=seed % 4 == 3)
    found: list[dict[str, bytes] | str] = []
    for engine in ("cpu", "triton"):
        try:
            merge(recipe, tmp_path / engine, backend=engine, threads=1, memory_limit="64MiB", vram_limit="64MiB")
            found.append(contents(tmp_path / engine))
        except SafepatchError as error:
            found.append(str(error))
    assert found[0] == found[1]


def test_the_engine_is_opened_by_name() -> None:
    engine = open_backend("triton", vram_limit=1 << 20)
    assert engine.name == "triton" and "interpreter" in engine.describe()
