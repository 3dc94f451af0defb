"""What users know from mergekit gives the same model here, within one rounding of the output dtype."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from safepatch_core import merge, open_checkpoint
from safepatch_core.files.reading import TensorEntry

torch = pytest.importorskip("torch", reason="makes the models")
transformers = pytest.importorskip("transformers", reason="makes the models")
MERGEKIT = Path(sys.executable).with_name("mergekit-yaml")
pytestmark = pytest.mark.skipif(not MERGEKIT.exists(), reason="mergekit is not installed (extra: peers)")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 base and two full fine-tunes of it. SAFEPATCH_PEER_MODEL names a real base; else a small random one."""
    root: Path = tmp_path_factory.mktemp("models")
    real = os.environ.get("SAFEPATCH_PEER_MODEL")
    torch.manual_seed(0)
    if real:
        model = transformers.AutoModelForCausalLM.from_pretrained(real, dtype=torch.bfloat16)
    else:
        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=199
        )
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(root / "base")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for patch in ("one", "two"):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name].float() + 0.02 * start[name].float().std() * torch.randn(p.shape))
        model.save_pretrained(root / patch)
    return root


def bits(entry: TensorEntry) -> np.ndarray[Any, Any]:
    return np.fromfile(entry.path, np.uint16, entry.entries, offset=entry.start).astype(np.int32)


def ordered(entry: TensorEntry) -> np.ndarray[Any, Any]:
    """bf16 bits as integers in the order of their values, so that neighbours differ by one."""
    raw = bits(entry)
    return np.where(raw & 0x8000, 0x8000 - raw, raw)


def value(entry: TensorEntry) -> np.ndarray[Any, Any]:
    return (bits(entry).astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize(("method", "combine"), [("task_arithmetic", "sum"), ("ties", "ties")])
def test_equals_mergekit_within_one_rounding(models: Path, tmp_path: Path, method: str, combine: str) -> None:
    theirs = {
        "merge_method": method,
        "base_model": str(models / "base"),
        "models": [{"model": str(models / p), "parameters": {"weight": 1.0, "density": 1.0}} for p in ("one", "two")],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    (tmp_path / "mergekit.yaml").write_text(yaml.safe_dump(theirs))
    command: list[str | Path] = [MERGEKIT, tmp_path / "mergekit.yaml", tmp_path / "theirs"]
    command += ["--quiet", "--no-copy-tokenizer"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]

    ours = {
        "base": str(models / "base"),
        "patches": [{"name": p, "source": str(models / p)} for p in ("one", "two")],
        "combine": combine,
        "targets": "all",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(ours))
    merge(tmp_path / "recipe.yaml", tmp_path / "ours", backend="cpu")

    a, b, base, one, two = (
        open_checkpoint(d).tensors
        for d in (tmp_path / "ours", tmp_path / "theirs", models / "base", models / "one", models / "two")
    )
    assert set(a) == set(base) <= set(b) | {"lm_head.weight"}
    entries = differing = changed = opposed = 0
    for name, entry in a.items():
        mine, start = ordered(entry), ordered(base[name])
        step = np.abs(mine - ordered(b[name]))
        if combine == "ties":
            # Deltas that cancel exactly have no majority: the contract leaves the entry, mergekit the positive one.
            w = value(base[name])
            tied = (value(one[name]) - w) + (value(two[name]) - w) == 0
            assert np.array_equal(mine[tied], start[tied])
            step, opposed = step[~tied], opposed + int(np.count_nonzero(tied))
        assert step.max(initial=0) <= 1, (name, int(step.max()))
        entries += len(mine)
        differing += int(np.count_nonzero(step))
        changed += int(np.count_nonzero(mine != start))
    assert changed > entries // 2
    print(f"{method}: of {entries} entries {differing} differ by one rounding, {opposed} cancel exactly")
    shutil.rmtree(tmp_path)
