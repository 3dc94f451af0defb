"""Random adapters of every kind, in random merges: every engine and cut gives what the oracle gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from safepatch_core.merging.sources import decoding
from tests.adapters import AdapterGenerator
from tests.test_merge_against_oracle import check_everywhere

ADAPTERS = int(os.environ.get("SAFEPATCH_RANDOM_RECIPES", "40"))


@pytest.mark.parametrize("seed", range(ADAPTERS))
def test_random_adapters(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PIECE", (1, 7, 64, 1 << 16)[seed % 4])
    recipe = AdapterGenerator(tmp_path / "in", seed, hostile=seed % 5 == 4).write()
    check_everywhere(recipe, seed, tmp_path)
