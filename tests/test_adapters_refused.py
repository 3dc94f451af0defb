"""What is no adapter of PEFT, or an incomplete one, is named for what it is, with what to do."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.sources import open_source
from safepatch_core.merging.sources.contract import load_alone
from tests.test_sources import BASE, EMBED, Q0, Table, adapter, pair, refuse, save


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(save(tmp_path / "base" / "model.safetensors", BASE).parent)


@pytest.mark.parametrize("shape", [((0,), (0,)), ((0, 4), (6, 0))])
def test_factors_that_zero3_left_empty(
    tmp_path: Path, base: Checkpoint, shape: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    tensors: Table = {f"{Q0}.lora_A.weight": ("F32", shape[0]), f"{Q0}.lora_B.weight": ("F32", shape[1])}
    refuse(base, adapter(tmp_path / "a", tensors), "empty", "ZeRO-3", "zero_to_fp32.py", "lora_A")


def test_a_checkpoint_that_zero3_left_empty(tmp_path: Path, base: Checkpoint) -> None:
    save(tmp_path / "p" / "model.safetensors", {**BASE, "model.layers.0.q.weight": ("F32", (0,))})
    refuse(base, tmp_path / "p", "empty", "ZeRO-3", "tensor 'model.layers.0.q.weight'")


def test_adapters_of_mlx(tmp_path: Path, base: Checkpoint) -> None:
    file = save(tmp_path / "m" / "adapters.safetensors", {"model.layers.0.q.lora_a": ("F32", (4, 2))})
    (tmp_path / "m" / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "num_layers": 1}))
    for path in (file, file.parent):
        with pytest.raises(InputError, match=r"mlx-lm, not of PEFT.*mlx_lm\.fuse"):
            open_source("p", path, None, base, relative_to=None)


@pytest.mark.parametrize("kind", [None, "lora"])
def test_adapters_of_kohya(tmp_path: Path, base: Checkpoint, kind: str | None) -> None:
    table: Table = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": ("F32", (2, 4))}
    file = save(tmp_path / "k" / "some-lora.safetensors", table)
    if kind == "lora":
        file.rename(file.with_name("adapter_model.safetensors"))
        (tmp_path / "k" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        refuse(base, tmp_path / "k", "kohya-ss", "fuse_lora")
    else:
        with pytest.raises(InputError, match="kohya-ss.*fuse_lora"):
            open_source("p", file, kind, base, relative_to=None)  # type: ignore[arg-type]


def test_weights_without_their_config(tmp_path: Path, base: Checkpoint) -> None:
    file = save(tmp_path / "a.safetensors", pair())
    refuse(base, file, "an adapter without its config", "adapter_config.json")


def test_the_file_of_weights_stands_for_its_folder(tmp_path: Path, base: Checkpoint) -> None:
    file = adapter(tmp_path / "a") / "adapter_model.safetensors"
    source = open_source("p", file, None, base, relative_to=None)
    assert source.kind == "lora" and source.config is not None and list(source.shapes) == ["model.layers.0.q.weight"]


def test_a_config_left_beside_a_full_checkpoint(tmp_path: Path, base: Checkpoint) -> None:
    root = adapter(tmp_path / "a")
    save(root / "model.safetensors", BASE)
    assert open_source("p", root, None, base, relative_to=None).kind == "lora"
    (root / "adapter_model.safetensors").unlink()
    source = open_source("p", root, None, base, relative_to=None)
    assert source.kind == "checkpoint" and "model.norm.weight" in source.shapes


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("LOHA", "merge_and_unload makes a checkpoint"),
        ("OFT", "merge_and_unload makes a checkpoint"),
        ("IA3", "merge_and_unload makes a checkpoint"),
        ("PREFIX_TUNING", "changes no weights"),
        ("XLORA", "changes no weights"),
    ],
)
def test_other_methods_say_what_to_do(tmp_path: Path, base: Checkpoint, kind: str, words: str) -> None:
    root = adapter(tmp_path / "a", peft_type=kind)
    refuse(base, root, f"unsupported peft_type: found {kind}, expected LORA, VERA", words)


EXPERTS = "base_model.model.m.experts"


def stacked(key: str = EXPERTS, experts: int = 3, rank: int = 2, out: int = 4, into: int = 5) -> Table:
    size = experts * rank
    return {f"{key}.lora_A.weight": ("F32", (size, into)), f"{key}.lora_B.weight": ("F32", (out, size))}


@pytest.mark.parametrize(
    ("tensors", "options", "words"),
    [
        (stacked(out=7), {}, ["another base", "lora_B [7, 6]", "m.experts.up [3, 4, 5]"]),
        (stacked(experts=4), {}, ["another base", "lora_A [8, 5]"]),
        (stacked(), {"target_parameters": ["experts.gate"]}, ["no tensor 'm.experts.gate'", "all experts in one"]),
        (stacked(), {"target_parameters": ["experts.up", "experts.same"]}, ["fits several parameters"]),
        (stacked(into=4), {"target_parameters": ["experts.square"]}, ["square experts", "config.json"]),
        (stacked(), {"target_parameters": [f"experts.p{i}" for i in range(7)]}, ["at most 6"]),
        (stacked(), {"target_parameters": "experts.up"}, ["target_parameters", "a list of names"]),
        (pair(), {}, ["the file has no factors of them"]),
        (
            {**stacked(), f"{EXPERTS}.lora_magnitude_vector": ("F32", (4,))},
            {"use_dora": True},
            ["not of a parameter's factors"],
        ),
    ],
)
def test_experts_that_do_not_fit(tmp_path: Path, tensors: Table, options: dict[str, Any], words: list[str]) -> None:
    shapes = {"up": (3, 4, 5), "same": (3, 4, 5), "square": (3, 4, 4)}
    table: Table = {f"m.experts.{name}": ("F32", shape) for name, shape in shapes.items()}
    base = open_checkpoint(save(tmp_path / "base.safetensors", {**BASE, **table}))
    root = adapter(tmp_path / "a", tensors, options={"target_parameters": ["experts.up"], **options})
    refuse(base, root, *words)


ROWS = f"{EMBED}.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("tensors", "indices", "words"),
    [
        ({ROWS: ("F32", (2, 4))}, [1], ["other rows than trainable_token_indices names", "found [2, 4]"]),
        ({ROWS: ("F32", (2, 4))}, [1, 1], ["each row once"]),
        ({ROWS: ("F32", (2, 4))}, [1, -1], ["a list of rows, from 0"]),
        ({ROWS: ("F32", (2, 4))}, {"lm_head": [1, 2]}, ["trainable_token_indices of model.embed_tokens", "null"]),
        ({ROWS: ("F32", (2, 5))}, [1, 2], ["found [10, 5]", "expected [10, 4]"]),
        ({ROWS: ("F32", (2, 4))}, [1, 10], ["found [11, 4]", "expected [10, 4]", "rows: common"]),
        (pair(), [1], ["no trained rows"]),
        (
            {
                ROWS: ("F32", (1, 4)),
                f"{EMBED}.lora_A.weight": ("F32", (2, 4)),
                f"{EMBED}.lora_B.weight": ("F32", (10, 2)),
            },
            [1],
            ["both factors and trained rows"],
        ),
    ],
)
def test_trained_rows_that_do_not_fit(
    tmp_path: Path, base: Checkpoint, tensors: Table, indices: Any, words: list[str]
) -> None:
    refuse(base, adapter(tmp_path / "a", tensors, options={"trainable_token_indices": indices}), *words)


VERA: Table = {
    f"{Q0}.vera_lambda_b": ("F32", (6,)),
    f"{Q0}.vera_lambda_d": ("F32", (3,)),
    "base_model.vera_A": ("F32", (3, 4)),
    "base_model.vera_B": ("F32", (6, 3)),
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_model.vera_A": None, "base_model.vera_B": None}, ["not saved", "save_projection: true"]),
        ({"base_model.vera_A": ("F32", (3, 3))}, ["another base", "vera_A [3, 3]", "room for [6, 4]"]),
        ({"base_model.vera_B": ("F32", (5, 3))}, ["another base", "vera_B [5, 3]"]),
        ({f"{Q0}.vera_lambda_d": ("F32", (2,))}, ["another base", "rank 2"]),
        ({f"{Q0}.vera_lambda_b": None}, ["vera_lambda_d without its other half"]),
        ({f"{Q0}.vera_lambda_b": ("F32", (7,))}, ["another base", "room for [7, 0]"]),
    ],
)
def test_vera_that_does_not_fit(tmp_path: Path, base: Checkpoint, changes: dict[str, Any], words: list[str]) -> None:
    tensors: Table = {name: value for name, value in {**VERA, **changes}.items() if value is not None}
    refuse(base, adapter(tmp_path / "a", tensors, peft_type="VERA", lora_alpha=None), *words)


@pytest.mark.parametrize(
    ("weight", "indices", "words"),
    [
        (("F32", (2,)), ("I32", (2, 3)), ["I32 [2, 3]", "expected I32 [2, 2]"]),
        (("F32", (2,)), None, ["shira_weight without its other half"]),
        (("F32", (2, 1)), ("I32", (2, 2)), ["expected 1 dimension"]),
    ],
)
def test_shira_that_does_not_fit(
    tmp_path: Path, base: Checkpoint, weight: Any, indices: Any, words: list[str]
) -> None:
    tensors: Table = {f"{Q0}.shira_weight": weight}
    tensors |= {} if indices is None else {f"{Q0}.shira_indices": indices}
    refuse(base, adapter(tmp_path / "a", tensors, peft_type="SHIRA", lora_alpha=None), *words)


@pytest.mark.parametrize("place", [[6, 0], [0, 4], [-1, 0]])
def test_shira_places_outside_of_the_tensor(tmp_path: Path, base: Checkpoint, place: list[int]) -> None:
    indices = np.array([[0, place[0]], [1, place[1]]], "<i4")
    tensors: Table = {f"{Q0}.shira_weight": ("F32", (2,)), f"{Q0}.shira_indices": ("I32", indices)}
    source = open_source(
        "p", adapter(tmp_path / "a", tensors, peft_type="SHIRA", lora_alpha=None), None, base, relative_to=None
    )
    found = source.lookup(base.tensors["model.layers.0.q.weight"], "error")
    assert found is not None
    with (
        closing(Inputs(source.checkpoints)) as inputs,
        pytest.raises(InputError, match="outside of the base's tensor"),
    ):
        load_alone(found, inputs, 0, 24)


def test_dora_without_magnitudes(tmp_path: Path, base: Checkpoint) -> None:
    magnitude: Table = {f"{Q0}.lora_magnitude_vector": ("F32", (5,))}
    refuse(base, adapter(tmp_path / "a", options={"use_dora": True}), "no lora_magnitude_vector")
    refuse(base, adapter(tmp_path / "b", {**pair(), **magnitude}, use_dora=True), "found [5], expected [6]")
