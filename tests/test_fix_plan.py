"""What a fix will take, told before: the figures are those of the run that follows, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from safepatch_core.commands.cli import cli
from safepatch_core.errors import InputError, UsageError
from safepatch_core.fixes.apply import apply, revert
from safepatch_core.fixes.build import build
from safepatch_core.fixes.expected import expected_fix
from safepatch_core.fixes.plan import memory_needed, plan_fix
from safepatch_core.fixes.reading import open_fix
from safepatch_core.merging.api import plan
from tests.fix_cases import BLOCK, changed, random_tensor, write_checkpoint, write_fix
from tests.oracle import Tensor, from_f32, save_file

LARGE = 40 * BLOCK  # entries of two windows in bfloat16


@pytest.fixture
def case(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint and a fix of it that leaves the second window of one tensor, and all of another, alone."""
    rng = np.random.default_rng(8)
    base = {n: random_tensor(rng, "BF16", LARGE) for n in ("a.weight", "b.weight")} | {
        "c": random_tensor(rng, "F32", 9)
    }
    merged = base | {"a.weight": changed(rng, base["a.weight"], [5, 900, 70000]), "c": changed(rng, base["c"], [8])}
    return write_checkpoint(tmp_path / "base", base), write_fix(tmp_path / "fix.safetensors", base, merged)


def counting(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that are read at offsets, and written there."""
    found = {"read": 0, "written": 0}

    def counted(call: Any, key: str) -> Any:
        def count(fd: int, data: Any, at: int) -> int:
            done: int = call(fd, data, at)
            found[key] += done
            return done

        return count

    monkeypatch.setattr(os, "preadv", counted(os.preadv, "read"))
    monkeypatch.setattr(os, "pwrite", counted(os.pwrite, "written"))
    return found


def test_in_place(case: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt, path = case
    with open_fix(path) as fix:
        told = plan_fix(fix, ckpt, in_place=True)
    assert (told.changes, told.tensors, told.files, told.goes_on) == (4, 2, 2, False)
    assert told.entries == LARGE + 9 and told.space < 2 << 20 < told.free
    found = counting(monkeypatch)
    apply(path, ckpt, in_place=True)
    assert found["written"] == told.bytes_written == 2 * 2 * BLOCK + 36
    assert found["read"] == pytest.approx(told.bytes_read, rel=0.01)
    with open_fix(path) as fix:
        assert plan_fix(fix, ckpt, "revert", in_place=True).bytes_written == told.bytes_written


def test_a_copy(case: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ckpt, path = case
    with open_fix(path) as fix:
        told = plan_fix(fix, ckpt, out=tmp_path / "none" / "out")
    assert not (tmp_path / "none").exists()
    found = counting(monkeypatch)
    out = apply(path, ckpt, tmp_path / "none" / "out").out
    assert found["read"] == pytest.approx(told.bytes_read, rel=0.01)
    weights = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert told.bytes_written == weights and told.files == 2
    assert weights < told.space < weights + (2 << 20)


def test_sums_are_made_anew(case: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files that change are read whole once more where a checkpoint lists their hashes."""
    copy = apply(case[1], case[0], tmp_path / "copy").out
    with open_fix(case[1]) as fix:
        told = plan_fix(fix, copy, "revert", in_place=True)
    found = counting(monkeypatch)
    revert(case[1], copy, in_place=True)
    hashed = sum(path.stat().st_size for path in copy.glob("*.safetensors"))
    assert found["written"] == told.bytes_written
    assert found["read"] + hashed == pytest.approx(told.bytes_read, rel=0.01)


def test_what_can_not_be_done_is_said(case: tuple[Path, Path], tmp_path: Path) -> None:
    ckpt, path = case
    single = shutil.copy(ckpt / "model-00001-of-00002.safetensors", tmp_path / "single.safetensors")
    os.link(ckpt / "model-00001-of-00002.safetensors", tmp_path / "link")
    with open_fix(path) as fix:
        for where, says in ((single, "it is not there"), (ckpt, "hard-linked")):
            with pytest.raises(InputError, match=says):
                plan_fix(fix, where, in_place=True)
        with pytest.raises(UsageError, match="--in-place"):
            plan_fix(fix, ckpt, out="x", in_place=True)
        needed = memory_needed(fix)
    with pytest.raises(UsageError, match=f"too small: found {needed - 1} bytes, expected at least {needed}"):
        apply(path, ckpt, tmp_path / "out", memory_limit=needed - 1)
    apply(path, ckpt, tmp_path / "out", memory_limit=needed)


def run(*words: object, status: int = 0) -> str:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    if status:
        assert getattr(result.exception, "status", None) == status
        return str(result.exception)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def test_the_command(case: tuple[Path, Path], tmp_path: Path) -> None:
    ckpt, path = case
    before = sorted(tmp_path.rglob("*"))
    told = json.loads(run("plan", path, "--to", ckpt, "--in-place", "--json"))
    assert told["direction"] == "apply" and told["in_place"] and told["changes"] == 4
    text = run("plan", path, "--from", ckpt)
    assert "revert as a copy" in text and "4 of 2,621,449 entries of 2 tensors" in text
    assert "needed," in text and sorted(tmp_path.rglob("*")) == before
    assert "--to, or --from" in run("plan", path, status=64)
    assert "either --to or --from" in run("plan", path, "--to", ckpt, "--from", ckpt, status=64)
    assert "too small" in run("plan", path, "--to", ckpt, "--memory-limit", "1MiB", status=64)
    apply(path, ckpt, in_place=True)
    (fix,) = (ckpt / ".safepatch-fixes").iterdir()
    assert "revert in place" in run("plan", fix.stem, "--from", ckpt, "--in-place")


@pytest.mark.parametrize("top", [0.2, 0.02, 0.001])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_the_size_of_a_fix_to_be_built(tmp_path: Path, top: float, scope: str) -> None:
    rng = np.random.default_rng(9)
    shapes = {"a.weight": (600, 700), "b.weight": (300, 700)}
    base, patch = {}, {}
    for name, shape in shapes.items():
        weights = rng.standard_normal(shape).astype(np.float32).ravel() * np.float32(0.02)
        step = weights * rng.standard_normal(weights.size).astype(np.float32) * np.float32(0.03)
        base[name], patch[name] = (Tensor("BF16", shape, from_f32(w, "BF16")) for w in (weights, weights + step))
    save_file(tmp_path / "base.safetensors", base)
    save_file(tmp_path / "patch.safetensors", patch)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"{{base: base.safetensors, patches: [{{name: p, source: patch.safetensors, top: {top}, retain: 0.5}}], "
        f"scope: {scope}}}"
    )
    expected = expected_fix(plan(recipe, threads=1))
    made = build(recipe, tmp_path / "fix.safetensors", threads=1)
    assert 0.9 * expected.changes < made.changes <= expected.changes
    assert made.size == pytest.approx(expected.size, rel=0.2)
    told = json.loads(run("plan", recipe, "--json"))["fix"]
    assert told == {"changes": expected.changes, "size": expected.size}
    assert f"at most {expected.changes:,d} entries" in run("plan", recipe)
