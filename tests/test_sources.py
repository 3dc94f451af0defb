"""Patches as sources: lookups against the base, LoRA held to PEFT itself, everything else refused by name."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from safepatch_core.backends.contract import Lora
from safepatch_core.errors import InputError, IOFailure, UsageError
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.sources import open_source
from safepatch_core.merging.sources.contract import Source, load_alone
from safepatch_core.merging.sources.dense import Dense, ImportanceFile
from safepatch_core.merging.sources.factors import Factors
from safepatch_core.spec import Missing

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "F64": "<f8", "U8": "u1"}
Table = dict[str, tuple[str, tuple[int, ...]] | tuple[str, NDArray[Any]]]


def save(path: Path, tensors: Table) -> Path:
    """A tensor is (dtype, shape) for zeros or (dtype, array of its storage type)."""
    path.parent.mkdir(exist_ok=True, parents=True)
    table, data = {}, b""
    for name, (dtype, what) in tensors.items():
        array = what if isinstance(what, np.ndarray) else np.zeros(what, DTYPES[dtype])
        raw = array.tobytes()
        table[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(table).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    return path


BASE: Table = {
    "model.layers.0.q.weight": ("BF16", (6, 4)),
    "model.layers.1.q.weight": ("BF16", (6, 4)),
    "model.embed_tokens.weight": ("BF16", np.arange(40, dtype=np.uint16).reshape(10, 4)),
    "model.norm.weight": ("F32", (4,)),
    "steps": ("I32", (3,)),
    "quantized.weight": ("U8", (6, 4)),
    "conv.weight": ("F32", (6, 4, 3)),
}
Q0 = "base_model.model.model.layers.0.q"
EMBED = "base_model.model.model.embed_tokens"


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(save(tmp_path / "base" / "model.safetensors", BASE).parent)


def pair(key: str = Q0, rank: int = 2, rows: int = 6, cols: int = 4, dtype: str = "F32") -> Table:
    return {f"{key}.lora_A.weight": (dtype, (rank, cols)), f"{key}.lora_B.weight": (dtype, (rows, rank))}


def adapter(root: Path, tensors: Table | None = None, options: dict[str, Any] | None = None, **config: Any) -> Path:
    """A PEFT adapter directory; by default a valid one of rank 2."""
    save(root / "adapter_model.safetensors", pair() if tensors is None else tensors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config, **(options or {})}
    (root / "adapter_config.json").write_text(json.dumps(config))
    return root


def refuse(base: Checkpoint, root: Path, *words: object, kind: Any = None) -> str:
    with pytest.raises(InputError) as caught:
        source = open_source("p", root, kind, base, relative_to=None)
        for name in source.shapes:
            look_up(source, base, name)
    message = str(caught.value)
    assert caught.value.status == 65 and str(root) in message and "\n" not in message
    for word in words:
        assert str(word) in message
    return message


def look_up(source: Source, base: Checkpoint, name: str, missing: Missing = "error") -> Any:
    return source.lookup(base.tensors[name], missing)


def factors_of(source: Source, base: Checkpoint, name: str) -> Factors:
    found = look_up(source, base, name)
    assert isinstance(found, Factors)
    return found


def load(source: Source, base: Checkpoint, name: str) -> Lora:
    found, inputs = look_up(source, base, name), Inputs(source.checkpoints)
    try:
        lora = load_alone(found, inputs, 0, base.tensors[name].entries)
        assert isinstance(lora, Lora) and inputs.bytes_read == found.once_bytes
        return lora
    finally:
        inputs.close()


# Checkpoints and deltas


@pytest.mark.parametrize("kind", ["checkpoint", "delta"])
def test_lookup(tmp_path: Path, base: Checkpoint, kind: Any) -> None:
    save(tmp_path / "p.safetensors", {"model.layers.0.q.weight": ("F16", (6, 4)), "steps": ("I32", (9,))})
    source = open_source("p", "p.safetensors", kind, base, relative_to=tmp_path)
    (checkpoint,) = source.checkpoints
    assert (source.kind, checkpoint.ref) == (kind, "p.safetensors")
    assert (dict(source.shapes), list(source.names)) == (
        {"model.layers.0.q.weight": (6, 4)},
        ["model.layers.0.q.weight", "steps"],
    )
    found = look_up(source, base, "model.layers.0.q.weight")
    assert isinstance(found, Dense) and (found.entry.dtype, found.form) == ("F16", kind)
    with pytest.raises(InputError) as caught:
        look_up(source, base, "model.layers.1.q.weight")
    for word in ["p.safetensors", "tensor 'model.layers.1.q.weight'", "missing from patch 'p'", "[6, 4]"]:
        assert word in str(caught.value)
    assert look_up(source, base, "model.layers.1.q.weight", "skip") is None


def test_lookup_shape_and_dtype(tmp_path: Path, base: Checkpoint) -> None:
    path = save(
        tmp_path / "p" / "model.safetensors",
        {
            "model.layers.0.q.weight": ("F32", (4, 6)),
            "model.layers.1.q.weight": ("I32", (6, 4)),
            "model.norm.weight": ("F64", (4,)),
            "conv.weight": ("F32", (6, 12)),
        },
    )
    source = open_source("p", path.parent, "delta", base, relative_to=None)
    for name, found, expected in [
        ("model.layers.0.q.weight", "[4, 6]", "[6, 4]"),
        ("model.layers.1.q.weight", "I32", "F32 or F16 or BF16"),
        ("model.norm.weight", "F64", "F32 or F16 or BF16"),
        ("conv.weight", "[6, 12]", "[6, 4, 3]"),
    ]:
        with pytest.raises(InputError) as caught:
            look_up(source, base, name, "skip")
        message = str(caught.value)
        assert caught.value.status == 65 and str(path) in message and f"tensor '{name}'" in message
        assert f"found {found}, expected {expected}" in message


def test_a_reference_is_looked_up_like_the_patch(tmp_path: Path, base: Checkpoint) -> None:
    q0, q1 = "model.layers.0.q.weight", "model.layers.1.q.weight"
    save(tmp_path / "p.safetensors", {q0: ("F16", (6, 4)), q1: ("F16", (6, 4))})
    save(tmp_path / "before.safetensors", {q0: ("BF16", (6, 4)), "conv.weight": ("F32", (1,))})
    source = open_source("p", "p.safetensors", None, base, relative_to=tmp_path, minus="before.safetensors")
    assert [c.ref for c in source.checkpoints] == ["p.safetensors", "before.safetensors"]
    found = look_up(source, base, q0)
    assert (found.form, found.entry_bytes, found.ring_bytes) == ("delta", 4, 4)
    with pytest.raises(InputError, match=r"before\.safetensors.*layers\.1.*missing from what patch 'p' is measured"):
        look_up(source, base, q1)
    assert look_up(source, base, q1, "skip") is None
    save(tmp_path / "before.safetensors", {q0: ("BF16", (4, 6))})
    source = open_source("p", "p.safetensors", None, base, relative_to=tmp_path, minus="before.safetensors")
    with pytest.raises(InputError, match=r"measured from has another shape than the base: found \[4, 6\]"):
        look_up(source, base, q0)


def test_a_reference_goes_with_checkpoints_alone(tmp_path: Path, base: Checkpoint) -> None:
    with pytest.raises(UsageError, match="minus goes with checkpoints: found kind lora"):
        open_source("p", adapter(tmp_path / "a"), None, base, relative_to=None, minus="before.safetensors")


def test_a_config_of_an_adapter_beside_the_merged_checkpoint(tmp_path: Path, base: Checkpoint) -> None:
    root = adapter(tmp_path / "a")
    assert open_source("p", root / "adapter_model.safetensors", None, base, relative_to=None).kind == "lora"
    (root / "adapter_model.safetensors").unlink()
    save(root / "model.safetensors", BASE)
    assert open_source("p", root, None, base, relative_to=None).kind == "checkpoint"


def test_factors_without_their_config(tmp_path: Path, base: Checkpoint) -> None:
    refuse(base, save(tmp_path / "alone.safetensors", pair()), "lora_A.weight", "an adapter without its config")
    key = "lora_te_layers_0_q"
    tensors: Table = {f"{key}.lora_down.weight": ("F16", (2, 4)), f"{key}.lora_up.weight": ("F16", (6, 2))}
    refuse(base, save(tmp_path / "style.safetensors", tensors), f"{key}.lora_down", "kohya-ss")


def test_tensors_that_zero3_left_empty(tmp_path: Path, base: Checkpoint) -> None:
    save(tmp_path / "p.safetensors", {"model.layers.0.q.weight": ("F32", (0,))})
    source = open_source("p", "p.safetensors", None, base, relative_to=tmp_path)
    with pytest.raises(InputError, match=r"layers\.0\.q\.weight': an empty tensor: saved from DeepSpeed ZeRO-3"):
        look_up(source, base, "model.layers.0.q.weight", "skip")


def test_only_float_tensors_change_anything(tmp_path: Path, base: Checkpoint) -> None:
    save(
        tmp_path / "p.safetensors",
        {"z": ("F64", (1,)), "a": ("BF16", (0,)), "ids": ("I32", (1,)), "model.norm.weight": ("F32", (4,))},
    )
    source = open_source("p", "p.safetensors", None, base, relative_to=tmp_path)
    assert source.kind == "checkpoint" and sorted(source.shapes) == ["a", "model.norm.weight", "z"]


def test_importance(tmp_path: Path, base: Checkpoint) -> None:
    save(
        tmp_path / "s.safetensors",
        {"model.norm.weight": ("F16", (4,)), "conv.weight": ("F32", (6, 4)), "quantized.weight": ("I32", (6, 4))},
    )
    scores = ImportanceFile.open("s.safetensors", base, relative_to=tmp_path)
    norm = scores.lookup(base.tensors["model.norm.weight"], "error")
    assert isinstance(norm, Dense) and norm.entry.dtype == "F16"
    assert scores.lookup(base.tensors["model.embed_tokens.weight"], "skip") is None
    for name, words in [
        ("model.embed_tokens.weight", "missing from the importance"),
        ("conv.weight", "found [6, 4], expected [6, 4, 3]"),
        ("quantized.weight", "found I32"),
    ]:
        with pytest.raises(InputError) as caught:
            scores.lookup(base.tensors[name], "error")
        assert (
            words in str(caught.value)
            and f"tensor '{name}'" in str(caught.value)
            and "s.safetensors" in str(caught.value)
        )


# LoRA, by hand


def test_an_adapter_directory_is_lora(tmp_path: Path, base: Checkpoint) -> None:
    root = adapter(tmp_path / "a", options={"new": None, "newer": False, "newest": [], "more": "", "most": {}})
    source = open_source("p", "a", None, base, relative_to=tmp_path)
    (checkpoint,) = source.checkpoints
    assert (source.kind, checkpoint.ref, checkpoint.root) == ("lora", "a", root)
    found = look_up(source, base, "model.layers.0.q.weight")
    assert isinstance(found, Factors) and (found.rank, found.scale, found.transposed) == (2, 2.0, False)
    assert (found.a.shape, found.b.shape) == ((2, 4), (6, 2))
    assert look_up(source, base, "model.layers.1.q.weight") is None
    assert source.config is not None and source.config["lora_alpha"] == 4
    # Asked for by kind, the same directory is a plain checkpoint that lacks the base's tensors.
    (checkpoint,) = open_source("p", root, "checkpoint", base, relative_to=None).checkpoints
    assert checkpoint.shards[0].file == "adapter_model.safetensors"


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_load(tmp_path: Path, base: Checkpoint, dtype: str) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 4), np.float32), rng.standard_normal((6, 2), np.float32)
    a[0, 0], b[0, 0] = -0.0, 2.0**-24  # a subnormal of F16
    if dtype == "BF16":
        stored = [(x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, b)]
        wanted = [(x.astype(np.uint32) << 16).view(np.float32) for x in stored]
    else:
        stored = [x.astype(DTYPES[dtype]) for x in (a, b)]
        wanted = [x.astype(np.float32) for x in stored]
    keys = list(pair())
    adapter(tmp_path / "a", {keys[0]: (dtype, stored[0]), keys[1]: (dtype, stored[1])})
    lora = load(open_source("p", tmp_path / "a", None, base, relative_to=None), base, "model.layers.0.q.weight")
    for got, want in zip((lora.a, lora.b), wanted, strict=True):
        assert got.dtype == np.float32 and got.flags.c_contiguous
        assert np.array_equal(got.view(np.uint32), want.view(np.uint32))
    assert lora.scale == 2.0


def test_load_swaps_the_roles_when_transposed(tmp_path: Path, base: Checkpoint) -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 6), np.float32), rng.standard_normal((4, 2), np.float32)
    keys = list(pair())
    adapter(tmp_path / "a", {keys[0]: ("F32", a), keys[1]: ("F32", b)}, fan_in_fan_out=True)
    lora = load(open_source("p", tmp_path / "a", None, base, relative_to=None), base, "model.layers.0.q.weight")
    assert np.array_equal(lora.a, b.T) and np.array_equal(lora.b, a.T)
    assert lora.a.flags.c_contiguous and lora.b.flags.c_contiguous


def test_load_notices_a_vanished_file(tmp_path: Path, base: Checkpoint) -> None:
    root = adapter(tmp_path / "a")
    source = open_source("p", root, None, base, relative_to=None)
    os.truncate(root / "adapter_model.safetensors", 100)
    with pytest.raises(IOFailure, match="adapter_model.safetensors.*changed"):
        load(source, base, "model.layers.0.q.weight")
    (root / "adapter_model.safetensors").unlink()
    with pytest.raises(IOFailure, match="adapter_model.safetensors.*cannot open"):
        load(source, base, "model.layers.0.q.weight")
    adapter(root)
    with pytest.raises(IOFailure, match="adapter_model.safetensors.*changed"):
        load(source, base, "model.layers.0.q.weight")


def test_keys_with_the_adapters_name(tmp_path: Path, base: Checkpoint) -> None:
    tensors = {
        **{k.replace(".weight", ".default.weight"): v for k, v in pair().items()},
        f"{EMBED}.lora_embedding_A.default": ("F32", (2, 10)),
        f"{EMBED}.lora_embedding_B.default": ("F32", (4, 2)),
    }
    source = open_source("p", adapter(tmp_path / "a", tensors), None, base, relative_to=None)
    assert dict(source.shapes) == {"model.layers.0.q.weight": (6, 4), "model.embed_tokens.weight": (10, 4)}
    assert factors_of(source, base, "model.embed_tokens.weight").transposed
    refuse(base, adapter(tmp_path / "b", {**tensors, **pair()}), "two adapters in one file", "lora_A.weight")


@pytest.mark.parametrize(
    ("alpha", "rank", "rslora"),
    [(16, 3, False), (1, 3, True), (0.1, 7, False), (0, 2, True), (-3, 5, False), (10**9, 6, True)],
)
def test_scale_is_rounded_once(tmp_path: Path, base: Checkpoint, alpha: float, rank: int, rslora: bool) -> None:
    root = adapter(tmp_path / "a", pair(rank=rank), r=rank, lora_alpha=alpha, use_rslora=rslora)
    found = factors_of(open_source("p", root, None, base, relative_to=None), base, "model.layers.0.q.weight")
    exact = alpha / math.sqrt(rank) if rslora else alpha / rank
    assert type(found.scale) is float and found.scale == float(np.float32(exact))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", "yes"),
        ("bias", "some"),
        ("lora_bias", 1),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", [1]),
        ("layer_replication", [[0, 1], [0, 1]]),
        ("target_parameters", ["experts.down_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("alora_invocation_tokens", [1, 2]),
        ("velora_config", {"num_groups": 4}),
        ("velora_config", {}),
        ("use_bdlora", {"nblocks": 2}),
        ("use_bdlora", {}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {}),
        ("monteclora_config", {}),
        ("use_qalora", True),
        ("ensure_weight_tying", True),
        ("megatron_config", {"x": 1}),
        ("enable_lora", [True, False, True]),
        ("an_option_of_the_future", 1),
        ("an_option_of_the_future", "on"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "OLoRA"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "of_the_future"),
        ("init_lora_weights", ["gaussian"]),
        ("use_rslora", "yes"),
        ("fan_in_fan_out", 1),
    ],
)
def test_unsupported_options_are_named(tmp_path: Path, base: Checkpoint, option: str, value: Any) -> None:
    root = adapter(tmp_path / "a", options={option: value})
    refuse(base, root, root / "adapter_config.json", option, "found ")


@pytest.mark.parametrize("peft_type", ["ADALORA", "LOHA", "IA3", "OFT", "lora", None, 1, ["LORA"]])
def test_other_peft_types(tmp_path: Path, base: Checkpoint, peft_type: Any) -> None:
    refuse(base, adapter(tmp_path / "a", peft_type=peft_type), "unsupported peft_type", "expected LORA")


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base(tmp_path: Path, base: Checkpoint, init: Any) -> None:
    root = adapter(tmp_path / "a", init_lora_weights=init, eva_config={"rho": 2.0}, loftq_config={"loftq_bits": 4})
    assert open_source("p", root, None, base, relative_to=None).shapes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "r: found 0"),
        ({"r": "2"}, "r: found 2, expected a whole number"),
        ({"r": 2.0}, "r: found 2.0"),
        ({"r": True}, "r: found True"),
        ({"lora_alpha": None}, "lora_alpha: found null"),
        ({"lora_alpha": "16"}, "lora_alpha: found 16, expected a finite float32 number"),
        ({"lora_alpha": float("inf")}, "lora_alpha: found inf"),
        ({"lora_alpha": float("nan")}, "lora_alpha: found nan"),
        ({"lora_alpha": 1e39}, "lora_alpha: found 1e+39"),
        ({"lora_alpha": True}, "lora_alpha: found True"),
        ({"rank_pattern": ["q"]}, "rank_pattern"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern q: found 0"),
        ({"alpha_pattern": {"q": "x"}}, "alpha_pattern q: found x"),
        ({"rank_pattern": {"q(": 2}}, "rank_pattern 'q(' is no regular expression"),
        ({"rank_pattern": {"(a+)+b": 2}}, "too complex"),
        ({"rank_pattern": {".*.*.*.*.*.*.*q": 2}}, "too complex"),
        ({"alpha_pattern": {"(a|b)(a|b)(a|b)(a|b)(a|b)": 2}}, "too complex"),
    ],
)
def test_bad_numbers_and_patterns(tmp_path: Path, base: Checkpoint, options: dict[str, Any], words: str) -> None:
    refuse(base, adapter(tmp_path / "a", options=options), "adapter_config.json", words)


def test_broken_config(tmp_path: Path, base: Checkpoint) -> None:
    root = adapter(tmp_path / "a")
    config = root / "adapter_config.json"
    for text, words in [
        ('{"peft_type":"LORA","r":2,"r":4}', "duplicate key 'r'"),
        ("[]", "not an adapter's config"),
        ("{", "not JSON"),
        ('{"peft_type":"LORA"} x', "bytes after its JSON value"),
    ]:
        config.write_text(text)
        refuse(base, root, config, words)
    config.unlink()
    refuse(base, root, config, "no such file", kind="lora")
    config.symlink_to(tmp_path / "elsewhere.json")
    (tmp_path / "elsewhere.json").write_text("{}")
    refuse(base, root, config, "leads out of the checkpoint")


def test_adapter_that_is_no_directory_or_a_pickle(tmp_path: Path, base: Checkpoint) -> None:
    file = adapter(tmp_path / "a") / "adapter_model.safetensors"
    alone = save(tmp_path / "b" / "adapter_model.safetensors", pair())
    refuse(base, alone, "expected a folder with adapter_config.json", kind="lora")
    file.rename(file.with_name("adapter_model.bin"))
    refuse(base, file.parent, "adapter_model.bin", "pickle", "expected adapter_model.safetensors")
    file.with_name("adapter_model.bin").unlink()
    refuse(base, file.parent, file, "no such file")


def half(side: str) -> Table:
    return {key: value for key, value in pair().items() if side in key}


@pytest.mark.parametrize(
    ("tensors", "tensor", "words"),
    [
        ({}, None, ["no LoRA factors"]),
        (half("lora_A"), f"{Q0}.lora_A.weight", ["lora_A without its other half"]),
        (half("lora_B"), f"{Q0}.lora_B.weight", ["lora_B without its other half"]),
        (pair(rank=3), "model.layers.0.q.weight", ["[3, 4]", "[6, 3]", "expected rank 2"]),
        (
            {**half("lora_A"), f"{Q0}.lora_B.weight": ("F32", (6, 3))},
            "model.layers.0.q.weight",
            ["[2, 4]", "[6, 3]", "rank 2"],
        ),
        (pair(rows=8), "model.layers.0.q.weight", ["another base", "found [8, 4]", "expected [6, 4]"]),
        (pair(cols=8), "model.layers.0.q.weight", ["another base", "found [6, 8]", "expected [6, 4]"]),
        (pair(rows=4, cols=8), "model.layers.0.q.weight", ["another base", "found [4, 8]", "expected [6, 4]"]),
        (pair(dtype="I32"), f"{Q0}.lora_A.weight", ["found I32"]),
        (pair(dtype="F64"), f"{Q0}.lora_A.weight", ["found F64"]),
        (pair("base_model.model.quantized"), "quantized.weight", ["found U8"]),
        (pair("base_model.model.conv"), "conv.weight", ["another base", "[6, 4]", "[6, 4, 3]"]),
        (
            {
                "base_model.model.conv.lora_A.weight": ("F32", (2, 4, 3)),
                "base_model.model.conv.lora_B.weight": ("F32", (6, 2, 1)),
            },
            "base_model.model.conv.lora_A.weight",
            ["convolutions", "[2, 4, 3]"],
        ),
        (
            {f"{EMBED}.lora_embedding_A": ("F32", (2, 9)), f"{EMBED}.lora_embedding_B": ("F32", (4, 2))},
            "model.embed_tokens.weight",
            ["another base", "[9, 4]", "transposed", "[10, 4]"],
        ),
        (
            {f"{EMBED}.lora_embedding_A": ("F32", (2, 10)), f"{EMBED}.lora_B.weight": ("F32", (4, 2))},
            f"{EMBED}.lora_embedding_A",
            ["without its other half"],
        ),
        (
            {
                **pair(EMBED, rows=10),
                f"{EMBED}.lora_embedding_A": ("F32", (2, 10)),
                f"{EMBED}.lora_embedding_B": ("F32", (4, 2)),
            },
            "model.embed_tokens.weight",
            ["both"],
        ),
        ({**pair(), "unrelated": ("F32", (1,))}, "unrelated", ["not a LoRA factor"]),
        ({**pair(), f"{Q0}.lora_magnitude_vector": ("F32", (6,))}, f"{Q0}.lora_magnitude_vector", ["not a LoRA"]),
        ({**pair(), f"{Q0}.lora_B.bias": ("F32", (6,))}, f"{Q0}.lora_B.bias", ["not a LoRA factor"]),
        (
            {k.removeprefix("base_model.model."): v for k, v in pair().items()},
            "model.layers.0.q.lora_A.weight",
            ["no LoRA factors"],
        ),
        (
            {**pair(), f"{EMBED}.weight": ("BF16", (12, 4))},
            "model.embed_tokens.weight",
            ["another shape", "found [12, 4]", "expected [10, 4]"],
        ),
        (
            {
                **{f"{EMBED}.lora_embedding_A": ("F32", (2, 10)), f"{EMBED}.lora_embedding_B": ("F32", (4, 2))},
                f"{EMBED}.base_layer.weight": ("BF16", np.ones((10, 4), np.uint16)),
            },
            f"{EMBED}.base_layer.weight",
            ["replaces a tensor of the base"],
        ),
    ],
)
def test_adapters_that_do_not_fit(
    tmp_path: Path, base: Checkpoint, tensors: Table, tensor: str | None, words: list[str]
) -> None:
    root = adapter(tmp_path / "a", tensors)
    refuse(base, root, root / "adapter_model.safetensors", *words, *([f"tensor '{tensor}'"] if tensor else []))


def test_copies_of_adapted_embeddings_are_harmless(tmp_path: Path, base: Checkpoint) -> None:
    copy = BASE["model.embed_tokens.weight"]
    factors: Table = {f"{EMBED}.lora_embedding_A": ("F32", (2, 10)), f"{EMBED}.lora_embedding_B": ("F32", (4, 2))}
    root = adapter(tmp_path / "a", {**factors, f"{EMBED}.base_layer.weight": copy, f"{EMBED}.weight": copy})
    assert factors_of(open_source("p", root, None, base, relative_to=None), base, "model.embed_tokens.weight")


def test_modules_trained_in_full_replace_the_bases(tmp_path: Path, base: Checkpoint) -> None:
    tensors = {**pair(), f"{EMBED}.weight": ("F32", (10, 4)), "base_model.model.score.bias": ("F32", (2,))}
    root = adapter(tmp_path / "a", tensors, modules_to_save=["embed_tokens", "score"])
    source = open_source("p", root, None, base, relative_to=None)
    assert dict(source.shapes) == {
        "model.layers.0.q.weight": (6, 4),
        "model.embed_tokens.weight": (10, 4),
        "score.bias": (2,),
    }
    found = look_up(source, base, "model.embed_tokens.weight")
    assert isinstance(found, Dense) and (found.form, found.entry.name) == ("checkpoint", f"{EMBED}.weight")


@pytest.mark.parametrize(
    "patterns",
    [
        {"q": 3},
        {"layers.0.q": 3, "q": 5},
        {"q": 5, "layers.0.q": 3},
        {r"^model\.layers\.0\.q": 3},
        {r".*\.1\..*": 3},
        {r"layers\.(0|1)\.q": 3},
        {"0.q": 3, "ayers.1.q": 4},
        {"model": 3},
        {"model.layers.0.q": 3},
        {"k|q": 3},
        {"mo[d]el.layers.[1-9].q": 3},
    ],
)
def test_patterns_match_as_in_peft(tmp_path: Path, base: Checkpoint, patterns: dict[str, int]) -> None:
    get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
    wanted = {}
    tensors: Table = {}
    for layer in (0, 1):
        module = f"model.layers.{layer}.q"
        rank = patterns.get(get_pattern_key(patterns.keys(), module), 2)
        wanted[f"{module}.weight"] = (rank, float(np.float32(rank / rank)))
        tensors |= pair(f"base_model.model.{module}", rank=rank)
    root = adapter(tmp_path / "a", tensors, lora_alpha=2, rank_pattern=patterns, alpha_pattern=patterns)
    source = open_source("p", root, None, base, relative_to=None)
    found = {name: factors_of(source, base, name) for name in source.shapes}
    assert {name: (factors.rank, factors.scale) for name, factors in found.items()} == wanted


def test_config_of_an_old_peft(tmp_path: Path, base: Checkpoint) -> None:
    old = {
        **{
            key: None
            for key in ("auto_mapping", "layers_pattern", "layers_to_transform", "modules_to_save", "revision")
        },
        **{"base_model_name_or_path": "org/name", "bias": "none", "fan_in_fan_out": False, "inference_mode": True},
        **{"init_lora_weights": True, "lora_dropout": 0.05, "target_modules": ["q"], "task_type": "CAUSAL_LM"},
        **{"enable_lora": None, "merge_weights": False},
    }
    assert open_source("p", adapter(tmp_path / "a", options=old), None, base, relative_to=None).shapes


# LoRA, against PEFT


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2))


PEFT_CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "plain": (llama, "float32", {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 7}),
    "bfloat16": (llama, "bfloat16", {"target_modules": "all-linear", "r": 4, "lora_alpha": 16}),
    "rslora": (llama, "float32", {"target_modules": ["up_proj"], "r": 6, "lora_alpha": 5, "use_rslora": True}),
    "patterns": (
        llama,
        "float32",
        {
            "target_modules": "all-linear",
            "r": 2,
            "lora_alpha": 3,
            # PEFT sorts the patterns as it saves them, so what it reads back is this order.
            "rank_pattern": {"layers.0.mlp.down_proj": 4, r"layers\.1\..*q_proj": 5, "mlp.down_proj": 3},
            "alpha_pattern": {"^model.layers.0.self_attn.k_proj": 11, "layers.0.self_attn.q_proj": 13, "q_proj": 9.5},
            "use_rslora": True,
        },
    ),
    "embedding": (llama, "float32", {"target_modules": ["embed_tokens", "q_proj"], "r": 3, "lora_alpha": 4}),
    "conv1d": (gpt2, "float32", {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 3, "lora_alpha": 4}),
    "conv1d-embedding": (gpt2, "bfloat16", {"target_modules": ["wte", "c_attn"], "r": 2, "lora_alpha": 5}),
    "gaussian": (llama, "float32", {"target_modules": ["o_proj"], "r": 3, "init_lora_weights": "gaussian"}),
    "orthogonal": (llama, "float32", {"target_modules": ["o_proj"], "r": 4, "init_lora_weights": "orthogonal"}),
    "mica": (llama, "float32", {"target_modules": ["o_proj"], "r": 4, "init_lora_weights": "mica"}),
}


@pytest.mark.parametrize("case", PEFT_CASES)
@pytest.mark.filterwarnings("ignore")
def test_deltas_are_those_of_peft(tmp_path: Path, case: str) -> None:
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    make, dtype, options = PEFT_CASES[case]
    torch.manual_seed(0)
    model = make().to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "base")
    live = peft.get_peft_model(model, peft.LoraConfig(**options), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    live.save_pretrained(tmp_path / "adapter")

    base = open_checkpoint(tmp_path / "base")
    source = open_source("p", tmp_path / "adapter", None, base, relative_to=None)
    layers = {
        f"{name.removeprefix('base_model.model.')}.weight": module
        for name, module in live.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert set(source.shapes) == set(layers) and layers
    for name, layer in layers.items():
        lora = load(source, base, name)
        assert lora.scale == float(np.float32(layer.scaling["default"]))
        delta = np.float32(lora.scale) * (lora.b @ lora.a)
        # In bfloat16 PEFT rounds the delta to it; float32 is the contract here.
        layer = layer.float()
        theirs = layer.get_delta_weight("default").detach().numpy()
        assert delta.shape == theirs.shape == base.tensors[name].shape
        assert np.allclose(delta, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_peft_saves_and_we_refuse(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, **options)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    refuse(open_checkpoint(tmp_path / "base"), tmp_path / "adapter", words)


def test_every_field_of_pefts_config_is_decided() -> None:
    """A field that a new PEFT adds is refused while active; this says that one is new, so that it can be read."""
    import dataclasses

    peft = pytest.importorskip("peft")
    from safepatch_core.merging.sources import folder, lora

    refused = {
        *("megatron_config", "velora_config", "use_qalora", "alora_invocation_tokens", "monteclora_config"),
        *("layer_replication", "use_bdlora", "arrow_config", "kasa_config", "ensure_weight_tying"),
    }
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= refused | lora.HARMLESS | lora.USED | folder.HARMLESS | folder.USED
