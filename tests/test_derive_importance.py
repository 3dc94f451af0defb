"""Importance at scale: SNIP and Fisher, in memory or on disk with the same bits, within its memory."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from safepatch_core.deriving import DeriveConfig, derive, importance
from safepatch_core.deriving.head import head_ends
from safepatch_core.deriving.importance import Kind, Memory, take_importance
from safepatch_core.deriving.objective import answer_nll
from safepatch_core.deriving.saving import Layer, by_layer
from safepatch_core.errors import InputError, IOFailure
from safepatch_core.merging.recipe import load_recipe
from safepatch_core.progress import Progress
from tests.tiny_lm import examples, tiny_llama, write_lm, write_rows

EXAMPLES = examples(5)
FEW_STEPS: dict[str, Any] = {"threads": 1, "learning_rate": 1e-3, "batch_size": 3, "ascent_bound": 50.0}
FEW_STEPS |= {"safety": {"max_steps": 2}, "over_safety": {"max_steps": 2}}


pytestmark = pytest.mark.usefixtures("one_thread")


def is_target(name: str, dimensions: int) -> bool:
    return dimensions >= 2 and "embed" not in name


def layers(
    model: Any, kind: Kind = "snip", memory: Memory = "memory", folder: Path | None = None
) -> tuple[list[Layer], float]:
    with Progress("importance", len(EXAMPLES), quiet=True, report=None) as progress:
        taken = take_importance(model, EXAMPLES, is_target, progress, kind=kind, memory=memory, folder=folder)
        return list(taken.layers), taken.nll


def flat(found: list[Layer]) -> Layer:
    return {name: scores for layer in found for name, scores in layer.items()}


def same_bits(a: Layer, b: Layer) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n].view(torch.int32), b[n].view(torch.int32)) for n in a)


def gradients(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Of each example's mean answer NLL, by autograd alone."""
    names = [n for n, p in model.named_parameters() if is_target(n, p.ndim)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    for example in EXAMPLES:
        loss = answer_nll(model, [example]) / example.answer_tokens
        yield dict(zip(names, torch.autograd.grad(loss, [model.get_parameter(n) for n in names]), strict=True))


def test_importance_is_the_mean_of_each_samples_absolute_product() -> None:
    model = tiny_llama()
    found, nll = layers(model)
    scores = flat(found)

    fresh = tiny_llama().eval()
    names = {n for n, p in fresh.named_parameters() if is_target(n, p.ndim)}
    expected = {n: torch.zeros_like(fresh.get_parameter(n)) for n in names}
    folded = {n: torch.zeros_like(fresh.get_parameter(n)) for n in names}  # what |mean of w * g| would be
    for example in EXAMPLES:
        labels = torch.full((1, len(example.ids)), -100)
        labels[0, example.answer :] = torch.tensor(example.ids[example.answer :])
        loss = fresh(input_ids=torch.tensor([example.ids]), labels=labels).loss
        for name, grad in zip(
            expected, torch.autograd.grad(loss, [fresh.get_parameter(n) for n in expected]), strict=True
        ):
            product = (fresh.get_parameter(name) * grad).detach() / len(EXAMPLES)
            expected[name] += product.abs()
            folded[name] += product
    assert scores.keys() == names
    for name, score in scores.items():
        assert score.dtype == torch.float32 and not score.requires_grad
        torch.testing.assert_close(score, expected[name], rtol=1e-4, atol=1e-9)
        assert not torch.allclose(score, folded[name].abs(), rtol=0.05)
    tokens = sum(e.answer_tokens for e in EXAMPLES)
    assert nll == pytest.approx(float(answer_nll(fresh, EXAMPLES).detach()) / tokens, rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_importance_of_bfloat16_weights_is_float32_and_of_broken_ones_an_error() -> None:
    model = tiny_llama().bfloat16()
    assert {scores.dtype for scores in flat(layers(model)[0]).values()} == {torch.float32}
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(InputError, match="not finite"):
        layers(model)


@pytest.mark.parametrize("kind", ["snip", "fisher"])
def test_scores_are_the_sums_of_the_docstring_bit_for_bit(kind: Kind) -> None:
    model = tiny_llama().eval()
    expected: Layer = {}
    for found in gradients(model):
        for name, g in found.items():
            term = (g * model.get_parameter(name)).abs() if kind == "snip" else g * g
            expected[name] = expected.get(name, torch.zeros_like(g)) + term.detach()
    expected = {name: total / len(EXAMPLES) for name, total in expected.items()}
    assert same_bits(flat(layers(tiny_llama(), kind)[0]), expected)


@pytest.mark.parametrize("kind", ["snip", "fisher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_disk_and_in_memory_give_the_same_bits(
    kind: Kind, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "_PIECE", 1000)  # a matrix takes several pieces, the last a short one
    memory, nll = layers(tiny_llama().to(dtype), kind, "memory")
    disk, again = layers(tiny_llama().to(dtype), kind, "disk", tmp_path)
    assert nll == again and same_bits(flat(memory), flat(disk)) and all(s.any() for s in flat(disk).values())
    assert [list(layer) for layer in memory] == [list(layer) for layer in disk]
    assert [{n.split(".")[2] for n in layer} for layer in disk] == [{"0"}, {"1"}]
    assert list(tmp_path.iterdir()) == []


def test_layers_are_named_by_their_first_number() -> None:
    names = ["embed.weight", "h.0.a.1.w", "h.0.b", "h.10.a", "norm", "h.1.a", "x2.w"]
    assert by_layer(names) == [["embed.weight", "norm", "x2.w"], ["h.0.a.1.w", "h.0.b"], ["h.10.a"], ["h.1.a"]]


def test_auto_goes_to_disk_where_the_sums_take_too_much_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = {"a": torch.zeros(700), "b": torch.zeros(700)}  # 5600 bytes of sums
    for free, spills in ((7900, True), (8100, False)):
        monkeypatch.setattr(importance, "_free_memory", lambda device, free=free: free)
        assert importance._spills("auto", parameters) is spills
        assert importance._spills("disk", parameters) and not importance._spills("memory", parameters)
    monkeypatch.undo()
    assert 0 < importance._free_memory(torch.device("cpu")) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")


def test_a_layer_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    for memory in ("memory", "disk"):
        with pytest.raises(InputError, match=r"tensor 'model\.layers\.\d.*importance is not finite"):
            layers(model, "snip", memory, tmp_path)


def test_recomputed_layers_change_no_bit_and_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    assert head_ends(model), "asked once, by a pass of its own"
    calls = []
    forward = type(model.model.layers[0]).forward

    def counted(layer: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(layer)
        return forward(layer, *args, **kwargs)

    monkeypatch.setattr(type(model.model.layers[0]), "forward", counted)
    found = flat(layers(model)[0])
    assert len(calls) == 2 * len(model.model.layers) * len(EXAMPLES)
    assert "forward" not in vars(model.model.layers[0])
    plain: Layer = {}
    for step in gradients(tiny_llama().eval()):
        for name, g in step.items():
            plain[name] = plain.get(name, 0) + (g * model.get_parameter(name).detach()).abs()
    assert same_bits(found, {name: total / len(EXAMPLES) for name, total in plain.items()})


@pytest.fixture
def where(tmp_path: Path) -> Path:
    write_lm(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def go(where: Path, out: str, **changes: Any) -> Path:
    places = {"model": where / "base", "data": where / "rows.jsonl", "out": where / out}
    derive(DeriveConfig.model_validate({**places, **FEW_STEPS, **changes}), quiet=True)
    return where / out


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_has_the_same_bytes_wherever_importance_is_summed_up(where: Path) -> None:
    memory, disk = (go(where, memory, importance_memory=memory) for memory in ("memory", "disk"))
    assert content(memory) == content(disk)


def test_fisher_and_snip_rank_otherwise_and_magnitude_takes_no_pass(where: Path) -> None:
    runs = {kind: go(where, kind, importance_kind=kind) for kind in ("snip", "fisher", "magnitude")}
    scores = {kind: load_file(runs[kind] / "importance/safety/model.safetensors") for kind in ("snip", "fisher")}
    trained = load_file(runs["snip"] / "safety/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert scores["snip"].keys() == scores["fisher"].keys()
    order = {kind: scores[kind][name].flatten().argsort().tolist() for kind in scores}
    assert order["snip"] != order["fisher"] and not torch.equal(trained[name], scores["snip"][name])
    assert [p.importance_path for p in load_recipe(runs["fisher"] / "recipe.yaml").patches] == [
        "importance/safety",
        "importance/over-safety",
    ]
    assert not (runs["magnitude"] / "importance").exists()
    assert [p.importance for p in load_recipe(runs["magnitude"] / "recipe.yaml").patches] == ["magnitude"] * 2


def test_a_disk_without_room_is_one_line_and_leaves_nothing_half_done(
    where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = os.posix_fallocate

    def full(fd: int, offset: int, size: int) -> None:
        if "(deleted)" in os.readlink(f"/proc/self/fd/{fd}"):  # a file without a name holds sums
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(IOFailure, match="importance/safety: .*No space left.*--resume"):
        go(where, "run", importance_memory="disk")
    assert not any(".safepatch" in name for name in content(where / "run"))
    assert not (where / "run/importance/safety").exists() and (where / "run/safety").exists()


CHILD = """
import sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from safepatch_core.deriving.importance import take_importance
from safepatch_core.language.chat import Example
from safepatch_core.progress import Progress

torch.set_num_threads(1)
target = lambda name, dimensions: dimensions >= 2 and "embed" not in name and "lm_head" not in name

def llama(width, layers):
    shape = dict(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, vocab_size=264)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=8))
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for buffer in model.buffers():
        buffer.fill_(0.5)
    return model

def run(model):
    examples = [Example(tuple(range(3, 35)), 20), Example(tuple(range(40, 72)), 20)]
    with Progress("importance", 2, quiet=True, report=None) as progress:
        taken = take_importance(model, examples, target, progress, memory=sys.argv[1], folder=Path(sys.argv[2]))
        return sum(float(scores.sum()) for layer in taken.layers for scores in layer.values())

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) << 10

run(llama(64, 2))  # what the libraries need themselves
before = status("VmRSS")
model = llama(768, 6)
sizes = {n: 4 * p.numel() for n, p in model.named_parameters()}
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
assert run(model) > 0
layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
targets = sum(size for name, size in sizes.items() if ".layers." in name and "norm" not in name)
print(status("VmHWM") - before, sum(sizes.values()), targets, layer)
"""


@pytest.mark.parametrize("memory", ["memory", "disk"])
def test_peak_memory_is_weights_sums_and_one_layers_gradients(memory: str, tmp_path: Path) -> None:
    """As the kernel counts it, with large blocks given back at once. All gradients together would not fit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, memory, str(tmp_path)],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    peak, weights, targets, layer = map(int, ran.stdout.split())
    sums = targets if memory == "memory" else layer  # a layer's sums are read while the one before is written
    slack = 28 << 20  # activations and logits of 32 tokens, a temporary, and what the libraries keep
    assert targets > 4 * layer and slack < targets - layer
    assert weights < peak < weights + sums + layer + slack, (peak, weights, targets, layer)
