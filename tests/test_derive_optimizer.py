"""AdamW in and after the backward pass, rounding to bfloat16, and what of either changes no bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from safepatch_core.deriving import DeriveConfig
from safepatch_core.deriving import optimizer as optimizers
from safepatch_core.deriving.loop import Outcome
from safepatch_core.deriving.objective import Likelihood, answer_nll
from safepatch_core.deriving.optimizer import AdamW, round_stochastically
from safepatch_core.errors import UsageError
from safepatch_core.settings import checked
from tests.tiny_lm import examples, tiny_llama, train_safety

EXAMPLES = examples(8)

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(**changes: Any) -> DeriveConfig:
    given = {"model": "m", "data": "d", "out": "o", "learning_rate": 1e-2, "batch_size": 4, "max_grad_norm": None}
    return DeriveConfig.model_validate({**given, "safety": {"max_steps": 4}, **changes})


def run(model: Any, bound: float | None = None, sign: float = 1.0, **changes: Any) -> tuple[Outcome, list[Any]]:
    return train_safety(model, EXAMPLES, settings(**changes), Likelihood(sign), bound=bound)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def optimizer(parameters: dict[str, Tensor], where: optimizers.Where = "adamw", **changes: Any) -> AdamW:
    given = {"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": None, "rounding": "stochastic"}
    return AdamW(parameters, where, **{**given, "state_dtype": torch.float32, "seed": 0, **changes})


@pytest.mark.parametrize("limit", [None, 0.5])
def test_after_the_backward_pass_it_is_the_adamw_and_clipping_of_torch(limit: float | None) -> None:
    ours, theirs = tiny_llama(), tiny_llama()
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    with optimizer(dict(ours.named_parameters()), max_grad_norm=limit) as mine:
        for _ in range(3):
            for model in (ours, theirs):
                torch.autograd.backward(answer_nll(model, EXAMPLES))
            norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit or math.inf)
            reference.step()
            reference.zero_grad()
            assert mine.step().grad_norm == float(norm)
    assert same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_the_backward_pass_nothing_changes_but_the_memory(dtype: torch.dtype, checkpointing: bool) -> None:
    after, inside = tiny_llama().to(dtype), tiny_llama().to(dtype)
    first = run(after, optim="adamw")
    second = run(inside, optim="adamw_in_backward", gradient_checkpointing=checkpointing)
    assert same(after, inside) and not same(after, tiny_llama().to(dtype))
    assert first[1] == second[1]
    assert (first[0].optim, second[0].optim) == ("adamw", "adamw_in_backward")


def test_one_layers_gradients_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    alive: list[int] = []
    step = AdamW._step

    def counted(self: AdamW, *args: Any) -> None:
        alive.append(sum(p.grad is not None for p in model.parameters()))
        step(self, *args)

    monkeypatch.setattr(AdamW, "_step", counted)
    run(model, optim="adamw_in_backward", safety={"max_steps": 1})
    assert len(alive) == len(list(model.parameters())) and set(alive) == {1}
    alive.clear()
    run(model, optim="adamw", safety={"max_steps": 1})
    assert alive[0] == len(list(model.parameters()))


def test_in_the_backward_pass_each_tensor_is_clipped_by_its_own_norm() -> None:
    weights = {"a": torch.zeros(4, requires_grad=True), "b": torch.zeros(4, requires_grad=True)}
    gradients = {"a": torch.full((4,), 3.0), "b": torch.full((4,), 0.125)}  # norms 6 and 0.25

    def backward() -> None:
        torch.autograd.backward(sum(((weights[n] * gradients[n]).sum() for n in weights), torch.zeros(())))

    for where, b in (("adamw_in_backward", 0.25), ("adamw", 0.25 / math.hypot(6, 0.25))):
        with optimizer(weights, where, max_grad_norm=1.0) as mine:  # type: ignore[arg-type]
            backward()
            assert mine.step().grad_norm == pytest.approx(math.hypot(6, 0.25))
            first = {n: float(mine.state()[0][f"{n}/exp_avg"].norm()) for n in weights}
        assert first["a"] == pytest.approx(0.1 * (1.0 if where == "adamw_in_backward" else 6 / math.hypot(6, 0.25)))
        assert first["b"] == pytest.approx(0.1 * b)
        assert all(w.grad is None for w in weights.values())
    backward()
    assert all(w.grad is not None for w in weights.values()), "the hooks outlived their optimiser"


def test_the_step_that_finds_the_bound_changes_nothing_inside_the_backward_pass_either() -> None:
    _, trace = run(tiny_llama(), sign=-1.0, optim="adamw_in_backward")
    bound = (trace[1]["nll"] + trace[2]["nll"]) / 2
    stopped, short = tiny_llama(), tiny_llama()
    given: dict[str, Any] = {"optim": "adamw_in_backward", "ascent_window": 1}
    outcome, lines = run(stopped, bound, -1.0, **given)
    assert (outcome.steps, outcome.bounded, lines[2]["stopped"]) == (2, True, "ascent_bound")
    run(short, None, -1.0, **given, safety={"max_steps": 2})
    assert same(stopped, short)


def test_divergence_inside_the_backward_pass_is_named() -> None:
    with pytest.raises(UsageError, match=r"diverged at step \d.*learning_rate 1e\+30"):
        run(tiny_llama(), learning_rate=1e30, optim="adamw_in_backward")


def test_auto_steps_in_the_backward_pass_where_gradients_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tiny_llama())[0].optim == "adamw"
    monkeypatch.setattr("safepatch_core.deriving.loop.GRADIENT_BYTES", 1000)
    assert run(tiny_llama())[0].optim == "adamw_in_backward"
    assert run(tiny_llama(), batch_size=2, gradient_accumulation_steps=2)[0].optim == "adamw"


def test_accumulation_in_the_backward_pass_is_refused() -> None:
    given = {"model": "m", "data": "d", "out": "o", "optim": "adamw_in_backward", "gradient_accumulation_steps": 2}
    with pytest.raises(UsageError, match="adamw_in_backward can't accumulate: gradient_accumulation_steps must be 1"):
        checked(DeriveConfig, given)


def test_stochastic_rounding_gives_a_neighbour_with_the_odds_of_its_distance() -> None:
    count = 1 << 16
    for value, share in ((1.0 + 2**-9, 0.25), (-(1.0 + 3 * 2**-9), 0.75), (1.0, 0.0), (2.0 - 2**-8, 0.5)):
        low, step = math.copysign(1.0, value), math.copysign(2**-7, value)
        low = math.trunc(value * 128) / 128
        out = torch.empty(count, dtype=torch.bfloat16)
        round_stochastically(torch.full((count,), value), out, torch.Generator().manual_seed(1))
        assert {*out.tolist()} <= {low, low + step}
        up = float((out != low).float().mean())
        assert up == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / count))
    odd = torch.empty(7, dtype=torch.bfloat16)
    round_stochastically(torch.full((7,), math.nan), odd, torch.Generator().manual_seed(1))
    assert bool(odd.isnan().all())


def test_small_updates_of_bfloat16_weights_add_up_stochastically_and_vanish_to_nearest() -> None:
    moved = {}
    for rounding in ("stochastic", "nearest"):
        weight = torch.ones(1 << 14, dtype=torch.bfloat16, requires_grad=True)
        # A step of 1e-4 where bfloat16 has 2^-8 below 1.
        with optimizer({"w": weight}, rounding=rounding, learning_rate=1e-4, weight_decay=0.0) as mine:
            for _ in range(20):
                torch.autograd.backward(weight.float().sum())
                assert mine.step().below_half_step == 1.0
        moved[rounding] = float((1 - weight.detach().double()).mean())
    assert moved["nearest"] == 0.0
    assert moved["stochastic"] == pytest.approx(20 * 1e-4, rel=0.05)


def test_bfloat16_weights_follow_float32_ones_within_their_rounding() -> None:
    exact, rounded = tiny_llama(), tiny_llama().bfloat16()
    exact.load_state_dict({name: t.float() for name, t in rounded.state_dict().items()})
    start = [p.detach().clone() for p in exact.parameters()]
    small: dict[str, Any] = {"learning_rate": 1e-4, "safety": {"max_steps": 8}}
    run(exact, **small)
    trace = run(rounded, dtype="bfloat16", **small)[1]
    assert all(0.5 < record["below_half_step"] <= 1 for record in trace)
    agree = total = 0.0
    for a, b, s in zip(exact.parameters(), rounded.parameters(), start, strict=True):
        delta = (a.detach() - s).flatten().double()
        agree += float(delta @ (b.detach().float() - s).flatten().double())
        total += float(delta @ delta)
    assert agree / total == pytest.approx(1.0, abs=0.2)  # as much moves in the direction of the exact update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_in_bfloat16_still_grows(dtype: torch.dtype) -> None:
    weight = torch.ones(1 << 12, dtype=dtype, requires_grad=True)
    with optimizer({"w": weight}, state_dtype=torch.bfloat16) as mine:
        for _ in range(50):
            torch.autograd.backward(weight.float().sum())
            mine.step()
        second = mine.state()[0]["w/exp_avg_sq"]
    assert second.dtype == torch.bfloat16
    assert float(second.double().mean()) == pytest.approx(1 - 0.999**50, rel=0.05)


def test_rounding_depends_on_seed_name_and_step_and_not_on_pieces_or_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(seed: int = 0) -> Any:
        model = tiny_llama().bfloat16()
        run(model, seed=seed, dtype="bfloat16", safety={"max_steps": 1}, batch_size=8)
        return model

    first = trained()
    assert same(first, trained()) and not same(first, trained(1))
    monkeypatch.setattr(optimizers, "CHUNK", 256)
    assert same(first, trained())
