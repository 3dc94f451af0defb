"""The training loop: plain PyTorch, one objective, one step at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, Protocol, TextIO

import numpy as np
import torch
from torch import Tensor

from safepatch_core.deriving.config import DeriveConfig, PatchConfig
from safepatch_core.deriving.objective import Likelihood, Objective
from safepatch_core.deriving.optimizer import AdamW, Where
from safepatch_core.deriving.sharding import shard_rows, to_local
from safepatch_core.errors import UsageError
from safepatch_core.language.chat import Example
from safepatch_core.language.model import freed_memory_returned
from safepatch_core.progress import Progress
from safepatch_core.ranks import Alone, Ranks

GRADIENT_BYTES = 1 << 30  # a larger set of gradients is never held as a whole, if optim is auto

Tensors = Callable[[str], Tensor]  # reads a saved tensor by its name


@dataclass(frozen=True, slots=True)
class Outcome:
    """`steps` optimiser steps were taken, as `optim` says; `bounded` if the ascent bound ended them.

    `below_half_step`: of all updates of bfloat16 weights, the share that rounding to nearest would have lost.
    """

    steps: int
    bounded: bool
    optim: Where
    below_half_step: float | None


class Checkpoints(Protocol):
    """Where training is saved, and found again."""

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keeps what a training is that has taken `step` steps; `facts` are plain JSON."""

    def latest(self) -> tuple[Tensors, dict[str, Any]] | None:
        """What was saved last, if anything was."""


class Mask(NamedTuple):
    """Entries that alone may move: `choose` tells them by parameter, of sharded ones the rank's own, as the model is;
    it is asked before the first step, and after every `steps`."""

    steps: int
    choose: Callable[[], Mapping[str, Tensor]]


def planned_steps(rows: int, config: DeriveConfig, patch: PatchConfig) -> int:
    """Optimiser steps of a training run that nothing stops; the last may hold fewer rows."""
    per_step = config.batch_size * config.gradient_accumulation_steps
    return patch.max_steps or math.ceil(math.ceil(patch.num_train_epochs * rows) / per_step)


def train(
    model: Any,
    examples: Sequence[Example],
    config: DeriveConfig,
    patch: PatchConfig,
    *,
    objective: Objective,
    bound: float | None,
    trace: TextIO,
    progress: Progress,
    utility: Sequence[Example] = (),
    checkpoints: Checkpoints | None = None,
    mask: Mask | None = None,
    after: Callable[[int], None] | None = None,
    ranks: Ranks | None = None,
) -> Outcome:
    """Trains the model's trainable parameters in place, with AdamW at a constant learning rate.

    Args:
        model: Of transformers or PEFT. Of one that is sharded over `ranks`, each rank takes its share of the rows of
            every forward pass, and all find the same numbers and write the same trace.
        examples: The rows.
        config: The run's settings.
        patch: The patch's own.
        objective: What a step minimises over its rows.
        bound: In nats per token: once the mean answer NLL over the latest `ascent_window` steps reaches it, training
            ends. The step that finds it so has no last backward pass, and changes nothing. None for no bound.
        trace: Gets one JSON line per step: step, nll (nats per token, before the update), tokens, utility_nll where
            there are such rows, grad_norm (unclipped), below_half_step (see Step) with bfloat16 weights, and
            learning_rate; the step that ends it at the bound has no update to tell of, but "stopped".
        progress: Is told of every step.
        utility: Rows of which each step takes as many as of `examples`, adding utility_weight times their mean answer
            NLL.
        checkpoints: What it holds is gone on with, and every save_steps steps it gets more.
        mask: Which entries move; None for all.
        after: Is told of every step that was taken, and may ask the model, in eval mode too.
        ranks: None for one process.

    Raises:
        UsageError: Training diverges.
    """
    ranks = ranks or Alone()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rate, weight = config.rate(patch), config.weight(patch)
    where, so_far = _where(config, parameters), _SoFar()
    total_steps = planned_steps(len(examples), config, patch)
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = _optimizer(parameters, where, rate, config, ranks)
    with freed_memory_returned(model, recomputed=config.gradient_checkpointing), optimizer:
        if checkpoints is not None and (found := checkpoints.latest()) is not None:
            so_far = _restore(*found, parameters, optimizer, masked=mask is not None)
            trace.writelines(so_far.lines)
            progress.skip(so_far.steps)
        for rows, beside in islice(_steps(examples, utility, config, patch), so_far.steps, None):
            step, tokens = so_far.steps + 1, sum(e.answer_tokens for e in rows)
            if mask is not None and so_far.steps % mask.steps == 0:
                _choose(mask, model, optimizer)
            loss, nats, utility_nats = _passes(model, objective, rows, beside, weight, config.batch_size, ranks)
            _check_finite(step, rate, "NLL", nats / tokens)
            record: dict[str, Any] = {"step": step, "nll": nats / tokens, "tokens": tokens}
            if beside:
                record["utility_nll"] = utility_nats / sum(e.answer_tokens for e in beside)
            so_far.window = [*so_far.window, (nats, tokens)][-config.ascent_window :]
            if bound is not None and so_far.steps and so_far.mean() >= bound:
                so_far.write(trace, record | {"learning_rate": rate, "stopped": "ascent_bound"})
                return so_far.outcome(where, bounded=True)
            torch.autograd.backward(loss)
            taken = optimizer.step()
            _check_finite(step, rate, "gradient norm", taken.grad_norm)
            record["grad_norm"] = taken.grad_norm
            if taken.below_half_step is not None:
                record["below_half_step"] = taken.below_half_step
                so_far.small.append(taken.below_half_step)
            so_far.write(trace, record | {"learning_rate": rate})
            so_far.steps = step
            length = sum(len(e.ids) for e in (*rows, *beside))
            progress.advance(tokens=length, step=step, nll=record["nll"], grad_norm=taken.grad_norm)
            if checkpoints is not None and config.save_steps and step % config.save_steps == 0 and step < total_steps:
                checkpoints.save(step, *_snapshot(so_far, parameters, optimizer))
            if after is not None:
                after(step)
                model.train()
    return so_far.outcome(where, bounded=False)


def _choose(mask: Mask, model: Any, optimizer: AdamW) -> None:
    """Lets those entries move that matter now; the model is left in training mode."""
    with optimizer.aside():
        optimizer.hold(mask.choose())
    model.train()


def _optimizer(
    parameters: Mapping[str, Tensor], where: Where, rate: float, config: DeriveConfig, ranks: Ranks
) -> AdamW:
    return AdamW(
        parameters,
        where,
        learning_rate=rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        rounding=config.rounding,
        state_dtype=getattr(torch, config.optim_state_dtype),
        seed=config.seed,
        ranks=ranks,
    )


def _passes(
    model: Any,
    objective: Objective,
    rows: Sequence[Example],
    beside: Sequence[Example],
    weight: float,
    size: int,
    ranks: Ranks,
) -> tuple[Tensor, float, float]:
    """All passes of a step, `size` rows each, but for the last backward pass.

    Returns:
        The loss to go back from; the answer NLL of the rows, and of those beside them, in nats.
    """
    nlls = np.zeros(2)
    loss: Tensor | None = None
    for at in range(0, len(rows), size):
        if loss is not None:
            torch.autograd.backward(loss)
        loss, nll = _loss(objective, model, rows[at : at + size], rows, ranks)
        nlls[0] += float(nll)
        if beside:
            term, nll = _loss(Likelihood(1.0), model, beside[at : at + size], beside, ranks)
            loss = loss + weight * term
            nlls[1] += float(nll)
    assert loss is not None
    ranks.total(nlls)
    return loss, float(nlls[0]), float(nlls[1])


@dataclass
class _SoFar:
    """What a training knows of its steps: answer NLLs and tokens in the bound's window, the lines of its trace, and
    the shares of updates below half a step."""

    steps: int = 0
    window: list[tuple[float, int]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    small: list[float] = field(default_factory=list)

    def mean(self) -> float:
        return sum(n for n, _ in self.window) / sum(t for _, t in self.window)

    def write(self, trace: TextIO, record: Mapping[str, Any]) -> None:
        self.lines.append(json.dumps(record) + "\n")
        trace.write(self.lines[-1])
        trace.flush()

    def outcome(self, where: Where, *, bounded: bool) -> Outcome:
        small = sum(self.small) / len(self.small) if self.small else None
        return Outcome(self.steps, bounded, where, small)


def _where(config: DeriveConfig, parameters: Mapping[str, Tensor]) -> Where:
    if config.optim != "auto":
        return config.optim
    large = sum(p.numel() * p.element_size() for p in parameters.values()) > GRADIENT_BYTES
    return "adamw_in_backward" if large and config.gradient_accumulation_steps == 1 else "adamw"


def _loss(
    objective: Objective, model: Any, batch: Sequence[Example], step: Sequence[Example], ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """This rank's share of what `Objective.loss` gives of the batch: ranks add up the NLLs, and average gradients."""
    if mine := shard_rows(batch, ranks):
        loss, nll = objective.loss(model, mine, step)
        return loss * ranks.size, nll
    # The others wait for this one in every layer.
    loss, nll = objective.loss(model, batch[:1], step)
    return loss * 0.0, nll * 0.0


def _check_finite(step: int, rate: float, what: str, value: float) -> None:
    if not math.isfinite(value):
        raise UsageError(
            f"training diverged at step {step}: lower the learning rate or the ascent bound",
            found=f"{what} {value} with learning_rate {rate:g}",
        )


def _snapshot(
    so_far: _SoFar, parameters: Mapping[str, Tensor], optimizer: AdamW
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    moments, counts = optimizer.state()
    weights = {name: to_local(p.detach()) for name, p in parameters.items()}
    facts = {"steps": so_far.steps, "window": so_far.window, "lines": so_far.lines, "small": so_far.small}
    return weights | moments | _random_state(parameters), facts | {"steps_of_tensors": counts}


@torch.no_grad()
def _restore(
    tensor: Tensors,
    facts: dict[str, Any],
    parameters: Mapping[str, Tensor],
    optimizer: AdamW,
    *,
    masked: bool,
) -> _SoFar:
    for name, parameter in parameters.items():
        to_local(parameter).copy_(tensor(name))
    optimizer.load_state(tensor, facts.pop("steps_of_tensors"), masked=masked)
    for name in _random_state(parameters):
        if name == "rng/cpu":
            torch.set_rng_state(tensor(name))
        else:
            torch.cuda.set_rng_state(tensor(name), name.removeprefix("rng/"))
    return _SoFar(**facts)


def _random_state(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the generators that dropout draws from."""
    devices = sorted({str(p.device) for p in parameters.values() if p.is_cuda})
    return {"rng/cpu": torch.get_rng_state()} | {f"rng/{d}": torch.cuda.get_rng_state(d) for d in devices}


def _steps(
    examples: Sequence[Example], utility: Sequence[Example], config: DeriveConfig, patch: PatchConfig
) -> Iterator[tuple[list[Example], list[Example]]]:
    """The rows of each optimiser step, and as many utility rows: every pass over either in a new seeded order."""
    per_step = config.batch_size * config.gradient_accumulation_steps
    steps = planned_steps(len(examples), config, patch)
    left = steps * per_step if patch.max_steps else math.ceil(patch.num_train_epochs * len(examples))
    order, other = _order(len(examples), config.seed), _order(len(utility), config.seed)
    for _ in range(steps):
        size = min(per_step, left)
        left -= size
        beside = [utility[i] for i in islice(other, size)] if utility else []
        yield [examples[i] for i in islice(order, size)], beside


def _order(count: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
