"""What is no adapter of PEFT, or an incomplete one, is named for what it is, with what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint
from safepatch_core.merging.sources import open_source
from tests.test_sources import BASE, Q0, Table, adapter, pair, refuse, save


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


@pytest.mark.parametrize("kind", [None, "checkpoint", "lora"])
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
    refuse(base, file, "an adapter, not a checkpoint", "adapter_config.json")


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
