"""The objectives: all read the token cross-entropy of the answer alone, under the model's own chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from safepatch_core.deriving.data import Pair
from safepatch_core.deriving.head import head_ends, keeps_logits, nll_for_logits
from safepatch_core.language.chat import Example
from safepatch_core.progress import Progress

IGNORED = -100


def answer_nll(model: Any, examples: Sequence[Example]) -> Tensor:
    """Sum of -log p over all answer tokens of the batch, in nats: a float32 scalar with its graph."""
    nlls, counted = _token_nlls(model, examples)
    nlls, counted = nlls.flatten(), counted.flatten()
    # Sums in the order in which cross_entropy does.
    target = torch.where(counted, 0, IGNORED)
    return torch.nn.functional.nll_loss(-nlls[:, None], target, ignore_index=IGNORED, reduction="sum")


def row_nlls(model: Any, examples: Sequence[Example]) -> Tensor:
    """Sum of -log p over each row's answer tokens, in nats: float32 of shape (rows,) with its graph."""
    return _token_nlls(model, examples)[0].sum(1)


def _token_nlls(model: Any, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """-log p of the tokens from the batch's first answer token on, in nats, float32 (rows, tokens); 0 for those that
    are no answer's, and which those are that count."""
    device = model.device
    width = max(len(e.ids) for e in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    # One more than there are tokens: the last position predicts nothing.
    labels = torch.full((len(examples), width + 1), IGNORED)
    for row, example in enumerate(examples):
        size = len(example.ids)
        ids[row, :size] = torch.tensor(example.ids)
        mask[row, :size] = 1
        labels[row, example.answer : size] = ids[row, example.answer : size]
    # Logits are the widest tensor of the pass: ask only for those from the first answer's predecessor on.
    first = max(min(e.answer for e in examples), 1)
    target = labels[:, first:].to(device)
    narrow = {"logits_to_keep": target.shape[1]} if keeps_logits(model) else {}
    read = partial(model, input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **narrow)
    if head_ends(model):
        with nll_for_logits(model, target, target != IGNORED):
            nlls = read().logits
    else:
        logits = read().logits[:, -target.shape[1] :].flatten(0, 1).float()
        nlls = torch.nn.functional.cross_entropy(logits, target.flatten(), ignore_index=IGNORED, reduction="none")
    return nlls.view(target.shape)[:, :-1], target[:, :-1] != IGNORED


class Objective(Protocol):
    """What a patch's training minimises."""

    def loss(self, model: Any, batch: Sequence[Example], step: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """The batch's share of the loss of all rows of the `step`, with its graph; and the batch's answer NLL."""


@dataclass(frozen=True)
class Likelihood:
    """Mean answer NLL of a step's tokens, times `sign`: 1 descends it, -1 ascends it."""

    sign: float

    def loss(self, model: Any, batch: Sequence[Example], step: Sequence[Example]) -> tuple[Tensor, Tensor]:
        nll = answer_nll(model, batch)
        return self.sign * nll / sum(e.answer_tokens for e in step), nll.detach()


@dataclass(frozen=True)
class NegativePreference:
    """NPO: 2/beta · mean over a step's rows of log(1 + (pi/pi_ref)^beta) (Zhang et al., arXiv 2404.05868, L_NPO).

    pi is an answer's probability as a whole, `reference` its NLL in nats under the untrained model. As beta goes to 0
    this becomes ascent; elsewhere a row counts the less, the less likely its answer has become.
    """

    beta: float
    reference: Mapping[Example, float]

    def loss(self, model: Any, batch: Sequence[Example], step: Sequence[Example]) -> tuple[Tensor, Tensor]:
        nlls = row_nlls(model, batch)
        ratios = torch.tensor([self.reference[e] for e in batch], device=nlls.device) - nlls
        loss = torch.nn.functional.softplus(self.beta * ratios).sum() * (2 / (self.beta * len(step)))
        return loss, nlls.detach().sum()


# Of the margin, times beta, by which a model prefers the chosen answer more than the untrained one did.
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda margin: torch.nn.functional.softplus(-margin),
    "hinge": lambda margin: torch.relu(1 - margin),
}


@dataclass(frozen=True)
class Preference:
    """DPO: the mean over a step's pairs of -log sigmoid(beta · margin), margin = log((pi / pi_ref)(chosen)) -
    log((pi / pi_ref)(rejected)) (Rafailov et al., arXiv 2305.18290, equation 7); or another of the `LOSSES`.

    pi is an answer's probability as a whole, `reference` its NLL in nats under the untrained model; the batch's NLL,
    that of the rejected answers.
    """

    beta: float
    loss_type: str
    reference: Mapping[Example, float]

    def loss(self, model: Any, batch: Sequence[Example], step: Sequence[Example]) -> tuple[Tensor, Tensor]:
        answers = [*batch, *chosen(batch)]
        nlls = row_nlls(model, answers)
        gains = torch.tensor([self.reference[e] for e in answers], device=nlls.device) - nlls
        rejected, preferred = gains.chunk(2)
        losses = LOSSES[self.loss_type](self.beta * (preferred - rejected))
        return losses.sum() / len(step), nlls[: len(batch)].detach().sum()


def chosen(examples: Sequence[Example]) -> list[Example]:
    """The answers to learn from: of pairs the chosen ones."""
    return [e.chosen if isinstance(e, Pair) else e for e in examples]


@torch.no_grad()
def reference_nlls(
    model: Any, examples: Sequence[Example], batch_size: int, progress: Progress
) -> dict[Example, float]:
    """Each row's answer NLL in nats. The model is left in eval mode."""
    model.eval()
    found: dict[Example, float] = {}
    for batch in batches(examples, batch_size):
        found |= zip(batch, row_nlls(model, batch).tolist(), strict=True)
        progress.advance(tokens=sum(len(e.ids) for e in batch))
    return found


@torch.no_grad()
def mean_nll(model: Any, examples: Sequence[Example], batch_size: int, progress: Progress) -> float:
    """Mean answer NLL over the examples' tokens, in nats per token. The model is left in eval mode."""
    model.eval()
    nats = 0.0
    for batch in batches(examples, batch_size):
        nats += float(answer_nll(model, batch))
        progress.advance(tokens=sum(len(e.ids) for e in batch))
    return nats / sum(e.answer_tokens for e in examples)


def batches(examples: Sequence[Example], size: int) -> Iterable[Sequence[Example]]:
    """The examples in order, `size` at a time."""
    return (examples[i : i + size] for i in range(0, len(examples), size))
