"""Merges into bases of four bits and of integers: every layout, byte for byte against the oracle."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from safepatch_core import apply, build, merge, plan, revert, verify
from safepatch_core.errors import InputError, UsageError
from tests import oracle_quantised
from tests.oracle import Tensor, from_f32, load_checkpoint, save_file, to_f32
from tests.oracle_quantised import Weight, number
from tests.twins import WIDE

Tensors = dict[str, Tensor]
FP4 = np.array([x * sign for sign in (1, -1) for x in (0.0, 0.5, 1, 1.5, 2, 3, 4, 6)], np.float32)
ROWS, COLS = 6, 64
MODULE = "model.layers.0.mlp.up_proj"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
FLOAT = "model.layers.0.self_attn.o_proj.weight"


def nibbles(data: bytes) -> Any:
    return np.array([code for byte in data for code in (byte & 15, byte >> 4)], np.uint8)


def paired(codes: Any) -> bytes:
    return bytes(int(low) | int(high) << 4 for low, high in zip(codes[::2], codes[1::2], strict=True))


def words(data: bytes, bits: int) -> Any:
    """Codes from little-endian words of 32 bits, the lowest bits first."""
    every = struct.unpack(f"<{len(data) // 4}I", data)
    return np.array([w >> at & ((1 << bits) - 1) for w in every for at in range(0, 32, bits)], np.uint8)


def as_words(codes: Any, bits: int) -> bytes:
    each = 32 // bits
    whole = [
        sum(int(c) << (bits * i) for i, c in enumerate(codes[at : at + each])) for at in range(0, len(codes), each)
    ]
    return struct.pack(f"<{len(whole)}I", *whole)


def exponents(t: Tensor) -> Any:
    return np.array([2.0 ** (b - 127) for b in t.data], np.float32)


def spread(scales: Any, shape: tuple[int, ...]) -> Any:
    """A scale for each entry, of groups that lie one after the other."""
    entries = int(np.prod(shape))
    return np.repeat(np.asarray(scales, np.float32), entries // len(scales))


@dataclass
class Layout:
    """How a random weight is stored, and what a reader makes of it."""

    config: dict[str, Any]
    make: Callable[[np.random.Generator], Tensors]
    read: Callable[[Tensors], Weight]
    name: str = f"{MODULE}.weight"
    shape: tuple[int, ...] = (ROWS, COLS)


def random_bytes(rng: np.random.Generator, *shape: int) -> bytes:
    return rng.integers(0, 256, int(np.prod(shape)), np.uint8).tobytes()


def powers(rng: np.random.Generator, *shape: int, dtype: str = "U8") -> Tensor:
    return Tensor(dtype, shape, rng.integers(117, 122, int(np.prod(shape)), np.uint8).tobytes())


def floats(rng: np.random.Generator, dtype: str, *shape: int) -> Tensor:
    values = (rng.random(int(np.prod(shape))) * 0.01 + 0.001).astype(np.float32)
    return Tensor(dtype, shape, from_f32(values, dtype))


def library(**weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


def mxfp4(dtype: str, codes: str, scale: str, scale_dtype: str, config: dict[str, Any]) -> Layout:
    codes, scale = f"{MODULE}.{codes}", f"{MODULE}.{scale}"

    def make(rng: np.random.Generator) -> Tensors:
        packed = Tensor(dtype, (ROWS, COLS // 2), random_bytes(rng, ROWS, COLS // 2))
        return {codes: packed, scale: powers(rng, ROWS, COLS // 32, dtype=scale_dtype)}

    def read(tensors: Tensors) -> Weight:
        scales = spread(exponents(tensors[scale]), (ROWS, COLS))
        return Weight(nibbles(tensors[codes].data), scales, (ROWS, COLS), FP4, codes, paired, [scale])

    return Layout(config, make, read)


def gpt_oss() -> Layout:
    """The float model has [experts, in, out]."""
    stored = (2, ROWS, COLS)

    def make(rng: np.random.Generator) -> Tensors:
        blocks = Tensor("U8", (2, ROWS, COLS // 32, 16), random_bytes(rng, 2, ROWS, COLS // 2))
        bias = Tensor("BF16", (2, ROWS), bytes(4 * ROWS))
        scales = powers(rng, 2, ROWS, COLS // 32)
        return {f"{EXPERTS}_blocks": blocks, f"{EXPERTS}_scales": scales, f"{EXPERTS}_bias": bias}

    def turned(x: Any, shape: tuple[int, ...]) -> Any:
        return x.reshape(shape).transpose(0, 2, 1).reshape(-1)

    def read(tensors: Tensors) -> Weight:
        codes = turned(nibbles(tensors[f"{EXPERTS}_blocks"].data), stored)
        scales = turned(spread(exponents(tensors[f"{EXPERTS}_scales"]), stored), stored)
        shape = (2, COLS, ROWS)
        beside = [f"{EXPERTS}_scales", f"{EXPERTS}_bias"]  # a bias of such a module is no target
        names = (f"{EXPERTS}_blocks", lambda new: paired(turned(new, shape)), beside)
        return Weight(codes, scales, shape, FP4, *names)

    return Layout({"quant_method": "mxfp4"}, make, read, EXPERTS, (2, COLS, ROWS))


def nvfp4(codes: str, whole: str, config: dict[str, Any]) -> Layout:
    codes, whole, scale = f"{MODULE}.{codes}", f"{MODULE}.{whole}", f"{MODULE}.weight_scale"
    divides = whole.endswith("global_scale")

    def make(rng: np.random.Generator) -> Tensors:
        packed = Tensor("U8", (ROWS, COLS // 2), random_bytes(rng, ROWS, COLS // 2))
        groups = rng.integers(0x30, 0x7E, ROWS * COLS // 16, np.uint8).tobytes()
        size = np.float32(3000.7 if divides else 1 / 3000.7)
        top = Tensor("F32", (1,) if divides else (), size.tobytes())
        return {codes: packed, scale: Tensor("F8_E4M3", (ROWS, COLS // 16), groups), whole: top}

    def read(tensors: Tensors) -> Weight:
        groups = np.array([number(b) for b in tensors[scale].data], np.float32)
        top = to_f32(tensors[whole])[0]
        scales = spread(groups / top if divides else groups * top, (ROWS, COLS))
        return Weight(nibbles(tensors[codes].data), scales, (ROWS, COLS), FP4, codes, paired, [scale, whole])

    return Layout(config, make, read)


def packed(bits: int, dtype: str, scales: tuple[int, ...], of_shape: str = "I64") -> Layout:
    codes, scale, said = (f"{MODULE}.weight_{end}" for end in ("packed", "scale", "shape"))

    def make(rng: np.random.Generator) -> Tensors:
        wide = COLS * bits // 32
        shape = struct.pack("<2q" if of_shape == "I64" else "<2i", ROWS, COLS)
        return {
            codes: Tensor("I32", (ROWS, wide), random_bytes(rng, ROWS, 4 * wide)),
            scale: floats(rng, dtype, *scales),
            said: Tensor(of_shape, (2,), shape),
        }

    def read(tensors: Tensors) -> Weight:
        numbers = np.arange(2**bits, dtype=np.float32) - 2 ** (bits - 1)
        spreads = spread(to_f32(tensors[scale]), (ROWS, COLS))
        found = words(tensors[codes].data, bits)
        names = (codes, lambda new: as_words(new, bits), [scale, said])
        return Weight(found, spreads, (ROWS, COLS), numbers, *names)

    return Layout(library(num_bits=bits, symmetric=True) | {"format": "pack-quantized"}, make, read)


def int8(dtype: str, scales: tuple[int, ...]) -> Layout:
    codes, scale = f"{MODULE}.weight", f"{MODULE}.weight_scale"

    def make(rng: np.random.Generator) -> Tensors:
        stored = Tensor("I8", (ROWS, COLS), random_bytes(rng, ROWS, COLS))
        return {codes: stored, scale: floats(rng, dtype, *scales)}

    def read(tensors: Tensors) -> Weight:
        numbers = np.array([b - 256 if b > 127 else b for b in range(256)], np.float32)
        found = np.frombuffer(tensors[codes].data, np.uint8)
        spreads = spread(to_f32(tensors[scale]), (ROWS, COLS))
        return Weight(found, spreads, (ROWS, COLS), numbers, codes, lambda new: bytes(new.tobytes()), [scale])

    return Layout(library(num_bits=8, symmetric=True) | {"format": "int-quantized"}, make, read)


LAYOUTS = {
    "mxfp4 of gpt-oss": gpt_oss(),
    "mxfp4 of compressed-tensors": mxfp4("U8", "weight_packed", "weight_scale", "U8", library(num_bits=4)),
    "mxfp4 of DeepSeek": mxfp4("I8", "weight", "scale", "F8_E8M0", {"quant_method": "fp8"}),
    "nvfp4 of compressed-tensors": nvfp4("weight_packed", "weight_global_scale", library(num_bits=4)),
    "nvfp4 of ModelOpt": nvfp4("weight", "weight_scale_2", {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "int4 in groups": packed(4, "BF16", (ROWS, COLS // 32)),
    "int4 as Kimi has it": packed(4, "BF16", (ROWS, COLS // 32), "I32"),
    "int4 per channel": packed(4, "F16", (ROWS, 1)),
    "packed int8": packed(8, "F32", (ROWS, COLS // 16)),
    "int8 per channel": int8("BF16", (ROWS, 1)),
    "int8 per tensor": int8("F32", (1,)),
}


class Base:
    """A base of one weight in a layout and one of floats, with patches of both."""

    def __init__(self, root: Path, layout: Layout, seed: int = 0) -> None:
        self.root, self.layout, self.rng = root, layout, np.random.default_rng(seed)
        self.tensors = layout.make(self.rng) | {FLOAT: self.floats((8, 8)), "model.norm.weight": self.floats((8,))}
        self.save()

    def floats(self, shape: tuple[int, ...], size: float = 0.05, dtype: str = "BF16") -> Tensor:
        values = self.rng.standard_normal(int(np.prod(shape))) * size
        return Tensor(dtype, shape, from_f32(values.astype(np.float32), dtype))

    def save(self, shards: int = 1, config: dict[str, Any] | None = None) -> None:
        folder = self.root / "base"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"quantization_config": config or self.layout.config}))
        for old in folder.glob("*.safetensors*"):
            old.unlink()
        if shards == 1:
            save_file(folder / "model.safetensors", self.tensors)
            return
        files = {n: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(self.tensors)}
        for file in set(files.values()):
            save_file(folder / file, {n: t for n, t in self.tensors.items() if files[n] == file})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))

    def patch(self, name: str, kind: str = "delta", size: float = 0.01, **keys: Any) -> dict[str, Any]:
        weight, shape = self.layout.read(self.tensors), self.layout.shape
        d = (self.rng.standard_normal(int(np.prod(shape))) * size).astype(np.float32)
        values = d if kind == "delta" else weight.values + d
        tensors = {
            self.layout.name: Tensor("BF16", shape, from_f32(values, "BF16")),
            FLOAT: self.floats((8, 8), size),
        }
        save_file(self.root / f"{name}.safetensors", tensors)
        return {"name": name, "source": f"{name}.safetensors", "kind": kind, **keys}

    def recipe(self, *patches: dict[str, Any], quantized: Any = WIDE, **options: Any) -> Path:
        path = self.root / "recipe.yaml"
        path.write_text(yaml.safe_dump({"base": "base", "patches": list(patches), "quantized": quantized} | options))
        return path

    def expected(self, recipe: Path) -> oracle_quantised.Result:
        return oracle_quantised.merge(recipe, unpack=lambda tensors: {self.layout.name: self.layout.read(tensors)})


def given(root: Path, name: str, seed: int = 0) -> Base:
    return Base(root, LAYOUTS[name], seed)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(tmp_path: Path, name: str, backend: str) -> None:
    base = given(tmp_path, name)
    recipe = base.recipe(base.patch("a", top=0.5), base.patch("b", "checkpoint", top=0.4, retain=0.5), seed=7)
    expected = base.expected(recipe)
    merge(recipe, tmp_path / "out", backend=backend)
    found = load_checkpoint(tmp_path / "out")
    assert found == expected.tensors
    assert [n for n in found if found[n] != base.tensors[n]] == [base.layout.read(base.tensors).stored, FLOAT]
    told = json.loads((tmp_path / "out" / "safepatch.json").read_text())["patches"]
    for of in told:
        assert of["codes"] == pytest.approx(expected.kept[of["name"]]._asdict(), rel=1e-12)
        assert of["codes"]["changed"] > 5
        assert list(of["tensors"]) == sorted([base.layout.name, FLOAT])


@pytest.mark.parametrize("name", LAYOUTS)
def test_nearest_to_a_float_original(tmp_path: Path, name: str) -> None:
    base = given(tmp_path, name, 3)
    weight = base.layout.read(base.tensors)
    noise = 1 + base.rng.uniform(-0.05, 0.05, len(weight.codes))
    original = Tensor("F32", base.layout.shape, (weight.values * noise).astype("<f4").tobytes())
    (tmp_path / "original").mkdir()
    floats = {n: base.tensors[n] for n in (FLOAT, "model.norm.weight")}
    save_file(tmp_path / "original" / "model.safetensors", {base.layout.name: original} | floats)
    rule = {"reference": "original", "rounding": "nearest"} | WIDE
    recipe = base.recipe(base.patch("a", "checkpoint", top=0.5), quantized=rule)
    merge(recipe, tmp_path / "out", backend="reference")
    assert load_checkpoint(tmp_path / "out") == base.expected(recipe).tensors


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_no_cut_shows(tmp_path: Path, name: str, scope: str) -> None:
    """Also with the companions in another shard; and the fix file of the merge does what the merge does."""
    base = given(tmp_path, name, 5)
    base.save(shards=2)
    recipe = base.recipe(base.patch("a", top=0.3, retain=0.5), base.patch("b", "checkpoint", top=0.2), scope=scope)
    expected = base.expected(recipe).tensors
    for i, chunk in enumerate((None, 1, 7, 50)):
        merge(recipe, tmp_path / f"out-{i}", backend="cpu", chunk_entries=chunk, threads=2)
        assert load_checkpoint(tmp_path / f"out-{i}") == expected
    assert verify(tmp_path / "out-0", recipe, backend="reference", chunk_entries=20).ok
    fix = tmp_path / "fix.safetensors"
    build(recipe, fix, backend="reference")
    apply(fix, tmp_path / "base", tmp_path / "fixed")
    assert load_checkpoint(tmp_path / "fixed") == expected
    revert(fix, tmp_path / "fixed", tmp_path / "back")
    assert load_checkpoint(tmp_path / "back") == base.tensors


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_survey_of_every_code(tmp_path: Path, name: str) -> None:
    """Steps that move every code by a step up or down, or beyond the end, with nearest rounding."""
    base = given(tmp_path, name, 9)
    weight = base.layout.read(base.tensors)
    steps = np.resize(np.array([1, -1, 0.5, -0.5, 300, -300, 0], np.float32), len(weight.codes)) * weight.scales
    source = {base.layout.name: Tensor("F32", base.layout.shape, steps.astype("<f4").tobytes())}
    save_file(tmp_path / "a.safetensors", source)
    (tmp_path / "original").mkdir()
    values = Tensor("F32", base.layout.shape, weight.values.astype("<f4").tobytes())
    floats = {n: base.tensors[n] for n in (FLOAT, "model.norm.weight")}
    save_file(tmp_path / "original" / "model.safetensors", {base.layout.name: values} | floats)
    rule = {"reference": "original", "rounding": "nearest"} | WIDE
    patch = {"name": "a", "source": "a.safetensors", "kind": "delta"}
    recipe = base.recipe(patch, quantized=rule, missing="skip")
    merge(recipe, tmp_path / "out", backend="reference")
    found = load_checkpoint(tmp_path / "out")
    assert found == base.expected(recipe).tensors
    after = base.layout.read(found)
    ends = weight.ends
    wanted = np.clip(
        weight.numbers[weight.codes] + np.resize([1, -1, 0.5, -0.5, 300, -300, 0], len(weight.codes)), *ends
    )
    assert np.abs(after.numbers[after.codes] - wanted).max() <= 1
    assert set(after.numbers[after.codes][4::7]) == {ends[1]} and set(after.numbers[after.codes][5::7]) == {ends[0]}


def test_integers_beside_other_formats(tmp_path: Path) -> None:
    """Of a mixed config only the groups of packed integers say how wide these are."""
    base = given(tmp_path, "int4 in groups")
    group = base.layout.config["config_groups"]["group_0"]
    others = {
        "b": {"weights": {"num_bits": 8, "type": "float"}},
        "c": {"format": "int-quantized", "weights": {"num_bits": 8, "type": "int", "symmetric": False}},
    }
    base.save(config=base.layout.config | {"format": "mixed-precision", "config_groups": {"a": group} | others})
    recipe = base.recipe(base.patch("a", top=0.5))
    merge(recipe, tmp_path / "out", backend="reference")
    assert load_checkpoint(tmp_path / "out") == base.expected(recipe).tensors


def changed(base: Base, **tensors: Tensor | None) -> None:
    """Other tensors beside the module's, by what follows its name."""
    for end, t in tensors.items():
        base.tensors.pop(f"{MODULE}.{end}", None)
        if t is not None:
            base.tensors[f"{MODULE}.{end}"] = t


REFUSED: dict[str, tuple[str, dict[str, Tensor | None], dict[str, Any], str]] = {
    "zero points": (
        "int4 in groups",
        {"weight_zero_point": Tensor("I32", (1, 2), bytes(8))},
        {},
        "asymmetric integers",
    ),
    "asymmetric": ("int8 per channel", {}, library(num_bits=8, symmetric=False), "asymmetric integers"),
    "act-order": ("int4 in groups", {"weight_g_idx": Tensor("I32", (COLS,), bytes(4 * COLS))}, {}, "act-order"),
    "3 bits": ("int4 in groups", {}, library(num_bits=3), "packed integers of 3 bits"),
    "mixed bits": (
        "int4 in groups",
        {},
        library(num_bits=4)
        | {"config_groups": {"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}}},
        "packed integers of 4, 8 bits",
    ),
    "marlin": ("int4 in groups", {}, library(num_bits=4) | {"format": "marlin-24"}, r"sparse integers \(marlin-24\)"),
    "no shape": ("int4 in groups", {"weight_shape": None}, {}, "without their shape"),
    "odd groups": (
        "int4 in groups",
        {"weight_scale": Tensor("F32", (ROWS, 3), bytes(12 * ROWS))},
        {},
        r"scales \[6, 3\], which fit no groups",
    ),
    "groups of 16 in MXFP4": (
        "mxfp4 of compressed-tensors",
        {"weight_scale": Tensor("U8", (ROWS, 4), bytes(4 * ROWS))},
        {},
        "no groups of 32",
    ),
    "no scale of the whole": ("nvfp4 of compressed-tensors", {"weight_global_scale": None}, {}, "with 0 scales"),
    "two of them": (
        "nvfp4 of compressed-tensors",
        {"weight_scale_2": Tensor("F32", (), bytes(4))},
        {},
        "with 2 scales of the whole",
    ),
    "another method": ("mxfp4 of DeepSeek", {}, {"quant_method": "quark"}, r"found quark"),
    "GPTQ": ("int8 per channel", {}, {"quant_method": "gptq"}, "found gptq"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    name, tensors, config, words = REFUSED[case]
    base = given(tmp_path, name)
    patch = base.patch("a")
    changed(base, **tensors)
    base.save(config=config or None)
    with pytest.raises(
        InputError, match=rf"quantised in a way that can't be merged into: found .*{words.removeprefix('found ')}"
    ):
        merge(base.recipe(patch), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_packed_weight_of_another_shape(tmp_path: Path) -> None:
    base = given(tmp_path, "int4 in groups")
    patch = base.patch("a")
    changed(base, weight_shape=Tensor("I64", (2,), struct.pack("<2q", ROWS, COLS - 1)))
    base.save()
    with pytest.raises(InputError, match=r"weight_shape.*another shape: found \[6, 63\], expected \[6, 64\]"):
        merge(base.recipe(patch), tmp_path / "out")


@pytest.mark.parametrize("exponent", [0, 20, 255])
def test_scales_at_the_ends_of_e8m0(tmp_path: Path, exponent: int) -> None:
    """Below 2^-100, and none at all: no entry under them can be patched, and all others can."""
    base = given(tmp_path, "mxfp4 of DeepSeek")
    name = f"{MODULE}.scale"
    scales = bytearray(base.tensors[name].data)
    scales[0] = exponent
    base.tensors[name] = base.tensors[name]._replace(data=bytes(scales))
    base.save()
    step = np.zeros((ROWS, COLS), np.float32)
    step[:, 33:] = 0.01
    save_file(tmp_path / "a.safetensors", {base.layout.name: Tensor("F32", (ROWS, COLS), step.tobytes())})
    recipe = base.recipe({"name": "a", "source": "a.safetensors", "kind": "delta"}, missing="skip")
    merge(recipe, tmp_path / "out")
    assert load_checkpoint(tmp_path / "out") == base.expected(recipe).tensors
    step[0, 5] = 0.01
    save_file(tmp_path / "a.safetensors", {base.layout.name: Tensor("F32", (ROWS, COLS), step.tobytes())})
    with pytest.raises(InputError, match=r"found 1 entries, the first at index 5, .*2\^-100"):
        merge(recipe, tmp_path / "never")


def test_a_matrix_that_the_limit_has_no_room_for(tmp_path: Path) -> None:
    layout = gpt_oss()
    layout.shape = (1, 4096, 4096)
    base = Base.__new__(Base)
    base.root, base.layout, base.rng = tmp_path, layout, np.random.default_rng(0)
    blocks = Tensor("U8", (1, 4096, 128, 16), bytes(4096 * 2048))
    base.tensors = {f"{EXPERTS}_blocks": blocks, f"{EXPERTS}_scales": Tensor("U8", (1, 4096, 128), bytes(4096 * 128))}
    base.save()
    values = Tensor("BF16", layout.shape, bytes(2 * 4096 * 4096))
    save_file(tmp_path / "a.safetensors", {EXPERTS: values})
    recipe = base.recipe({"name": "a", "source": "a.safetensors", "kind": "delta"})
    told = r"too small for a matrix of '.*gate_up_proj', which is stored the other way round: found .*at least \d+"
    with pytest.raises(UsageError, match=told) as refused:
        plan(recipe, memory_limit="20MiB")
    assert plan(recipe, memory_limit=int(str(refused.value).split()[-2])).targets


def test_matrices_that_can_only_be_read_whole_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a checkpoint of gpt-oss is measured from is asked for piece by piece, across the stored rows."""
    monkeypatch.setattr("safepatch_core.merging.quantised.values.PIECE", 100)
    base = given(tmp_path, "mxfp4 of gpt-oss", 2)
    recipe = base.recipe(base.patch("a", "checkpoint", top=0.5), base.patch("b", "checkpoint", top=0.3))
    expected = base.expected(recipe).tensors
    for i, chunk in enumerate((None, 50)):
        merge(recipe, tmp_path / f"out-{i}", backend="reference", chunk_entries=chunk)
        assert load_checkpoint(tmp_path / f"out-{i}") == expected
