"""Fixes applied to live tensors: arrays, state dicts, modules, devices. Checked first, all or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safepatch_core import apply_, revert_
from safepatch_core.errors import InputError
from safepatch_core.fixes import codec, operators
from safepatch_core.fixes.reading import open_fix
from tests.fix_cases import changed, random_tensor, unsigned, write_fix
from tests.oracle import Tensor

torch = pytest.importorskip("torch")
Table = dict[str, Tensor]
TYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}


def table() -> tuple[Table, Table]:
    rng = np.random.default_rng(3)
    base = {
        "a.weight": random_tensor(rng, "BF16", 300, 500),
        "b.weight": random_tensor(rng, "F32", 20, 30),
        "c.weight": random_tensor(rng, "F8_E4M3", 20, 30),
        "d.bias": random_tensor(rng, "F16", 30),
    }
    return base, {n: t if n == "d.bias" else changed(rng, t, 0.05, "small") for n, t in base.items()}


BASE, MERGED = table()


@pytest.fixture
def fix(tmp_path: Path) -> Path:
    return write_fix(tmp_path / "fix.safetensors", BASE, MERGED)


def tensor(t: Tensor) -> Any:
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[unsigned(t).itemsize]
    return torch.frombuffer(bytearray(t.data), dtype=width).view(TYPES[t.dtype]).view(t.shape)


def as_torch(tensors: Table) -> dict[str, Any]:
    return {name: tensor(t) for name, t in tensors.items()}


def as_numpy(tensors: Table) -> dict[str, Any]:
    return {name: unsigned(t).copy().reshape(t.shape) for name, t in tensors.items()}


class Foreign:
    """An array of another library, which offers DLPack and nothing else."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def data(tensors: Any) -> dict[str, bytes]:
    def raw(t: Any) -> bytes:
        t = t.array if isinstance(t, Foreign) else t
        return bytes(t.tobytes() if isinstance(t, np.ndarray) else t.detach().view(torch.uint8).numpy().tobytes())

    return {name: raw(t) for name, t in tensors.items()}


FORMS: dict[str, Any] = {
    "torch": as_torch,
    "numpy": as_numpy,
    "dlpack": lambda tensors: {name: Foreign(array) for name, array in as_numpy(tensors).items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back(fix: Path, form: str) -> None:
    tensors = FORMS[form](BASE)
    result = apply_(tensors, fix)
    assert (result.direction, result.tensors) == ("apply", 3)
    assert data(tensors) == {name: t.data for name, t in MERGED.items()}
    with pytest.raises(InputError, match="carries fix .* already"):
        apply_(tensors, fix)
    with open_fix(fix) as opened:
        assert revert_(tensors, opened).id == result.id
    assert data(tensors) == {name: t.data for name, t in BASE.items()}
    with pytest.raises(InputError, match="does not carry fix"):
        revert_(tensors, fix)


def test_another_device(fix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs for tensors of a GPU, on the CPU."""
    monkeypatch.setattr(operators, "way", lambda entries: operators.by_index)
    tensors = as_torch(BASE)
    apply_(tensors, fix)
    assert data(tensors) == {name: t.data for name, t in MERGED.items()}
    revert_(tensors, fix)
    assert data(tensors) == {name: t.data for name, t in BASE.items()}


class Model(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 20, dtype=torch.bfloat16)
        self.head = torch.nn.Linear(20, 50, bias=False, dtype=torch.bfloat16)
        if tied:
            self.head.weight = self.embed.weight


def file_of(model: Any) -> Table:
    return {
        name: Tensor("BF16", tuple(t.shape), t.detach().view(torch.int16).numpy().tobytes())
        for name, t in model.state_dict().items()
    }


@pytest.mark.parametrize("wrapped", [False, True])
def test_modules(tmp_path: Path, wrapped: bool) -> None:
    model = Model()
    base = file_of(model)
    merged = {n: changed(np.random.default_rng(0), t, 0.1, "small") for n, t in base.items()}
    fix = write_fix(tmp_path / "fix.safetensors", base, merged)
    apply_(torch.nn.ModuleDict({"_orig_mod": model}) if wrapped else model, fix)
    assert file_of(model) == merged


def test_tied_tensors_once(tmp_path: Path) -> None:
    model = Model(tied=True)
    base = file_of(model)
    one = changed(np.random.default_rng(0), base["embed.weight"], 0.1, "small")
    both = {"embed.weight": one, "head.weight": one}
    fix = write_fix(tmp_path / "fix.safetensors", base, both)
    apply_(model, fix)
    assert file_of(model) == both
    revert_(model, fix)
    embed = write_fix(tmp_path / "embed.safetensors", base, {**base, "embed.weight": one})
    apply_(model, embed)
    assert file_of(model) == both
    revert_(model, embed)
    other = {"embed.weight": one, "head.weight": changed(np.random.default_rng(1), base["head.weight"], 0.1, "small")}
    with pytest.raises(InputError, match="'head.weight': shares its memory with 'embed.weight'"):
        apply_(model, write_fix(tmp_path / "other.safetensors", base, other))
    assert file_of(model) == base


def transposed(tensors: dict[str, Any]) -> str:
    tensors["b.weight"] = tensors["b.weight"].t().contiguous().t()
    return "'b.weight': can't be changed in place: found strides"


def missing(tensors: dict[str, Any]) -> str:
    del tensors["c.weight"]
    return "'c.weight': the model has no such tensor: it may have been fused"


def reshaped(tensors: dict[str, Any]) -> str:
    tensors["b.weight"] = tensors["b.weight"][:10].clone()
    return "'b.weight': is not the tensor that the fix touches: found 300 entries, expected 600"


def wider(tensors: dict[str, Any]) -> str:
    tensors["b.weight"] = tensors["b.weight"].double()
    return "'b.weight': can't be changed in place: found entries of 8 bytes"


def edited(tensors: dict[str, Any]) -> str:
    tensors["c.weight"].view(torch.uint8).fill_(7)
    return "'c.weight': carries something else"


def narrower(tensors: dict[str, Any]) -> str:
    tensors["b.weight"] = tensors["b.weight"].half()
    return "'b.weight'"


def offloaded(tensors: dict[str, Any]) -> str:
    tensors["b.weight"] = tensors["b.weight"].to("meta")
    return "'b.weight': can't be changed in place: found a tensor without memory"


@pytest.mark.parametrize("spoil", [transposed, missing, reshaped, wider, edited, narrower, offloaded])
def test_refused_before_an_entry_changes(fix: Path, spoil: Any) -> None:
    tensors = as_torch(BASE)
    says = spoil(tensors)
    before = {name: t.clone() for name, t in tensors.items()}
    for run in (apply_, revert_):
        with pytest.raises(InputError) as refused:
            run(tensors, fix)
        assert says in str(refused.value)
    for name, t in before.items():
        now = tensors[name]
        assert t.device.type == "meta" or data({"": t.contiguous()}) == data({"": now.contiguous()})


def test_read_only_arrays_are_refused(fix: Path) -> None:
    arrays = as_numpy(BASE)
    arrays["b.weight"].flags.writeable = False
    with pytest.raises(InputError, match="'b.weight': can't be changed in place.*writable: False"):
        apply_(arrays, fix)


def test_a_failure_in_the_middle_takes_all_back(fix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = as_torch(BASE)
    settle, calls = codec.settle, 0

    def failing(run: Any, entries: Any, goal: int, *sides: Any) -> Any:
        nonlocal calls
        calls += goal == codec.NEW
        if goal == codec.NEW and calls == 3:
            raise MemoryError
        return settle(run, entries, goal, *sides)

    monkeypatch.setattr(codec, "settle", failing)
    with pytest.raises(MemoryError):
        apply_(tensors, fix)
    assert data(tensors) == {name: t.data for name, t in BASE.items()}


def test_graphs_that_saved_old_values_notice(tmp_path: Path) -> None:
    model = Model()
    base = file_of(model)
    merged = {n: changed(np.random.default_rng(0), t, 0.1, "small") for n, t in base.items()}
    x = torch.ones(1, 20, dtype=torch.bfloat16, requires_grad=True)
    y = model.head(x).sum()
    apply_(model, write_fix(tmp_path / "fix.safetensors", base, merged))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_tensors_of_inference_mode(fix: Path) -> None:
    with torch.inference_mode():
        tensors = as_torch(BASE)
        apply_(tensors, fix)
        assert data(tensors) == {name: t.data for name, t in MERGED.items()}
