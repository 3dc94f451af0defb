"""What a later quantisation leaves of a merge, against plain code that follows compressed-tensors' rules."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from safepatch_core import InputError, SurviveResult, UsageError, merge, survive
from safepatch_core.commands.cli import cli
from safepatch_core.merging.quantised.formats import FORMATS
from safepatch_core.merging.quantised.grids import E2M1, E4M3, F32, INT4, INT8
from tests.oracle import Tensor, from_f32, load_file, save_file, to_f32

GRIDS = {"fp8": E4M3, "int8": INT8, "int4": INT4, "mxfp4": E2M1, "nvfp4": E2M1}
EPSILON = {"F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
SHAPES = {"a.weight": (130, 160), "b.weight": (3, 256), "c.experts": (2, 9, 64), "d.weight": (4, 24)}


def rounded(x: Any, dtype: str) -> F32:
    x = np.ascontiguousarray(x, np.float32)
    with np.errstate(over="ignore"):
        return to_f32(Tensor(dtype, x.shape, from_f32(x.ravel(), dtype))).reshape(x.shape)


def scale_of(name: str, block: F32, matrix: F32, dtype: str) -> np.float32:
    """The scale of one block by the rules that `formats` states."""
    top = np.float32(np.abs(block).max())
    if name == "mxfp4":
        if top == 0:
            return np.float32(2.0**-127)
        exponent = int(np.floor(np.log2(np.float64(top))))
        exponent += float(top) >= 1.75 * 2.0**exponent
        return np.float32(2.0 ** max(exponent - 2, -127))
    if name == "nvfp4":
        highest = np.abs(matrix).max()
        whole = rounded(np.float32(2688) * rounded(np.float32(1) / highest, dtype), dtype)
        local = np.clip(whole * rounded(top / np.float32(6), dtype), 0, 448)
        local = E4M3.decode(E4M3.encode(np.array([local], np.float32)))[0]
        return np.float32((local or np.float32(0.125)) / whole)
    half_span = {"fp8": 448, "int8": 127.5, "int4": 7.5}[name.split("-")[0]]
    scale = rounded(top / np.float32(half_span), dtype)
    return np.float32(scale if scale else EPSILON[dtype])


def nearest(grid: Any, y: F32) -> F32:
    """By comparing with every number of the grid."""
    codes = [c for c in range(len(grid.numbers)) if np.isfinite(grid.numbers[c])]
    codes.sort(key=lambda c: (c % 2, np.signbit(grid.numbers[c])))  # of two as near, argmin takes the first
    numbers = grid.numbers[codes].astype(np.float64)
    y = np.clip(y, grid.lowest, grid.highest).astype(np.float64)
    found: F32 = numbers[np.argmin(np.abs(y[..., None] - numbers), axis=-1)].astype(np.float32)
    return found


def quantised(name: str, x: F32, dtype: str) -> tuple[F32, F32] | None:
    """Of a tensor, the numbers that its codes stand for, and their values; None where groups don't come out even."""
    rows = 128 if name == "fp8-block" else 1
    cols = {"fp8-block": 128, "int4-g128": 128, "int4-g32": 32, "mxfp4": 32, "nvfp4": 16}.get(name) or x.shape[-1]
    if rows == 1 and x.shape[-1] % cols:
        return None
    numbers, values = np.empty_like(x), np.empty_like(x)
    for at in np.ndindex(x.shape[:-2]):
        for r in range(0, x.shape[-2], rows):
            for c in range(0, x.shape[-1], cols):
                place = (*at, slice(r, r + rows), slice(c, c + cols))
                scale = scale_of(name, x[place], x[at], dtype)
                numbers[place] = nearest(GRIDS[name.split("-")[0]], x[place] / scale)
                values[place] = numbers[place] * scale
    return numbers, values


def both(name: str, old: F32, new: F32, dtype: str) -> tuple[tuple[F32, F32], tuple[F32, F32]] | None:
    before, after = quantised(name, old, dtype), quantised(name, new, dtype)
    return None if before is None or after is None else (before, after)


def expected(before: Any, after: Any, old: F32, new: F32, mine: Any = True) -> dict[str, Any]:
    """The report of one tensor, over the entries that differ and are `mine`."""
    changed = (old != new) & mine
    delta = (new.astype(np.float64) - old)[changed]
    left = (after[1].astype(np.float64) - before[1])[changed]
    moved = before[0] != after[0]
    return {
        "entries": int(changed.sum()),
        "changed": int((moved & changed).sum()),
        "elsewhere": int((moved & (old == new)).sum()),
        "survival": (delta @ left) / (delta @ delta),
        "cosine": (delta @ left) / np.sqrt((delta @ delta) * (left @ left)) if left.any() else 0.0,
    }


def write(path: Path, tensors: dict[str, F32], dtype: str = "BF16") -> dict[str, F32]:
    """A checkpoint; the values as they are stored."""
    path.mkdir(parents=True)
    stored = {n: Tensor(dtype, x.shape, from_f32(np.ascontiguousarray(x).ravel(), dtype)) for n, x in tensors.items()}
    save_file(path / "model.safetensors", stored)
    (path / "config.json").write_text("{}")
    return {n: to_f32(t).reshape(t.shape) for n, t in stored.items()}


def weights(seed: int, size: float = 0.02) -> dict[str, F32]:
    """Matrices whose rows differ in size, with zeros, a row of zeros and one far entry."""
    random = np.random.default_rng(seed)
    found = {}
    for name, shape in SHAPES.items():
        x = random.standard_normal(shape) * size * np.exp2(random.uniform(-4, 2, (*shape[:-1], 1)))
        x[random.random(shape) < 0.02] = 0
        x[..., 1, :] = 0
        x[..., 0, 0] = 30 * size
        found[name] = x.astype(np.float32)
    return found


def patched(base: dict[str, F32], seed: int, share: float = 0.1, size: float = 2e-3) -> dict[str, F32]:
    random = np.random.default_rng(seed)
    return {
        n: np.where(random.random(x.shape) < share, x + size * random.standard_normal(x.shape), x).astype(np.float32)
        for n, x in base.items()
    }


def check(result: SurviveResult, name: str, old: dict[str, F32], new: dict[str, F32], dtype: str) -> None:
    of, elsewhere = result.formats[name], 0
    for tensor in old:
        sides = both(name, old[tensor], new[tensor], dtype)
        if sides is None:
            assert tensor in of.unfit and tensor not in of.whole.tensors
            continue
        wanted = expected(*sides, old[tensor], new[tensor])
        elsewhere += wanted.pop("elsewhere")
        assert of.whole.tensors[tensor].facts() == pytest.approx(wanted, rel=1e-9), tensor
    assert of.elsewhere == elsewhere
    assert of.whole.total.entries == sum(found.entries for found in of.whole.tensors.values())


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_leaves_what_the_rules_say(tmp_path: Path, name: str, dtype: str) -> None:
    old = write(tmp_path / "base", weights(1), dtype)
    new = write(tmp_path / "out", patched(old, 2), dtype)
    check(survive(tmp_path / "out", tmp_path / "base", [name]), name, old, new, dtype)


def test_any_cut_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stripe of the fewest rows, pieces of a few entries, one thread or several."""
    old = write(tmp_path / "base", weights(1))
    write(tmp_path / "out", patched(old, 2))
    whole = survive(tmp_path / "out", tmp_path / "base")
    monkeypatch.setattr("safepatch_core.merging.quantised.sums.PIECE", 7)
    monkeypatch.setattr("safepatch_core.merging.quantised.comparison.STRIPE_BYTES", 700)  # 128 rows fit
    for threads in (1, 3):
        cut = survive(tmp_path / "out", tmp_path / "base", memory_limit="33MiB", threads=threads)
        for name, of in cut.formats.items():
            other = whole.formats[name]
            assert of.elsewhere == other.elsewhere and of.unfit == other.unfit
            for tensor, found in of.whole.tensors.items():
                assert found.facts() == pytest.approx(other.whole.tensors[tensor].facts(), rel=1e-9)


def test_a_limit_that_is_too_small(tmp_path: Path) -> None:
    old = write(tmp_path / "base", {"a.weight": np.ones((130, 20_000), np.float32)})
    write(tmp_path / "out", patched(old, 2))
    with pytest.raises(UsageError, match="too small for 128 rows of 'a.weight'.* MiB more"):
        survive(tmp_path / "out", tmp_path / "base", memory_limit="32MiB")
    with pytest.raises(UsageError, match="at least 32MiB"):
        survive(tmp_path / "out", tmp_path / "base", memory_limit="31MiB")


def test_a_base_on_the_grid_loses_small_steps(tmp_path: Path) -> None:
    """What was dequantised lies on its grid: steps below half a step of it all come back."""
    codes = np.random.default_rng(0).integers(-7, 8, (64, 128)).astype(np.float32)
    codes[:, ::32] = -7.5  # the size that a group's scale is taken from, so that the scale stays 1
    old = write(tmp_path / "base", {"a.weight": codes}, "F32")["a.weight"]
    steps = np.where(np.abs(old) < 7, np.float32(0.3), np.float32(0))
    write(tmp_path / "out", {"a.weight": old + steps}, "F32")
    of = survive(tmp_path / "out", tmp_path / "base", ["int4-g32"]).formats["int4-g32"].whole.total
    assert of.entries > 5000
    assert (of.changed, of.survival, of.cosine) == (0, 0.0, 0.0)


def two_patches(root: Path, extra: str = "", over: str = "over-safety") -> tuple[dict[str, F32], ...]:
    old = write(root / "base", weights(1) | {"norm": np.ones(5, np.float32)})
    deltas = [write(root / name, patched(old, seed, 1)) for seed, name in ((3, "safety"), (4, over))]
    (root / "recipe.yaml").write_text(
        f"base: base\n{extra}patches:\n  - {{name: safety, source: safety, top: 0.1, retain: 0.5}}\n"
        f"  - {{name: over-safety, source: {over}, top: 0.2, scale: 2}}\n"
    )
    merge(root / "recipe.yaml", root / "out", backend="reference")
    return old, *deltas


def stored_of(root: Path) -> dict[str, F32]:
    tensors = load_file(root / "model.safetensors")
    return {name: to_f32(t).reshape(t.shape) for name, t in tensors.items()}


def selected_alone(root: Path, name: str, extra: str) -> dict[str, Any]:
    """Where a patch changes something when it is the only one; retention does not depend on the other."""
    text = (root / "recipe.yaml").read_text().splitlines()
    kept = [line for line in text if "- {" not in line or f"name: {name}," in line]
    (root / f"{name}.yaml").write_text("\n".join(kept))
    merge(root / f"{name}.yaml", root / f"out-{name}", backend="reference")
    base, out = stored_of(root / "base"), stored_of(root / f"out-{name}")
    return {n: base[n] != out[n] for n in base}


@pytest.mark.parametrize("extra", ["", "combine: sum\n", "scope: model\n"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_each_patch_over_the_entries_that_it_alone_selected(tmp_path: Path, extra: str, backend: str) -> None:
    if backend == "cpu":
        pytest.importorskip("safepatch_core._engine", reason="the extension isn't built")
    old, *_ = two_patches(tmp_path, extra)
    new = stored_of(tmp_path / "out")
    acts = {name: selected_alone(tmp_path, name, extra) for name in ("safety", "over-safety")}
    found = survive(tmp_path / "out", tmp_path / "base", recipe=tmp_path / "recipe.yaml", backend=backend)
    assert not found.notes and not found.floats
    for name, tensor in itertools.product(found.formats, SHAPES):
        sides = both(name, old[tensor], new[tensor], "BF16")
        for patch, share in found.formats[name].patches.items():
            if sides is None:
                assert tensor not in share.tensors
                continue
            other = next(n for n in acts if n != patch)
            wanted = expected(*sides, old[tensor], new[tensor], acts[patch][tensor] & ~acts[other][tensor])
            del wanted["elsewhere"]
            assert share.tensors[tensor].facts() == pytest.approx(wanted, rel=1e-9), (name, patch, tensor)


def test_the_manifest_tells_patches_apart_where_they_lie_beside(tmp_path: Path) -> None:
    two_patches(tmp_path)
    told = survive(tmp_path / "out", tmp_path / "base", ["int4-g32"], recipe=tmp_path / "recipe.yaml")
    assert survive(tmp_path / "out", tmp_path / "base", ["int4-g32"]) == told
    chunked = survive(tmp_path / "out", tmp_path / "base", ["int4-g32"], chunk_entries=64)
    assert chunked == told
    (tmp_path / "safety").rename(tmp_path / "elsewhere")
    whole = survive(tmp_path / "out", tmp_path / "base", ["int4-g32"])
    assert not whole.formats["int4-g32"].patches and "without --recipe" in whole.notes[0]
    assert whole.formats["int4-g32"].whole == told.formats["int4-g32"].whole


def test_a_merge_that_is_not_the_recipes(tmp_path: Path) -> None:
    two_patches(tmp_path)
    (tmp_path / "other.yaml").write_text((tmp_path / "recipe.yaml").read_text() + "seed: 1\n")
    with pytest.raises(InputError, match=r"tensor 'a.weight': is not what the recipe gives"):
        survive(tmp_path / "out", tmp_path / "base", recipe=tmp_path / "other.yaml")
    # The manifest's own recipe is only tried.
    write(tmp_path / "more", {n: x * 2 for n, x in stored_of(tmp_path / "safety").items()})
    (tmp_path / "safety").rename(tmp_path / "old")
    (tmp_path / "more").rename(tmp_path / "safety")
    found = survive(tmp_path / "out", tmp_path / "base", ["mxfp4"])
    assert not found.formats["mxfp4"].patches and "is not what the recipe gives" in found.notes[0]


def test_one_patch_needs_no_recipe(tmp_path: Path) -> None:
    old = write(tmp_path / "base", weights(1))
    write(tmp_path / "tuned", patched(old, 2))
    (tmp_path / "r.yaml").write_text("base: base\npatches: [{name: only, source: tuned}]\n")
    merge(tmp_path / "r.yaml", tmp_path / "out")
    (tmp_path / "tuned").rename(tmp_path / "gone")
    of = survive(tmp_path / "out", tmp_path / "base", ["fp8-block"]).formats["fp8-block"]
    assert of.patches == {"only": of.whole} and of.whole.total.entries


def test_what_stays_float_is_told(tmp_path: Path) -> None:
    base = weights(1) | {"lm_head.weight": np.ones((3, 32), np.float32), "norm": np.ones(5, np.float32)}
    old = write(tmp_path / "base", base)
    write(tmp_path / "out", {n: x + np.float32(0.5) * (n in ("lm_head.weight", "norm")) for n, x in old.items()})
    found = survive(tmp_path / "out", tmp_path / "base", ["nvfp4"])
    assert found.floats == ["lm_head.weight", "norm"]
    total = found.formats["nvfp4"].whole.total
    assert (total.entries, total.survival, total.cosine) == (0, None, None)


def test_what_is_refused(tmp_path: Path) -> None:
    old = write(tmp_path / "base", weights(1))
    with pytest.raises(InputError, match="do not differ"):
        survive(tmp_path / "base", tmp_path / "base")
    with pytest.raises(UsageError, match="unknown format: found 'int3', expected fp8-block"):
        survive(tmp_path / "base", tmp_path / "base", ["int3"])
    with pytest.raises(UsageError, match="no format"):
        survive(tmp_path / "base", tmp_path / "base", [])
    write(tmp_path / "less", {n: x for n, x in old.items() if n != "b.weight"})
    with pytest.raises(InputError, match="'b.weight': only one of the two has it"):
        survive(tmp_path / "less", tmp_path / "base")
    write(tmp_path / "wide", old | {"b.weight": np.ones((3, 32), np.float32)})
    with pytest.raises(InputError, match="'b.weight': the two differ in dtype or shape"):
        survive(tmp_path / "wide", tmp_path / "base")
    write(tmp_path / "nan", old | {"b.weight": np.full((3, 256), np.nan, np.float32)})
    with pytest.raises(InputError, match=r"nan.*'b.weight': holds NaN or infinity"):
        survive(tmp_path / "nan", tmp_path / "base")
    (tmp_path / "codes").mkdir()
    codes = Tensor("U8", (4, 4), bytes(16))
    held = {"q.weight_packed": codes, "q.weight_scale": Tensor("F32", (4, 1), bytes(16))}
    save_file(tmp_path / "codes" / "model.safetensors", held)
    with pytest.raises(InputError, match="'q.weight_packed': is quantised already"):
        survive(tmp_path / "codes", tmp_path / "codes")


def test_the_command(tmp_path: Path) -> None:
    two_patches(tmp_path)
    words = ["survive", str(tmp_path / "out"), "--base", str(tmp_path / "base"), "--formats", "fp8-block,int4-g32"]
    told = CliRunner().invoke(cli, [*words, "--json"])
    assert told.exit_code == 0, told.output
    data = json.loads(told.stdout)
    assert list(data["formats"]) == ["fp8-block", "int4-g32"]
    assert set(data["formats"]["int4-g32"]["patches"]) == {"safety", "over-safety"}
    assert data["formats"]["int4-g32"]["unfit"] == ["d.weight"]
    whole = data["formats"]["fp8-block"]["whole"]
    shown = CliRunner().invoke(cli, [*words, "--tensors"]).output
    assert f"{whole['entries']:,d}" in shown and f"{whole['survival']:.4f}" in shown and "a.weight" in shown
    assert "int4-g32: does not take 'd.weight'" in shown
    assert CliRunner().invoke(cli, [*words, "--quiet"]).output == ""


def test_a_merge_tells_it_too(tmp_path: Path) -> None:
    two_patches(tmp_path)
    words = ["merge", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "again"), "--survive", "mxfp4,int4-g32"]
    told = CliRunner().invoke(cli, [*words, "--json"])
    assert told.exit_code == 0, told.output
    found = survive(tmp_path / "out", tmp_path / "base", ["mxfp4", "int4-g32"])
    assert json.loads(told.stdout)["survive"] == found.facts()
    total = found.formats["mxfp4"].patches["safety"].total
    shown = CliRunner().invoke(cli, [*words, "--force"]).output
    assert f"{total.survival:.4f}" in shown and "int4-g32" in shown
    for name, extra in (("int3", []), ("mxfp4", ["--memory-limit", "20MiB"])):
        refused = CliRunner().invoke(cli, [*words[:3], str(tmp_path / "never"), "--survive", name, *extra])
        assert isinstance(refused.exception, UsageError)
    assert not (tmp_path / "never").exists()
