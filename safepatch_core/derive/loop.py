"""The training loop: plain PyTorch, one objective, either direction."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TextIO

import torch

from safepatch_core.derive.config import DeriveConfig, PatchConfig
from safepatch_core.derive.objective import Example, answer_nll, batches
from safepatch_core.derive.progress import Progress
from safepatch_core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Outcome:
    """`steps` optimiser steps were taken; `bounded` if the ascent bound ended them."""

    steps: int
    bounded: bool


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
    ascent: bool,
    trace: TextIO,
    progress: Progress,
) -> Outcome:
    """Trains the model's trainable parameters in place, with AdamW at a constant learning rate.

    Descent minimises the mean answer NLL of each step's tokens, ascent maximises it, until the mean over the latest
    `ascent_window` steps reaches `ascent_bound`; the step that finds it so changes nothing. Each step writes one JSON
    line to `trace`: step, nll (nats per token, before the update), tokens, grad_norm (unclipped) and learning_rate.
    Raises UsageError if training diverges.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate = config.rate(patch)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=config.weight_decay, fused=True)
    limit = config.max_grad_norm or math.inf
    bound = config.ascent_bound if ascent else None
    window: deque[tuple[float, int]] = deque(maxlen=config.ascent_window)
    sign = -1.0 if ascent else 1.0
    taken = 0
    model.train()
    for step, rows in enumerate(_steps(examples, config, patch), 1):
        tokens = sum(e.answer_tokens for e in rows)
        total = 0.0
        for batch in batches(rows, config.batch_size):
            nll = answer_nll(model, batch)
            torch.autograd.backward(sign * nll / tokens)
            total += float(nll.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(total) or not math.isfinite(norm):
            raise UsageError(
                f"training diverged at step {step}: lower the learning rate or the ascent bound",
                found=f"NLL {total / tokens} and gradient norm {norm} with learning_rate {rate:g}",
            )
        window.append((total, tokens))
        record = {"step": step, "nll": total / tokens, "tokens": tokens, "grad_norm": norm, "learning_rate": rate}
        mean = sum(n for n, _ in window) / sum(t for _, t in window)
        bounded = bound is not None and taken > 0 and mean >= bound
        trace.write(json.dumps(record | ({"stopped": "ascent_bound"} if bounded else {})) + "\n")
        trace.flush()
        if bounded:
            return Outcome(taken, True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        taken += 1
        progress.advance(tokens=sum(len(e.ids) for e in rows), step=step, nll=total / tokens, grad_norm=norm)
    return Outcome(taken, False)


def _steps(examples: Sequence[Example], config: DeriveConfig, patch: PatchConfig) -> Iterator[list[Example]]:
    """The rows of each optimiser step: every pass over the examples in a new seeded order."""
    per_step = config.batch_size * config.gradient_accumulation_steps
    steps = planned_steps(len(examples), config, patch)
    left = steps * per_step if patch.max_steps else math.ceil(patch.num_train_epochs * len(examples))
    order = _order(len(examples), config.seed)
    for _ in range(steps):
        size = min(per_step, left)
        left -= size
        yield [examples[i] for i in islice(order, size)]


def _order(count: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
