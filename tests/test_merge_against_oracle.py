"""The whole merge against brute force: worked examples, then random recipes on every engine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from safepatch_core import merge as safepatch_merge
from safepatch_core.errors import SafepatchError
from tests import oracle
from tests.oracle import OracleError, Result, Tensor, load_checkpoint, load_file
from tests.recipes import write_plain, write_random

RECIPES = int(os.environ.get("SAFEPATCH_RANDOM_RECIPES", "60"))
ENGINES = ("oracle", "reference", "cpu")


def run(engine: str, recipe: Path) -> dict[str, Tensor]:
    if engine == "oracle":
        return oracle.merge(recipe).tensors
    out = recipe.parent / f"out-{engine}"
    safepatch_merge(recipe, out, backend=engine)
    return load_checkpoint(out)


def f32(*values: float, shape: tuple[int, ...] | None = None) -> Tensor:
    return Tensor("F32", shape or (len(values),), np.array(values, "<f4").tobytes())


def floats(t: Tensor) -> list[float]:
    return [float(x) for x in oracle.to_f32(t)]


# The oracle's own ground: published vectors


@pytest.mark.parametrize(
    ("counter", "key", "lanes"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers(counter: str, key: str, lanes: str) -> None:
    k0, k1 = (int(word, 16) for word in key.split())
    got = oracle.philox([int(word, 16) for word in counter.split()], (k0, k1))
    assert [int(lane) for lane in got] == [int(word, 16) for word in lanes.split()]


# Worked examples, each for the oracle too


@pytest.mark.parametrize("engine", ENGINES)
def test_product_and_sum_round_separately(engine: str, tmp_path: Path) -> None:
    near_one = 1 + 2.0**-12  # its square ends in 2^-24, which a fused multiply-add would keep
    patch = ({"w": f32(near_one)}, {"kind": "delta", "scale": near_one})
    recipe = write_plain(tmp_path, {"w": f32(-1.0)}, {"p": patch}, targets="all")
    assert floats(run(engine, recipe)["w"]) == [2.0**-11]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("n", "k"), [(1, 0), (3, 2), (5, 2), (7, 4)])
def test_k_rounds_half_to_even(engine: str, n: int, k: int, tmp_path: Path) -> None:
    patch = ({"w": f32(*range(1, n + 1))}, {"kind": "delta", "top": 0.5})
    recipe = write_plain(tmp_path, {"w": f32(*[0.0] * n)}, {"p": patch}, targets="all")
    assert floats(run(engine, recipe)["w"]) == [i if i > n - k else 0 for i in range(1, n + 1)]


@pytest.mark.parametrize("engine", ENGINES)
def test_equal_scores_go_to_the_lower_position_in_bytewise_order_of_names(engine: str, tmp_path: Path) -> None:
    names = ("b", "a2", "a10", "\uffee", "\U0001f600")  # UTF-16 would put the last one before its neighbour
    base = {name: f32(0, 0) for name in names}
    patch = ({name: f32(-1, 1) for name in names}, {"kind": "delta", "top": 0.7})
    out = run(engine, write_plain(tmp_path, base, {"p": patch}, targets="all", scope="model"))
    touched = {name: floats(out[name]) for name in names}
    assert touched == {
        "a10": [-1, 1],
        "a2": [-1, 1],
        "b": [-1, 1],
        "\uffee": [-1, 0],
        "\U0001f600": [0, 0],
    }


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_skip_leaves_the_best_out(engine: str, scope: str, tmp_path: Path) -> None:
    d = [1, -5, 9, 5, 0, 5, -2, 8, 3, 4]
    patch = ({"w": f32(*d)}, {"kind": "delta", "top": 0.4, "skip": 0.3})
    out = run(engine, write_plain(tmp_path, {"w": f32(*[0] * 10)}, {"p": patch}, targets="all", scope=scope))
    # Of the order 9 8 -5 5 5 4 3 -2 1 the first three are skipped, by position among equals, and four are taken.
    assert floats(out["w"]) == [0, 0, 0, 5, 0, 5, 0, 0, 3, 4]


@pytest.mark.parametrize("engine", ENGINES)
def test_skip_is_counted_with_top_in_one_sum(engine: str, tmp_path: Path) -> None:
    deltas = {"w": f32(*range(1, 6)), "v": f32(*range(1, 6))}
    other = {"names": ["v"], "skip": 0.5}
    patch = (deltas, {"kind": "delta", "top": 0.3, "skip": 0.3, "overrides": [other]})
    out = run(engine, write_plain(tmp_path, {n: f32(0, 0, 0, 0, 0) for n in deltas}, {"p": patch}, targets="all"))
    assert floats(out["w"]) == [0, 0, 3, 0, 0]  # 3 less 2, for k(0.6) = 3 and k(0.3) = 2
    assert floats(out["v"]) == [0, 2, 3, 0, 0]  # 4 less 2


@pytest.mark.parametrize("engine", ENGINES)
def test_lambda_multiplies_the_sum_and_rounds_once(engine: str, tmp_path: Path) -> None:
    near = 1 + 2.0**-12
    patches = {name: ({"w": f32(x)}, {"kind": "delta"}) for name, x in (("a", near - 0.25), ("b", 0.25))}
    keys: dict[str, Any] = {"combine": "sum", "accumulate": "deltas", "lambda": near, "targets": "all"}
    out = run(engine, write_plain(tmp_path, {"w": f32(-1.0)}, patches, **keys))
    assert floats(out["w"]) == [2.0**-11]


@pytest.mark.parametrize("engine", ENGINES)
def test_difference_acts_where_exactly_one_patch_is_important(engine: str, tmp_path: Path) -> None:
    base = {"w": f32(0, 0, 0, 0)}
    first = ({"w": f32(8, 4, 2, 1)}, {"kind": "delta", "top": 0.5})
    second = ({"w": f32(-1, -8, -4, -2)}, {"kind": "delta", "top": 0.5, "scale": 10})
    recipe = write_plain(tmp_path, base, {"a": first, "b": second}, targets="all")
    assert floats(run(engine, recipe)["w"]) == [8, 0, -40, 0]


@pytest.mark.parametrize("engine", ENGINES)
def test_difference_of_three_leaves_what_two_or_three_hold(engine: str, tmp_path: Path) -> None:
    patches = {
        "a": ({"w": f32(1, 1, 1, 0)}, {"kind": "delta"}),
        "b": ({"w": f32(0, 1, 1, 0)}, {"kind": "delta"}),
        "c": ({"w": f32(0, 0, 1, 1)}, {"kind": "delta"}),
    }
    recipe = write_plain(tmp_path, {"w": f32(0, 0, 0, 0)}, patches, targets="all")
    assert floats(run(engine, recipe)["w"]) == [1, 0, 0, 1]


@pytest.mark.parametrize("engine", ENGINES)
def test_sum_adds_in_recipe_order(engine: str, tmp_path: Path) -> None:
    big = 2.0**24  # big + 1 rounds to big
    deltas = {"x": f32(big, 1), "y": f32(1, big), "z": f32(-big, -big)}
    for order, expected in (("xyz", [0, 0]), ("xzy", [1, 1]), ("yzx", [1, 1]), ("yxz", [0, 0])):
        patches = {f"p{i}": ({"w": deltas[name]}, {"kind": "delta"}) for i, name in enumerate(order)}
        recipe = write_plain(tmp_path / order, {"w": f32(0, 0)}, patches, targets="all", combine="sum")
        assert floats(run(engine, recipe)["w"]) == expected, order


@pytest.mark.parametrize("engine", ENGINES)
def test_ties_means_the_changes_of_the_elected_sign(engine: str, tmp_path: Path) -> None:
    base = {"w": f32(1, 1, -0.0, 1, 1)}
    patches = {
        "a": ({"w": f32(3, 1, 1, -1, 0)}, {"kind": "delta"}),
        "b": ({"w": f32(-1, -1, -1, -2, 0)}, {"kind": "delta"}),
        "c": ({"w": f32(1, 0, 0, 1, 4)}, {"kind": "delta", "scale": 2}),
    }
    recipe = write_plain(tmp_path, base, patches, targets="all", combine="ties")
    # 3 - 1 + 2 > 0: (3 + 2) / 2; a sum of 0 leaves the bits; -1 - 2 + 2 < 0: -3 / 2; one patch alone: 8 / 1
    expected = f32(3.5, 1, -0.0, -0.5, 9)
    assert run(engine, recipe)["w"].data == expected.data


@pytest.mark.parametrize("engine", ENGINES)
def test_ties_of_steps_that_overflow_both_ways_stop_the_merge(engine: str, tmp_path: Path) -> None:
    opposed = [("up", f32(2, 0), 3e38), ("down", f32(2, 0), -3e38)]
    patches = {name: ({"w": d}, {"kind": "delta", "scale": scale}) for name, d, scale in opposed}
    recipe = write_plain(tmp_path / "finite", {"w": f32(1, 1)}, patches, targets="all", combine="ties")
    with pytest.raises((OracleError, SafepatchError), match="overflow"):
        run(engine, recipe)
    infinite = {"w": f32(np.inf, 1)}
    recipe = write_plain(tmp_path / "infinite", infinite, patches, targets="all", combine="ties")
    assert run(engine, recipe)["w"].data == infinite["w"].data


@pytest.mark.parametrize("engine", ENGINES)
def test_rescale_divides_in_float64_and_retention_follows_philox(engine: str, tmp_path: Path) -> None:
    n = 24
    options = {"kind": "delta", "scale": 0.1, "retain": 0.3, "rescale": True}
    patch = ({"w": f32(*[1.0] * n)}, options)
    recipe = write_plain(tmp_path, {"w": f32(*[0.0] * n)}, {"safety": patch}, targets="all", seed=7)
    divided = float(np.float32(0.1 / 0.3))
    assert divided != float(np.float32(0.1) / np.float32(0.3))
    out = floats(run(engine, recipe)["w"])
    assert {i: x for i, x in enumerate(out) if x} == dict.fromkeys((1, 11, 14, 15, 17), divided)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("above", "kept"), [(0, False), (0.99, False), (1, True)])
def test_retention_compares_with_the_floor_of_p(engine: str, above: float, kept: bool, tmp_path: Path) -> None:
    lanes = [int(u) for u in oracle.philox([0, 0, 0, 0], oracle.random_key(7, "safety", "w"))]
    largest = max(lanes)  # the others survive in any case
    patch = ({"w": f32(1, 1, 1, 1)}, {"kind": "delta", "retain": (largest + above) / 2**32})
    recipe = write_plain(tmp_path, {"w": f32(0, 0, 0, 0)}, {"safety": patch}, targets="all", seed=7)
    assert floats(run(engine, recipe)["w"]) == [float(kept or u < largest) for u in lanes]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("order", "top", "kept"),
    [("retain-first", 4 / 24, [11, 14, 15, 17]), ("select-first", 0.5, [14, 15, 17])],  # of 1, 11, 14, 15, 17
)
def test_order_of_retention_and_selection(
    engine: str, order: str, top: float, kept: list[int], tmp_path: Path
) -> None:
    patch = ({"w": f32(*range(1, 25))}, {"kind": "delta", "top": top, "retain": 0.3})
    base = {"w": f32(*[0.0] * 24)}
    recipe = write_plain(tmp_path, base, {"safety": patch}, targets="all", seed=7, order=order)
    assert np.flatnonzero(floats(run(engine, recipe)["w"])).tolist() == kept


@pytest.mark.parametrize("engine", ENGINES)
def test_results_round_to_the_base_dtype_ties_to_even(engine: str, tmp_path: Path) -> None:
    # Half a step, a little more, half a step above an odd pattern, -0 moved by nothing, a subnormal moved.
    base = {
        "bf16": Tensor("BF16", (5,), np.array([0x3F80, 0x3F80, 0x3F81, 0x8000, 0x0001], "<u2").tobytes()),
        "f16": Tensor("F16", (5,), np.array([0x3C00, 0x3C00, 0x3C01, 0x8000, 0x0001], "<u2").tobytes()),
    }
    moves = {
        "bf16": f32(2.0**-8, 2.0**-8 + 2.0**-20, 2.0**-8, 0, 2.0**-133),
        "f16": f32(2.0**-11, 2.0**-11 + 2.0**-23, 2.0**-11, 0, 2.0**-24),
    }
    patch = (moves, {"kind": "delta", "scores": {name: f32(*[1.0] * 5) for name in moves}})
    out = run(engine, write_plain(tmp_path, base, {"p": patch}, targets="all"))
    bits = {name: np.frombuffer(out[name].data, "<u2").tolist() for name in moves}
    assert bits == {"bf16": [0x3F80, 0x3F81, 0x3F82, 0, 2], "f16": [0x3C00, 0x3C01, 0x3C02, 0, 2]}


@pytest.mark.parametrize("engine", ENGINES)
def test_entries_on_which_nothing_acts_keep_their_bits(engine: str, tmp_path: Path) -> None:
    bits = np.array([0x8000, 0x7FA1, 0xFF81, 0xFF80, 0x0001, 0x3F80], "<u2")
    base = {"w": Tensor("BF16", (6,), bits.tobytes()), "other": Tensor("BF16", (2,), bits[1:3].tobytes())}
    # A zero delta has score 0; an acting patch leaves a base entry that is not finite as it is.
    patch = ({"w": f32(0, 1, 0, 1, 0, 1), "other": f32(1, 1)}, {"kind": "delta"})
    recipe = write_plain(tmp_path, base, {"p": patch}, targets={"include": ["w"]})
    out = run(engine, recipe)
    bits[5] = 0x4000
    assert out["w"].data == bits.tobytes()
    assert out["other"] == base["other"]


@pytest.mark.parametrize("engine", ENGINES)
def test_skipped_entries_are_not_eligible_for_that_patch_alone(engine: str, tmp_path: Path) -> None:
    inf, nan = float("inf"), float("nan")
    patches = {
        "a": ({"w": f32(nan, 1, 1, inf)}, {"kind": "delta"}),
        "b": ({"w": f32(1, 2, 3, 4)}, {"kind": "delta", "scores": {"w": f32(1, nan, -inf, inf)}}),
    }
    recipe = write_plain(tmp_path, {"w": f32(0, 0, 0, 0)}, patches, targets="all", nonfinite="skip")
    assert floats(run(engine, recipe)["w"]) == [1, 1, 1, 0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("weight", "touched"), [("patched", 2), ("base", 0), ("delta", 1), (None, 2)])
def test_gradients_weigh_what_the_recipe_says(engine: str, weight: str | None, touched: int, tmp_path: Path) -> None:
    base, patched = [10.0, 0.0, 5.0], [9.0, 3.0, 7.0]
    # |patched g| = 5.4 3 7, |w g| = 6 0 5, |d g| = 0.6 3 2
    keys: dict[str, Any] = {"top": 0.4, "gradients": {"w": f32(-0.6, 1, 1)}}
    patch = ({"w": f32(*patched)}, keys | ({"weight": weight} if weight else {}))
    recipe = write_plain(tmp_path, {"w": f32(*base)}, {"p": patch}, targets="all")
    expected = [patched[i] if i == touched else base[i] for i in range(3)]
    assert floats(run(engine, recipe)["w"]) == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_patched_gradients_weigh_the_checkpoint_itself(engine: str, tmp_path: Path) -> None:
    big = 2.0**26  # 0.5 - big rounds to -big, and big + d to 0
    keys = {"top": 0.5, "gradients": {"w": f32(1, 1)}, "weight": "patched"}
    patch = ({"w": f32(0.5, 0.25)}, keys)
    recipe = write_plain(tmp_path, {"w": f32(big, 0)}, {"p": patch}, targets="all")
    assert floats(run(engine, recipe)["w"]) == [0, 0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_change_may_be_measured_from_another_checkpoint(engine: str, chunk: int | None, tmp_path: Path) -> None:
    """The step is that of the fine-tune, wherever the base went since; it is rounded once, and to float32."""
    big = 2.0**24
    save = {
        "w": f32(big, 1, 0.5),
        "v": Tensor("BF16", (3,), oracle.from_f32(np.array([1, 2, 3], np.float32), "BF16")),
    }
    oracle.save_file(tmp_path / "before.safetensors", save)
    patch = ({"w": f32(big + 2, 2, 0.25), "v": f32(1, 2.125, 3)}, {"minus": "before.safetensors"})
    base = {"w": f32(10, 20, 30), "v": f32(-1, -2, -3)}
    recipe = write_plain(tmp_path, base, {"p": patch}, targets="all")
    if engine == "oracle":
        out = run(engine, recipe)
    else:
        safepatch_merge(recipe, tmp_path / "out", backend=engine, chunk_entries=chunk)
        out = load_checkpoint(tmp_path / "out")
    assert floats(out["w"]) == [12, 21, 29.75] and floats(out["v"]) == [-1, -1.875, -3]


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_at_a_patch_measured_from_elsewhere(engine: str, tmp_path: Path) -> None:
    """The patched model is then w + d, not what the fine-tune's file says."""
    oracle.save_file(tmp_path / "before.safetensors", {"w": f32(100, 1)})
    keys = {"top": 0.5, "gradients": {"w": f32(1, 1)}, "weight": "patched", "minus": "before.safetensors"}
    recipe = write_plain(tmp_path, {"w": f32(0, 5)}, {"p": ({"w": f32(101, 2)}, keys)}, targets="all")
    assert floats(run(engine, recipe)["w"]) == [0, 6]  # |1 * 1| < |6 * 1|


@pytest.mark.parametrize("engine", ENGINES)
def test_globs_are_case_sensitive_and_exclusion_wins(engine: str, tmp_path: Path) -> None:
    names = ("model.q.weight", "model.Q.weight", "model.q.bias", "x[0].weight", "x0.weight", "lm_head.weight")
    base: dict[str, Tensor] = {name: f32(0) for name in names}
    base["model.ids.weight"] = Tensor("I64", (1,), bytes(8))
    patch = ({name: f32(1) for name in names}, {"kind": "delta"})
    globs = {"include": ["model.*", "x[0].*", "x[[]0]*"], "exclude": ["model.[a-z].bias"]}
    out = run(engine, write_plain(tmp_path, base, {"p": patch}, targets=globs))
    touched = [name for name in names if floats(out[name]) == [1]]
    assert touched == ["model.q.weight", "model.Q.weight", "x[0].weight", "x0.weight"]
    assert out["model.ids.weight"] == base["model.ids.weight"]


def write_adapter(root: Path, modules: dict[str, tuple[Tensor, Tensor]], **config: Any) -> None:
    root.mkdir()
    tensors = {}
    for module, (a, b) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    oracle.save_file(root / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "bias": "none", "target_modules": list(modules)} | config
    (root / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("engine", ENGINES)
def test_lora_sums_over_the_rank_in_order(engine: str, tmp_path: Path) -> None:
    big = 2.0**24
    base = {"m.q.weight": f32(0, 0, shape=(1, 2)), "m.k.weight": f32(0, 0, shape=(1, 2))}
    a = f32(big, big, 1, -big, -big, 1, shape=(3, 2))  # columns: big 1 -big -> 0, big -big 1 -> 1
    write_adapter(tmp_path / "adapter", {"m.q": (a, f32(1, 1, 1, shape=(1, 3)))}, r=3, lora_alpha=6)
    out = run(engine, write_plain(tmp_path, base, {"p": (None, {"source": "adapter"})}))
    assert floats(out["m.q.weight"]) == [0, 2]
    assert out["m.k.weight"] == base["m.k.weight"]


@pytest.mark.parametrize("engine", ENGINES)
def test_lora_scale_follows_patterns_and_the_transposed_layout(engine: str, tmp_path: Path) -> None:
    a, b = f32(1, 2, 0, 0, shape=(2, 2)), f32(1, 0, 10, 0, 100, 0, shape=(3, 2))
    one = (f32(1, 2, shape=(1, 2)), f32(1, 10, 100, shape=(3, 1)))
    modules = {"h.0.q": (a, b), "h.1.q": (a, b), "h.0.up": one, "xq": (a, b)}
    base = {f"{module}.weight": f32(*[0.0] * 6, shape=(2, 3)) for module in modules}
    config: dict[str, Any] = {"r": 2, "lora_alpha": 4, "rank_pattern": {"up": 1}, "fan_in_fan_out": True}
    config |= {"alpha_pattern": {"h.1.q": 6, r".*\.0\.up": 8, "q": 5}, "use_rslora": True}
    write_adapter(tmp_path / "adapter", modules, **config)
    out = run(engine, write_plain(tmp_path, base, {"p": (None, {"source": "adapter"})}))
    root2 = 2**0.5
    for name, s in (("h.0.q", 5 / root2), ("h.1.q", 6 / root2), ("h.0.up", 8.0), ("xq", 4 / root2)):
        scale = np.float32(s)
        expected = [float(scale * np.float32(x)) for x in (1, 10, 100, 2, 20, 200)]
        assert floats(out[f"{name}.weight"]) == expected, name


# Random recipes


def expect(recipe: Path) -> Result | OracleError:
    try:
        return oracle.merge(recipe)
    except OracleError as e:
        return e


def tree(out: Path) -> dict[str, str]:
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in out.rglob("*")}


def compare(out: Path, expected: Result, label: str) -> None:
    got = load_checkpoint(out)
    assert got.keys() == expected.tensors.keys(), label
    for name, want in expected.tensors.items():
        assert got[name][:2] == want[:2], f"{label}: {name}"
        if got[name].data != want.data:
            unit = f"<u{oracle.WIDTH[want.dtype]}"
            ours, theirs = (np.frombuffer(t.data, unit) for t in (got[name], want))
            at = np.flatnonzero(ours != theirs)
            bits = f"[{at[0]}] {ours[at[0]]:#x}, not {theirs[at[0]]:#x}"
            pytest.fail(f"{label}: {name}: {len(at)} entries differ, {bits}")
    counts = {}
    for patch in json.loads((out / "safepatch.json").read_text())["patches"]:
        counts[patch["name"]] = {n: oracle.Counts(**c) for n, c in patch["tensors"].items()}
    assert counts == expected.counts, label


SIZES = {"1KB": 1_000, "3KB": 3_000, "5GB": 5_000_000_000}


def check_layout(out: Path, recipe_path: Path) -> None:
    """The base's own shards or shards of the size asked for; an index and checksums that agree with them."""
    recipe = yaml.safe_load(recipe_path.read_text())
    shards = {file.name: load_file(file) for file in out.glob("*.safetensors")}
    if recipe.get("max_shard_size") is None:
        base = recipe_path.parent / recipe["base"]
        sources = [base] if base.is_file() else list(base.glob("*.safetensors"))
        held = {"model.safetensors" if file == base else file.name: set(load_file(file)) for file in sources}
        assert {name: set(tensors) for name, tensors in shards.items()} == held
    else:
        for name, tensors in shards.items():
            sizes = [len(t.data) for t in tensors.values() if t.data]
            assert sum(sizes) <= SIZES[recipe["max_shard_size"]] or len(sizes) == 1, name
    if set(shards) != {"model.safetensors"}:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {n: file for file, tensors in shards.items() for n in tensors}
        assert index["metadata"]["total_size"] == sum(
            len(t.data) for tensors in shards.values() for t in tensors.values()
        )
    sums = dict(line.split("  ")[::-1] for line in (out / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: digest for name, digest in tree(out).items() if name != "SHA256SUMS"}


def settings(seed: int) -> list[dict[str, Any]]:
    """Engine, threads, host memory and entries per chunk: whole tensors and chunks on both engines."""
    chunk = (4, 5, 8, 16, 37, 64, 256)[seed % 7]
    limit = ("64MiB", "100MiB", "1GiB")[seed % 3]
    return [
        {"backend": "reference", "threads": 1, "memory_limit": limit},
        {"backend": "reference", "threads": 2, "memory_limit": limit, "chunk_entries": chunk},
        {"backend": "cpu", "threads": 1, "memory_limit": limit},
        {"backend": "cpu", "threads": 2, "memory_limit": "64MiB", "chunk_entries": chunk},
    ]


@pytest.mark.parametrize("seed", range(RECIPES))
def test_random_recipe(seed: int, tmp_path: Path) -> None:
    check_everywhere(write_random(tmp_path / "in", seed, hostile=seed % 4 == 3), seed, tmp_path)


def check_everywhere(recipe: Path, seed: int, tmp_path: Path) -> None:
    """Every engine gives what the oracle gives, or fails as it does."""
    expected = expect(recipe)
    trees = []
    for number, options in enumerate(settings(seed)):
        label = f"seed {seed}, {options}"
        out = tmp_path / "out" / str(number)
        out.parent.mkdir(exist_ok=True)
        if isinstance(expected, OracleError):
            with pytest.raises(SafepatchError) as caught:
                safepatch_merge(recipe, out, **options)
            assert caught.value.status == expected.status, f"{label}: {caught.value}, not {expected}"
            assert list(out.parent.iterdir()) == [], label
        else:
            safepatch_merge(recipe, out, **options)
            compare(out, expected, label)
            trees.append(tree(out))
            if number == 0:
                check_layout(out, recipe)
    assert all(other == trees[0] for other in trees), "one recipe, other bytes"


def available_isas() -> list[str]:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return ["scalar", *(["avx2"] if "avx2" in flags else []), *(["avx512"] if "avx512bw" in flags else [])]


MERGE_ALL = """
import sys
from safepatch_core import merge
chunk = int(sys.argv[1]) or None
for folder in sys.argv[2:]:
    merge(folder + "/in/recipe.yaml", folder + "/out", backend="cpu", threads=2, chunk_entries=chunk)
"""


@pytest.mark.parametrize("isa", ("scalar", "avx2", "avx512"))
@pytest.mark.parametrize("chunk", (0, 6))
def test_every_instruction_set_gives_the_same_bytes(isa: str, chunk: int, tmp_path: Path) -> None:
    if isa not in available_isas():
        pytest.skip(f"this processor has no {isa}")
    expected = {}
    for seed in range(1000, 1000 + max(12, RECIPES // 4)):
        result = expect(write_random(tmp_path / str(seed) / "in", seed, size=40))
        if isinstance(result, Result):
            expected[tmp_path / str(seed)] = result
    environ = os.environ | {"SAFEPATCH_FORCE_ISA": isa}
    command = [sys.executable, "-c", MERGE_ALL, str(chunk), *map(str, expected)]
    subprocess.run(command, env=environ, check=True)
    for folder, result in expected.items():
        compare(folder / "out", result, f"{isa}, {folder.name}")


@pytest.mark.parametrize("seed", (2000, 2001, 2004))
def test_large_tensors_on_the_command_line(seed: int, tmp_path: Path) -> None:
    recipe = write_random(tmp_path / "in", seed, size=1500)
    expected = expect(recipe)
    assert isinstance(expected, Result)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "safepatch_core", "merge", str(recipe), "-o", str(out)]
    subprocess.run([*command, "--backend", "cpu", "--threads", "2", "--memory-limit", "64MiB"], check=True)
    compare(out, expected, f"seed {seed}")


@pytest.mark.parametrize("scope", ("tensor", "model"))
def test_a_tensor_larger_than_the_memory_limit(scope: str, tmp_path: Path) -> None:
    rows, columns = 2401, 2803  # 27 MB in float32, three times, under 64 MiB
    draw = np.random.default_rng(5)

    def steps() -> Tensor:
        values = draw.integers(-9, 10, rows * columns).astype(np.float32) / np.float32(64)
        return Tensor("F32", (rows, columns), values.tobytes())

    patches = {
        "safety": ({"w": steps()}, {"top": 0.03, "retain": 0.3}),
        "over-safety": ({"w": steps()}, {"kind": "delta", "top": 0.02, "retain": 0.3, "rescale": True}),
    }
    recipe = write_plain(tmp_path / "in", {"w": steps()}, patches, scope=scope)
    out = tmp_path / "out"
    safepatch_merge(recipe, out, backend="cpu", threads=2, memory_limit="64MiB")
    result = oracle.merge(recipe)
    compare(out, result, scope)
    assert all(counts["w"].applied > 10_000 for counts in result.counts.values())


def test_a_square_head_beside_layers_that_fit_only_the_other_way_round(tmp_path: Path) -> None:
    """It is linear whatever the adapter's flag says; one of the random recipes has it."""
    recipe = write_random(tmp_path / "in", 1068, size=40)
    assert '"fan_in_fan_out": true' in (tmp_path / "in/adapter-p_3/adapter_config.json").read_text()
    expected = expect(recipe)
    assert isinstance(expected, Result)
    safepatch_merge(recipe, tmp_path / "out", backend="cpu")
    compare(tmp_path / "out", expected, "a square head")
