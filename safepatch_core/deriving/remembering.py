"""What keeps a round from undoing the rounds before it: terms beside an objective.

EWC (Kirkpatrick et al. 2017): a weight is drawn back to where the round began, as strongly as it mattered before.
DER (Buzzega et al. 2020): on rows of earlier rounds the logits stay what they were when the round began.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from safepatch_core.deriving.head import keeps_logits
from safepatch_core.deriving.names import BaseNames
from safepatch_core.deriving.objective import Objective, batches
from safepatch_core.deriving.saving import read_tensor
from safepatch_core.errors import InputError, UsageError
from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.language.chat import Example
from safepatch_core.progress import Progress


class Term(Protocol):
    """What is added to a step's loss, whole, however the step's rows are cut into batches."""

    def __call__(self, model: Any, batch: Sequence[Example]) -> Tensor:
        """The term, with its graph. What it draws depends on the batch alone: a resumed run draws the same."""


@dataclass(frozen=True)
class Remembering:
    """An objective and terms beside it; each counts once per step."""

    objective: Objective
    terms: Sequence[Term]

    def loss(self, model: Any, batch: Sequence[Example], step: Sequence[Example]) -> tuple[Tensor, Tensor]:
        loss, nll = self.objective.loss(model, batch, step)
        for term in self.terms:
            loss = loss + term(model, batch) * (len(batch) / len(step))
        return loss, nll


@dataclass(frozen=True)
class Anchor:
    """EWC: weight/2 · Σ F (θ - θ₀)² over the parameters named, F having mean 1 over all of their entries."""

    weight: float
    importance: Mapping[str, Tensor]  # F
    start: Mapping[str, Tensor]

    def __call__(self, model: Any, batch: Sequence[Example]) -> Tensor:
        parameters = dict(model.named_parameters())
        terms = [
            (f * (parameters[name].float() - self.start[name].float()).square()).sum()
            for name, f in self.importance.items()
        ]
        return self.weight / 2 * torch.stack(terms).sum()


def anchored(model: Any, names: BaseNames, scores: Sequence[Checkpoint], weight: float) -> Anchor:
    """The term for a model where it stands.

    Args:
        model: What will be trained; its trainable parameters are held on to.
        names: What these are in the base.
        scores: Fisher importance of earlier rounds, under the base's names; they are added up. A parameter that none
            has is free.
        weight: Of the term.

    Raises:
        InputError: The scores are of another model, or zero.
        UsageError: A parameter is stored apart in the base.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        of_base = list(names.convert({name: parameter.detach()}))
        if [tensor.shape for _, tensor in of_base[:1]] != [parameter.shape]:
            raise UsageError("EWC of a parameter that the base stores apart", tensor=name, expected="no ewc_fisher")
        if there := [_read(of, of_base[0][0], parameter) for of in scores if of_base[0][0] in of.tensors]:
            found[name] = torch.stack(there).sum(0)
    entries, total = sum(f.numel() for f in found.values()), sum(float(f.double().sum()) for f in found.values())
    if not total:
        raise InputError("no Fisher importance above zero of what is trained", file=scores[0].ref)
    scaled = {name: f * (entries / total) for name, f in found.items()}
    own = dict(model.named_parameters())
    return Anchor(weight, scaled, {name: own[name].detach().clone() for name in found})


def _read(scores: Checkpoint, name: str, parameter: Tensor) -> Tensor:
    entry = scores.tensors[name]
    if entry.shape != tuple(parameter.shape):
        raise InputError(
            "not the Fisher importance of this model",
            file=scores.ref,
            tensor=name,
            found=list(entry.shape),
            expected=list(parameter.shape),
        )
    return read_tensor(entry).float().to(parameter.device)


@dataclass(frozen=True)
class Replay:
    """DER: weight · mean (z - z₀)² over answer tokens and vocabulary, of as many earlier rows as the batch has."""

    weight: float
    logits: Mapping[Example, Tensor]  # z₀ of each row's answer tokens: (tokens, vocabulary), on the CPU

    def __call__(self, model: Any, batch: Sequence[Example]) -> Tensor:
        seed = zlib.crc32(repr([example.ids for example in batch]).encode())
        drawn = torch.randint(len(self.logits), (len(batch),), generator=torch.Generator().manual_seed(seed))
        every = list(self.logits)
        rows = [every[i] for i in drawn.tolist()]
        then = torch.cat([self.logits[row] for row in rows]).to(model.device).float()
        now = torch.cat(answer_logits(model, rows)).float()
        return self.weight * (now - then).square().mean()


@torch.no_grad()
def replayed(model: Any, rows: Sequence[Example], weight: float, size: int, progress: Progress) -> Replay:
    """The term for a model where it stands. The model is left in eval mode."""
    model.eval()
    logits: dict[Example, Tensor] = {}
    for batch in batches(rows, size):
        logits |= zip(batch, (of.cpu() for of in answer_logits(model, batch)), strict=True)
        progress.advance(tokens=sum(len(e.ids) for e in batch))
    return Replay(weight, logits)


def answer_logits(model: Any, rows: Sequence[Example]) -> list[Tensor]:
    """Of each row, what the model says at its answer's tokens: (tokens, vocabulary)."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = torch.tensor(row.ids)
        mask[at, : len(row.ids)] = 1
    first = min(row.answer for row in rows) - 1
    narrow = {"logits_to_keep": width - first} if keeps_logits(model) else {}
    made = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False, **narrow)
    logits = made.logits[:, first - width :]
    return [logits[at, row.answer - 1 - first : len(row.ids) - 1 - first] for at, row in enumerate(rows)]
