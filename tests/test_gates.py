"""Gates: a patch has a tensor or not, by the cosine of two deltas; the same bits however the sums are cut."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from safepatch_core import build, merge, plan, verify
from safepatch_core.commands.cli import cli
from safepatch_core.errors import InputError, UsageError
from safepatch_core.fixes.apply import apply
from safepatch_core.merging import rates
from safepatch_core.merging.api import cosines, describe
from safepatch_core.merging.gates import Sum
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.recipe import parse_recipe
from safepatch_core.spec import LANES
from tests import oracle
from tests.oracle import Tensor, load_checkpoint
from tests.recipes import write_plain

ENGINES = ("oracle", "reference", "cpu")


def f32(*values: float) -> Tensor:
    return Tensor("F32", (len(values),), np.array(values, "<f4").tobytes())


def run(engine: str, recipe: Path, **options: Any) -> dict[str, list[float]]:
    """The tensors of the merge."""
    if engine == "oracle":
        merged = oracle.merge(recipe).tensors
    else:
        out = recipe.parent / f"out-{engine}"
        merge(recipe, out, backend=engine, **options)
        merged = load_checkpoint(out)
    return {name: oracle.to_f32(t).tolist() for name, t in merged.items()}


def told(out: Path, patch: int) -> dict[str, float]:
    """The cosines in a manifest."""
    tensors = json.loads((out / "safepatch.json").read_text())["patches"][patch]["tensors"]
    return {name: facts["cosine"] for name, facts in tensors.items()}


BASE = {"along": f32(0, 0), "apart": f32(0, 0), "against": f32(0, 0)}
TUNED = {"along": f32(1, 2), "apart": f32(1, 2), "against": f32(1, 2)}
SAFETY = {"along": f32(2, 4), "apart": f32(2, -1), "against": f32(-1, -2)}


def gated(root: Path, gate: dict[str, Any], **keys: Any) -> Path:
    patches = {"tuned": (TUNED, {"kind": "delta"}), "safety": (SAFETY, {"kind": "delta", "gate": gate})}
    return write_plain(root, BASE, patches, **({"targets": "all", "combine": "sum"} | keys))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("gate", "opened"),
    [
        ({"below": 0.5}, {"apart", "against"}),
        ({"below": 0.0}, {"against"}),  # 0 itself is not below it
        ({"least": 0.0}, {"along", "apart"}),
        ({"least": 1.0}, {"along"}),
        ({"least": -0.5, "below": 0.5}, {"apart"}),
    ],
)
def test_a_patch_has_the_tensors_whose_cosine_opens_its_gate(
    engine: str, gate: dict[str, Any], opened: set[str], tmp_path: Path
) -> None:
    found = run(engine, gated(tmp_path, {"patch": "tuned", **gate}))
    for name, tuned in TUNED.items():
        step = oracle.to_f32(SAFETY[name]) if name in opened else np.zeros(2)
        assert found[name] == (oracle.to_f32(tuned) + step).tolist()


@pytest.mark.parametrize("engine", ENGINES)
def test_two_gates_at_one_threshold_share_the_tensors_as_safemerge_does(engine: str, tmp_path: Path) -> None:
    above, below = {"patch": "safety", "least": 0.35}, {"patch": "safety", "below": 0.35}
    patches: dict[str, Any] = {
        "tuned": (TUNED, {"kind": "delta", "gate": above}),
        "part": (TUNED, {"kind": "delta", "gate": below, "scale": 0.5}),
        "safety": (SAFETY, {"kind": "delta", "gate": {"patch": "tuned", "below": 0.35}, "scale": 0.25}),
    }
    found = run(engine, write_plain(tmp_path, BASE, patches, targets="all", combine="sum"))
    assert found == {"along": [1, 2], "apart": [0.5 + 0.5, 1 - 0.25], "against": [0.5 - 0.25, 1 - 0.5]}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_shut_gate_leaves_the_entries_to_others_and_n_as_it_is(engine: str, tmp_path: Path) -> None:
    recipe = gated(tmp_path, {"patch": "tuned", "below": -0.5}, combine="difference", scope="model")
    data = yaml.safe_load(recipe.read_text())
    data["patches"][1]["top"] = 1 / 6  # one entry of all six, though only two are left to choose from
    recipe.write_text(yaml.safe_dump(data))
    assert run(engine, recipe) == {"along": [1, 2], "apart": [1, 2], "against": [1, 0]}


def large(root: Path, n: int, **keys: Any) -> Path:
    rng = np.random.default_rng(3)

    def noise(dtype: str) -> Tensor:
        values = rng.standard_normal(n).astype(np.float32) * np.float32(0.1)
        return Tensor(dtype, (n,), oracle.from_f32(values, dtype))

    base = {"w": noise("BF16"), "v": noise("F16")}
    patches = {
        "tuned": ({name: noise(t.dtype) for name, t in base.items()}, {"kind": "checkpoint"}),
        "safety": (
            {name: noise("F32") for name in base},
            {"kind": "delta", "gate": {"patch": "tuned", "least": -1.0}},
        ),
    }
    return write_plain(root, base, patches, targets="all", **keys)


def test_a_cosine_has_the_same_bits_on_every_engine_chunk_and_by_the_contracts_text(tmp_path: Path) -> None:
    n = 2 * 65536 + LANES + 77
    recipe = large(tmp_path, n)
    merge(recipe, tmp_path / "whole", backend="cpu")
    merge(recipe, tmp_path / "chunked", backend="reference", chunk_entries=9999)
    found = told(tmp_path / "whole", 1)
    assert told(tmp_path / "chunked", 1) == found
    for name, t in load_checkpoint(tmp_path / "base.safetensors").items():
        tuned = load_checkpoint(tmp_path / "tuned.safetensors")[name]
        a = (oracle.to_f32(tuned) - oracle.to_f32(t)).astype(np.float64)
        b = oracle.to_f32(load_checkpoint(tmp_path / "safety.safetensors")[name]).astype(np.float64)
        product, first, second = (oracle.lane_sum(x * y) for x, y in ((a, b), (a, a), (b, b)))
        assert found[name] == product / math.sqrt(first * second)
        assert found[name] == pytest.approx(math.fsum(a * b) / math.sqrt(math.fsum(a * a) * math.fsum(b * b)))


def test_a_sum_is_added_up_lane_by_lane() -> None:
    terms = np.zeros(2 * LANES + 3)
    terms[[0, LANES, 2 * LANES]] = 1, 2.0**-53, 2.0**-53  # each alone is lost beside 1
    terms[[1, LANES + 1]] = 2.0**-53, 2.0**-53  # but not in a lane of their own
    sum_ = Sum()
    for at in range(0, len(terms), LANES):
        sum_.add(terms[at : at + LANES])
    assert sum_.total == oracle.lane_sum(terms) == 1 + 2.0**-52
    assert sum(terms.tolist()) != sum_.total  # the order shows


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_patch_lacks_has_no_cosine_and_that_is_zero(engine: str, tmp_path: Path) -> None:
    some = {"along": SAFETY["along"]}
    patches = {
        "tuned": (TUNED, {"kind": "delta", "gate": {"patch": "safety", "below": 0.5}}),
        "safety": (some, {"kind": "delta"}),
    }
    recipe = write_plain(tmp_path, BASE, patches, targets="all", combine="sum", missing="skip")
    assert run(engine, recipe) == {"along": [2, 4], "apart": [1, 2], "against": [1, 2]}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_tensor_that_the_patch_leaves_alone_is_not_its_own(engine: str, tmp_path: Path) -> None:
    """Else a patch would stop the merge for changing nothing, because its only open tensor is one of zeros."""
    safety = SAFETY | {"apart": f32(0, 0), "against": f32(3, 6)}
    gate = {"patch": "tuned", "below": 0.5}
    patches = {"tuned": (TUNED, {"kind": "delta"}), "safety": (safety, {"kind": "delta", "gate": gate})}
    recipe = write_plain(tmp_path, BASE, patches, targets="all", combine="sum")
    assert run(engine, recipe) == {name: [1, 2] for name in TUNED}


def test_a_gate_that_is_shut_everywhere_is_said_and_stops_nothing(tmp_path: Path) -> None:
    recipe = gated(tmp_path, {"patch": "tuned", "below": -1.0})
    result = merge(recipe, tmp_path / "out", backend="cpu")
    assert "patch safety changes nothing: its gate is shut for all 3 targets" in result.warnings
    assert result.counts["safety"] == {"entries": 6, "eligible": 0, "selected": 0, "applied": 0}
    assert verify(tmp_path / "out", recipe).ok


def test_plan_says_how_many_tensors_a_gate_leaves(tmp_path: Path) -> None:
    made = plan(gated(tmp_path, {"patch": "tuned", "below": 0.5}))
    assert "the gate of patch safety is open for 2 of 3 targets" in made.notes
    assert made.recipe.written()["patches"][1]["gate"] == {"patch": "tuned", "below": 0.5}
    assert "gate" not in made.recipe.written()["patches"][0]


def test_the_plan_counts_what_gates_read_and_how_long_that_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, opened, close = large(tmp_path, 70_000), [], Inputs.close

    def counted(inputs: Inputs) -> None:
        opened.append(inputs.bytes_read)
        close(inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Inputs, "close", counted)
        made = plan(of, backend="cpu")
    each = 70_000 * (2 + 2 + 4)  # the base, which is taken from the one patch, and the other's deltas
    assert sorted(opened) == [each, each] and made.gate_bytes == 2 * each
    told = describe(made)
    assert told["gates"] == {"entries": 140_000, "bytes_read": 2 * each}
    assert merge(of, tmp_path / "out", backend="cpu").bytes_read == told["bytes_read"]

    known = dict.fromkeys(rates.NAMES, 1e12) | {rates.STARTUP: 0.0, rates.STALLS: 1.0, rates.CORES: 16.0}
    by_gates = rates.predict(told, known | {rates.GATE: 1e3}, cached=1.0)
    assert by_gates == pytest.approx(140_000 / (8 * 1e3), rel=1e-3)
    disk = known | {rates.DISK_READ: 1e3}
    assert rates.predict(told, disk) == pytest.approx(told["bytes_read"] / 1e3)
    assert rates.predict(told, disk | {rates.GATE: 1e3}) < rates.predict(told, disk) + by_gates  # both at once


def test_every_two_patches_have_cosines_gates_or_not(tmp_path: Path) -> None:
    made = plan(gated(tmp_path, {"patch": "tuned", "below": -1.0}))
    assert cosines(made) == {"tuned, safety": {"against": -1.0, "along": 1.0, "apart": 0.0}}


def test_cosines_on_the_command_line(tmp_path: Path) -> None:
    recipe = str(gated(tmp_path, {"patch": "tuned", "below": 0.5}))
    told = CliRunner().invoke(cli, ["plan", recipe, "--cosines", "--json"], catch_exceptions=False)
    assert json.loads(told.output)["cosines"] == {"tuned, safety": {"against": -1.0, "along": 1.0, "apart": 0.0}}
    told = CliRunner().invoke(cli, ["plan", recipe, "--cosines"], catch_exceptions=False)
    assert [line.split() for line in told.output.splitlines()[-4:]] == [
        ["tuned,", "safety", "tensor"],
        ["-1.0000", "against"],
        ["1.0000", "along"],
        ["0.0000", "apart"],
    ]
    (tmp_path / "one").mkdir()
    alone = write_plain(tmp_path / "one", BASE, {"tuned": (TUNED, {"kind": "delta"})}, targets="all")
    with pytest.raises(UsageError, match="of two patches"):
        CliRunner().invoke(cli, ["plan", str(alone), "--cosines"], catch_exceptions=False)


@pytest.mark.parametrize("nonfinite", ["error", "skip"])
def test_a_delta_that_is_not_finite_stops_the_merge_or_counts_as_zero(nonfinite: str, tmp_path: Path) -> None:
    bad = TUNED | {"against": f32(math.nan, 2)}
    patches = {
        "tuned": (bad, {"kind": "delta"}),
        "safety": (SAFETY, {"kind": "delta", "gate": {"patch": "tuned", "below": 0.5}}),
    }
    recipe = write_plain(tmp_path, BASE, patches, targets="all", combine="sum", nonfinite=nonfinite)
    if nonfinite == "error":
        with pytest.raises(InputError, match="'against': the delta is NaN or infinite: found 1 entries, the first"):
            plan(recipe)
    else:
        assert run("cpu", recipe) == run("oracle", recipe)
        assert told(tmp_path / "out-cpu", 1)["against"] == pytest.approx(-4 / (2 * math.sqrt(5)))


def test_a_fix_of_a_gated_merge_applies_to_the_same_bytes(tmp_path: Path) -> None:
    recipe = gated(tmp_path, {"patch": "tuned", "below": 0.5})
    merge(recipe, tmp_path / "merged", backend="cpu")
    build(recipe, tmp_path / "fix.safetensors", backend="cpu")
    apply(tmp_path / "fix.safetensors", tmp_path / "base.safetensors", tmp_path / "fixed")
    assert load_checkpoint(tmp_path / "fixed") == load_checkpoint(tmp_path / "merged")


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ({"patch": "safety", "below": 0.5}, "another patch of the recipe"),
        ({"patch": "nobody", "below": 0.5}, "there is tuned"),
        ({"patch": "tuned"}, "least or below"),
        ({"patch": "tuned", "least": 0.5, "below": 0.5}, "least is the lower one"),
        ({"patch": "tuned", "below": 1.5}, "1"),
    ],
)
def test_a_gate_that_says_nothing_is_refused(gate: dict[str, Any], words: str) -> None:
    patches = [{"name": "tuned", "source": "a"}, {"name": "safety", "source": "b", "gate": gate}]
    with pytest.raises(UsageError, match=words):
        parse_recipe({"base": "base", "patches": patches})


def test_the_lanes_of_the_contract_are_those_of_the_oracle() -> None:
    assert LANES == 4096
