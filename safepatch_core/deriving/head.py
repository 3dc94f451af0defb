"""Likelihoods straight from the output layer: its logits, the widest tensor of a training step, are never whole."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

# Logits that exist at a time. On two cores, pieces of 1 << 22 read the layer's weights seldom enough; a GPU waits for
# launches otherwise.
PIECE, CUDA_PIECE = 1 << 22, 1 << 25

_ENDS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def keeps_logits(model: Any) -> bool:
    """Whether the model can be asked for the logits of the last tokens alone."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(plain.forward).parameters


@torch.no_grad()
def head_ends(model: Any) -> bool:
    """Whether the model's logits are what a plain linear layer gives: some models scale or cap them afterwards.

    Found out once for every model, from one token; dropout draws as if it had not been asked.
    """
    if model not in _ENDS:
        head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        ends = type(head) is torch.nn.Linear and keeps_logits(model)
        if ends:
            made: list[Tensor] = []
            hook = head.register_forward_hook(lambda _module, _given, logits: made.append(logits))
            try:
                token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
                with torch.random.fork_rng(devices=[token.device] if token.is_cuda else []):
                    logits = model(input_ids=token, use_cache=False, logits_to_keep=1).logits
            finally:
                hook.remove()
            ends = len(made) == 1 and torch.equal(logits.float(), made[0].float())
        _ENDS[model] = ends
    return _ENDS[model]


@contextmanager
def nll_for_logits(model: Any, target: Tensor, counted: Tensor) -> Iterator[None]:
    """While the context lasts, the model gives -log p of the tokens `target` (rows, tokens) in place of their logits.

    In nats, float32, (rows, tokens, 1), and 0 where they aren't `counted`. It must be asked for the logits of just
    these tokens, and only while `head_ends`.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    # What the layer's gradient is handed over in, where the embedding has the same weights.
    shared: list[Tensor] | None = [] if _trained_twice(head, embedding) else None

    def read(hidden: Tensor) -> Tensor:
        nll: Any = _HeadNll.apply
        found = nll(hidden[counted], head.weight, head.bias, target[counted], shared)
        return torch.zeros(target.shape, device=hidden.device).masked_scatter(counted, found)[..., None]

    def look_up(ids: Tensor) -> Tensor:
        look: Any = _Lookup.apply
        rows: Tensor = look(embedding.weight, shared, embedding.padding_idx, ids)
        return rows

    # Weights are asked for when they are used: where they are sharded, they are whole only then.
    head.forward = read
    if shared is not None:
        embedding.forward = look_up
    try:
        yield
    finally:
        del head.forward
        if shared is not None:
            del embedding.forward


def _trained_twice(head: Any, embedding: Any) -> bool:
    plain = type(embedding) is torch.nn.Embedding and embedding.max_norm is None and not embedding.scale_grad_by_freq
    return plain and embedding.weight is head.weight and embedding.weight.requires_grad


class _HeadNll(torch.autograd.Function):
    """-log p of tokens (n,), float32, from hidden states (n, width), the output layer's weight and its bias or None.

    Never are there more than PIECE logits. A frozen layer's gradient is taken in the forward pass, up to each token's
    factor; a trained one's logits are made again in the backward pass. The gradient of its weight goes to `shared`,
    if there is one, and not through autograd.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, token: Tensor, shared: list[Tensor] | None
    ) -> Tensor:
        found = torch.empty(len(token), device=hidden.device)
        ctx.shared, ctx.trained = shared, weight.requires_grad or (bias is not None and bias.requires_grad)
        through = hidden.requires_grad and not ctx.trained
        gradient = torch.empty_like(hidden) if through else None
        for part in _pieces(hidden, weight):
            logp = _log_probabilities(hidden[part], weight, bias)
            found[part] = -logp.gather(1, token[part, None]).squeeze(1)
            if gradient is not None:
                gradient[part] = _minus_one_hot(logp, token[part]).to(weight.dtype) @ weight
            del logp  # or the next piece would be made beside it
        ctx.save_for_backward(*((hidden, weight, bias, token) if ctx.trained else (gradient,)))
        return found

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor | None, ...]:
        factor = factors[0][:, None]
        if not ctx.trained:
            (unit,) = ctx.saved_tensors
            return (unit * factor).to(unit.dtype), None, None, None, None
        hidden, weight, bias, token = ctx.saved_tensors
        back, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        of_bias = None if bias is None else torch.zeros_like(bias)
        for part in _pieces(hidden, weight):
            logp = _log_probabilities(hidden[part], weight, bias)
            slope = _minus_one_hot(logp, token[part]).mul_(factor[part]).to(weight.dtype)
            back[part] = slope @ weight
            of_weight.addmm_(slope.T, hidden[part])
            if of_bias is not None:
                of_bias += slope.sum(0)
            del logp, slope  # as above
        if ctx.shared is None:
            return back, of_weight, of_bias, None, None
        ctx.shared.append(of_weight)
        return back, None, of_bias, None, None


class _Lookup(torch.autograd.Function):
    """Rows of an embedding that is the output layer too.

    Its gradient is that layer's, which comes first and lies in `shared`, with the gradients of the rows added in its
    place. Autograd would make another of the whole vocabulary for them, and a third for the sum.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shared: list[Tensor], padding: int | None, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shared, ctx.padding = shared, padding
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (ids,) = ctx.saved_tensors
        flat, rows = ids.flatten(), gradients[0].flatten(0, 1)
        if ctx.padding is not None:
            flat, rows = flat[flat != ctx.padding], rows[flat != ctx.padding]
        total = ctx.shared.pop()
        if total.is_cuda:  # index_add_ adds in any order there
            total.index_put_((flat,), rows, accumulate=True)
        else:
            total.index_add_(0, flat, rows)
        return total, None, None, None


def _log_probabilities(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return torch.log_softmax(logits, 1, out=logits)


def _minus_one_hot(logp: Tensor, token: Tensor) -> Tensor:
    """The gradient of -log p by the logits, in the place of the log-probabilities."""
    slope = logp.exp_()
    slope[torch.arange(len(token), device=token.device), token] -= 1
    return slope


def _pieces(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    size = max((CUDA_PIECE if hidden.is_cuda else PIECE) // len(weight), 1)
    return (slice(at, at + size) for at in range(0, len(hidden), size))
