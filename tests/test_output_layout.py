"""What a merge writes has the names that loaders look for, and says what it lacks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from safepatch_core import merge, verify
from safepatch_core.files.checkpoint import open_checkpoint
from tests.oracle import Tensor, save_file

DIFFUSERS = "diffusion_pytorch_model"


def tensors(seed: int = 0) -> dict[str, Tensor]:
    draw = np.random.default_rng(seed)
    names = ("a.weight", "b.weight", "mtp.weight")
    return {name: Tensor("F32", (4, 4), draw.standard_normal((4, 4)).astype("<f4").tobytes()) for name in names}


def shards(
    folder: Path, stem: str, index: str, named: tuple[str, ...] = ("a.weight", "b.weight", "mtp.weight")
) -> None:
    """Two shards; the index names only some of the tensors."""
    folder.mkdir()
    model = tensors()
    files = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file(folder / files[0], {"a.weight": model["a.weight"]})
    save_file(folder / files[1], {name: model[name] for name in ("b.weight", "mtp.weight")})
    weight_map = {name: files[name != "a.weight"] for name in named}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")


def recipe(root: Path, base: str = "base", **options: object) -> Path:
    save_file(root / "patch.safetensors", tensors(1))
    path = root / "recipe.yaml"
    patches = [{"name": "p", "source": "patch.safetensors"}]
    path.write_text(yaml.safe_dump({"base": base, "patches": patches} | options))
    return path


def weights(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if "safetensors" in path.name)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("model.safetensors", "model"),
        ("model.fp16.safetensors", "model"),
        ("whatever.safetensors", "model"),
        (f"{DIFFUSERS}.safetensors", DIFFUSERS),
        (f"{DIFFUSERS}.fp16.safetensors", DIFFUSERS),
    ],
)
@pytest.mark.parametrize("folder", [True, False])
def test_a_single_file_gets_the_name_that_loaders_look_for(
    tmp_path: Path, file: str, name: str, folder: bool
) -> None:
    (tmp_path / "base").mkdir()
    save_file(tmp_path / "base" / file, tensors())
    path = recipe(tmp_path, "base" if folder else f"base/{file}")
    merge(path, tmp_path / "out", backend="reference")
    assert weights(tmp_path / "out") == [f"{name}.safetensors"]
    assert verify(tmp_path / "out", path, backend="reference").ok
    merge(recipe(tmp_path, "base", max_shard_size="100B"), tmp_path / "cut", backend="reference")
    assert weights(tmp_path / "cut") == [
        *(f"{name}-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        f"{name}.safetensors.index.json",
    ]


@pytest.mark.parametrize(
    ("stem", "index", "name"),
    [
        ("model", "model.safetensors.index.json", "model"),
        ("model.fp16", "model.safetensors.index.fp16.json", "model"),
        (DIFFUSERS, f"{DIFFUSERS}.safetensors.index.json", DIFFUSERS),
        (f"{DIFFUSERS}.fp16", f"{DIFFUSERS}.safetensors.index.fp16.json", DIFFUSERS),
    ],
)
def test_shards_keep_their_names_and_the_index_gets_the_default_one(
    tmp_path: Path, stem: str, index: str, name: str
) -> None:
    shards(tmp_path / "base", stem, index)
    path = recipe(tmp_path)
    assert merge(path, tmp_path / "out", backend="reference").warnings == ()
    assert set(weights(tmp_path / "out")) == {
        *(f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)),
        f"{name}.safetensors.index.json",
    }
    verdict = verify(tmp_path / "out", path, backend="reference")
    assert verdict.ok and verdict.tensors == 3


def test_what_the_index_does_not_name_is_copied_and_never_a_target(tmp_path: Path) -> None:
    shards(tmp_path / "base", "model", "model.safetensors.index.json", ("a.weight", "b.weight"))
    path = recipe(tmp_path, targets="all")
    warning, *others = merge(path, tmp_path / "out", backend="reference").warnings
    assert warning == (
        "base: 1 tensors of the shards are not in model.safetensors.index.json, the first 'mtp.weight': "
        "copied, and never a target"
    )
    assert others == []
    out = open_checkpoint(tmp_path / "out")
    with open(out.tensors["mtp.weight"].path, "rb") as file:
        file.seek(out.tensors["mtp.weight"].start)
        assert file.read(64) == tensors()["mtp.weight"].data
    assert verify(tmp_path / "out", path, backend="reference").ok


def test_an_output_that_loaders_cannot_load_is_warned_of(tmp_path: Path) -> None:
    shards(tmp_path / "base", "model", "model.safetensors.index.json")
    config = {"auto_map": {"AutoModelForCausalLM": "modeling_tiny.Tiny"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "modeling_tiny.py").write_text("")
    (tmp_path / "base" / "custom_generate").mkdir()
    path = recipe(tmp_path)
    code = "config.json names code that is not there, to be copied from its origin: modeling_tiny.py"
    assert merge(path, tmp_path / "out", backend="reference").warnings == (
        "folders are not carried along: custom_generate",
        "files that are not carried along: modeling_tiny.py",
        code,
    )
    verdict = verify(tmp_path / "out")
    assert verdict.ok and verdict.warnings == [code]


def test_a_base_without_a_config(tmp_path: Path) -> None:
    save_file(tmp_path / "base.safetensors", tensors())
    result = merge(recipe(tmp_path, "base.safetensors"), tmp_path / "out", backend="reference")
    assert result.warnings == ("the output has no config.json: there is none beside the base",)
    assert verify(tmp_path / "out").warnings == ["there is no config.json, which loaders ask for"]


def test_a_file_in_a_models_folder_takes_its_config_along(tmp_path: Path) -> None:
    shards(tmp_path / "base", "model", "model.safetensors.index.json")
    file = "base/model-00002-of-00002.safetensors"
    result = merge(recipe(tmp_path, file, missing="skip"), tmp_path / "out", backend="reference")
    assert (tmp_path / "out" / "config.json").read_text() == "{}" and weights(tmp_path / "out") == [
        "model.safetensors"
    ]
    assert "model-00001-of-00002.safetensors" in result.warnings[-1]
