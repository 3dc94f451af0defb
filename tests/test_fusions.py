"""Weights joined in one checkpoint and apart in another: the same merge, bit for bit, or refused by their names."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from safepatch_core import merge, plan
from safepatch_core.backends.contract import Bits
from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.sources.dense import Named, fitted
from tests.oracle import Tensor, load_checkpoint, save_file

Tensors = dict[str, Tensor]
L = "model.layers.0."
EXPERTS, HIDDEN, INNER = 3, 6, 4


def f32(rng: np.random.Generator, *shape: int) -> Tensor:
    return Tensor("F32", shape, rng.standard_normal(shape).astype("<f4").tobytes())


def positive(t: Tensor) -> Tensor:
    return Tensor(t.dtype, t.shape, np.abs(np.frombuffer(t.data, "<f4")).tobytes())


def join(*parts: Tensor) -> Tensor:
    return Tensor(
        parts[0].dtype, (sum(p.shape[0] for p in parts), *parts[0].shape[1:]), b"".join(p.data for p in parts)
    )


def stack(parts: list[Tensor]) -> Tensor:
    return Tensor(parts[0].dtype, (len(parts), *parts[0].shape), b"".join(p.data for p in parts))


def turned(t: Tensor) -> Tensor:
    """A matrix, or each of a stack of them, transposed."""
    values = np.frombuffer(t.data, "<f4").reshape(t.shape).swapaxes(-1, -2)
    return Tensor(t.dtype, values.shape, values.tobytes())


def in_turn(one: Tensor, other: Tensor) -> Tensor:
    """Rows of one and of the other, by turns."""
    values = np.stack([np.frombuffer(t.data, "<f4").reshape(t.shape) for t in (one, other)], axis=1)
    return Tensor(one.dtype, (2 * one.shape[0], *one.shape[1:]), values.tobytes())


def names_of(family: str) -> tuple[str, str, str, str]:
    """What gate, up and down are called, and the block that they are in."""
    if family == "mixtral":
        return "w1", "w3", "w2", f"{L}block_sparse_moe."
    return "gate_proj", "up_proj", "down_proj", f"{L}feed_forward." if family == "llama4" else f"{L}mlp."


def apart(family: str, seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    found = {f"{L}self_attn.o_proj.weight": f32(rng, HIDDEN, HIDDEN)}
    if family == "phi":
        found |= {f"{L}self_attn.{p}_proj.weight": f32(rng, 6 if p == "q" else 2, HIDDEN) for p in "qkv"}
        return found | {f"{L}mlp.{p}_proj.weight": f32(rng, INNER, HIDDEN) for p in ("gate", "up")}
    gate, up, down, block = names_of(family)
    for e in range(EXPERTS):
        if family == "gpt_oss":
            found[f"{block}experts.{e}.{gate}.bias"] = f32(rng, INNER)
            found[f"{block}experts.{e}.{up}.bias"] = f32(rng, INNER)
            found[f"{block}experts.{e}.{down}.bias"] = f32(rng, HIDDEN)
        found[f"{block}experts.{e}.{gate}.weight"] = f32(rng, INNER, HIDDEN)
        found[f"{block}experts.{e}.{up}.weight"] = f32(rng, INNER, HIDDEN)
        found[f"{block}experts.{e}.{down}.weight"] = f32(rng, HIDDEN, INNER)
    return found | {f"{block}gate.weight": f32(rng, EXPERTS, HIDDEN)}


def joined(family: str, tensors: Tensors) -> Tensors:
    found = {f"{L}self_attn.o_proj.weight": tensors[f"{L}self_attn.o_proj.weight"]}
    if family == "phi":
        found[f"{L}self_attn.qkv_proj.weight"] = join(*(tensors[f"{L}self_attn.{p}_proj.weight"] for p in "qkv"))
        found[f"{L}mlp.gate_up_proj.weight"] = join(*(tensors[f"{L}mlp.{p}_proj.weight"] for p in ("gate", "up")))
        return found
    gate, up, down, block = names_of(family)
    whole = f"{L}mlp." if family == "mixtral" else block
    of = [{p: tensors[f"{block}experts.{e}.{p}.weight"] for p in (gate, up, down)} for e in range(EXPERTS)]
    rows = in_turn if family == "gpt_oss" else join
    gate_up, downs = stack([rows(expert[gate], expert[up]) for expert in of]), stack([expert[down] for expert in of])
    across = turned if family in ("gpt_oss", "llama4") else lambda t: t
    found |= {f"{whole}experts.gate_up_proj": across(gate_up), f"{whole}experts.down_proj": across(downs)}
    if family == "gpt_oss":
        of = [{p: tensors[f"{block}experts.{e}.{p}.bias"] for p in (gate, up, down)} for e in range(EXPERTS)]
        found[f"{whole}experts.gate_up_proj_bias"] = stack([in_turn(expert[gate], expert[up]) for expert in of])
        found[f"{whole}experts.down_proj_bias"] = stack([expert[down] for expert in of])
    return found | {f"{whole}gate.weight": tensors[f"{block}gate.weight"]}


def save(path: Path, tensors: Tensors, model_type: str | None = "qwen3_moe") -> None:
    path.mkdir()
    save_file(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))


def recipe(root: Path, patch: str, spec: dict[str, Any] | None = None, **options: Any) -> Path:
    path = root / f"{patch}.yaml"
    entry = {"name": "p", "source": patch, "top": 0.5, "retain": 0.7} | (spec or {})
    path.write_text(yaml.safe_dump({"base": "base", "targets": "all", "patches": [entry]} | options))
    return path


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("kind", ["checkpoint", "delta", "minus", "scores"])
@pytest.mark.parametrize("base_joined", [True, False], ids=["joined-base", "base-apart"])
@pytest.mark.parametrize("family", ["qwen", "mixtral", "phi", "llama4", "gpt_oss"])
def test_the_same_bytes_either_way(
    tmp_path: Path, family: str, base_joined: bool, kind: str, chunk: int | None
) -> None:
    """A patch as the base is laid out, and one laid out the other way, merge to the same bytes."""
    layouts: list[Callable[[Tensors], Tensors]] = [lambda tensors: joined(family, tensors), lambda tensors: tensors]
    same, other = layouts if base_joined else layouts[::-1]
    specs: dict[str, dict[str, Any]] = {"checkpoint": {}, "delta": {"kind": "delta"}}
    save(tmp_path / "base", same(apart(family, 0)), family)
    for name, layout in (("same", same), ("other", other)):
        save(tmp_path / name, layout(apart(family, 1)))
        save(tmp_path / f"{name}-scores", layout({n: positive(t) for n, t in apart(family, 2).items()}))
        save(tmp_path / f"{name}-before", layout(apart(family, 3)))
    outs = []
    for name in ("same", "other"):
        specs |= {"minus": {"minus": f"{name}-before"}, "scores": {"importance": {"scores": f"{name}-scores"}}}
        merge(recipe(tmp_path, name, specs[kind]), tmp_path / f"out-{name}", backend="reference", chunk_entries=chunk)
        outs.append(load_checkpoint(tmp_path / f"out-{name}"))
    assert outs[0] == outs[1] and outs[0] != same(apart(family, 0))
    made = plan(recipe(tmp_path, "other"), backend="reference")
    assert made.renamed[0] and "patch p" in made.notes[0] and made.warnings == ()
    assert plan(recipe(tmp_path, "same"), backend="reference").renamed == ((),)
    manifest = json.loads((tmp_path / "out-other" / "safepatch.json").read_text())
    assert manifest["patches"][0]["names"] == list(made.renamed[0])


def refused(root: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(recipe(root, "patch"), backend="reference")
    for word in words:
        assert word in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("laid_out", "model_type"), [("qwen", "gpt_oss"), ("llama4", "qwen3_moe"), ("llama4", None), ("gpt_oss", None)]
)
def test_an_order_of_columns_that_nothing_tells_is_refused_by_name(
    tmp_path: Path, laid_out: str, model_type: str | None
) -> None:
    """gpt-oss with rows as others have them, or columns of gate and up without a family that has such."""
    save(tmp_path / "base", joined(laid_out, apart(laid_out, 0)), model_type)
    save(tmp_path / "patch", apart(laid_out, 1), model_type)
    refused(tmp_path, "experts.0.", "joined in '")


def test_joined_experts_the_other_way_round(tmp_path: Path) -> None:
    """Qwen3-VL's on the hub are [experts, in, out], and [experts, out, in] in memory."""
    of = {seed: joined("qwen", apart("qwen", seed)) for seed in (0, 1)}
    for name, seed in (("base", 0), ("same", 1)):
        save(tmp_path / name, of[seed], "qwen3_vl_moe")
    save(tmp_path / "other", {n: turned(t) if ".experts." in n else t for n, t in of[1].items()}, "qwen3_vl_moe")
    outs = []
    for name in ("same", "other"):
        merge(recipe(tmp_path, name), tmp_path / f"out-{name}", backend="reference")
        outs.append(load_checkpoint(tmp_path / f"out-{name}"))
    assert outs[0] == outs[1] != of[0]
    assert plan(recipe(tmp_path, "other"), backend="reference").renamed == (("experts transposed",),)


@pytest.mark.parametrize("base_joined", [True, False])
@pytest.mark.parametrize("family", ["qwen", "mixtral", "gpt_oss"])
def test_another_prefix_as_well(tmp_path: Path, family: str, base_joined: bool) -> None:
    """Layouts of a language model within a vision model differ in both."""
    layouts: list[Callable[[Tensors], Tensors]] = [lambda tensors: joined(family, tensors), lambda tensors: tensors]
    same, other = layouts if base_joined else layouts[::-1]
    save(tmp_path / "base", same(apart(family, 0)), family)
    save(tmp_path / "same", same(apart(family, 1)), family)
    renamed = {n.replace("model.", "model.language_model."): t for n, t in other(apart(family, 1)).items()}
    save(tmp_path / "patch", renamed, family)
    outs = []
    for name in ("same", "patch"):
        merge(recipe(tmp_path, name), tmp_path / f"out-{name}", backend="reference")
        outs.append(load_checkpoint(tmp_path / f"out-{name}"))
    assert outs[0] == outs[1]
    assert "'model.' for 'model.language_model.'" in plan(recipe(tmp_path, "patch"), backend="reference").renamed[0]


@pytest.mark.parametrize("band", [1, 40, 1 << 20])
def test_any_run_of_a_turned_tensor(tmp_path: Path, band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whichever order its entries are asked for, and each byte read once where that is the base's."""
    monkeypatch.setattr("safepatch_core.merging.sources.turned.BAND_BYTES", band)
    save(tmp_path / "patch", apart("gpt_oss", 1), "gpt_oss")
    save(tmp_path / "base", joined("gpt_oss", apart("gpt_oss", 0)), "gpt_oss")
    base, patch = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "patch")
    named = Named.of(patch, base, lambda name, dimensions: True, "all")
    rng = np.random.default_rng(0)
    for name, whole in joined("gpt_oss", apart("gpt_oss", 1)).items():
        tensor = fitted(named, base.tensors[name], "checkpoint", "error", "the patch")
        assert tensor is not None
        values, inputs = np.frombuffer(whole.data, "<u4"), Inputs([patch])
        held = tensor.hold(inputs, np.empty(tensor.held_bytes, np.uint8))
        runs = list(pairwise([0, *sorted(rng.integers(0, len(values), 4).tolist()), len(values)]))
        for i, (lo, hi) in enumerate([*runs, *rng.permutation(runs).tolist()]):
            found = held.load(inputs, lo, hi, np.empty(4 * (hi - lo), np.uint8))
            assert isinstance(found, Bits) and np.array_equal(found.data, values[lo:hi])
            if i == len(runs) - 1:
                assert inputs.bytes_read == 4 * len(values) == tensor.entry_bytes * len(values)
        inputs.close()


def test_square_experts_need_a_config_that_tells(tmp_path: Path) -> None:
    square = {n: t for n, t in joined("qwen", apart("qwen", 0)).items() if "gate_up" not in n}
    rng = np.random.default_rng(0)
    square[f"{L}mlp.experts.down_proj"] = f32(rng, EXPERTS, 4, 4)
    patch = {f"{L}mlp.experts.{e}.down_proj.weight": f32(rng, 4, 4) for e in range(EXPERTS)}
    patch |= {n: t for n, t in apart("qwen", 1).items() if "experts" not in n}
    save(tmp_path / "base", square, None)
    save(tmp_path / "patch", patch, None)
    refused(tmp_path, f"joined in '{L}mlp.experts.down_proj'")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "qwen3_moe"}')
    assert plan(recipe(tmp_path, "patch"), backend="reference").renamed[0]


def test_an_expert_too_few_is_refused_by_name(tmp_path: Path) -> None:
    patch = apart("qwen", 1)
    del patch[f"{L}mlp.experts.2.up_proj.weight"]
    save(tmp_path / "base", joined("qwen", apart("qwen", 0)))
    save(tmp_path / "patch", patch)
    refused(tmp_path, "experts.0.gate_proj.weight", f"all of them joined in '{L}mlp.experts.gate_up_proj'")


def test_experts_too_many_are_refused_by_name(tmp_path: Path) -> None:
    base = {name: tensor for name, tensor in apart("qwen", 0).items() if ".experts.2." not in name}
    save(tmp_path / "base", base)
    save(tmp_path / "patch", joined("qwen", apart("qwen", 1)))
    refused(tmp_path, f"{L}mlp.experts.", "one matrix each, like")


def test_an_adapter_of_single_experts_on_a_joined_base(tmp_path: Path) -> None:
    save(tmp_path / "base", joined("qwen", apart("qwen", 0)))
    (tmp_path / "patch").mkdir()
    rng = np.random.default_rng(1)
    key = f"base_model.model.{L}mlp.experts.0.gate_proj"
    pair = {f"{key}.lora_A.weight": f32(rng, 2, HIDDEN), f"{key}.lora_B.weight": f32(rng, INNER, 2)}
    save_file(tmp_path / "patch" / "adapter_model.safetensors", pair)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "patch" / "adapter_config.json").write_text(json.dumps(config))
    refused(tmp_path, f"{L}mlp.experts.0.gate_proj.weight", f"joined in '{L}mlp.experts.gate_up_proj'")
