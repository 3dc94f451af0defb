"""EWC and replay: what keeps a round from undoing those before it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safepatch_core.deriving import DeriveConfig, DeriveResult, derive
from safepatch_core.deriving.loop import train
from safepatch_core.deriving.names import BaseNames
from safepatch_core.deriving.objective import Likelihood
from safepatch_core.deriving.remembering import Anchor, Remembering, Replay, Term, anchored, answer_logits, replayed
from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.progress import Progress
from tests.tiny_lm import examples, tiny_llama, write_lm, write_rows


def settings(where: Path, **changes: Any) -> DeriveConfig:
    given: dict[str, Any] = {
        "model": str(where / "base"),
        "data": str(where / "rows.jsonl"),
        "out": str(where / "run"),
    }
    given |= {"device": "cpu", "threads": 1, "batch_size": 3, "safety": {"max_steps": 2}, "importance": "none"}
    given |= {"over_safety": {"max_steps": 2}, "ascent_bound": None, "learning_rate": 1e-3}
    return DeriveConfig(**(given | changes))


@pytest.fixture
def where(tmp_path: Path) -> Path:
    write_lm(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def go(where: Path, **changes: Any) -> DeriveResult:
    return derive(settings(where, **changes), quiet=True)


def fisher(where: Path) -> Path:
    """Importance of the targets, as `derive` saves it."""
    base = load_file(where / "base" / "model.safetensors")
    torch.manual_seed(5)
    scores = {n: torch.rand_like(t) for n, t in base.items() if t.ndim == 2 and "embed" not in n}
    (where / "fisher").mkdir()
    save_file(scores, where / "fisher" / "model.safetensors")
    return where / "fisher"


def quiet() -> Progress:
    return Progress("test", 99, quiet=True, report=None)


def test_the_anchor_is_the_quadratic_of_ewc_with_importance_of_mean_one(where: Path) -> None:
    model, path = tiny_llama(), fisher(where)
    names = BaseNames(model, open_checkpoint(where / "base"))
    scores = load_file(path / "model.safetensors")
    term = anchored(model, names, [open_checkpoint(path), open_checkpoint(path)], 0.5)
    assert term(model, ()).item() == 0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    mean = sum(float(f.double().sum()) for f in scores.values()) / sum(f.numel() for f in scores.values())
    expected = sum(
        float((f.double() / mean * (dict(model.named_parameters())[n].detach() - before[n]).double().square()).sum())
        for n, f in scores.items()
    )
    assert term(model, ()).item() == pytest.approx(0.25 * expected, rel=1e-4)


def test_replay_is_the_mean_square_of_what_the_logits_of_answers_changed_by() -> None:
    model, rows = tiny_llama(), examples(5)
    with quiet() as progress:
        term = replayed(model, rows, 2.0, 2, progress)
    assert float(term(model, rows[:2])) == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    one = Replay(2.0, {rows[3]: term.logits[rows[3]]})
    now = model(torch.tensor([rows[3].ids])).logits[0, rows[3].answer - 1 : -1]
    expected = 2.0 * float((now - term.logits[rows[3]]).square().mean())
    assert float(one(model, rows[:1])) == pytest.approx(expected, rel=1e-4)


def test_logits_of_a_padded_batch_are_those_of_each_row_alone() -> None:
    model, rows = tiny_llama(), examples(4)
    for row, many in zip(rows, answer_logits(model, rows), strict=True):
        alone = model(torch.tensor([row.ids])).logits[0, row.answer - 1 : -1]
        assert many.shape == (row.answer_tokens, 264)
        torch.testing.assert_close(many, alone, rtol=1e-4, atol=1e-4)


def test_a_term_counts_once_per_step_however_the_step_is_cut() -> None:
    model, rows = tiny_llama(), examples(4)
    start = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    objective = Remembering(Likelihood(0.0), [Anchor(1.0, {n: torch.ones_like(p) for n, p in start.items()}, start)])
    whole = objective.loss(model, rows, rows)[0]
    cut = sum(objective.loss(model, rows[at : at + 1], rows)[0] for at in range(4))
    torch.testing.assert_close(whole, cut)


def test_replayed_rows_are_drawn_by_the_batch_so_that_a_resumed_run_draws_the_same() -> None:
    model, rows = tiny_llama(), examples(6)
    with quiet() as progress:
        term = replayed(model, rows[:3], 1.0, 2, progress)
    moved = Replay(1.0, {row: logits + row.answer_tokens for row, logits in term.logits.items()})
    values = [float(moved(model, rows[at : at + 2])) for at in (0, 2, 4, 0)]
    assert values[0] == values[3] and len(set(values)) > 1


@pytest.mark.parametrize("optim", ["adamw", "adamw_in_backward"])
def test_strong_terms_hold_the_weights_and_the_logits(where: Path, optim: str) -> None:
    rows = examples(4)
    far: dict[str, float] = {}
    for kind in ("free", "anchor", "replay"):
        model = tiny_llama()
        names, config = BaseNames(model, open_checkpoint(where / "base")), settings(where, optim=optim)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        with quiet() as progress:
            replay = replayed(model, rows, 1e3, 2, progress)
        path = where / "fisher" if (where / "fisher").exists() else fisher(where)
        terms: list[Term] = []
        if kind == "anchor":
            terms.append(anchored(model, names, [open_checkpoint(path)], 1e6))
        elif kind == "replay":
            terms.append(replay)
        for name, p in model.named_parameters():
            p.requires_grad_(p.ndim == 2 and "embed" not in name)
        with quiet() as progress:
            patch = config.safety.model_copy(update={"max_steps": 6})
            objective = Remembering(Likelihood(-1.0), terms)
            train(model, rows, config, patch, objective=objective, bound=None, trace=io.StringIO(), progress=progress)
        moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
        now = torch.cat(answer_logits(model, rows)) - torch.cat([replay.logits[row] for row in rows])
        far[kind] = float(now.square().mean()) if kind != "anchor" else float(moved.norm())
        far.setdefault("weights", float(moved.norm()))
    assert far["anchor"] < 0.5 * far["weights"] and far["replay"] < 0.5 * far["free"]


def test_a_run_takes_both_and_says_what_it_was_made_from(where: Path) -> None:
    free = go(where)
    remembering = {"ewc_fisher": [str(fisher(where))], "replay_data": str(where / "rows.jsonl"), "replay_rows": "0:4"}
    held = go(where, out=str(where / "held"), replay_weight=10.0, **remembering)
    inputs = held.summary["inputs"]
    assert inputs["replay_data"]["rows"] == 4 and len(inputs["ewc_fisher"]) == 64
    a, b = (load_file(of.run / "safety" / "model.safetensors") for of in (free, held))
    assert any(not torch.equal(a[name], b[name]) for name in a)
    first, second = (json.loads((of.run / "trace-safety.jsonl").read_text().splitlines()[0]) for of in (free, held))
    assert first["nll"] == second["nll"]  # the trace tells the rows' own


def test_training_that_remembers_resumes_to_the_same_bytes(where: Path) -> None:
    more = {"ewc_fisher": [str(fisher(where))], "replay_data": str(where / "rows.jsonl"), "save_steps": 1}
    more["safety"] = {"max_steps": 4}
    whole = go(where, **more)
    expected = (whole.run / "safety" / "model.safetensors").read_bytes()

    class Stop(Exception):
        pass

    def report(event: dict[str, Any]) -> None:
        if event.get("phase") == "safety" and event.get("done") == 2:
            raise Stop

    changed = settings(where, out=str(where / "stopped"), **more)
    with pytest.raises(Stop):
        derive(changed, quiet=True, report=report)
    again = derive(changed, quiet=True, resume=True)
    assert (again.run / "safety" / "model.safetensors").read_bytes() == expected


def test_scores_of_another_model_are_refused(where: Path) -> None:
    path = fisher(where)
    save_file({"other.weight": torch.ones(2, 2)}, path / "model.safetensors")
    with pytest.raises(InputError, match="no Fisher importance above zero of what is trained"):
        go(where, ewc_fisher=[str(path)])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "lora", "ewc_fisher": ["x"]}, "needs method full"),
        ({"method": "direction", "utility_data": "u", "refused_data": "r", "replay_data": "d"}, "goes with training"),
    ],
)
def test_what_can_not_remember_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DeriveConfig(model="m", data="d", out="o", **given)
