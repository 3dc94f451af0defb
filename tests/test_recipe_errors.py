"""Recipes and patches that must be refused: the exit status, one clear line, and nothing created."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from safepatch_core.commands.cli import main
from safepatch_core.errors import UsageError
from safepatch_core.merging.recipe import parse_recipe
from tests.oracle import Tensor, save_file
from tests.recipes import write_plain

Refusal = Callable[[Path, int], str]


class Gone:
    """Stands for a key that is left out."""

    def __repr__(self) -> str:
        return "left out"


GONE = Gone()


def run_merge(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit status of `safepatch merge RECIPE`, with its output in `out` beside the recipe."""
    command = ["safepatch", "merge", str(recipe), "-o", str(recipe.parent / "out"), "--quiet"]
    monkeypatch.setattr(sys, "argv", command)
    try:
        return main()
    except SystemExit as e:
        return e.code


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refusal:
    """Runs `safepatch merge` on a recipe that must fail with `status`; its one line on stderr."""

    def run(recipe: Path, status: int) -> str:
        before = sorted(recipe.parent.iterdir()) if recipe.parent.is_dir() else []
        code = run_merge(recipe, monkeypatch)
        stdout, stderr = capfd.readouterr()
        assert code == status, stderr
        assert stdout == ""
        assert stderr.endswith("\n") and len(stderr.splitlines()) == 1, stderr
        assert "Traceback" not in stderr and stderr.strip().isprintable()
        assert (sorted(recipe.parent.iterdir()) if recipe.parent.is_dir() else []) == before, "left something"
        return stderr

    return run


def tensor(values: Any, dtype: str = "F32") -> Tensor:
    numpy_dtype = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "BOOL": "?"}[dtype]
    array = np.array(values, numpy_dtype)
    return Tensor(dtype, array.shape, array.tobytes())


def two_by_three() -> Tensor:
    return tensor([[1, 2, 3], [4, 5, 6]])


def write_valid(root: Path) -> dict[str, Any]:
    """A valid merge on disk; its recipe, to be spoiled."""
    base = {"a.weight": two_by_three(), "b.weight": two_by_three()}
    path = write_plain(root, base, {"safety": (base, {"kind": "delta"}), "other": (base, {"kind": "delta"})})
    recipe: dict[str, Any] = yaml.safe_load(path.read_text())
    return recipe


def test_the_recipe_that_the_others_spoil_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_valid(tmp_path)
    assert not run_merge(tmp_path / "recipe.yaml", monkeypatch)
    assert (tmp_path / "out" / "safepatch.json").is_file()


# Recipes: status 64


TOP_LEVEL: list[tuple[str, Any, tuple[str, ...]]] = [
    ("base", GONE, ()),
    ("base", None, ()),
    ("base", 7, ()),
    ("base", ["base.safetensors"], ()),
    ("base", "", ()),
    ("patches", GONE, ()),
    ("patches", None, ()),
    ("patches", [], ()),
    ("patches", "safety", ()),
    ("patches", {"safety": {"source": "safety.safetensors"}}, ()),
    ("patches", ["safety.safetensors"], ()),
    ("patch", [], ("patches",)),
    ("Combine", "sum", ("combine",)),
    ("combine", "slerp", ("difference", "sum", "ties")),
    ("combine", None, ("difference", "sum", "ties")),
    ("combine", ["sum"], ("difference", "sum", "ties")),
    ("scope", "layer", ("tensor", "model")),
    ("scope", True, ("tensor", "model")),
    ("order", "first", ("retain-first", "select-first")),
    ("nonfinite", "ignore", ("error", "skip")),
    ("missing", "warn", ("error", "skip")),
    ("targets", "mlp", ("linear", "all")),
    ("targets", None, ("linear", "all")),
    ("targets", ["*"], ("linear", "all")),
    ("targets", {"includes": ["*"]}, ("include",)),
    ("targets", {"include": "*"}, ()),
    ("targets", {"include": [3]}, ()),
    ("targets", {"include": ["*"], "exclude": "b*"}, ()),
    ("lambda", 2, ("accumulate: deltas", "combine: ties")),
    ("lambda", "2", ()),
    ("lambda", float("nan"), ()),
    ("lambda_", 1, ()),
    ("seed", -1, ()),
    ("seed", 2**64, ()),
    ("seed", 1.5, ()),
    ("seed", "random", ()),
    ("seed", True, ()),
    ("seed", None, ()),
    ("max_shard_size", "5 parsecs", ()),
    ("max_shard_size", "GB", ()),
    ("max_shard_size", "-5GB", ()),
    ("max_shard_size", "0GB", ()),
    ("max_shard_size", 0, ()),
    ("max_shard_size", "1e3", ()),
    ("max_shard_size", "", ()),
    ("max_shard_size", [5], ()),
    ("max_shard_size", True, ()),
]


@pytest.mark.parametrize(("key", "value", "allowed"), TOP_LEVEL)
def test_top_level_keys(key: str, value: Any, allowed: tuple[str, ...], refused: Refusal, tmp_path: Path) -> None:
    recipe = write_valid(tmp_path)
    recipe.pop(key, None)
    if value is not GONE:
        recipe[key] = value
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    line = refused(tmp_path / "recipe.yaml", 64)
    assert "recipe.yaml" in line
    for word in (key, *allowed):
        assert word in line


PATCH_LEVEL: list[tuple[str, Any, tuple[str, ...]]] = [
    ("name", GONE, ()),
    ("name", None, ()),
    ("name", "", ("a-z0-9_-",)),
    ("name", "Safety", ("a-z0-9_-",)),
    ("name", "two words", ("a-z0-9_-",)),
    ("name", "../up", ("a-z0-9_-",)),
    ("name", "line\n", ("a-z0-9_-",)),
    ("name", "s\u00e9curit\u00e9", ("a-z0-9_-",)),
    ("name", "\u0663", ("a-z0-9_-",)),  # a digit, but not one of 0-9
    ("name", False, ()),
    ("name", 5, ()),
    ("source", GONE, ()),
    ("source", None, ()),
    ("source", 3, ()),
    ("source", "", ()),
    ("kind", "diff", ("checkpoint", "delta", "lora")),
    ("kind", 1, ("checkpoint", "delta", "lora")),
    ("share", 0.1, ("top", "retain")),
    ("top", -0.1, ("0", "1")),
    ("skip", -0.1, ("0", "1")),
    ("skip", 1.1, ("0", "1")),
    ("skip", None, ()),
    ("top", 1.0000001, ("0", "1")),
    ("top", 3, ("0", "1")),
    ("top", float("nan"), ("0", "1")),
    ("top", float("inf"), ("0", "1")),
    ("top", "all", ()),
    ("top", True, ()),
    ("top", None, ()),
    ("top", [0.1], ()),
    ("retain", -0.3, ("0", "1")),
    ("retain", 1.5, ("0", "1")),
    ("retain", float("nan"), ("0", "1")),
    ("retain", "half", ()),
    ("retain", True, ()),
    ("scale", float("nan"), ()),
    ("scale", float("inf"), ()),
    ("scale", float("-inf"), ()),
    ("scale", 1e39, ()),  # infinite in float32
    ("scale", "big", ()),
    ("scale", True, ()),
    ("minus", "", ()),
    ("minus", 3, ()),
    ("rescale", "maybe", ()),
    ("rescale", 2, ()),
    ("rescale", 1.0, ()),
    ("importance", "snip", ("magnitude", "scores", "gradients")),
    ("importance", None, ("magnitude", "scores", "gradients")),
    ("importance", 3, ("magnitude", "scores", "gradients")),
    ("importance", {}, ("scores", "gradients")),
    ("importance", {"score": "other.safetensors"}, ("scores", "gradients")),
    ("importance", {"scores": 3}, ()),
    ("importance", {"scores": "other.safetensors", "gradients": "other.safetensors"}, ()),
    ("importance", {"scores": "other.safetensors", "weight": "base"}, ("weight",)),
    ("importance", {"gradients": "other.safetensors", "weight": "new"}, ("patched", "base", "delta")),
    ("importance", {"weight": "base"}, ("gradients",)),
]


@pytest.mark.parametrize(("key", "value", "allowed"), PATCH_LEVEL)
def test_keys_of_a_patch(key: str, value: Any, allowed: tuple[str, ...], refused: Refusal, tmp_path: Path) -> None:
    recipe = write_valid(tmp_path)
    recipe["patches"][1].pop(key, None)
    if value is not GONE:
        recipe["patches"][1][key] = value
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True))
    line = refused(tmp_path / "recipe.yaml", 64)
    assert "recipe.yaml" in line
    for word in (key, *allowed):
        assert word in line


def test_nothing_retained_can_not_be_rescaled(refused: Refusal, tmp_path: Path) -> None:
    recipe = write_valid(tmp_path)
    recipe["patches"][0] |= {"retain": 0, "rescale": True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    line = refused(tmp_path / "recipe.yaml", 64)
    assert "rescale" in line and "retain" in line


@pytest.mark.parametrize("kind", ["delta", "lora"])
def test_only_checkpoints_are_measured_from_another(kind: str, refused: Refusal, tmp_path: Path) -> None:
    recipe = write_valid(tmp_path)
    recipe["patches"][0] |= {"kind": kind, "minus": "base.safetensors"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "minus goes with kind: checkpoint" in refused(tmp_path / "recipe.yaml", 64)


def test_names_of_patches_are_unique(refused: Refusal, tmp_path: Path) -> None:
    recipe = write_valid(tmp_path)
    recipe["patches"][1]["name"] = "safety"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    line = refused(tmp_path / "recipe.yaml", 64)
    assert "name" in line and "safety" in line


TEXTS: list[tuple[str, bytes, str]] = [
    ("empty", b"", ""),
    ("comment", b"# nothing\n", ""),
    ("scalar", b"just words\n", ""),
    ("list", b"- base: base.safetensors\n", ""),
    ("unclosed", b"base: [base.safetensors\n", "line"),
    ("tab", b"base: base.safetensors\npatches:\n\t- name: safety\n", "line"),
    ("two documents", b"base: base.safetensors\npatches: []\n---\nbase: x\n", ""),
    ("bad utf-8", b"base: base\xff.safetensors\n", ""),
    ("control character", b"base: base\x00.safetensors\n", ""),
    ("json array", b"[]", ""),
    ("unknown anchor", b"base: *nowhere\n", "nowhere"),
    ("duplicate key", b"base: base.safetensors\nbase: other.safetensors\npatches: []\n", "base"),
    (
        "duplicate key of a patch",
        b"base: base.safetensors\npatches:\n- {name: a, source: safety.safetensors, top: 0.1, top: 0.9}\n",
        "top",
    ),
    (
        "terminal escape",
        b'base: base.safetensors\npatches: [{name: a, source: safety.safetensors}]\n"\\e[31mred": 1\n',
        "red",
    ),
    ("number as key", b"base: base.safetensors\n5: five\n", "5"),
    ("list as key", b"base: base.safetensors\n? [a, b]\n: 1\n", ""),
    ("merge key", b"base: base.safetensors\n<<: 5\n", ""),
]


@pytest.mark.parametrize(("what", "text", "word"), TEXTS, ids=[what for what, _, _ in TEXTS])
def test_texts_that_are_no_recipe(what: str, text: bytes, word: str, refused: Refusal, tmp_path: Path) -> None:
    write_valid(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes(text)
    line = refused(tmp_path / "recipe.yaml", 64)
    assert "recipe.yaml" in line and word in line


def test_python_objects_in_yaml_are_not_made(refused: Refusal, tmp_path: Path) -> None:
    write_valid(tmp_path)
    made = tmp_path.parent / f"{tmp_path.name}-made"
    (tmp_path / "recipe.yaml").write_text(f"base: !!python/object/apply:os.mkdir ['{made}']\npatches: []\n")
    refused(tmp_path / "recipe.yaml", 64)
    assert not made.exists()


@pytest.mark.parametrize("depth", (30, 20_000))
def test_deep_yaml_is_refused_quickly(depth: int, refused: Refusal, tmp_path: Path) -> None:
    if depth == 30:  # each anchor doubles the one before it
        lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, depth)]
        text = "\n".join([*lines, "base: base.safetensors", "patches: []"])
    else:
        text = "base: " + "[" * depth + "]" * depth
    write_valid(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    assert len(refused(tmp_path / "recipe.yaml", 64)) < 2000


def test_a_recipe_that_is_not_there(refused: Refusal, tmp_path: Path) -> None:
    assert "nowhere.yaml" in refused(tmp_path / "nowhere.yaml", 64)


def test_a_recipe_that_is_a_directory(refused: Refusal, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "folder" in refused(tmp_path / "folder", 64)


# Inputs: status 65


@pytest.mark.parametrize("where", (("base",), ("patches", 0, "source"), ("patches", 1, "importance", "scores")))
@pytest.mark.parametrize("path", ("./gone", "gone.safetensors", "gone/too/far"))
def test_files_that_are_not_there(where: tuple[Any, ...], path: str, refused: Refusal, tmp_path: Path) -> None:
    recipe = write_valid(tmp_path)
    recipe["patches"][1]["importance"] = {"scores": "other.safetensors"}
    place = recipe
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = path
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "gone" in refused(tmp_path / "recipe.yaml", 65)


def spoiled(tensors: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    """`tensors` with `a.weight` or `b.weight` replaced or, where None, left out."""
    new = tensors | {f"{key}.weight": t for key, t in changes.items() if t is not None}
    return {name: t for name, t in new.items() if changes.get(name.removesuffix(".weight"), t) is not None}


NAN, INF = float("nan"), float("inf")
PATCHES: list[tuple[str, dict[str, Tensor | None], str, tuple[str, ...]]] = [
    ("missing tensor", {"b": None}, "safety.safetensors", ("b.weight",)),
    ("extra tensor", {"c": two_by_three()}, "safety.safetensors", ("c.weight",)),
    ("transposed", {"b": tensor([[1, 2]] * 3)}, "safety.safetensors", ("b.weight", "3, 2", "2, 3")),
    ("flat", {"b": tensor([1] * 6)}, "safety.safetensors", ("b.weight", "6", "2, 3")),
    ("integers", {"b": tensor([[1, 2, 3]] * 2, "I64")}, "safety.safetensors", ("b.weight", "I64")),
    ("booleans", {"b": tensor([[1, 0, 1]] * 2, "BOOL")}, "safety.safetensors", ("b.weight", "BOOL")),
    ("double", {"b": tensor([[1, 2, 3]] * 2, "F64")}, "safety.safetensors", ("b.weight", "F64")),
    ("NaN", {"b": tensor([[1, NAN, 3], [4, NAN, INF]])}, "safety.safetensors", ("b.weight", "1", "3")),
    ("infinity", {"a": tensor([[1, 2, 3], [4, -INF, 6]])}, "safety.safetensors", ("a.weight", "4", "1")),
]


@pytest.mark.parametrize(("what", "change", "file", "words"), PATCHES, ids=[p[0] for p in PATCHES])
@pytest.mark.parametrize("kind", ("delta", "checkpoint"))
def test_patches_that_do_not_fit_the_base(
    kind: str,
    what: str,
    change: dict[str, Tensor | None],
    file: str,
    words: tuple[str, ...],
    refused: Refusal,
    tmp_path: Path,
) -> None:
    base = {"a.weight": two_by_three(), "b.weight": two_by_three()}
    recipe = write_plain(tmp_path, base, {"safety": (spoiled(base, **change), {"kind": kind})})
    line = refused(recipe, 65)
    for word in (file, *words):
        assert word in line


SCORES: list[tuple[str, dict[str, Tensor | None], tuple[str, ...]]] = [
    ("negative", {"b": tensor([[1, 2, -3], [-4, 5, 6]])}, ("b.weight", "negative", "2")),
    ("negative subnormal", {"b": tensor([[1, 2, -1e-45], [4, 5, 6]])}, ("b.weight", "negative", "2")),
    ("NaN", {"b": tensor([[1, 2, 3], [NAN, 5, INF]])}, ("b.weight", "3", "2")),
    ("missing", {"b": None}, ("b.weight",)),
    ("shape", {"b": tensor([[1, 2]] * 3)}, ("b.weight", "3, 2", "2, 3")),
    ("integers", {"b": tensor([[1, 2, 3]] * 2, "I64")}, ("b.weight", "I64")),
]


@pytest.mark.parametrize(("what", "change", "words"), SCORES, ids=[s[0] for s in SCORES])
def test_scores_that_can_not_rank(
    what: str, change: dict[str, Tensor | None], words: tuple[str, ...], refused: Refusal, tmp_path: Path
) -> None:
    base = {"a.weight": two_by_three(), "b.weight": two_by_three()}
    keys = {"kind": "delta", "scores": spoiled(base, **change)}
    line = refused(write_plain(tmp_path, base, {"safety": (base, keys)}), 65)
    for word in ("safety-scores.safetensors", *words):
        assert word in line


def test_negative_scores_stop_even_where_other_entries_are_skipped(refused: Refusal, tmp_path: Path) -> None:
    base = {"a.weight": two_by_three()}
    keys = {"kind": "delta", "scores": {"a.weight": tensor([[1, NAN, 2], [3, 4, -5]])}}
    line = refused(write_plain(tmp_path, base, {"safety": (base, keys)}, nonfinite="skip"), 65)
    assert "negative" in line and "5" in line


@pytest.mark.parametrize("nonfinite", ("error", "skip"))
@pytest.mark.parametrize("dtype", ("F16", "F32"))
def test_overflow_stops_the_merge(nonfinite: str, dtype: str, refused: Refusal, tmp_path: Path) -> None:
    large = {"F16": 65504.0, "F32": 3.4e38}[dtype]
    base = {"a.weight": tensor([[0, 1, large], [1, large, 1]], dtype)}
    patch = {"a.weight": tensor([[0, 1, large], [1, large, 1]], dtype)}
    recipe = write_plain(tmp_path, base, {"safety": (patch, {"kind": "delta"})}, nonfinite=nonfinite)
    line = refused(recipe, 65)
    assert "a.weight" in line and "overflow" in line
    assert "2" in line


def test_double_targets_are_refused(refused: Refusal, tmp_path: Path) -> None:
    base = {"a.weight": tensor([[1, 2]], "F64"), "b.weight": two_by_three()}
    line = refused(write_plain(tmp_path, base, {"safety": (base, {})}), 65)
    assert "a.weight" in line and "F64" in line


def test_names_can_not_drive_a_terminal(refused: Refusal, tmp_path: Path) -> None:
    base = {"a.weight": two_by_three()}
    patch = base | {"\x1b]0;owned\x07\u202e\n.weight": two_by_three()}
    line = refused(write_plain(tmp_path, base, {"safety": (patch, {"kind": "delta"})}), 65)
    assert "owned" in line and r"\x1b" in line


# Adapters


def write_adapter(root: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """An adapter of rank 2 for `a.weight` of 2 x 3; the recipe that merges it."""
    base = {"a.weight": two_by_three(), "b.weight": two_by_three()}
    recipe = write_plain(root, base, {"safety": (None, {"source": "adapter"})})
    (root / "adapter").mkdir()
    good = {"lora_A": tensor([[1, 2, 3]] * 2), "lora_B": tensor([[1, 2]] * 2)}
    if tensors is None:
        tensors = {f"base_model.model.a.{part}.weight": t for part, t in good.items()}
    save_file(root / "adapter" / "adapter_model.safetensors", tensors)
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "bias": "none",
        "target_modules": ["a"],
    } | config
    settings = {key: value for key, value in settings.items() if value is not GONE}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    return recipe


def test_the_adapter_that_the_others_spoil_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not run_merge(write_adapter(tmp_path), monkeypatch)
    assert (tmp_path / "out" / "safepatch.json").is_file()


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "LOHA"),
    ({"peft_type": "IA3"}, "IA3"),
    ({"peft_type": GONE}, "peft_type"),
    ({"use_dora": True}, "dora"),
    ({"r": GONE}, "rank"),
    ({"r": 0}, "json: r:"),
    ({"r": -2}, "json: r:"),
    ({"r": "2"}, "json: r:"),
    ({"r": 2.5}, "json: r:"),
    ({"r": 3}, "rank"),
    ({"lora_alpha": "4"}, "lora_alpha"),
    ({"lora_alpha": NAN}, "lora_alpha"),
    ({"rank_pattern": {"a": 1}}, "rank"),
    ({"rank_pattern": {"a": 0}}, "rank_pattern"),
    ({"rank_pattern": ["a"]}, "rank_pattern"),
    ({"rank_pattern": {"(": 2}}, "rank_pattern"),
    ({"alpha_pattern": {"a": "x"}}, "alpha_pattern"),
    ({"use_rslora": "yes"}, "use_rslora"),
]


@pytest.mark.parametrize(("config", "word"), CONFIGS, ids=[str(c) for c, _ in CONFIGS])
def test_adapter_configs_that_are_refused(
    config: dict[str, Any], word: str, refused: Refusal, tmp_path: Path
) -> None:
    line = refused(write_adapter(tmp_path, **config), 65)
    assert "adapter" in line and word.lower() in line.lower()


A, B = "base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight"
TABLES: list[tuple[str, dict[str, Tensor], str]] = [
    ("no B", {A: tensor([[1, 2, 3]] * 2)}, A),
    ("no A", {B: tensor([[1, 2]] * 2)}, B),
    ("nothing", {}, "adapter"),
    ("other rows", {A: tensor([[1, 2, 3]] * 2), B: tensor([[1, 2]] * 5)}, "a.weight"),
    ("other columns", {A: tensor([[1, 2, 3, 4]] * 2), B: tensor([[1, 2]] * 2)}, "a.weight"),
    ("ranks differ", {A: tensor([[1, 2, 3]] * 2), B: tensor([[1, 2, 3]] * 2)}, "rank"),
    ("three dimensions", {A: tensor([[[1, 2, 3]] * 2]), B: tensor([[1, 2]] * 2)}, "lora_A"),
    ("integers", {A: tensor([[1, 2, 3]] * 2, "I64"), B: tensor([[1, 2]] * 2)}, "I64"),
    ("NaN", {A: tensor([[1, 2, NAN]] * 2), B: tensor([[1, 2]] * 2)}, "a.weight"),
    (
        "not in the base",
        {A.replace(".a.", ".z."): tensor([[1, 2, 3]] * 2), B.replace(".a.", ".z."): tensor([[1, 2]] * 2)},
        "z",
    ),
    ("other tensors", {A: tensor([[1, 2, 3]] * 2), B: tensor([[1, 2]] * 2), "x.y": tensor([1])}, "x.y"),
    (
        "a bias",
        {
            A: tensor([[1, 2, 3]] * 2),
            B: tensor([[1, 2]] * 2),
            A.replace("lora_A.weight", "bias"): tensor([1]),
        },
        "bias",
    ),
    (
        "a DoRA magnitude",
        {
            A: tensor([[1, 2, 3]] * 2),
            B: tensor([[1, 2]] * 2),
            A.replace("lora_A.weight", "lora_magnitude_vector"): tensor([1, 1]),
        },
        "magnitude",
    ),
]


@pytest.mark.parametrize(("what", "tensors", "word"), TABLES, ids=[t[0] for t in TABLES])
def test_adapter_tensors_that_are_refused(
    what: str, tensors: dict[str, Tensor], word: str, refused: Refusal, tmp_path: Path
) -> None:
    line = refused(write_adapter(tmp_path, tensors), 65)
    assert "adapter" in line and word in line


@pytest.mark.parametrize("text", (b"", b"{", b"[]", b"\xff\xfe", b'{"peft_type": "LORA", "peft_type": "LORA"}'))
def test_adapter_configs_that_are_no_json_object(text: bytes, refused: Refusal, tmp_path: Path) -> None:
    recipe = write_adapter(tmp_path)
    (tmp_path / "adapter" / "adapter_config.json").write_bytes(text)
    assert "adapter_config.json" in refused(recipe, 65)


def test_a_pickled_adapter_is_refused_unread(refused: Refusal, tmp_path: Path) -> None:
    recipe = write_adapter(tmp_path)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    assert "adapter_model" in refused(recipe, 65)


def test_a_checkpoint_is_no_adapter(refused: Refusal, tmp_path: Path) -> None:
    recipe = write_valid(tmp_path)
    recipe["patches"][1]["kind"] = "lora"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "other" in refused(tmp_path / "recipe.yaml", 65)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"accumulate": "deltas", "combine": "ties"}, "accumulate: deltas goes with combine: difference or sum"),
        ({"elect": {"zero": "positive"}}, "elect goes with combine: ties"),
        ({"elect": {"divide": "some"}, "combine": "ties"}, "elect.divide"),
        ({"quota": "ceil"}, "quota"),
        ({"scope": "model", "patches": [{"overrides": [{"names": ["*"], "top": 0.5}]}]}, "goes with scope: tensor"),
        (
            {"scope": "model", "patches": [{"overrides": [{"names": ["*"], "skip": 0}]}]},
            "skip goes with scope: tensor",
        ),
        ({"patches": [{"overrides": [{"names": ["*"]}]}]}, "an override has top, skip, retain or scale"),
        ({"patches": [{"overrides": [{"names": [], "top": 0.5}]}]}, "names"),
        ({"patches": [{"rescale": True, "overrides": [{"names": ["*"], "retain": 0}]}]}, "divides by retain"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], line: str) -> None:
    patches = [{"name": "p", "source": "there", **patch} for patch in keys.pop("patches", [{}])]
    with pytest.raises(UsageError, match=line):
        parse_recipe({"base": "base", "patches": patches, **keys})
