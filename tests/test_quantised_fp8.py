"""Merges into FP8 bases: against the oracle byte for byte, however they are run, and what of the base stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safepatch_core import merge, plan, verify
from safepatch_core.errors import InputError, UsageError
from tests import oracle, oracle_quantised
from tests.oracle import Tensor, save_file
from tests.oracle_quantised import NUMBERS
from tests.twins import BLOCK, FLOAT, LAYOUTS, SHAPE, UP, WIDE, Q, Twin, differing, merged

ENGINES = ("reference", "cpu")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_scales(tmp_path: Path, layout: str, engine: str) -> None:
    twin = Twin(tmp_path, layout)
    recipe = twin.recipe(twin.patch("a", top=0.3), twin.patch("b", "checkpoint", top=0.2, retain=0.5), seed=7)
    expected = oracle_quantised.merge(recipe, twin.block)
    assert merged(twin, recipe, backend=engine) == expected.tensors
    assert len(differing(twin.base[Q], expected.tensors[Q])) > 50


@pytest.mark.parametrize("combine", ["difference", "sum", "ties"])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_kind_and_importance(tmp_path: Path, engine: str, combine: str) -> None:
    twin = Twin(tmp_path, seed=3)
    patches = [
        twin.patch("a", "checkpoint", top=0.4, importance=twin.importance("a", "patched")),
        twin.patch("b", "lora", top=0.4, scale=-1.5, importance=twin.importance("b", "patched")),
        twin.patch("c", "delta", top=0.4, importance=twin.importance("c", "base"), retain=0.6, rescale=True),
        twin.patch("d", "checkpoint", top=0.4, importance=twin.importance("d", "delta")),
        twin.patch("e", "lora", top=0.1, importance=twin.importance("e")),
    ]
    recipe = twin.recipe(*patches, combine=combine, order="select-first", scope="model")
    expected = oracle_quantised.merge(recipe, BLOCK)
    assert merged(twin, recipe, backend=engine, chunk_entries=64) == expected.tensors


@pytest.mark.parametrize("engine", ENGINES)
def test_skip_and_lambda_reach_the_codes(tmp_path: Path, engine: str) -> None:
    twin = Twin(tmp_path, seed=5)
    patches = [twin.patch("a", top=0.4, skip=0.1), twin.patch("b", "lora", top=0.3, skip=0.05)]
    recipe = twin.recipe(*patches, combine="sum", accumulate="deltas", **{"lambda": 1.7})
    expected = oracle_quantised.merge(recipe, BLOCK)
    assert merged(twin, recipe, backend=engine) == expected.tensors
    assert len(differing(twin.base[Q], expected.tensors[Q])) > 50


@pytest.mark.parametrize("engine", ENGINES)
def test_gates_and_agreements_see_the_deltas_that_a_merge_takes(tmp_path: Path, engine: str) -> None:
    twin = Twin(tmp_path, seed=8)
    same, opposite = ({"patch": "a", "signs": signs} for signs in ("same", "opposite"))
    patches = [
        twin.patch("a", "checkpoint", top=0.4),
        twin.patch("b", "lora", top=0.3, agreement=opposite),
        twin.patch("c", "checkpoint", top=0.3, agreement=same, importance=twin.importance("c", "patched")),
        twin.patch("d", "delta", top=0.3, agreement=opposite, importance=twin.importance("d", "delta")),
        twin.patch("e", "lora", top=0.3, gate={"patch": "a", "below": 0.0}),
        twin.patch("f", "checkpoint", top=0.3, gate={"patch": "a", "least": 0.0}),
    ]
    recipe = twin.recipe(*patches, combine="sum")
    expected = oracle_quantised.merge(recipe, BLOCK)
    assert merged(twin, recipe, backend=engine, chunk_entries=128) == expected.tensors
    assert len(differing(twin.base[Q], expected.tensors[Q])) > 50


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_float_original(tmp_path: Path, rounding: str, dtype: str) -> None:
    twin = Twin(tmp_path)
    twin.original(dtype)
    rule = {"reference": "original", "rounding": rounding, "reference_dtype": "float32"} | WIDE
    recipe = twin.recipe(twin.patch("a", "checkpoint", top=0.5), quantized=rule)
    expected = oracle_quantised.merge(recipe, BLOCK)
    assert merged(twin, recipe) == expected.tensors
    assert len(differing(twin.base[Q], expected.tensors[Q])) > 50


@pytest.mark.parametrize("reference_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("original", [False, True])
def test_checkpoints_are_measured_from_what_a_trainer_was_handed(
    tmp_path: Path, original: bool, reference_dtype: str
) -> None:
    twin = Twin(tmp_path)
    twin.original("F32")
    rule = WIDE | {"reference_dtype": reference_dtype} | ({"reference": "original"} if original else {})
    recipe = twin.recipe(twin.patch("a", "checkpoint", size=1e-4), quantized=rule)
    assert merged(twin, recipe) == oracle_quantised.merge(recipe, BLOCK).tensors
    warned = any("in bfloat16" in w or "in float16" in w for w in plan(recipe, backend="reference").warnings)
    assert warned == (original and reference_dtype != "float32")


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_no_cut_and_no_engine_shows(tmp_path: Path, scope: str) -> None:
    twin = Twin(tmp_path, seed=5)
    patches = twin.patch("a", "checkpoint", top=0.3, retain=0.5), twin.patch("b", "lora", top=0.2)
    recipe = twin.recipe(*patches, scope=scope)
    merged(twin, recipe, "whole")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    for i, (engine, chunk, threads) in enumerate((("cpu", None, 3), ("cpu", 7, 2), ("reference", 64, None))):
        merge(recipe, tmp_path / f"out-{i}", backend=engine, chunk_entries=chunk, threads=threads)
        assert {path.name: path.read_bytes() for path in (tmp_path / f"out-{i}").iterdir()} == whole
    assert verify(tmp_path / "whole", recipe, backend="cpu").ok


def test_scales_in_another_shard(tmp_path: Path) -> None:
    twin = Twin(tmp_path)
    recipe = twin.recipe(twin.patch("a", top=0.3))
    expected = oracle_quantised.merge(recipe, BLOCK).tensors
    twin.save_base(twin.base, shards=3)
    assert merged(twin, recipe) == expected
    files = [f.name for f in (tmp_path / "out").glob("*.safetensors")]
    assert len(files) == 3


def test_a_patch_that_asks_for_nothing_but_acts_changes_no_byte(tmp_path: Path) -> None:
    """Deltas of zero that are selected by scores, and -0 codes: all keep their bits."""
    codes = np.resize(np.array([0x80, 0, 1, 0x81, 0x7E, 0xFE, 0x38, 0xB8], np.uint8), SHAPE)
    twin = Twin(tmp_path, "blocks of E8M0", codes=codes)
    tensors = {n: Tensor("F32", SHAPE, np.zeros(SHAPE, "<f4").tobytes()) for n in (Q, UP)}
    tensors[FLOAT] = twin.floats((8, 8))  # so that the patch does something
    save_file(tmp_path / "a.safetensors", tensors)
    patch = {"name": "a", "source": "a.safetensors", "kind": "delta", "importance": twin.importance("a")}
    out = merged(twin, twin.recipe(patch))
    assert {n for n in out if out[n] != twin.base[n]} == {FLOAT}
    told = json.loads((tmp_path / "out" / "safepatch.json").read_text())["patches"][0]
    assert told["codes"] == {"acted": 5600, "changed": 0, "saturated": 0, "survival": None, "cosine": None}


def test_only_codes_of_acted_entries_change(tmp_path: Path) -> None:
    twin = Twin(tmp_path)
    d = np.zeros(SHAPE, np.float32)
    d[3, ::7] = 10
    tensors = {Q: Tensor("F32", SHAPE, d.tobytes())}
    save_file(tmp_path / "a.safetensors", tensors)
    patch = {"name": "a", "source": "a.safetensors", "kind": "delta"}
    out = merged(twin, twin.recipe(patch, missing="skip"))
    assert [n for n in out if out[n] != twin.base[n]] == [Q]
    assert set(differing(twin.base[Q], out[Q])) <= set(np.flatnonzero(d))
    assert set(np.frombuffer(out[Q].data, np.uint8)[np.flatnonzero(d)]) == {0x7E}  # saturated
    told = json.loads((tmp_path / "out" / "safepatch.json").read_text())["patches"][0]["codes"]
    assert told["acted"] == told["saturated"] == 10


def one_entry(root: Path, code: int, d: float, rounding: str = "nearest", original: float | None = None) -> int:
    """The code that an entry of scale 1 has after a step of d."""
    codes = np.zeros(SHAPE, np.uint8)
    codes[0, 0] = code
    twin = Twin(root, "tensor", codes=codes)
    for name in (Q, UP):
        twin.base[f"{name.removesuffix('.weight')}.qscale_weight"] = Tensor("F32", (), np.float32(1).tobytes())
    twin.save_base(twin.base)
    step = np.zeros(SHAPE, np.float32)
    step[0, 0] = d
    save_file(
        root / "a.safetensors", {Q: Tensor("F32", SHAPE, step.tobytes()), UP: Tensor("F32", SHAPE, step.tobytes())}
    )
    at = np.zeros(SHAPE, np.float32)
    at[0, 0] = NUMBERS[code] if original is None else original
    (root / "original").mkdir()
    tensors = {n: Tensor("F32", SHAPE, at.tobytes()) for n in (Q, UP)} | {FLOAT: twin.base[FLOAT]}
    save_file(root / "original" / "model.safetensors", tensors)
    rule = {"rounding": rounding, "reference": "original" if rounding == "nearest" else "dequantised"} | WIDE
    patch = {"name": "a", "source": "a.safetensors", "kind": "delta"}
    out = merged(twin, twin.recipe(patch, quantized=rule, missing="skip"))
    return out[Q].data[0]


@pytest.mark.parametrize(
    ("code", "d", "expected"),
    [
        (0x38, 0.0625, 0x38),  # 1 + 1/16 lies between 1 and 1.125: to the even code
        (0x39, 0.0625, 0x3A),  # 1.125 + 1/16: up to 1.25
        (0x38, 0.0626, 0x39),
        (0x01, -(2.0**-10), 0x00),  # half the least: to zero
        (0x01, -(2.0**-9) * 1.25, 0x00),  # below zero, and nearest to it: +0
        (0x80, -(2.0**-12), 0x80),  # -0 stays what it is where its value does
        (0x80, 2.0**-9, 0x01),
        (0x7E, 1.0, 0x7E),
        (0xFE, -1000.0, 0xFE),
        (0x78, 10000.0, 0x7E),
    ],
)
def test_nearest(tmp_path: Path, code: int, d: float, expected: int) -> None:
    assert one_entry(tmp_path, code, d) == expected


def test_stochastic_is_right_in_the_mean(tmp_path: Path) -> None:
    twin = Twin(tmp_path, "tensor", codes=np.full(SHAPE, 0x38))
    for name in (Q, UP):
        twin.base[f"{name.removesuffix('.weight')}.qscale_weight"] = Tensor("F32", (), np.float32(1).tobytes())
    twin.save_base(twin.base)
    step = np.full(SHAPE, 0.03125, np.float32)  # a quarter of the way to 1.125
    save_file(tmp_path / "a.safetensors", {n: Tensor("F32", SHAPE, step.tobytes()) for n in (Q, UP)})
    patch = {"name": "a", "source": "a.safetensors", "kind": "delta"}
    recipe = twin.recipe(patch, quantized={}, missing="skip")
    out = merged(twin, recipe)
    up = np.frombuffer(out[Q].data, np.uint8) == 0x39
    assert set(out[Q].data) == {0x38, 0x39} and abs(up.mean() - 0.25) < 0.03
    told = json.loads((tmp_path / "out" / "safepatch.json").read_text())["patches"][0]["codes"]
    expected = oracle_quantised.merge(recipe).kept["a"]
    assert told == pytest.approx(expected._asdict(), rel=1e-12)
    assert 0.8 < told["survival"] < 1.2


def test_codes_that_are_no_number_stay(tmp_path: Path) -> None:
    codes = np.resize(np.array([0x7F, 0xFF, 0x38], np.uint8), SHAPE)
    twin = Twin(tmp_path, codes=codes)
    recipe = twin.recipe(twin.patch("a", size=0.2))
    expected = oracle_quantised.merge(recipe, BLOCK).tensors
    out = merged(twin, recipe)
    assert out == expected
    after = np.frombuffer(out[Q].data, np.uint8).reshape(SHAPE)
    assert np.array_equal(after[codes != 0x38], codes[codes != 0x38])


@pytest.mark.parametrize("value", [0.0, -0.001, np.nan, np.inf, 2.0**-101])
def test_bad_scales_under_patched_entries(tmp_path: Path, value: float) -> None:
    twin = Twin(tmp_path)
    name = f"{Q.removesuffix('.weight')}.weight_scale_inv"
    scales = oracle.to_f32(twin.base[name]).copy()
    scales[0] = value
    twin.base[name] = twin.base[name]._replace(data=scales.tobytes())
    twin.save_base(twin.base)
    for chunk in (None, 100):
        with pytest.raises(
            InputError, match=r"q_proj.*scales .* found 1024 entries, the first at index 0, .*2\^-100"
        ):
            merged(twin, twin.recipe(twin.patch("a")), chunk_entries=chunk)
    step = np.zeros(SHAPE, np.float32)
    step[35:, 35:] = 0.05  # elsewhere
    save_file(tmp_path / "a.safetensors", {Q: Tensor("F32", SHAPE, step.tobytes())})
    patch = {"name": "a", "source": "a.safetensors", "kind": "delta"}
    assert merged(twin, twin.recipe(patch, missing="skip"))[Q] != twin.base[Q]


def test_saturation_may_be_an_error(tmp_path: Path) -> None:
    twin = Twin(tmp_path, codes=np.full(SHAPE, 0x7E))
    patch = twin.patch("a")
    with pytest.raises(InputError, match=r"beyond the codes: found \d+ entries"):
        merged(twin, twin.recipe(patch, quantized={"saturate": "error"} | WIDE))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bounds", [[1.5, 2], [-1, 0.5]])
def test_what_does_not_survive_is_not_published(tmp_path: Path, bounds: list[float]) -> None:
    twin = Twin(tmp_path)
    with pytest.raises(InputError, match=r"does not keep the patch 'a': found survival [\d.]+ \(\d+ of \d+"):
        merged(twin, twin.recipe(twin.patch("a"), quantized={"survival": bounds}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"rounding": "nearest"}, "goes with a reference file"),
        ({"rounding": "up"}, "quantized.rounding"),
        ({"reference_dtype": "fp8"}, "quantized.reference_dtype"),
        ({"saturate": "wrap"}, "quantized.saturate"),
        ({"survival": [2, 1]}, "the lower end first"),
        ({"survival": [1]}, "quantized.survival"),
        ({"surival": [1, 2]}, "unknown key"),
        ({"reference": ""}, "quantized.reference"),
    ],
)
def test_keys(tmp_path: Path, rule: Any, words: str) -> None:
    twin = Twin(tmp_path)
    with pytest.raises(UsageError, match=words):
        merged(twin, twin.recipe(twin.patch("a"), quantized=rule))


def test_without_the_key_the_base_is_refused_and_told_of_it(tmp_path: Path) -> None:
    twin = Twin(tmp_path)
    with pytest.raises(InputError, match=r"quantised \(fp8\).*`quantized:`"):
        merged(twin, twin.recipe(twin.patch("a"), quantized=None))


def test_with_the_key_a_float_base_is_refused(tmp_path: Path) -> None:
    twin = Twin(tmp_path)
    patch = twin.patch("a")
    twin.save_base({n: twin.base[FLOAT] if n == FLOAT else twin.floats(SHAPE) for n in (FLOAT, Q, UP)})
    with pytest.raises(InputError, match="not quantised"):
        merged(twin, twin.recipe(patch))
