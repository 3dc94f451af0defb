"""A patch from pairs of answers, and training that moves nothing but the entries that SNIP ranks highest."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import safepatch_core
from safepatch_core.deriving import DeriveConfig, derive
from safepatch_core.deriving.data import Pair
from safepatch_core.deriving.objective import Preference, answer_nll, chosen, reference_nlls
from safepatch_core.deriving.optimizer import AdamW
from safepatch_core.errors import InputError, UsageError
from safepatch_core.language.chat import Example, Format
from safepatch_core.merging.api import merge
from safepatch_core.merging.recipe import load_recipe
from safepatch_core.progress import Progress
from safepatch_core.settings import checked
from tests.oracle import load_checkpoint
from tests.test_derive_objective import by_hand
from tests.test_quantised_transformers import write_twin
from tests.tiny_lm import tiny_llama, tiny_tokenizer, write_lm

pytestmark = pytest.mark.usefixtures("one_thread")

CHAT = Format(tiny_tokenizer())
ROWS = [
    {"question": f"What is {i}?", "rejected": f"Sure, {i}{'.' * i}", "chosen": f"No{'!' * (3 - i)}"} for i in range(4)
]


def pair(row: Mapping[str, str]) -> Pair:
    no, yes = (CHAT.encode(row["question"], row[name], 256) for name in ("rejected", "chosen"))
    return Pair(no.ids, no.answer, no.truncated, yes)


PAIRS = [pair(row) for row in ROWS]


def references(model: Any) -> dict[Example, float]:
    with Progress("reference", 4, quiet=True, report=None) as progress:
        return reference_nlls(model, [*PAIRS, *chosen(PAIRS)], 2, progress)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_dpo_is_the_papers_formula_over_the_pairs_of_a_step(loss_type: str) -> None:
    model, beta = tiny_llama(), 0.3
    before = references(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    expected, nats = 0.0, 0.0
    for e in PAIRS:
        rejected, preferred = (before[x] - by_hand(model, x) for x in (e, e.chosen))  # log of pi / pi_ref
        margin = beta * (preferred - rejected)
        expected += -math.log(1 / (1 + math.exp(-margin))) if loss_type == "sigmoid" else max(0.0, 1 - margin)
        nats += by_hand(model, e)
    dpo = Preference(beta, loss_type, before)
    whole, nll = dpo.loss(model, PAIRS, PAIRS)
    assert float(whole.detach()) == pytest.approx(expected / len(PAIRS), rel=1e-4)
    assert float(nll) == pytest.approx(nats, rel=1e-5) and not nll.requires_grad
    halves = [dpo.loss(model, PAIRS[i : i + 2], PAIRS)[0] for i in (0, 2)]
    assert float(sum(h.detach() for h in halves)) == pytest.approx(expected / len(PAIRS), rel=1e-4)


@pytest.fixture
def where(tmp_path: Path) -> Path:
    write_lm(tmp_path / "base")
    write_pairs(tmp_path)
    return tmp_path


def write_pairs(folder: Path) -> None:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def settings(where: Path, safety: Mapping[str, Any], **changes: Any) -> DeriveConfig:
    given: dict[str, Any] = {
        **{"model": str(where / "base"), "data": str(where / "pairs.jsonl"), "out": str(where / "run")},
        **{"answer_column": "rejected", "patches": "safety", "learning_rate": 1e-2, "threads": 1, "batch_size": 2},
        **{"ascent_bound": 50.0, "safety": {"objective": "dpo", "max_steps": 4, **safety}},
    }
    return checked(DeriveConfig, given | changes)


def test_the_chosen_answers_become_likelier_than_the_rejected_ones(where: Path) -> None:
    result = derive(settings(where, {}), quiet=True)
    model, before = tiny_llama(), tiny_llama()
    model.load_state_dict(load_file(where / "run/safety/model.safetensors"), strict=False)

    def gain(answers: list[Any]) -> float:
        return float((answer_nll(before, answers) - answer_nll(model, answers)).detach())

    assert gain(chosen(PAIRS)) > 0 > gain(PAIRS)
    recipe = load_recipe(result.recipe)
    assert [patch.name for patch in recipe.patches] == ["safety"]
    assert sorted(p.name for p in (where / "run").iterdir()) == sorted(
        ["curves.png", "derive.json", "importance", "recipe.yaml", "safety", "trace-safety.jsonl"]
    )
    assert result.summary["patches"].keys() == {"safety"} == result.summary["importance"].keys()


def snip(model: Any, samples: list[Example]) -> dict[str, torch.Tensor]:
    """Mean |w * g| of each answer's mean NLL."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for e in samples:
        model.zero_grad()
        torch.autograd.backward(answer_nll(model, [e]) / e.answer_tokens)
        for name, p in model.named_parameters():
            sums[name] += (p.detach() * p.grad).abs()
    return sums


def moved(where: Path, name: str = "safety") -> dict[str, torch.Tensor]:
    """Where a patch has other bits than the backbone."""
    base, patch = (load_file(where / of / "model.safetensors") for of in ("base", f"run/{name}"))
    whole = {key: patch[key].view(torch.int32) != base[key].float().view(torch.int32) for key in base}
    return {key: of for key, of in whole.items() if key.endswith("_proj.weight")}


@pytest.mark.parametrize("optim", ["adamw", "adamw_in_backward"])
def test_only_what_snip_ranks_highest_at_the_backbone_moves(where: Path, optim: str) -> None:
    derive(settings(where, {"mask_top": 0.2}, optim=optim), quiet=True)
    scores = snip(tiny_llama(), chosen(PAIRS))
    for name, changed in moved(where).items():
        count = int(0.2 * changed.numel())
        least = scores[name].flatten().topk(count).values[-1] * (1 - 1e-4)  # of sums in another order
        assert 0 < int(changed.sum()) <= count and not changed[scores[name] < least].any(), name


def test_entries_are_chosen_anew(where: Path) -> None:
    derive(settings(where, {"mask_top": 0.2, "mask_steps": 1}), quiet=True)
    found = [int(of.sum()) / of.numel() for of in moved(where).values()]
    assert 0.21 < max(found) < 0.8, "more than one choice holds, and not all"


def test_an_entry_that_is_let_go_stays_where_it_is_whatever_its_momentum() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    moments: Any = {"weight_decay": 0.0, "max_grad_norm": None, "rounding": "nearest", "state_dtype": torch.float32}
    with AdamW({"w": weight}, "adamw", learning_rate=0.1, seed=0, **moments) as optimizer:
        kept = torch.tensor([True, True, False, False])
        for mask in (kept, ~kept, kept):
            optimizer.hold({"w": mask})
            before = weight.detach().clone()
            weight.grad = torch.tensor([1.0, -2.0, 3.0, -4.0])
            assert optimizer.step().grad_norm == pytest.approx(math.sqrt(5 if mask is kept else 25)), "of what moves"
            assert torch.equal(before != weight.detach(), mask)


def test_a_masked_training_goes_on_to_the_same_bytes(where: Path) -> None:
    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if (event["phase"], event["done"]) == ("safety", 4):
            raise Stop

    safety = {"mask_top": 0.3, "mask_steps": 2, "max_steps": 6}
    more = {"save_steps": 3, "importance": "none"}  # saved between two choices
    derive(settings(where, safety, out=str(where / "whole"), **more), quiet=True)
    with pytest.raises(Stop):
        derive(settings(where, safety, **more), quiet=True, report=stop)
    derive(settings(where, safety, **more), quiet=True, resume=True)
    one, other = ((where / of / "safety/model.safetensors").read_bytes() for of in ("whole", "run"))
    assert one == other


def test_it_goes_into_the_codes_of_a_quantised_twin(tmp_path: Path) -> None:
    write_twin(tmp_path, vocab_size=264)
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    write_pairs(tmp_path)
    result = derive(settings(tmp_path, {"mask_top": 0.6, "top": 1.0, "retain": 1.0}, save_as="delta"), quiet=True)
    recipe = load_recipe(result.recipe)
    assert recipe.base == str(tmp_path / "base") and recipe.quantized is not None
    done = merge(recipe, tmp_path / "out")
    kept = done.kept
    assert kept is not None and list(kept) == ["safety"] and (kept["safety"]["changed"] or 0) > 100
    delta = load_file(tmp_path / "run/safety/model.safetensors")
    before, after = load_checkpoint(tmp_path / "base"), load_checkpoint(tmp_path / "out")
    for name, change in delta.items():
        if before[name].dtype != "F8_E4M3":
            continue
        old, new = (torch.frombuffer(bytearray(of[name].data), dtype=torch.uint8) for of in (before, after))
        assert not (old != new)[change.flatten() == 0].any(), name
        assert 0 < int((change != 0).sum()) <= int(0.6 * change.numel())


def test_pairs_are_what_the_float_model_and_its_twin_say(tmp_path: Path) -> None:
    write_twin(tmp_path, vocab_size=264)
    for folder in ("base", "float"):
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    questions = [{"question": row["question"]} for row in ROWS]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    safety = {"objective": "dpo", "mask_top": 0.6, "max_steps": 2, "top": 1.0, "retain": 1.0}
    section = {"data": "questions.jsonl", "model": "base", "patches": "safety", "safety": safety, "batch_size": 2}
    file = {
        "derive": section | {"threads": 1, "learning_rate": 1e-2, "ascent_bound": 50.0},
        "answers": {"model": "float", "max_new_tokens": 6},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(file))
    done = safepatch_core.run(tmp_path / "run.yaml", tmp_path / "out", backend="cpu", threads=1)
    said = [json.loads(line) for line in (tmp_path / "out/answers/answers.jsonl").read_text().splitlines()]
    different = [row for row in said if row["model"]["answer"] != row["baseline"]["answer"]]
    data = [json.loads(line) for line in (tmp_path / "out/data.jsonl").read_text().splitlines()]
    assert 0 < len(data) <= len(different)
    for row in data:
        (found,) = (of for of in different if of["prompt"] == row["question"])
        assert (row["chosen"], row["rejected"]) == (found["model"]["answer"], found["baseline"]["answer"])
    before, after = (load_checkpoint(of) for of in (tmp_path / "base", Path(done.data["model"])))
    assert {n.rpartition(".")[2] for n in before if before[n] != after[n]} == {"weight"}


def test_what_does_not_go_together_is_refused(where: Path) -> None:
    with pytest.raises(UsageError, match="mask_top.*method full"):
        settings(where, {"mask_top": 0.5}, method="lora")
    with pytest.raises(UsageError, match="weight_decay.*must be 0"):
        settings(where, {"mask_top": 0.5}, weight_decay=0.1)
    with pytest.raises(UsageError, match="dpo goes with training"):
        settings(where, {}, method="direction", utility_data="u", refused_data="r")
    with pytest.raises(InputError, match="no column 'better'.*--chosen-column to name one"):
        derive(settings(where, {}, chosen_column="better"), quiet=True)
    assert not (where / "run").exists()
