"""Fixes in the formats of other tools, read as these tools read them: the same bits, or refused."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safepatch_core.errors import InputError, UsageError
from safepatch_core.fixes.export import export
from tests import fix_oracle
from tests.fix_cases import changed, random_tensor, unsigned, write_checkpoint, write_fix
from tests.oracle import Tensor, from_f32, load_checkpoint, to_f32


def weights(rng: np.random.Generator, dtype: str, *shape: int) -> Tensor:
    return Tensor(dtype, shape, from_f32(rng.standard_normal(shape).astype(np.float32).ravel() * 0.05, dtype))


def nudged(rng: np.random.Generator, t: Tensor, share: float = 0.05) -> Tensor:
    """`t` moved a little where a draw says so, as training does."""
    w = to_f32(t)
    at = rng.random(len(w)) < share
    return Tensor(t.dtype, t.shape, from_f32(np.where(at, w * np.float32(1.02) + np.float32(0.001), w), t.dtype))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(6)


def test_dense(tmp_path: Path, rng: np.random.Generator) -> None:
    base = {"a.weight": random_tensor(rng, "BF16", 30, 30), "b": random_tensor(rng, "U8", 5)}
    merged = {**base, "a.weight": changed(rng, base["a.weight"], 0.2)}
    ckpt = write_checkpoint(tmp_path / "base", base)
    export(write_fix(tmp_path / "f.safetensors", base, merged), "dense", ckpt, tmp_path / "out")
    assert load_checkpoint(tmp_path / "out") == merged


def test_the_base_is_that_of_the_recipe(tmp_path: Path, rng: np.random.Generator) -> None:
    """Looked for beside the fix; without a name for it, one has to be given."""
    base = {"a.weight": random_tensor(rng, "BF16", 30, 30)}
    merged = {"a.weight": changed(rng, base["a.weight"], 0.2)}
    write_checkpoint(tmp_path / "base", base)
    export(write_fix(tmp_path / "f.safetensors", base, merged, {"base": "base"}), "dense", None, tmp_path / "out")
    assert load_checkpoint(tmp_path / "out") == merged
    with pytest.raises(UsageError, match="does not name its base: expected --base"):
        export(write_fix(tmp_path / "f.safetensors", base, merged), "dense", None, tmp_path / "other")
    with pytest.raises(InputError, match="no such file"):
        export(write_fix(tmp_path / "f.safetensors", base, merged, {"base": "b"}), "dense", None, tmp_path / "other")


def test_slime(tmp_path: Path, rng: np.random.Generator) -> None:
    """As a server takes it: decompress, XOR all bytes, compare the checksum of what comes out."""
    zstandard = pytest.importorskip("zstandard")
    base = {n: random_tensor(rng, d, 30, 3000) for n, d in (("a", "BF16"), ("b", "F32"), ("c", "U8"), ("d", "F16"))}
    merged = {n: t if n == "d" else changed(rng, t, 0.05) for n, t in base.items()}
    ckpt = write_checkpoint(tmp_path / "base", base)
    fix = write_fix(tmp_path / "f.safetensors", base, merged)
    result = export(fix, "slime", ckpt, tmp_path / "deltas", version=3)
    assert result.out == tmp_path / "deltas" / "weight_v000003"
    index = json.loads((result.out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"version": "000003", "base_version": "000002", "delta_encoding": "xor"} | {
        "compression_format": "zstd",
        "checksum_format": "adler32",
    }
    assert set(index["weight_map"]) == {"a", "b", "c"}
    found = dict(base)
    for file in set(index["weight_map"].values()):
        sums, arrays = fix_oracle.read((result.out / file).read_bytes())
        for name, (dtype, shape, data) in arrays.items():
            assert dtype == "U8" and shape == [len(data)]
            delta = np.frombuffer(zstandard.ZstdDecompressor().decompress(data), np.uint8)
            new = (np.frombuffer(base[name].data, np.uint8) ^ delta).tobytes()
            assert sums[name] == f"{zlib.adler32(new):08x}"
            found[name] = base[name]._replace(data=new)
    assert found == merged
    export(fix, "slime", ckpt, tmp_path / "deltas", version=4)
    assert (tmp_path / "deltas" / "weight_v000004").is_dir() and result.out.is_dir()


LAYERS = {"lin1.weight": (64, 40), "lin2.weight": (30, 64)}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_shira_merges_to_the_same_bits(tmp_path: Path, rng: np.random.Generator, dtype: str) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base = {name: weights(rng, dtype, *shape) for name, shape in LAYERS.items()}
    merged = {name: nudged(rng, t, 0.1 if name == "lin1.weight" else 0.02) for name, t in base.items()}
    if dtype == "F32":  # where both are near each other their difference is exact
        merged = {
            name: Tensor("F32", t.shape, from_f32(to_f32(t) * np.float32(1.25), "F32")) for name, t in base.items()
        }
        merged = {name: sparse(rng, base[name], t) for name, t in merged.items()}
    ckpt = write_checkpoint(tmp_path / "base", base)
    export(write_fix(tmp_path / "f.safetensors", base, merged), "shira", ckpt, tmp_path / "adapter")
    model = model_of(torch, base)
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).merge_and_unload()
    for name, t in merged.items():
        assert raw(torch, adapted.state_dict()[name]) == t.data, name


def sparse(rng: np.random.Generator, old: Tensor, new: Tensor) -> Tensor:
    at = rng.random(len(unsigned(old))) < 0.05
    return old._replace(data=np.where(at, unsigned(new), unsigned(old)).tobytes())


def model_of(torch: Any, tensors: dict[str, Tensor]) -> Any:
    class Model(torch.nn.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            for name, t in tensors.items():
                rows, cols = t.shape
                layer = torch.nn.Linear(cols, rows, bias=False)
                kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[t.dtype]
                layer.weight = torch.nn.Parameter(torch.frombuffer(bytearray(t.data), dtype=kind).view(t.shape))
                setattr(self, name.removesuffix(".weight"), layer)

        def forward(self, x: Any) -> Any:
            return self.lin2(self.lin1(x))

    return Model()


def raw(torch: Any, tensor: Any) -> bytes:
    return bytes(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "says"),
    [
        ("embed_tokens.weight", "BF16", (50, 40), "not the weight of a linear layer"),
        ("norm.weight", "BF16", (500,), "not the weight of a linear layer"),
        ("lin.weight", "F8_E4M3", (50, 40), "can't take an adapter's steps"),
    ],
)
def test_shira_refuses_what_it_cannot_hold(
    tmp_path: Path, rng: np.random.Generator, name: str, dtype: str, shape: tuple[int, ...], says: str
) -> None:
    base = {name: random_tensor(rng, dtype, *shape), "x": random_tensor(rng, "U8", 3)}
    fix = write_fix(tmp_path / "f.safetensors", base, {**base, name: changed(rng, base[name], [3, 5])})
    ckpt = write_checkpoint(tmp_path / "base", base)
    with pytest.raises(InputError, match=f"tensor '{name}': .*{says}"):
        export(fix, "shira", ckpt, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "f.safetensors"]


def test_shira_refuses_steps_that_do_not_lead_there(tmp_path: Path, rng: np.random.Generator) -> None:
    """1 and the float after 2^-30 have no float32 difference that leads from one to the other; -0 from 1 neither."""
    base = {"lin.weight": Tensor("F32", (20, 20), np.ones(400, "<f4").tobytes()), "x": random_tensor(rng, "U8", 3)}
    for value in (2.0**-30 * (1 + 2.0**-23), -0.0):
        new = np.ones(400, "<f4")
        new[7] = value
        merged = {**base, "lin.weight": Tensor("F32", (20, 20), new.tobytes())}
        fix = write_fix(tmp_path / "f.safetensors", base, merged)
        ckpt = tmp_path / "base"
        if not ckpt.exists():
            write_checkpoint(ckpt, base)
        with pytest.raises(
            InputError, match="'lin.weight': no step of an adapter leads to the same bits: found 1 such"
        ):
            export(fix, "shira", ckpt, tmp_path / "out")
