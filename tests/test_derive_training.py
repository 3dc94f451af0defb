"""The loop goes the right way, stops at the bound and repeats bit for bit; importance is SNIP, sample by sample."""

from __future__ import annotations

import ctypes
import io
import mmap
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from safepatch_core.deriving import DeriveConfig
from safepatch_core.deriving.loop import Outcome, planned_steps, train
from safepatch_core.deriving.objective import Likelihood, answer_nll
from safepatch_core.errors import UsageError
from safepatch_core.language.chat import Example, Format
from safepatch_core.language.model import freed_memory_returned
from safepatch_core.progress import Progress
from tests.tiny_lm import examples, tiny_llama, tiny_tokenizer, train_safety

CHAT = Format(tiny_tokenizer())
EXAMPLES = examples(8)

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(**changes: Any) -> DeriveConfig:
    given = {"model": "m", "data": "d", "out": "o", "learning_rate": 1e-2, "batch_size": 4, "ascent_bound": None}
    return DeriveConfig.model_validate({**given, "safety": {"max_steps": 6}, **changes})


def run(config: DeriveConfig, *, ascent: bool, examples: list[Example] = EXAMPLES) -> tuple[Any, Outcome, list[Any]]:
    model = tiny_llama()
    bound = config.ascent_bound if ascent else None
    return model, *train_safety(model, examples, config, Likelihood(-1.0 if ascent else 1.0), bound=bound)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_descent_lowers_and_ascent_raises_the_nll() -> None:
    for ascent in (False, True):
        _, outcome, trace = run(settings(), ascent=ascent)
        first, last = trace[0]["nll"], trace[-1]["nll"]
        assert outcome == Outcome(6, False, "adamw", None)
        assert (last > 1.3 * first) if ascent else (last < 0.7 * first)
        assert [record["step"] for record in trace] == [1, 2, 3, 4, 5, 6]
        assert all(record["learning_rate"] == 1e-2 and record["grad_norm"] > 0 for record in trace)


def test_first_nll_is_that_of_the_untrained_model() -> None:
    _, _, trace = run(settings(batch_size=8, safety={"max_steps": 1}), ascent=True)
    nats, tokens = float(answer_nll(tiny_llama(), EXAMPLES).detach()), sum(e.answer_tokens for e in EXAMPLES)
    assert trace[0]["nll"] == pytest.approx(nats / tokens, rel=1e-6)
    assert trace[0]["tokens"] == tokens


def test_ascent_stops_at_the_bound_and_the_finding_step_changes_nothing() -> None:
    free, _, trace = run(settings(), ascent=True)
    bound = (trace[2]["nll"] + trace[3]["nll"]) / 2
    stopped, outcome, short = run(settings(ascent_bound=bound, ascent_window=1), ascent=True)
    assert (outcome.steps, outcome.bounded) == (3, True)
    found = {key: value for key, value in trace[3].items() if key != "grad_norm"}  # it has no backward pass
    assert short[:3] == trace[:3] and short[3] == found | {"stopped": "ascent_bound"}
    assert same(stopped, run(settings(safety={"max_steps": 3}), ascent=True)[0])
    assert not same(stopped, free)


def test_the_bound_reads_the_mean_over_the_window_weighted_by_tokens() -> None:
    _, _, trace = run(settings(), ascent=True)
    window = trace[1:4]
    mean = sum(r["nll"] * r["tokens"] for r in window) / sum(r["tokens"] for r in window)
    for bound, stopped in ((mean * (1 - 1e-6), 3), (mean * (1 + 1e-6), 4)):
        assert run(settings(ascent_bound=bound, ascent_window=3), ascent=True)[1].steps == stopped


def test_the_bound_is_not_for_descent_and_lets_one_step_be_taken() -> None:
    assert not run(settings(ascent_bound=1e-3), ascent=False)[1].bounded
    assert run(settings(ascent_bound=1e-3), ascent=True)[1].steps == 1


def test_a_seed_repeats_bit_for_bit() -> None:
    first, again = (run(settings(seed=3), ascent=False) for _ in range(2))
    assert same(first[0], again[0]) and first[2] == again[2]
    assert run(settings(seed=4), ascent=False)[2] != first[2]


def test_accumulated_batches_are_one_step_with_one_mean() -> None:
    config = settings(max_grad_norm=None)
    whole = run(config, ascent=False)
    halves = run(config.model_copy(update={"batch_size": 2, "gradient_accumulation_steps": 2}), ascent=False)
    assert [r["tokens"] for r in whole[2]] == [r["tokens"] for r in halves[2]]
    for a, b in zip(whole[2], halves[2], strict=True):
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


def test_every_pass_sees_every_row_once_in_a_new_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Example] = []

    def watched(model: Any, batch: list[Example]) -> torch.Tensor:
        seen.extend(batch)
        return answer_nll(model, batch)

    monkeypatch.setattr("safepatch_core.deriving.objective.answer_nll", watched)
    config = settings(batch_size=3, safety={"num_train_epochs": 2.5})
    assert planned_steps(8, config, config.safety) == 7
    _, outcome, _ = run(config, ascent=False)
    assert outcome.steps == 7 and len(seen) == 20
    assert sorted(seen[:8], key=EXAMPLES.index) == EXAMPLES == sorted(seen[8:16], key=EXAMPLES.index)
    assert seen[:8] != seen[8:16]


def test_utility_rows_join_the_loss_of_each_step_in_an_order_of_their_own() -> None:
    ordinary = [CHAT.encode(f"Name {i}", "No." + "!" * i, 256) for i in range(5)]

    def trained(**changes: Any) -> tuple[Any, list[Any]]:
        config, model = settings(safety={"max_steps": 3}, **changes), tiny_llama()
        return model, train_safety(model, EXAMPLES, config, Likelihood(-1.0), utility=ordinary)[1]

    model, trace = trained(utility_weight=0.5, max_grad_norm=None)
    halves, same_trace = trained(utility_weight=0.5, max_grad_norm=None, batch_size=2, gradient_accumulation_steps=2)
    for a, b in zip(trace, same_trace, strict=True):
        assert a == {**a, **{key: pytest.approx(b[key], rel=2e-2) for key in ("nll", "utility_nll", "grad_norm")}}
    for p, q in zip(model.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.1, atol=5e-3)
    # It holds ordinary answers where they were while the others go away, and more so with more weight.
    free = trained(utility_weight=0.0)[1]
    assert trace[-1]["utility_nll"] < free[-1]["utility_nll"]
    assert trained(utility_weight=5.0)[1][-1]["utility_nll"] < trace[-1]["utility_nll"]
    first = [r["nll"] for r in (trace[0], run(settings(), ascent=True)[2][0])]
    assert first[0] == first[1], "the rows themselves are drawn as without utility rows"


def test_the_first_step_with_utility_rows_follows_the_gradient_of_the_sum() -> None:
    ordinary = [CHAT.encode("Name it", "No.", 256)] * 4
    config, model = settings(safety={"max_steps": 1}, batch_size=8, utility_weight=2.0), tiny_llama()
    _, trace = train_safety(model, EXAMPLES, config, Likelihood(-1.0), utility=ordinary)
    fresh = tiny_llama()
    nlls = [answer_nll(fresh, rows) / sum(e.answer_tokens for e in rows) for rows in (EXAMPLES, ordinary)]
    gradients = torch.autograd.grad(-nlls[0] + 2.0 * nlls[1], list(fresh.parameters()))
    expected = float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])))
    assert trace[0]["grad_norm"] == pytest.approx(expected, rel=1e-4)


def test_only_trainable_parameters_move() -> None:
    config = settings()
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    objective, trace = Likelihood(1.0), io.StringIO()
    with Progress("train", 6, quiet=True, report=None) as progress:
        train(model, EXAMPLES, config, config.safety, objective=objective, bound=None, trace=trace, progress=progress)
    for (name, now), then in zip(model.named_parameters(), tiny_llama().parameters(), strict=True):
        assert torch.equal(now, then) == ("q_proj" not in name)


def test_divergence_is_named() -> None:
    with pytest.raises(UsageError, match=r"diverged at step \d.*learning_rate 1e\+30"):
        run(settings(learning_rate=1e30), ascent=True)


def test_rates_default_by_method_and_give_way_to_the_nearer_one() -> None:
    plain = settings(learning_rate=None)
    assert plain.rate(plain.safety) == 1e-5
    lora = settings(learning_rate=None, method="lora", safety={"learning_rate": 1e-3})
    assert (lora.rate(lora.safety), lora.rate(lora.over_safety)) == (1e-3, 1e-4)
    _, _, trace = run(settings(safety={"max_steps": 1, "learning_rate": 1e-3}), ascent=True)
    assert trace[0]["learning_rate"] == 1e-3


def test_progress_is_plain_lines_off_a_terminal_events_for_programs_and_silent_when_quiet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    events: list[dict[str, Any]] = []
    for quiet in (False, True):
        with Progress("safety", 3, quiet=quiet, report=events.append) as progress:
            for step in range(3):
                progress.advance(tokens=10, nll=1.5, step=step)
    out, err = capsys.readouterr()
    assert out == "" and [line.split(",")[0] for line in err.splitlines()] == ["safety: 1/3", "safety: 3/3"]
    assert "nll 1.500" in err and "tokens/s" in err
    assert [(e["phase"], e["done"], e["total"], e["nll"], e["step"]) for e in events[:3]] == [
        ("safety", done, 3, 1.5, done - 1) for done in (1, 2, 3)
    ]
    assert all(e["tokens_per_second"] > 0 for e in events)


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("safety", 2, quiet=False, report=None) as progress:
        progress.advance(tokens=10, nll=1.5)
    assert terminal.getvalue().startswith("\rsafety:   0%|") and "\n" not in terminal.getvalue()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's heap")
def test_holes_of_the_heap_are_given_back_when_the_process_has_grown() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    row = torch.zeros(1, 4)
    with freed_memory_returned(model, recomputed=True):
        model(row)
        blocks = [torch.ones(2 << 18) for _ in range(200)]
        del blocks[::2]  # 200 MB, between blocks that stay
        grown = resident()
        model(row)
        assert resident() < grown - (150 << 20)
    assert not model[0]._forward_pre_hooks


def test_the_heap_is_looked_at_where_layers_are_recomputed() -> None:
    """Of layers that are recomputed, transformers calls what is in them alone."""
    model, calls = tiny_llama().train(), list[int]()

    def looked() -> int:
        calls.append(1)
        return 0

    model.gradient_checkpointing_enable({"use_reentrant": False})
    with freed_memory_returned(model, recomputed=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr("safepatch_core.language.model._resident", looked)
        loss = answer_nll(model, EXAMPLES[:1])
        forward = len(calls)
        torch.autograd.backward(loss)
    assert forward and len(calls) > forward
