"""Names of patches and the base's: wrappers, one exchange of prefixes, aliases; else refused, never guessed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from safepatch_core import merge, plan
from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint
from safepatch_core.files.header import make_header
from safepatch_core.merging.names import Exchange, resolve
from tests.oracle import Tensor, load_checkpoint, save_file

Table = Mapping[str, tuple[int, ...]]


def llama(prefix: str = "model.", layers: int = 2, hidden: int = 4) -> dict[str, tuple[int, ...]]:
    table: dict[str, tuple[int, ...]] = {
        f"{prefix}embed_tokens.weight": (9, hidden),
        f"{prefix}norm.weight": (hidden,),
    }
    for i in range(layers):
        table[f"{prefix}layers.{i}.self_attn.q_proj.weight"] = (hidden, hidden)
        table[f"{prefix}layers.{i}.mlp.up_proj.weight"] = (6, hidden)
    return table


def gpt2(prefix: str) -> dict[str, tuple[int, ...]]:
    table: dict[str, tuple[int, ...]] = {f"{prefix}wte.weight": (9, 4), f"{prefix}ln_f.weight": (4,)}
    for i in range(2):
        table[f"{prefix}h.{i}.attn.c_attn.weight"] = (4, 12)
        table[f"{prefix}h.{i}.ln_1.weight"] = (4,)
    return table


def vision(language: str, tower: str, projector: str, head: str) -> dict[str, tuple[int, ...]]:
    table = llama(language) | {f"{tower}encoder.layers.{i}.self_attn.q_proj.weight": (3, 3) for i in range(2)}
    return table | {f"{projector}linear_1.weight": (4, 3), f"{head}lm_head.weight": (9, 4)}


HUB_VISION = vision(
    "language_model.model.", "vision_tower.vision_model.", "multi_modal_projector.", "language_model."
)
NEW_VISION = vision("model.language_model.", "model.vision_tower.vision_model.", "model.multi_modal_projector.", "")


def base_of(tmp_path: Path, table: Table) -> Checkpoint:
    path = tmp_path / "base.safetensors"
    header, ranges = make_header((name, "F32", shape) for name, shape in table.items())
    path.write_bytes(header + bytes(max((hi for _, hi in ranges.values()), default=0)))
    return open_checkpoint(path)


def takes(name: str, dimensions: int) -> bool:
    return dimensions >= 2 and "embed" not in name and "lm_head" not in name and "wte" not in name


def exchange(tmp_path: Path, patch: Table, base: Table) -> Exchange:
    return resolve({name: (shape,) for name, shape in patch.items()}, base_of(tmp_path, base), takes, "patch")


HEAD = {"lm_head.weight": (9, 4)}
BERT = {"embeddings.word_embeddings.weight": (9, 4), "encoder.layer.0.attention.self.query.weight": (4, 4)}
CASES: dict[str, tuple[Table, Table, list[str]]] = {
    "the base's": (llama(), llama(), []),
    "a head beside": (llama() | HEAD, llama(), []),
    "compiled": (
        {f"_orig_mod.{name}": shape for name, shape in llama().items()},
        llama(),
        ["parts of wrappers left aside"],
    ),
    "wrapped within": (
        {name.replace("self_attn", "_checkpoint_wrapped_module.self_attn"): s for name, s in llama().items()},
        llama(),
        ["parts of wrappers left aside"],
    ),
    "sharded, compiled and parallel": (
        {f"module._orig_mod.{n.replace('mlp', '_fsdp_wrapped_module.mlp')}": s for n, s in llama().items()},
        llama(),
        ["parts of wrappers left aside"],
    ),
    "a compiled base": (
        llama(),
        {f"_orig_mod.{name}": shape for name, shape in llama().items()},
        ["parts of wrappers left aside"],
    ),
    "dropped": (gpt2("transformer.") | HEAD, gpt2(""), ["'transformer.' dropped"]),
    "added": (gpt2(""), gpt2("transformer.") | HEAD, ["'transformer.' added"]),
    "swapped": (
        {f"roberta.{n}": s for n, s in BERT.items()},
        {f"bert.{n}": s for n, s in BERT.items()},
        ["'bert.' for 'roberta.'"],
    ),
    "compiled and dropped": (
        {f"_orig_mod.{n}": s for n, s in gpt2("transformer.").items()},
        gpt2(""),
        ["parts of wrappers left aside", "'transformer.' dropped"],
    ),
    "the language model of a vision model": (
        llama("model.language_model."),
        HUB_VISION,
        ["'language_model.model.' for 'model.language_model.'"],
    ),
    "a language model alone": (llama(), NEW_VISION, ["'model.language_model.' for 'model.'"]),
}


@pytest.mark.parametrize("case", CASES)
def test_names_are_found(tmp_path: Path, case: str) -> None:
    patch, base, told = CASES[case]
    found = exchange(tmp_path, patch, base)
    assert list(found.told) == told
    missed = {name for name in patch if found(name) not in base}
    assert missed <= {"lm_head.weight"} and len({found(name) for name in patch}) == len(patch)
    for name in set(patch) - missed:
        assert base[found(name)] == patch[name]


@pytest.mark.parametrize("back", [False, True])
def test_a_vision_model_may_need_an_exchange_for_each_of_its_parts(tmp_path: Path, back: bool) -> None:
    patch, base = (HUB_VISION, NEW_VISION) if back else (NEW_VISION, HUB_VISION)
    found = exchange(tmp_path, patch, base)
    assert {found(name): shape for name, shape in patch.items()} == dict(base)
    assert len(found.told) == 3


def test_what_was_not_asked_for_goes_the_same_way(tmp_path: Path) -> None:
    found = exchange(tmp_path, gpt2("transformer."), gpt2("") | {"position_ids": (1, 4)})
    assert found("transformer.h.0.attn.mask") == "h.0.attn.mask" and found("position_ids") == "position_ids"
    assert found("_orig_mod.transformer.h.7.x") == "h.7.x"


def test_a_grown_vocabulary_is_no_obstacle_and_another_matrix_is(tmp_path: Path) -> None:
    patch = gpt2("transformer.") | {"transformer.wte.weight": (11, 4)}
    found = exchange(tmp_path, patch, gpt2(""))
    assert found.told == ("'transformer.' dropped",) and found("transformer.wte.weight") == "wte.weight"
    found = exchange(tmp_path, patch | {"transformer.h.1.attn.c_attn.weight": (4, 8)}, gpt2(""))
    assert found.told == () and found("transformer.wte.weight") == "transformer.wte.weight"
    assert found.closest == "'transformer.' dropped serves 4 of 6 names, but not 'transformer.h.1.attn.c_attn.weight'"


def test_a_layer_that_the_base_lacks_is_an_obstacle(tmp_path: Path) -> None:
    found = exchange(tmp_path, llama("student.model.", layers=3), llama())
    assert found.told == () and found.closest is not None and "layers.2" in found.closest


def test_layers_are_not_exchanged(tmp_path: Path) -> None:
    patch = {"model.layers.7.self_attn.q_proj.weight": (4, 4)}
    assert exchange(tmp_path, patch, llama()).told == ()


def test_modules_are_not_exchanged(tmp_path: Path) -> None:
    assert exchange(tmp_path, {"score.weight": (2, 4)}, {"classifier.weight": (2, 4)} | llama()).told == ()


def test_two_ways_are_refused(tmp_path: Path) -> None:
    base = llama("encoder.") | llama("decoder.")
    with pytest.raises(InputError, match=r"patch: .*two ways: found .*'decoder\.' added and 'encoder\.' added"):
        exchange(tmp_path, llama(""), base)
    assert exchange(tmp_path, llama("", hidden=5), llama("encoder.", hidden=5) | llama("decoder.")).told == (
        "'encoder.' added",
    )


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    patch = llama() | {f"module.{name}": shape for name, shape in llama().items()}
    with pytest.raises(InputError, match="tensor 'module.model.* two names of it are one tensor"):
        exchange(tmp_path, patch, llama())


def test_many_foreign_names_are_quick(tmp_path: Path) -> None:
    patch = {f"a.layers.{i}.experts.{e}.w1.weight": (1, 1) for i in range(20) for e in range(500)}
    base = {f"b.layers.{i}.experts.{e}.w3.weight": (1, 1) for i in range(20) for e in range(500)}
    base |= {f"b.layers.{i}.experts.{e}.w1.weight": (1, 2) for i in range(20) for e in range(500)}
    assert exchange(tmp_path, patch, base).told == ()


# Merged


def values(table: Table, seed: int = 0) -> dict[str, Tensor]:
    draw = np.random.default_rng(seed)
    return {n: Tensor("F32", s, draw.integers(-9, 9, s).astype("<f4").tobytes()) for n, s in table.items()}


def recipe(root: Path, **patch: Any) -> Path:
    path = root / "recipe.yaml"
    entry = {"name": "p", "source": "patch.safetensors"} | patch
    path.write_text(yaml.safe_dump({"base": "base.safetensors", "patches": [entry]}))
    return path


def told(path: Path) -> tuple[list[str], dict[str, Tensor]]:
    """What the plan and the manifest tell of names, and the output."""
    made = plan(path, backend="reference")
    merge(made, path.parent / "out")
    names = json.loads((path.parent / "out" / "safepatch.json").read_text())["patches"][0]["names"]
    assert all(any(name in note for note in made.notes) for name in names)
    return names, load_checkpoint(path.parent / "out")


def test_checkpoint_reference_and_importance_are_resolved_alike(tmp_path: Path) -> None:
    base = values(gpt2(""))
    patch, before = values(gpt2("transformer."), 1), values(gpt2("model.transformer."), 2)
    scores = {f"_orig_mod.{n}": Tensor("F32", t.shape, np.ones(t.shape, "<f4").tobytes()) for n, t in base.items()}
    for name, tensors in (("base", base), ("patch", patch), ("before", before), ("scores", scores)):
        save_file(tmp_path / f"{name}.safetensors", tensors)
    path = recipe(tmp_path, minus="before.safetensors", importance={"scores": "scores.safetensors"})
    names, out = told(path)
    assert names == ["'transformer.' dropped", "of minus, 'model.transformer.' dropped"]
    name = "h.0.attn.c_attn.weight"
    found, w, a, b = (
        np.frombuffer(t.data, "<f4")
        for t in (out[name], base[name], patch[f"transformer.{name}"], before[f"model.transformer.{name}"])
    )
    assert np.array_equal(found, w + (a - b))
    assert "names of the importance of patch p" in "".join(plan(path, backend="reference").notes)


@pytest.mark.parametrize("module", ["transformer.h.0.attn.c_attn", "model.transformer.h.0.attn.c_attn"])
def test_an_adapter_of_a_live_model(tmp_path: Path, module: str) -> None:
    save_file(tmp_path / "base.safetensors", values(gpt2("")))
    folder = tmp_path / "patch"
    folder.mkdir()
    pair = values(
        {f"base_model.model.{module}.lora_A.weight": (2, 4), f"base_model.model.{module}.lora_B.weight": (12, 2)}
    )
    save_file(folder / "adapter_model.safetensors", pair)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "fan_in_fan_out": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    names, out = told(recipe(tmp_path, source="patch"))
    assert names and out["h.0.attn.c_attn.weight"] != values(gpt2(""))["h.0.attn.c_attn.weight"]


def test_a_shared_tensor_is_found_by_its_other_name(tmp_path: Path) -> None:
    """safetensors saves one of the names of a shared tensor, and notes the others in the header."""
    table = llama() | HEAD
    save_file(tmp_path / "base.safetensors", values(table))
    header, ranges = make_header(
        ((n, "F32", s) for n, s in llama().items()), {"lm_head.weight": "model.embed_tokens.weight", "format": "pt"}
    )
    patch = values(llama(), 1)
    (tmp_path / "patch.safetensors").write_bytes(header + b"".join(patch[name].data for name in ranges))
    path = recipe(tmp_path)
    path.write_text(path.read_text() + "targets: all\n")
    names, out = told(path)
    assert names == [] and out["lm_head.weight"].data == patch["model.embed_tokens.weight"].data


@pytest.mark.parametrize("attention", ["attn", "attention"])
def test_causal_masks_are_no_targets(tmp_path: Path, attention: str) -> None:
    masks: Table = {f"h.0.{attention}.bias": (1, 1, 4, 4), f"h.0.{attention}.masked_bias": ()}
    base = values(gpt2("") | dict(masks))
    save_file(tmp_path / "base.safetensors", base)
    save_file(tmp_path / "patch.safetensors", values(gpt2("transformer."), 1))
    path = recipe(tmp_path)
    path.write_text(path.read_text() + "targets: all\n")
    _, out = told(path)
    assert all(out[name] == base[name] for name in masks)


def test_no_names_in_common_are_refused_with_what_came_closest(tmp_path: Path) -> None:
    save_file(tmp_path / "base.safetensors", values(gpt2("")))
    save_file(
        tmp_path / "patch.safetensors", values(gpt2("transformer.") | {"transformer.h.2.attn.c_attn.weight": (4, 12)})
    )
    with pytest.raises(InputError) as caught:
        plan(recipe(tmp_path), backend="reference")
    message = str(caught.value)
    assert "no tensor of the patch is in the base" in message and "skip" not in message
    assert "'transformer.' dropped serves 6 of 7 names, but not 'transformer.h.2.attn.c_attn.weight'" in message


@pytest.mark.parametrize("before", ["_orig_mod.base_model.model.", "module.base_model.model._orig_mod."])
def test_an_adapter_of_a_wrapped_model(tmp_path: Path, before: str) -> None:
    """PEFT's model compiled or in parallel, or a compiled model in it."""
    save_file(tmp_path / "base.safetensors", values(gpt2("")))
    folder = tmp_path / "patch"
    folder.mkdir()
    factors = {f"{before}h.0.attn.c_attn.lora_A.weight": (2, 4), f"{before}h.0.attn.c_attn.lora_B.weight": (12, 2)}
    save_file(folder / "adapter_model.safetensors", values(factors))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    _, out = told(recipe(tmp_path, source="patch"))
    changed = {n for n, t in values(gpt2("")).items() if out[n] != t}
    assert changed == {"h.0.attn.c_attn.weight"}


@pytest.mark.parametrize("kind", [None, "checkpoint"])
def test_an_unmerged_adapter_in_a_checkpoint_is_named(tmp_path: Path, kind: str | None) -> None:
    table = gpt2("base_model.model.")
    table["base_model.model.h.0.attn.c_attn.base_layer.weight"] = table.pop("base_model.model.h.0.attn.c_attn.weight")
    table |= {f"base_model.model.h.0.attn.c_attn.lora_{side}.default.weight": (2, 2) for side in "AB"}
    save_file(tmp_path / "base.safetensors", values(gpt2("")))
    save_file(tmp_path / "patch.safetensors", values(table))
    with pytest.raises(InputError, match="lora_A.* not merged into it: .*merge_and_unload"):
        plan(recipe(tmp_path, **({"kind": kind} if kind else {})), backend="reference")
