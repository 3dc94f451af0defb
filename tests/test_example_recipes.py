"""The recipes in examples/recipes, through the command line, against their formulas."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from safepatch_core.commands.cli import cli
from tests import oracle
from tests.oracle import F32Array, Tensor, load_checkpoint, save_file

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
NAMES = ("model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight")
Weights = Mapping[str, F32Array]


def write(folder: Path, seed: int, near: Weights | None = None) -> Weights:
    """A model of two matrices in bfloat16, which floats of sixteenths fill exactly."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    values = {name: rng.integers(-16, 17, (8, 16)).astype(np.float32) / np.float32(16) for name in NAMES}
    if near:
        values = {name: near[name] + step for name, step in values.items()}
    tensors = {n: Tensor("BF16", x.shape, oracle.from_f32(x.ravel(), "BF16")) for n, x in values.items()}
    save_file(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text("{}")
    return values


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Weights]:
    aligned = write(tmp_path / "models" / "aligned", 0)
    made: dict[str, Weights] = {"aligned": aligned}
    for seed, name in enumerate(("sft", "tuned", "unaligned", "domain", "safe"), 1):
        made[name] = write(tmp_path / "models" / name, seed, aligned)
    made["fisher"] = {n: np.abs(x) for n, x in write(tmp_path / "models" / "draft", 9).items()}
    (tmp_path / "models" / "fisher").mkdir()
    scores = {n: Tensor("F32", x.shape, x.astype("<f4").tobytes()) for n, x in made["fisher"].items()}
    save_file(tmp_path / "models" / "fisher" / "model.safetensors", scores)
    return made


def run(name: str, tmp_path: Path, *command: str) -> str:
    shutil.copy(RECIPES / f"{name}.yaml", tmp_path)
    result = CliRunner().invoke(cli, [command[0], str(tmp_path / f"{name}.yaml"), *command[1:]])
    assert result.exit_code == 0, result.output
    return result.output


def merged(name: str, tmp_path: Path) -> Weights:
    run(name, tmp_path, "merge", "-o", str(tmp_path / "out"))
    return {n: oracle.to_f32(t).reshape(t.shape) for n, t in load_checkpoint(tmp_path / "out").items()}


def bf16(x: Any) -> F32Array:
    return oracle.to_f32(Tensor("BF16", x.shape, oracle.from_f32(x.astype(np.float32).ravel(), "BF16"))).reshape(
        x.shape
    )


def test_every_recipe_is_tried_here() -> None:
    assert {path.stem for path in RECIPES.glob("*")} == {"expo", "resta", "mergealign", "irr", "safemerge"}


def test_expo(tmp_path: Path, models: dict[str, Weights]) -> None:
    for name, found in merged("expo", tmp_path).items():
        step = np.float32(0.3) * (models["aligned"][name] - models["sft"][name])
        assert np.array_equal(found, bf16(models["aligned"][name] + step))


def test_mergealign(tmp_path: Path, models: dict[str, Weights]) -> None:
    for name, found in merged("mergealign", tmp_path).items():
        assert np.array_equal(found, bf16((models["domain"][name] + models["aligned"][name]) / 2))


def test_resta(tmp_path: Path, models: dict[str, Weights]) -> None:
    kept = 0
    for name, found in merged("resta", tmp_path).items():
        aligned, tuned, unaligned = (models[of][name] for of in ("aligned", "tuned", "unaligned"))
        without = aligned + np.float32(0.5) * (aligned - unaligned)
        dare = aligned + np.float32(1 / 0.7) * (tuned - aligned) + np.float32(0.5) * (aligned - unaligned)
        dropped = found == bf16(without)
        assert np.all(dropped | (found == bf16(dare)))
        kept += int(np.count_nonzero(~dropped))
    assert 0.6 < kept / 256 < 0.8


def test_irr(tmp_path: Path, models: dict[str, Weights]) -> None:
    for name, found in merged("irr", tmp_path).items():
        tuning, safety = (models["tuned"][name] - models["aligned"][name]).ravel(), models["aligned"][name]
        against = tuning * (safety - models["unaligned"][name]).ravel() < 0
        scores = np.where(against, models["fisher"][name].ravel(), 0)
        worst = np.argsort(-scores, kind="stable")[: round(0.1 * scores.size)]
        assert np.all(scores[worst] > 0)
        tuning[worst] = 0
        assert np.array_equal(found, bf16(safety + tuning.reshape(safety.shape)))


def test_safemerge_and_the_cosines_that_plan_prints(tmp_path: Path, models: dict[str, Weights]) -> None:
    found = merged("safemerge", tmp_path)
    for name in NAMES:
        aligned = models["aligned"][name]
        tuned, safe = (models[of][name] - aligned for of in ("tuned", "safe"))
        cosine = float((tuned * safe).sum()) / float(np.sqrt((tuned * tuned).sum() * (safe * safe).sum()))
        mixed = aligned + np.float32(0.8) * tuned + np.float32(0.2) * safe
        assert np.array_equal(found[name], bf16(aligned + tuned if cosine >= 0.1 else mixed))
        shown = run("safemerge", tmp_path, "plan", "--cosines")
        row = next(line for line in shown.splitlines() if line.endswith(name))
        assert f"{cosine:.4f}" in row
