"""The objectives: all read the token cross-entropy of the answer alone, under the model's own chat template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from safepatch_core.derive.head import head_ends, keeps_logits, nll_for_logits
from safepatch_core.derive.progress import Progress
from safepatch_core.errors import InputError

IGNORED = -100
# Some templates print today's date unless they are given one, and a run must not depend on the day.
TEMPLATE_DATE = "26 Jul 2024"
_MARK = "safepatch-answer"


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised row: `ids[answer:]` are the answer's tokens and the end of the turn."""

    ids: tuple[int, ...]
    answer: int
    truncated: bool = False

    @property
    def answer_tokens(self) -> int:
        return len(self.ids) - self.answer


class Format:
    """Turns (question, answer) into token ids the way the model sees them in a chat.

    Without a chat template the text is "Question: …\\nAnswer: …". Raises InputError if the template refuses the
    conversation (some know no system message) or the tokenizer has neither a template's end of turn nor an
    end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, system_prompt: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        self._chat = bool(getattr(tokenizer, "chat_template", None))
        self._lead: list[int] = []
        opening, closing = " ", ""
        if self._chat:
            user = {"role": "user", "content": "question"}
            text = self._render([*self._system, user, {"role": "assistant", "content": _MARK}], False)
            head, found, closing = text.rpartition(_MARK)
            if not found:
                raise InputError("chat template does not show the assistant's answer")
            prompt = self._render([*self._system, user], True)
            opening = head.removeprefix(prompt) if head.startswith(prompt) else ""
        elif tokenizer.bos_token_id is not None and self._ids("a", special=True)[:1] == [tokenizer.bos_token_id]:
            self._lead = [tokenizer.bos_token_id]
        # What a template puts before the answer (an empty thinking block) belongs to the prompt; a mere space
        # belongs to the answer's first token.
        answer_lead = opening[len(opening.rstrip(" ")) :]
        self._opening, self._answer_lead = opening[: len(opening) - len(answer_lead)], answer_lead
        self._end = self._end_of_turn(closing)

    def prompt(self, question: str) -> str:
        """The text up to the answer, as it stands at generation."""
        if self._chat:
            text = self._render([*self._system, {"role": "user", "content": question}], True)
        else:
            text = "".join(f"{m['content']}\n\n" for m in self._system) + f"Question: {question}\nAnswer:"
        return text + self._opening

    def encode(self, question: str, answer: str, max_length: int) -> Example:
        """The row's tokens, at most `max_length` of them (the answer is cut at its end).

        The prompt's tokens are always those of the prompt alone, as at generation: where tokenising prompt and answer
        together would merge across the boundary, they are tokenised apart. Raises InputError if no answer token fits.
        """
        text, reply = self.prompt(question), self._answer_lead + answer.strip()
        prompt = self._ids(text)
        ids = self._ids(text + reply)
        if ids[: len(prompt)] != prompt:
            ids = prompt + self._ids(reply)
        ids = [*self._lead, *ids, *self._end]
        start = len(self._lead) + len(prompt)
        if start >= max_length:
            raise InputError(
                "question leaves no room for an answer", found=f"{start} tokens", expected=f"max_length > {start}"
            )
        return Example(tuple(ids[:max_length]), start, len(ids) > max_length)

    def _render(self, messages: list[dict[str, str]], generate: bool) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generate, date_string=TEMPLATE_DATE
                )
            )
        except TemplateError as error:
            raise InputError(f"chat template failed: {error}") from error

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def _end_of_turn(self, closing: str) -> list[int]:
        """Ids from the answer's end up to the first special token of the template's closing, or end of sequence."""
        special = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        ids = self._ids(closing.strip())
        for position, token in enumerate(ids):
            if token in special:
                return ids[: position + 1]
        if self._tokenizer.eos_token_id is None:
            raise InputError("tokenizer has no end-of-sequence token")
        return [self._tokenizer.eos_token_id]


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
