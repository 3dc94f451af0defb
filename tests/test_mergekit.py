"""mergekit's configurations give mergekit's model here, as far as promised; what can't is refused by key."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from safepatch_core import UsageError, load_recipe, open_checkpoint
from safepatch_core.files.reading import TensorEntry
from safepatch_core.integrations.mergekit import BIT_EQUAL, EQUAL_BUT_TIES, SAME_RULE, _band, read_mergekit
from safepatch_core.merging.recipe import PatchSpec

torch = pytest.importorskip("torch", reason="makes the models")
transformers = pytest.importorskip("transformers", reason="makes the models")
MERGEKIT = (sys.executable, "-m", "mergekit.scripts.run_yaml")
needs_mergekit = pytest.mark.skipif(find_spec("mergekit") is None, reason="mergekit is not installed (extra: peers)")


def make_models(root: Path, dtype: Any) -> Path:
    """A base of three layers and three fine-tunes of it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=199
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(root / "base")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for patch in ("one", "two", "three"):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name].float() + 0.02 * torch.randn(p.shape))
        model.save_pretrained(root / patch)
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, where magnitudes are often equal."""
    return make_models(tmp_path_factory.mktemp("models"), torch.bfloat16)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, where they hardly ever are."""
    return make_models(tmp_path_factory.mktemp("wide"), torch.float32)


def write(root: Path, folder: Path, method: str, *each: dict[str, Any], **top: Any) -> Path:
    """A configuration that merges the first of the fine-tunes, one for each mapping of parameters."""
    names = ("one", "two", "three")[: len(each)]
    config: dict[str, Any] = {"merge_method": method, "base_model": str(root / "base"), "dtype": "float32"}
    config |= {"models": [{"model": str(root / n), "parameters": p} for n, p in zip(names, each, strict=True)]}
    config |= {"out_dtype": "bfloat16", **top}
    path = folder / "mergekit.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path


def bits(entry: TensorEntry) -> np.ndarray[Any, Any]:
    return np.fromfile(
        entry.path, np.uint32 if entry.dtype == "F32" else np.uint16, entry.entries, offset=entry.start
    )


def floats(entry: TensorEntry) -> np.ndarray[Any, Any]:
    found = bits(entry)
    return (found if entry.dtype == "F32" else found.astype(np.uint32) << 16).view(np.float32)


def all_bits(folder: Path) -> dict[str, Any]:
    return {name: bits(entry) for name, entry in open_checkpoint(folder).tensors.items()}


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def both(config: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The bits that safepatch and mergekit give, tensor by tensor, and what safepatch said."""
    ours, theirs = config.with_name("ours"), config.with_name("theirs")
    told = run(sys.executable, "-m", "safepatch_core", "merge", config, "-o", ours, "--backend", "cpu")
    run(*MERGEKIT, config, theirs, "--quiet", "--no-copy-tokenizer")
    a, b = (open_checkpoint(folder).tensors for folder in (ours, theirs))
    assert set(a) <= set(b)
    return {n: bits(t) for n, t in a.items()}, {n: bits(b[n]) for n in a}, told


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> int:
    """Entries with other bits; zeros of either sign are one."""

    def plain(a: np.ndarray[Any, Any]) -> Any:
        return a & np.array((1 << (8 * a.itemsize - 1)) - 1, a.dtype)

    return sum(int(np.count_nonzero((a != theirs[n]) & (plain(a | theirs[n]) != 0))) for n, a in ours.items())


EXACT: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "one model, a weight": ("task_arithmetic", [{"weight": 0.7}], {}),
    "one model, lambda": ("task_arithmetic", [{"weight": 1}], {"parameters": {"lambda": 1.3}}),
    "sums of three": ("task_arithmetic", [{"weight": 0.4}, {"weight": 1.1}, {"weight": -0.3}], {}),
    "gradients and filters": (
        "task_arithmetic",
        [{"weight": [0.1, 0.5, 1.0]}, {"weight": [{"filter": "mlp", "value": [0, 1]}, {"value": "3e-1"}]}],
        {"parameters": {"lambda": 0.5}},
    ),
    "ties of two": ("ties", [{"weight": 1}] * 2, {}),
    "ties with weights": ("ties", [{"weight": 0.5}, {"weight": 0.3}, {"weight": 0.9}], {}),
    "ties that are not divided": ("ties", [{"weight": 0.5}, {"weight": 0.7}], {"parameters": {"normalize": False}}),
    "sums, scaled": ("task_arithmetic", [{"weight": 0.4}, {"weight": 1.1}], {"parameters": {"lambda": 0.3}}),
    "ties with weights, scaled": ("ties", [{"weight": 0.5}, {"weight": 0.3}], {"parameters": {"lambda": 1.7}}),
    "breadcrumbs that drop nothing": ("breadcrumbs", [{"weight": 0.7, "density": 1.0, "gamma": 0.1}], {}),
}


@needs_mergekit
@pytest.mark.parametrize("case", EXACT)
def test_is_bit_equal(models: Path, tmp_path: Path, case: str) -> None:
    method, each, top = EXACT[case]
    ours, theirs, told = both(write(models, tmp_path, method, *each, **top))
    assert differing(ours, theirs) == 0 and differing(ours, all_bits(models / "base")) > 10_000
    assert BIT_EQUAL in told


LAYERS = {"weight": [{"filter": "mlp", "value": [0.2, 1.0]}, {"value": 0.6}]}
NO_TIES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "ties of densities": ("ties", [{"weight": 1, "density": 0.3}, {"weight": 1, "density": [0.2, 0.7]}], {}),
    "breadcrumbs": ("breadcrumbs", [{"weight": 0.7, "density": 0.4, "gamma": 0.05}], {}),
    "breadcrumbs of two": (
        "breadcrumbs",
        [
            LAYERS | {"density": [0.3, 0.9]},
            {"weight": 1.2, "density": 0.65, "gamma": [{"filter": "norm", "value": 0}]},
        ],
        {"parameters": {"lambda": 0.8, "gamma": [0.01, 0.2]}},
    ),
    "breadcrumbs that skip less, for their density": (
        "breadcrumbs",
        [{"weight": 1, "density": 0.9, "gamma": 0.3}],
        {},
    ),
    "breadcrumbs_ties": (
        "breadcrumbs_ties",
        [LAYERS | {"density": 0.5}, {"weight": 0.9, "density": 0.7, "gamma": 0.1}, {"weight": -0.4, "density": 0.2}],
        {"parameters": {"normalize": True}},
    ),
}


@needs_mergekit
@pytest.mark.parametrize("case", NO_TIES)
def test_is_bit_equal_where_no_magnitudes_are(wide: Path, tmp_path: Path, case: str) -> None:
    """The numbers of entries are mergekit's, tensor by tensor, and so are the entries."""
    method, each, top = NO_TIES[case]
    ours, theirs, told = both(write(wide, tmp_path, method, *each, out_dtype="float32", **top))
    assert EQUAL_BUT_TIES in told
    assert differing(ours, theirs) == 0 and differing(ours, all_bits(wide / "base")) > 10_000


@needs_mergekit
@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_take_the_same_magnitudes(models: Path, tmp_path: Path, method: str) -> None:
    """Of the equal ones at a cut others may be taken, and nothing else differs."""
    config = write(models, tmp_path, method, {"weight": 1, "density": 0.37, "gamma": 0.03})
    ours, theirs, told = both(config)
    assert EQUAL_BUT_TIES in told
    base, patched = (open_checkpoint(models / name).tensors for name in ("base", "one"))
    for name, mine in ours.items():
        size = np.abs(floats(patched[name]) - floats(base[name]))
        taken, wanted = (np.sort(size[of != bits(base[name])]) for of in (mine, theirs[name]))
        np.testing.assert_array_equal(taken, wanted)


@needs_mergekit
def test_passthrough_is_a_copy(models: Path, tmp_path: Path) -> None:
    config = tmp_path / "mergekit.yml"
    config.write_text(yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": str(models / "one")}]}))
    ours, theirs, told = both(config)
    assert all(np.array_equal(a, theirs[n]) for n, a in ours.items()) and BIT_EQUAL in told


@needs_mergekit
def test_ties_of_a_density_is_equal_but_for_equal_magnitudes(models: Path, tmp_path: Path) -> None:
    each: list[dict[str, Any]] = [{"weight": 1, "density": 0.3}, {"weight": 1, "density": [0.2, 0.7]}]
    ours, theirs, told = both(write(models, tmp_path, "ties", *each))
    assert EQUAL_BUT_TIES in told
    # As many are selected; only which of those at the cut may differ.
    base = all_bits(models / "base")
    assert differing(ours, theirs) < differing(ours, base) // 20


@needs_mergekit
def test_dare_is_the_same_rule(models: Path, tmp_path: Path) -> None:
    ours, theirs, told = both(write(models, tmp_path, "dare_linear", {"weight": 1, "density": 0.5}))
    assert SAME_RULE in told
    base = all_bits(models / "base")
    mine, yours = differing(ours, base), differing(theirs, base)
    assert abs(mine - yours) < 0.02 * mine


def test_import_writes_the_recipe_that_merge_uses(models: Path, tmp_path: Path) -> None:
    config = write(
        models, tmp_path, "ties", {"weight": [0, 1], "density": 0.5}, {"weight": 1}, tokenizer_source="base"
    )
    told = run(sys.executable, "-m", "safepatch_core", "import", config, "-o", tmp_path / "recipe.yaml")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert EQUAL_BUT_TIES in told and EQUAL_BUT_TIES in (tmp_path / "recipe.yaml").read_text()
    assert (recipe.quota, recipe.elect.zero, recipe.elect.divide) == ("floor", "positive", "weights")
    one = recipe.patches[0]
    assert [one.at(f"model.layers.{i}.mlp.up_proj.weight").scale for i in range(3)] == [0, 0.5, 1]
    assert one.at("model.embed_tokens.weight").scale == one.at("model.norm.weight").scale == 0
    assert {p.at("lm_head.weight").top for p in recipe.patches} == {0.5, 1}
    again = subprocess.run([sys.executable, "-m", "safepatch_core", "import", config, "-o", tmp_path / "recipe.yaml"])
    assert again.returncode == 73


@pytest.mark.parametrize("density", [0.0, 0.01, 0.37, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.05, 0.3, 1.0])
def test_shares_of_breadcrumbs_come_out_as_counts(density: float, gamma: float) -> None:
    for n in (1, 2, 3, 7, 64, 99, 1000, 4097, 2**31 + 1):
        taken = n if density == 1 else int(density * n)
        skipped = 0 if density == 1 or not taken else min(int(gamma * n), n - taken)
        top, skip = _band(density, gamma, n)
        patch = PatchSpec(name="p", source="p", top=top, skip=skip)
        assert patch.quotas(n, "floor") == (skipped + taken, skipped)


def test_plan_and_build_take_a_mergekit_configuration(models: Path, tmp_path: Path) -> None:
    config = write(models, tmp_path, "breadcrumbs", {"weight": 1, "density": 0.4, "gamma": 0.1})
    safepatch = (sys.executable, "-m", "safepatch_core")
    assert EQUAL_BUT_TIES in run(*safepatch, "plan", config, "--backend", "cpu")
    fix, merged, applied = (tmp_path / name for name in ("fix.safetensors", "merged", "applied"))
    assert EQUAL_BUT_TIES in run(*safepatch, "build", config, "-o", fix, "--backend", "cpu")
    run(*safepatch, "merge", config, "-o", merged, "--backend", "cpu")
    assert EQUAL_BUT_TIES in run(*safepatch, "verify", merged, "--recipe", config)
    run(*safepatch, "apply", fix, "--to", models / "base", "-o", applied)
    mine, theirs = all_bits(merged), all_bits(applied)
    assert all(np.array_equal(of, theirs[name]) for name, of in mine.items())


def test_one_slice_over_all_layers_is_a_list_of_models(models: Path, tmp_path: Path) -> None:
    sources = [{"model": str(models / "one"), "layer_range": [0, 3], "parameters": {"weight": 0.5}}]
    slices = [{"sources": sources, "parameters": {"weight": 9}}]
    config = write(models, tmp_path, "task_arithmetic", models=None, slices=slices)
    recipe, promise = read_mergekit(config)
    assert [p["scale"] for p in recipe["patches"]] == [0.5] and promise == BIT_EQUAL
    sources[0]["layer_range"] = [0, 2]
    with pytest.raises(UsageError, match=r"slices: layer_range \[0, 2\]: expected all layers, \[0, 3\]"):
        read_mergekit(write(models, tmp_path, "task_arithmetic", models=None, slices=slices))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("slerp", {}, "merge_method: slerp has no equal here: it needs norms"),
    ("della", {}, "merge_method: della has no equal here: it draws by rank"),
    ("breadcrumbs", {"parameters": {"gamma": 1.5}}, "gamma: found 1.5, expected 0 to 1"),
    ("breadcrumbs", {"parameters": {"rescale": True, "density": 0.5}}, "rescale: breadcrumbs is not rescaled"),
    ("mystery", {}, "merge_method: unknown: 'mystery'"),
    ("ties", {"dtype": "bfloat16"}, "dtype: found bfloat16: only float32 arithmetic"),
    ("ties", {"out_dtype": None}, "out_dtype: the output keeps the base's dtype: expected out_dtype: bfloat16"),
    ("ties", {"base_model": None}, "base_model: ties needs one"),
    ("ties", {"tokenizer_source": "union"}, "tokenizer_source: not carried over"),
    ("ties", {"chat_template": "auto"}, "chat_template: not carried over"),
    ("ties", {"modules": {}}, "modules: models of several modules"),
    ("task_arithmetic", {"parameters": {"normalize": True}}, "normalize: task_arithmetic is not divided"),
    ("ties", {"parameters": {"lambda": {"value": 2, "filter": "mlp"}}}, "lambda: differs from tensor to tensor"),
    ("dare_ties", {"parameters": {"normalize": True}}, "normalize: of dare_ties, weights that differ from 1"),
]


@pytest.mark.parametrize(("method", "top", "line"), REFUSED)
def test_what_has_no_equal_is_refused_by_key(
    models: Path, tmp_path: Path, method: str, top: dict[str, Any], line: str
) -> None:
    config = write(models, tmp_path, method, {"weight": 0.5}, {"weight": 0.7}, **top)
    with pytest.raises(UsageError) as raised:
        read_mergekit(config)
    assert f"{config}: {line}" in str(raised.value)


def test_adapters_and_missing_weights_are_refused(models: Path, tmp_path: Path) -> None:
    config = write(models, tmp_path, "ties", {"density": 0.5})
    with pytest.raises(UsageError, match="weight: .* has none for lm_head.weight"):
        read_mergekit(config)
    config.write_text(config.read_text().replace(f"{models}/one", f"{models}/one+adapter"))
    with pytest.raises(UsageError, match="an adapter is a patch of its own here"):
        read_mergekit(config)
