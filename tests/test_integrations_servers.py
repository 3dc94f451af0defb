"""Fixes in servers, against stand-ins for the few calls of vLLM and SGLang that the integrations make.

Neither server is installed where these tests run. The stand-ins have the names, arguments and refusals of what they
stand for, and a model that fuses and shards as a server's does.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from safepatch_core.errors import InputError, UsageError
from tests.fix_cases import changed, random_tensor, write_checkpoint, write_fix
from tests.oracle import Tensor, load_file

torch = pytest.importorskip("torch")
Table = dict[str, Tensor]
Weights = Iterable[tuple[str, Any]]


def table() -> Table:
    rng = np.random.default_rng(5)
    names = {"q.weight": (8, 6), "k.weight": (4, 6), "mlp.weight": (10, 6), "norm.weight": (6,)}
    return {name: random_tensor(rng, "BF16", *shape) for name, shape in names.items()}


def variant(seed: int, tensors: Table, *names: str) -> Table:
    rng = np.random.default_rng(seed)
    return {n: changed(rng, t, 0.3, "small") if n in names else t for n, t in tensors.items()}


BASE = table()
ONE = variant(1, BASE, "q.weight", "k.weight")
TWO = variant(2, ONE, "mlp.weight")
OVER = variant(3, ONE, "q.weight")  # on the same entries as the first


def as_torch(t: Tensor) -> Any:
    return torch.frombuffer(bytearray(t.data), dtype=torch.bfloat16).view(t.shape)


class Model:
    """Rank 1 of 2: q and k in one parameter, rows cut; loading may fail half way."""

    def __init__(self) -> None:
        self.qk, self.mlp, self.norm = torch.zeros(6, 6), torch.zeros(5, 6), torch.zeros(6)
        self.qk, self.mlp, self.norm = (t.bfloat16() for t in (self.qk, self.mlp, self.norm))
        self.fails_at: str | None = None

    def load_weights(self, weights: Weights) -> None:
        places = {"q.weight": self.qk[:4], "k.weight": self.qk[4:], "mlp.weight": self.mlp, "norm.weight": self.norm}
        for name, tensor in weights:
            if name == self.fails_at:
                self.fails_at = None
                raise RuntimeError("out of memory")
            place = places[name]
            place.copy_(tensor[len(tensor) - len(place) :] if tensor.ndim > 1 else tensor)

    def bits(self) -> list[bytes]:
        return [t.view(torch.uint8).numpy().tobytes() for t in (self.qk, self.mlp, self.norm)]


def served(tensors: Table) -> list[bytes]:
    """What that rank has of a checkpoint."""
    model = Model()
    model.load_weights((name, as_torch(t)) for name, t in tensors.items())
    return model.bits()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return {
        "base": str(write_checkpoint(tmp_path / "base", BASE)),
        "one": str(write_fix(tmp_path / "one.safetensors", BASE, ONE)),
        "two": str(write_fix(tmp_path / "two.safetensors", ONE, TWO)),
        "over": str(write_fix(tmp_path / "over.safetensors", ONE, OVER)),
    }


class DefaultModelLoader:
    """vLLM's: refuses formats and keys that it doesn't know, gives tensors that must not be written to."""

    def __init__(self, load_config: Any) -> None:
        self.load_config = load_config
        if load_config.load_format not in ("auto", "hf", "safetensors"):
            raise ValueError(f"Unknown load_format: {load_config.load_format}")
        unexpected = load_config.model_loader_extra_config.keys() - {"enable_multithread_load", "num_threads"}
        if unexpected:
            raise ValueError(f"Unexpected extra config keys: {unexpected}")
        self.mapped: dict[str, Any] = {}

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
        for path in sorted(Path(model_config.model).glob("*.safetensors")):
            for name, tensor in load_file(path).items():
                self.mapped[name] = as_torch(tensor)
                yield name, self.mapped[name]

    def load_weights(self, model: Any, model_config: Any) -> None:
        model.load_weights(self.get_all_weights(model_config, model))


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The integration, imported over a stand-in for vLLM; `loaders` are those that were registered."""
    names = ("vllm", "vllm.model_executor", "vllm.model_executor.model_loader")
    modules: dict[str, Any] = {name: ModuleType(name) for name in (*names, f"{names[2]}.default_loader")}
    loaders: dict[str, Any] = {}

    def register_model_loader(load_format: str) -> Any:
        assert load_format not in loaders  # vLLM warns of an overwritten one
        return lambda found: loaders.setdefault(load_format, found)

    modules[names[2]].register_model_loader = register_model_loader
    modules[f"{names[2]}.default_loader"].DefaultModelLoader = DefaultModelLoader
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "safepatch_core.integrations.vllm", raising=False)
    module = importlib.import_module("safepatch_core.integrations.vllm")
    module.loaders = loaders  # type: ignore[attr-defined]
    yield module
    sys.modules.pop("safepatch_core.integrations.vllm", None)


def load_config(load_format: str = "safepatch", **extra: Any) -> Any:
    return SimpleNamespace(load_format=load_format, model_loader_extra_config=extra)


def model_config(files: dict[str, str]) -> Any:
    return SimpleNamespace(model=files["base"], revision=None)


def worker(vllm: Any, files: dict[str, str], config: Any = None) -> Any:
    """A worker with the extension mixed in as vLLM does it, and the base loaded."""

    class Worker:
        def __init__(self) -> None:
            self.vllm_config = SimpleNamespace(
                load_config=config or load_config("auto"), model_config=model_config(files)
            )
            self.model = Model()

        def reload_weights(
            self, weights_iterator: Weights, weights_path: str | None = None, is_checkpoint_format: bool = True
        ) -> None:
            assert is_checkpoint_format and weights_path is None
            self.model.load_weights(weights_iterator)

    for name in dir(vllm.FixWorker):
        assert name.startswith("__") or not hasattr(Worker, name)  # vLLM refuses an extension that hides something
    made = type("Worker", (Worker, vllm.FixWorker), {})()
    made.model.load_weights((name, as_torch(t)) for name, t in BASE.items())
    return made


def test_registered_once_under_the_name_that_people_type(vllm: Any) -> None:
    vllm.register()
    vllm.register()
    assert vllm.loaders == {"safepatch": vllm.FixLoader}


@pytest.mark.parametrize(("fixes", "expected"), [(["one"], ONE), (["one", "two"], TWO)])
def test_the_loader_gives_what_the_merged_checkpoint_would(
    vllm: Any, files: dict[str, str], fixes: list[str], expected: Table
) -> None:
    model, given = Model(), load_config(fixes=[files[f] for f in fixes], num_threads=2)
    loader = vllm.FixLoader(given)
    loader.load_weights(model, model_config(files))
    assert model.bits() == served(expected) != served(BASE)
    for name, tensor in loader.mapped.items():  # nothing was written to the files
        assert tensor.view(torch.uint8).numpy().tobytes() == BASE[name].data
    assert given.load_format == "safepatch" and "fixes" in given.model_loader_extra_config


def test_a_server_on_another_base_does_not_start(vllm: Any, files: dict[str, str]) -> None:
    with pytest.raises(InputError, match="'q.weight': carries something else"):
        vllm.FixLoader(load_config(fixes=[files["over"]])).load_weights(Model(), model_config(files))


@pytest.mark.parametrize("extra", [{}, {"fixes": "one"}, {"fixes": []}, {"fixes": [1]}])
def test_the_loader_wants_fixes(vllm: Any, extra: Any) -> None:
    with pytest.raises(UsageError, match=r"--model-loader-extra-config.*expected \{\"fixes\""):
        vllm.FixLoader(load_config(**extra))


def test_a_running_server_applies_lists_and_reverts(vllm: Any, files: dict[str, str]) -> None:
    w = worker(vllm, files)
    assert w.list_fixes() == []
    (first,) = w.apply_fix(files["one"])
    assert first["path"] == files["one"] and w.model.bits() == served(ONE)
    both = w.apply_fix(files["two"])
    assert both == w.list_fixes() and w.model.bits() == served(TWO)
    assert [fix["path"] for fix in w.revert_fix(first["id"])] == [files["two"]]  # no entry is touched by both
    assert w.revert_fix(files["two"]) == [] and w.model.bits() == served(BASE)


def test_what_the_loader_applied_comes_out(vllm: Any, files: dict[str, str]) -> None:
    w = worker(vllm, files, load_config(fixes=[files["one"]]))
    assert [fix["path"] for fix in w.list_fixes()] == [files["one"]]
    w.model.load_weights((name, as_torch(t)) for name, t in ONE.items())
    assert w.revert_fix(files["one"]) == [] and w.model.bits() == served(BASE)


def test_refusals_leave_the_weights_alone(vllm: Any, files: dict[str, str]) -> None:
    w = worker(vllm, files)
    with pytest.raises(InputError, match="'q.weight': carries something else"):
        w.apply_fix(files["over"])
    with pytest.raises(InputError, match="no such fix is served.*expected none is"):
        w.revert_fix("f" * 32)
    assert w.model.bits() == served(BASE) and w.list_fixes() == []
    (one,) = w.apply_fix(files["one"])
    with pytest.raises(InputError, match=f"fix {one['id']} is served already"):
        w.apply_fix(files["one"])
    w.apply_fix(files["over"])
    with pytest.raises(InputError, match="'q.weight': carries something else"):  # the one above needs it
        w.revert_fix(one["id"])
    assert w.model.bits() == served(OVER) and len(w.list_fixes()) == 2


def test_a_fix_file_that_was_replaced_is_noticed(vllm: Any, files: dict[str, str]) -> None:
    w = worker(vllm, files)
    w.apply_fix(files["one"])
    Path(files["one"]).write_bytes(Path(files["two"]).read_bytes())
    with pytest.raises(InputError, match="another fix than the one applied"):
        w.apply_fix(files["over"])
    assert w.model.bits() == served(ONE)


@pytest.mark.parametrize("tensor", list(BASE))
def test_a_reload_that_fails_brings_back_what_was_served(vllm: Any, files: dict[str, str], tensor: str) -> None:
    w = worker(vllm, files)
    w.apply_fix(files["one"])
    w.model.fails_at = tensor
    with pytest.raises(RuntimeError, match="out of memory"):
        w.apply_fix(files["two"])
    assert w.model.bits() == served(ONE) and len(w.list_fixes()) == 1


def test_without_vllm_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "safepatch_core.integrations.vllm", raising=False)
    with pytest.raises(UsageError, match="vLLM is not installed"):
        importlib.import_module("safepatch_core.integrations.vllm")


def sglang_update(model: Model, named_tensors: Any, load_format: str) -> None:
    """What SGLang does with a format that `--custom-weight-loader` named: imports it, calls it on every rank."""
    module, name = load_format.rsplit(".", 1)
    getattr(importlib.import_module(module), name)(model, named_tensors)


def test_a_request_says_what_sglang_shall_serve(files: dict[str, str]) -> None:
    from safepatch_core.integrations.sglang import LOADER, request

    model = Model()
    second_alone = {**BASE, "mlp.weight": TWO["mlp.weight"]}
    for fixes, expected in ((["one"], ONE), (["one", "two"], TWO), (["two"], second_alone)):
        sglang_update(model, request(files["base"], [files[f] for f in fixes]), LOADER)
        assert model.bits() == served(expected)
    sglang_update(model, request(files["base"], []), LOADER)
    assert model.bits() == served(BASE)


def test_sglang_refusals_leave_the_weights_alone(files: dict[str, str]) -> None:
    from safepatch_core.integrations.sglang import LOADER, request

    model: Any = Model()
    sglang_update(model, request(files["base"], [files["one"]]), LOADER)
    with pytest.raises(InputError, match="'q.weight': carries something else"):
        sglang_update(model, request(files["base"], [files["over"]]), LOADER)
    with pytest.raises(UsageError, match="not a request"):
        sglang_update(model, [("q.weight", torch.zeros(1))], LOADER)
    model.quant_config = object()
    with pytest.raises(UsageError, match="quantised"):
        sglang_update(model, request(files["base"], []), LOADER)
    assert model.bits() == served(ONE)


def test_sglang_brings_back_what_was_served(files: dict[str, str]) -> None:
    from safepatch_core.integrations.sglang import LOADER, request

    model = Model()
    sglang_update(model, request(files["base"], [files["one"]]), LOADER)
    model.fails_at = "norm.weight"
    with pytest.raises(RuntimeError, match="out of memory"):
        sglang_update(model, request(files["base"], [files["one"], files["two"]]), LOADER)
    assert model.bits() == served(ONE)
