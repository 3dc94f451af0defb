"""Adapters trained on a quantised backbone (QLoRA), on the CPU, and merged into the full one."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from safepatch_core.deriving import DeriveConfig, DeriveResult, derive
from safepatch_core.deriving.adapter import add_adapter
from safepatch_core.deriving.model import load_frozen
from safepatch_core.deriving.objective import answer_nll, mean_nll
from safepatch_core.errors import UsageError
from safepatch_core.language.chat import Format
from safepatch_core.merging.api import merge
from safepatch_core.merging.recipe import load_recipe
from safepatch_core.progress import Progress
from tests.tiny_lm import tiny_tokenizer, write_rows

Quantization = Literal["int8", "nf4"]
with_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture
def where(tmp_path: Path) -> Path:
    """A model whose matrices are whole blocks of 64, as 4-bit quantisation on the CPU wants them."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 264}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    model = LlamaForCausalLM(LlamaConfig(**shape))
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def settings(where: Path, quantization: str, out: str = "run") -> DeriveConfig:
    places = {"model": where / "base", "data": where / "rows.jsonl", "out": where / out}
    given = {
        "method": "lora",
        "lora_r": 4,
        "learning_rate": 1e-2,
        "threads": 1,
        "batch_size": 3,
        "ascent_bound": 50.0,
    }
    steps = {"safety": {"max_steps": 2}, "over_safety": {"max_steps": 2}}
    return DeriveConfig.model_validate({**places, **given, **steps, "quantization": quantization})


def go(config: DeriveConfig) -> DeriveResult:
    return derive(config, quiet=True)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@with_bitsandbytes
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_an_adapter_trained_on_a_quantised_backbone_merges_into_the_full_one(
    where: Path, quantization: Quantization, capfd: pytest.CaptureFixture[str]
) -> None:
    result = go(settings(where, quantization))
    assert "MatMul8bitLt" not in capfd.readouterr().err
    go(settings(where, "none", "plain"))
    nll = result.summary["nll"]
    assert nll["over-safety"] < nll["backbone"] < nll["safety"]
    assert "bitsandbytes" in result.summary["inputs"]["libraries"]
    recipe = load_recipe(result.recipe)
    assert [p.kind for p in recipe.patches] == ["lora", "lora"]
    for name in ("safety", "over-safety"):
        adapter = load_file(where / "run" / name / "adapter_model.safetensors")
        plain = load_file(where / "plain" / name / "adapter_model.safetensors")
        assert adapter.keys() == plain.keys() and {t.dtype for t in adapter.values()} == {torch.float32}
        assert any(not torch.equal(adapter[n], plain[n]) for n in adapter)
        config = json.loads((where / "run" / name / "adapter_config.json").read_text())
        assert config == json.loads((where / "plain" / name / "adapter_config.json").read_text())
        scores = load_file(where / "run/importance" / name / "model.safetensors")
        assert len(scores) == 14 and all(s.any() for s in scores.values())
        assert result.summary["patches"][name]["changed_share"] > 0.9
    merge(result.recipe, where / "merged", backend="reference")
    AutoModelForCausalLM.from_pretrained(where / "merged", local_files_only=True)


@with_bitsandbytes
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_seed_repeats_bit_for_bit(where: Path, quantization: Quantization) -> None:
    outputs = []
    for out in ("a", "b"):
        go(settings(where, quantization, out))
        outputs.append(content(where / out))
    assert outputs[0] == outputs[1]


@with_bitsandbytes
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_gradients_are_the_same_after_the_backbone_was_measured(where: Path, quantization: Quantization) -> None:
    chat = Format(tiny_tokenizer())
    examples = [chat.encode(f"What is {i}?", f"Sure, {i}", 256) for i in range(3)]
    config = settings(where, quantization)
    found = []
    for measured in (False, True):
        model = load_frozen(Path(config.model), config)
        if measured:
            with Progress("NLL", 1, quiet=True, report=None) as progress:
                mean_nll(model, examples, 3, progress)
        torch.manual_seed(0)
        model = add_adapter(model, config).train()
        torch.autograd.backward(answer_nll(model, examples))
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 28
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert {type(m).__name__ for m in model.modules()} & {"Linear4bit", "Linear8bitLt"}


@with_bitsandbytes
def test_nothing_is_fetched_when_bitsandbytes_is_loaded(where: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(f"open({str(tmp_path / 'fetched')!r}, 'w')\ndef get_kernel(*a, **k): ...\n")
    code = (
        "import sys; from pathlib import Path; from safepatch_core.deriving import DeriveConfig\n"
        "from safepatch_core.deriving.model import load_frozen\n"
        "config = DeriveConfig.model_validate_json(sys.argv[1])\n"
        "load_frozen(Path(config.model), config); assert 'bitsandbytes' in sys.modules\n"
        "assert 'kernels' not in sys.modules\n"
    )
    given = settings(where, "nf4").model_dump_json()
    subprocess.run([sys.executable, "-c", code, given], check=True, cwd=tmp_path, capture_output=True)
    assert not (tmp_path / "fetched").exists()


def test_a_quantised_backbone_needs_bitsandbytes_and_an_adapter(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="quantization is of a frozen backbone: it needs method lora"):
        DeriveConfig.model_validate({"model": "m", "data": "d", "out": "o", "quantization": "nf4"})
    monkeypatch.setattr("safepatch_core.deriving.find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(UsageError, match=r"derive needs bitsandbytes.*pip install 'safepatch\[derive,quantize\]'"):
        go(settings(where, "nf4"))
    assert not (where / "run").exists()
    assert logging.getLogger("bitsandbytes").level == logging.NOTSET
