"""The forms of a patch: checkpoint or delta, named and cut into shards as the base; what rounding leaves of it."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from safepatch_core.deriving import DeriveConfig, DeriveResult, derive, saving
from safepatch_core.deriving.model import changed_entries
from safepatch_core.deriving.saving import applied, patched_tensors, save_delta, save_model, save_scores
from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.merging.api import merge
from tests.tiny_lm import tiny_llama, write_lm, write_rows

FAST: dict[str, Any] = {"threads": 1, "learning_rate": 1e-3, "batch_size": 3, "ascent_bound": 50.0}
FAST |= {"safety": {"max_steps": 2}, "over_safety": {"max_steps": 2}}
PATCHES = ("safety", "over-safety")
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def where(tmp_path: Path) -> Path:
    write_lm(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def go(where: Path, out: str, **changes: Any) -> DeriveResult:
    places = {"model": where / "base", "data": where / "rows.jsonl", "out": where / out}
    return derive(DeriveConfig.model_validate({**places, **FAST, **changes}), quiet=True)


def weights(folder: Path) -> Tensors:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def files(folder: Path) -> dict[str, list[str]]:
    """Names in each file, as `safetensors` reads them."""
    return {p.name: sorted(load_file(p)) for p in sorted(folder.glob("*.safetensors"))}


def linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def same_bits(a: Tensors, b: Tensors) -> bool:
    def bits(t: torch.Tensor) -> torch.Tensor:
        return t.contiguous().view(torch.uint8)

    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(bits(a[n]), bits(b[n])) for n in a)


def split(folder: Path) -> None:
    """Cuts a single-file checkpoint into three shards with odd names."""
    tensors = weights(folder)
    (folder / "model.safetensors").unlink()
    parts: dict[str, Tensors] = {}
    for i, name in enumerate(sorted(tensors)):
        parts.setdefault(f"part-{i % 3}.safetensors", {})[name] = tensors[name]
    for file, part in parts.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, part in parts.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float32_delta_merges_to_the_bytes_of_the_checkpoint(tmp_path: Path, dtype: torch.dtype) -> None:
    write_lm(tmp_path / "base", dtype)
    write_rows(tmp_path / "rows.jsonl")
    given = {"learning_rate": 1e-2, "importance": "backbone"}
    go(tmp_path, "whole", **given)
    go(tmp_path, "delta", save_as="delta", **given)
    base = weights(tmp_path / "base")
    for name in PATCHES:
        trained, delta = weights(tmp_path / "whole" / name), weights(tmp_path / "delta" / name)
        assert sorted(p.name for p in (tmp_path / "delta" / name).iterdir()) == ["model.safetensors"]
        assert same_bits(delta, {n: trained[n].float() - base[n].float() for n in base if linear(n)})
    recipe = yaml.safe_load((tmp_path / "delta/recipe.yaml").read_text())
    assert [p["kind"] for p in recipe["patches"]] == ["delta", "delta"]
    assert (tmp_path / "whole/trace-safety.jsonl").read_bytes() == (
        tmp_path / "delta/trace-safety.jsonl"
    ).read_bytes()
    for run in ("whole", "delta"):
        merge(tmp_path / run / "recipe.yaml", tmp_path / f"{run}-merged", backend="cpu")
    merged = weights(tmp_path / "delta-merged")
    assert same_bits(merged, weights(tmp_path / "whole-merged")) and not same_bits(merged, base)


def test_a_bfloat16_delta_is_the_float32_one_rounded_to_nearest_even(where: Path) -> None:
    base = weights(where / "base")
    go(where, "run", save_as="delta", delta_dtype="bfloat16", importance="none")
    go(where, "exact", save_as="delta", importance="none")
    for name in PATCHES:
        half, exact = weights(where / "run" / name), weights(where / "exact" / name)
        assert half.keys() == exact.keys() == {n for n in base if linear(n)}
        for key, values in exact.items():
            bits = values.view(torch.int32).to(torch.int64)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            assert torch.equal(half[key].view(torch.int16), rounded.to(torch.int16)), key
    merge(where / "run/recipe.yaml", where / "merged", backend="reference")
    assert not same_bits(weights(where / "merged"), base)


def test_importance_is_taken_at_base_plus_delta_as_saved(where: Path) -> None:
    go(where, "whole")
    go(where, "delta", save_as="delta")
    go(where, "half", save_as="delta", delta_dtype="bfloat16")
    for name in PATCHES:
        whole, delta, half = (weights(where / run / "importance" / name) for run in ("whole", "delta", "half"))
        assert [p.name for p in (where / "delta/importance" / name).iterdir()] == ["model.safetensors"]
        assert whole.keys() == delta.keys() and not same_bits(delta, half)
        for key in whole:
            torch.testing.assert_close(delta[key], whole[key], rtol=1e-3, atol=1e-6)


def test_a_stopped_delta_run_resumes_to_the_same_bytes(where: Path) -> None:
    class Stop(BaseException):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["phase"] == "importance over-safety":
            raise Stop

    def content(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    go(where, "run", save_as="delta")
    places = {"model": where / "base", "data": where / "rows.jsonl", "out": where / "stopped"}
    config = DeriveConfig.model_validate({**places, **FAST, "save_as": "delta"})
    with pytest.raises(Stop):
        derive(config, quiet=True, report=stop)
    # Where importance is summed up decides no byte: a resumed run may choose anew.
    derive(config.model_copy(update={"importance_memory": "disk"}), quiet=True, resume=True)
    assert content(where / "stopped") == content(where / "run")


def test_every_form_is_cut_into_shards_as_the_base_is(where: Path) -> None:
    split(where / "base")
    base = open_checkpoint(where / "base")
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    layout = {file: sorted(e.name for e in shard.tensors) for file, shard in zip(names, base.shards, strict=True)}
    targets = {file: [n for n in tensors if linear(n)] for file, tensors in layout.items()}
    for form in ("checkpoint", "delta"):
        go(where, form, save_as=form)
        assert files(where / form / "safety") == (layout if form == "checkpoint" else targets)
        assert files(where / form / "importance/safety") == targets
        index = json.loads((where / form / "safety/model.safetensors.index.json").read_text())
        total = sum(4 * t.numel() for t in weights(where / form / "safety").values())
        assert index["metadata"]["total_size"] == total
        assert open_checkpoint(where / form / "safety").tensors.keys() == index["weight_map"].keys()
    AutoModelForCausalLM.from_pretrained(where / "checkpoint/safety", local_files_only=True)
    merge(where / "delta/recipe.yaml", where / "merged", backend="reference")


def test_experts_that_transformers_fuses_are_saved_one_by_one_as_in_the_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 264}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
    MixtralForCausalLM(MixtralConfig(**shape, **heads, max_position_embeddings=64)).save_pretrained(tmp_path / "base")
    split(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    expert = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    assert expert in base.tensors
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert expert not in dict(model.named_parameters())
    for parameter in model.parameters():
        parameter.data += 1.0
    before = weights(tmp_path / "base")
    expected = {name: tensor + 1.0 for name, tensor in before.items()}
    for folder in ("whole", "delta", "scores"):
        (tmp_path / folder).mkdir()
    save_model(model, tmp_path / "whole", base)
    assert same_bits(weights(tmp_path / "whole"), expected)
    entries = [e for e in base.tensors.values() if len(e.shape) > 1]
    save_delta(model, tmp_path / "delta", base, entries, torch.float32)
    assert same_bits(weights(tmp_path / "delta"), {e.name: expected[e.name] - before[e.name] for e in entries})
    matrices = {name: p.detach() for name, p in model.named_parameters() if p.ndim > 1}
    layers = ({name: matrices[name] for name in group} for group in saving.by_layer(matrices))
    save_scores(model, tmp_path / "scores", base, entries, matrices, layers)
    assert same_bits(weights(tmp_path / "scores"), {e.name: expected[e.name] for e in entries})
    with applied(tmp_path / "delta", "delta", base, entries, tmp_path / "again") as checkpoint:
        again: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert not (tmp_path / "again").exists()
    fused = "model.layers.1.mlp.experts.gate_up_proj"
    torch.testing.assert_close(again.get_parameter(fused), model.get_parameter(fused))


def test_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    write_lm(tmp_path / "base", torch.bfloat16)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    (tmp_path / "saved").mkdir()
    save_model(model, tmp_path / "saved", open_checkpoint(tmp_path / "base"))
    saved = tmp_path / "saved/model.safetensors"
    save_file(load_file(saved), tmp_path / "plain.safetensors", metadata={"format": "pt"})
    assert saved.read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


def test_at_most_two_tensors_of_a_delta_or_a_checkpoint_are_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lm(tmp_path / "base")
    base, model = open_checkpoint(tmp_path / "base"), tiny_llama()
    entries = [e for e in base.tensors.values() if linear(e.name)]
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watched(read: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        nonlocal most
        most = max(most, 1 + sum(ref() is not None for ref in alive))
        tensor = read(*args)
        alive.append(weakref.ref(tensor))
        return tensor

    for name in ("read_tensor", "read_patch"):
        monkeypatch.setattr(saving, name, partial(watched, getattr(saving, name)))
    (tmp_path / "delta").mkdir()
    save_delta(model, tmp_path / "delta", base, entries, torch.float32)
    assert (len(alive), most) == (len(entries), 1)
    changed_entries(patched_tensors(tmp_path / "delta", "delta", base, entries))
    with applied(tmp_path / "delta", "delta", base, entries, tmp_path / "again"):
        assert len(alive) == 5 * len(entries) + len(base.tensors) - len(entries)
    assert most <= 4  # a pair, while the pair before it is let go


def test_what_the_base_does_not_have_is_refused_before_a_file_is_made(tmp_path: Path) -> None:
    write_lm(tmp_path / "base")
    tensors = weights(tmp_path / "base")
    wide, few = tmp_path / "wide.safetensors", tmp_path / "few.safetensors"
    save_file(tensors | {"model.norm.weight": torch.zeros(33)}, wide)
    save_file({n: t for n, t in tensors.items() if n != "model.norm.weight"}, few)
    for path, message in ((wide, r"another shape.*\[32\].*\[33\]"), (few, "no counterpart in the base")):
        with pytest.raises(InputError, match=rf"model\.norm\.weight.*{message}"):
            save_delta(tiny_llama(), tmp_path, open_checkpoint(path), [], torch.float32)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_failure_while_writing_is_the_one_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lm(tmp_path / "base")

    def broken(entry: Any) -> torch.Tensor:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(saving, "read_tensor", broken)
    base = open_checkpoint(tmp_path / "base")
    with pytest.raises(OSError, match="Input/output error"):
        save_delta(tiny_llama(), tmp_path, base, list(base.tensors.values()), torch.float32)


def test_a_delta_needs_full_training_of_the_targets() -> None:
    given = {"model": "m", "data": "d", "out": "o", "save_as": "delta"}
    DeriveConfig.model_validate(given)
    for change in ({"method": "lora"}, {"trainable": "all"}):
        with pytest.raises(ValueError, match="save_as: delta holds the targets alone"):
            DeriveConfig.model_validate({**given, **change})


def test_what_survives_rounding_in_entries_sums_and_norms() -> None:
    old = torch.tensor([1.0, 1.0, 1.0, -2.0, 0.0]).bfloat16()  # above 1 a step is 2^-7, below -2 it is 2^-6
    step = 2.0**-7
    new = torch.tensor([1.0, 1.0 + step, 1.0 + 0.25 * step, -2.0 - 1.5 * step, 0.0])
    found = changed_entries([(old[:2], new[:2]), (old[2:], new[2:])])
    # Of steps 0, 1, 1/4 and -3/2, rounding leaves 0, 1, 0 and -2.
    assert (found.exact, found.rounded) == (3, 2)
    assert found.kept_l1 == pytest.approx(2.5 / 2.75)
    assert found.error_l2 == pytest.approx(math.sqrt((0.25**2 + 0.5**2) / (1 + 0.25**2 + 1.5**2)))
    same = torch.ones(3)
    assert changed_entries([(same, same)]) == (0, 0, 1.0, 0.0)
    assert changed_entries([(same, same + 0.1)]) == (3, 3, 1.0, 0.0)
    tiny = changed_entries([(torch.ones(3).half(), torch.ones(3) + 1e-6)])
    assert tiny == (3, 0, 0.0, 1.0)


def test_the_record_tells_what_rounding_to_the_bases_dtype_leaves(tmp_path: Path) -> None:
    write_lm(tmp_path / "base", torch.bfloat16)
    write_rows(tmp_path / "rows.jsonl")
    for form in ({"save_as": "checkpoint"}, {"save_as": "delta"}, {"method": "lora", "lora_r": 2}):
        name = "-".join(map(str, form.values()))
        result = go(tmp_path, name, learning_rate=1e-4, importance="none", **form)
        patch = result.summary["patches"]["over-safety"]
        assert 0 < patch["changed_share_in_base_dtype"] < patch["changed_share"] <= 1
        assert patch["changed_share_in_base_dtype"] < patch["kept_l1_in_base_dtype"] < 1
        assert 0 < patch["error_l2_in_base_dtype"] < 2
    base = open_checkpoint(tmp_path / "base")
    pairs = patched_tensors(tmp_path / "checkpoint/over-safety", "checkpoint", base, base.tensors.values())
    whole = changed_entries(pairs)
    record = json.loads((tmp_path / "checkpoint/derive.json").read_text())["patches"]["over-safety"]
    assert record["kept_l1_in_base_dtype"] == pytest.approx(whole.kept_l1)
