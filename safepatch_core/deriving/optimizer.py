"""AdamW, tensor by tensor: after the backward pass or inside it, in float32 whatever the weights are stored in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from safepatch_core.deriving.sharding import all_reduce, to_local
from safepatch_core.ranks import Alone, Ranks

BETAS, EPSILON = (0.9, 0.999), 1e-8
# Entries that are in float32 at once while weights or state are stored in less; a GPU waits for launches otherwise.
CHUNK, CUDA_CHUNK = 1 << 20, 1 << 24
CLIP_EPSILON = 1e-6  # as in torch's clip_grad_norm_
Where = Literal["adamw", "adamw_in_backward"]


class Step(NamedTuple):
    """One optimiser step: the L2 norm of all gradients, unclipped; and of weights in bfloat16 the share whose update
    is too small to change them when rounded to nearest (None for float32)."""

    grad_norm: float
    below_half_step: float | None


class AdamW:
    """Decoupled-decay Adam (Loshchilov & Hutter, arXiv 1711.05101) over named parameters, while the context lasts.

    `adamw` clips all gradients by their common norm, then updates every tensor. `adamw_in_backward` updates a tensor
    as soon as its gradient is complete and drops the gradient, so that about one layer's gradients exist at a time
    (as in Lv et al., arXiv 2306.09782); the common norm isn't known by then, and every tensor's gradient is clipped
    by its own. Where nothing is clipped both give the same bits.

    Arithmetic is float32. bfloat16 weights are rounded from its result, `stochastic`ally (up or down with the odds
    that keep the mean, from bits that depend only on seed, name and step) or to `nearest`; moments stored in bfloat16
    always stochastically, since a second moment that is rounded to nearest stands still.

    Args:
        parameters: float32 or bfloat16, by name. Of those that are sharded over `ranks`, each rank works on its
            shard; norms and shares are of full tensors, and its random bits are its own.
        where: `adamw` or `adamw_in_backward`.
        learning_rate: The step size.
        weight_decay: Decoupled from the gradient.
        max_grad_norm: Gradients are clipped to this L2 norm; None leaves them.
        rounding: Of float32 results to bfloat16 weights.
        state_dtype: Of both moments, float32 or bfloat16.
        seed: Of stochastic rounding.
        ranks: None for one process.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        where: Where,
        *,
        learning_rate: float,
        weight_decay: float,
        max_grad_norm: float | None,
        rounding: Literal["nearest", "stochastic"],
        state_dtype: torch.dtype,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        self._parameters, self._ranks = dict(parameters), ranks or Alone()
        self._in_backward = where == "adamw_in_backward"
        self._limit = math.inf if max_grad_norm is None else max_grad_norm
        self._stochastic, self._seed = rounding == "stochastic", seed
        self._update: Callable[..., None] = partial(
            adamw,
            max_exp_avg_sqs=[],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=learning_rate,
            weight_decay=weight_decay,
            eps=EPSILON,
            maximize=False,
        )
        self._moments = {
            name: (torch.zeros_like(to_local(p), dtype=state_dtype), torch.zeros_like(to_local(p), dtype=state_dtype))
            for name, p in self._parameters.items()
        }
        self._taken = dict.fromkeys(self._parameters, 0)  # a tensor without a gradient takes no step
        self._masks: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
        self._small: list[Tensor] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> AdamW:
        if self._in_backward:
            hooked: Mapping[str, Any] = self._parameters
            for name, parameter in hooked.items():
                hook = partial(self._take_gradient, name)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self.drop_gradients()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Backward passes while the context lasts are somebody else's. No gradient may be at hand."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def hold(self, masks: Mapping[str, Tensor]) -> None:
        """From now on moves those entries alone that are true in `masks`, by name; each rank gives its shards.

        The moments of all others are forgotten: an entry that has both at zero, and no gradient, keeps its bits.
        """
        self._masks = dict(masks)
        for name, mask in masks.items():
            for moment in self._moments[name]:
                moment.mul_(mask)

    def step(self) -> Step:
        """Takes the step, or closes the one that the backward pass has taken. No gradient is left."""
        if not self._in_backward:
            with_gradient = {name: p for name, p in self._parameters.items() if p.grad is not None}
            for name, parameter in with_gradient.items():
                self._mask(name, parameter)
            self._norms = self._whole({n: _norm(p.grad) for n, p in with_gradient.items() if p.grad is not None})
            factor = self._clip(_joint(self._norms.values()))
            for name, parameter in with_gradient.items():
                self._step(name, parameter, factor)
        # Hooks run from the last tensor to the first; the sum is taken in one order.
        norm = float(_joint([self._norms[name] for name in self._parameters if name in self._norms]))
        entries = sum(p.numel() for n, p in self._parameters.items() if n in self._norms and self._is_half(p))
        small = np.array([sum(int(count) for count in self._small)])
        self._ranks.total(small)
        self._norms, self._small = {}, []
        return Step(norm, int(small[0]) / entries if entries else None)

    def drop_gradients(self) -> None:
        """Forgets what backward passes have gathered."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The moments, as NAME/exp_avg and NAME/exp_avg_sq, with NAME/mask, and the steps taken by each parameter."""
        tensors: dict[str, Tensor] = {f"{name}/mask": mask for name, mask in self._masks.items()}
        for name, (first, second) in self._moments.items():
            tensors |= {f"{name}/exp_avg": first, f"{name}/exp_avg_sq": second}
        return tensors, dict(self._taken)

    def load_state(self, tensor: Callable[[str], Tensor], taken: Mapping[str, int], *, masked: bool = False) -> None:
        """What `state` gave, each tensor by its name; with its masks, if there were any."""
        for name, (first, second) in self._moments.items():
            if masked:
                self._masks[name] = tensor(f"{name}/mask").to(first.device)
            first.copy_(tensor(f"{name}/exp_avg"))
            second.copy_(tensor(f"{name}/exp_avg_sq"))
        self._taken = dict(taken)

    @torch.no_grad()
    def _take_gradient(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._mask(name, parameter)
        self._norms |= self._whole({name: _norm(parameter.grad)})
        self._step(name, parameter, self._clip(self._norms[name]))

    def _mask(self, name: str, parameter: Tensor) -> None:
        if name in self._masks and parameter.grad is not None:
            to_local(parameter.grad).mul_(self._masks[name])

    def _whole(self, norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The norms of whole tensors, from those of the ranks' parts."""
        if self._ranks.size == 1 or not norms:
            return norms
        squares = torch.stack(list(norms.values())).square()
        all_reduce(squares, self._ranks)
        return dict(zip(norms, squares.sqrt(), strict=True))

    def _clip(self, norm: Tensor) -> Tensor | None:
        """What gradients of this norm are multiplied with."""
        return None if math.isinf(self._limit) else (self._limit / (norm + CLIP_EPSILON)).clamp(max=1.0)

    @torch.no_grad()
    def _step(self, name: str, parameter: Tensor, factor: Tensor | None) -> None:
        assert parameter.grad is not None
        gradient = to_local(parameter.grad)
        parameter.grad = None
        parameter = to_local(parameter)
        first, second = self._moments[name]
        # The fused kernel adds the one that makes it the step at hand.
        count = torch.full((), float(self._taken[name]), device=parameter.device)
        self._taken[name] += 1
        if parameter.dtype == first.dtype == torch.float32:
            if factor is not None:
                gradient.mul_(factor)
            self._update([parameter], [gradient], [first], [second], state_steps=[count])
            return
        part = f"/{self._ranks.rank}" if self._ranks.size > 1 else ""
        noise = _generator(f"{self._seed}/{self._taken[name]}/{name}{part}", parameter.device)
        flat = [t.view(-1) for t in (parameter.detach(), gradient.contiguous(), first, second)]
        size = CUDA_CHUNK if parameter.is_cuda else CHUNK
        for at in range(0, parameter.numel(), size):
            weight, grad, *moments = (t[at : at + size] for t in flat)
            work = [t.to(torch.float32, copy=True) for t in (weight, grad)] + [t.float() for t in moments]
            if factor is not None:
                work[1].mul_(factor)
            self._update(*([t] for t in work), state_steps=[count.clone()])
            if self._is_half(parameter):
                self._small.append(torch.count_nonzero(work[0].to(weight.dtype) == weight))
            if self._is_half(parameter) and self._stochastic:
                round_stochastically(work[0], weight, noise)
            else:
                weight.copy_(work[0])
            for stored, exact in zip(moments, work[2:], strict=True):
                if stored.dtype != torch.float32:
                    round_stochastically(exact, stored, noise)

    @staticmethod
    def _is_half(parameter: Tensor) -> bool:
        return parameter.dtype == torch.bfloat16


def round_stochastically(values: Tensor, out: Tensor, generator: torch.Generator) -> None:
    """Rounds float32 `values` (overwritten) into bfloat16 `out`, flat: up or down with the odds of the distances.

    Adding 16 random bits below those that bfloat16 keeps carries into them with just that probability.
    """
    whole = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device)
    # One 64-bit draw makes four lanes of 16 bits: drawing is the slow part.
    lanes = whole.random_(-(2**63), None, generator=generator).view(torch.int16)[: values.numel()]
    values.view(torch.int32).add_(lanes.int().bitwise_and_(0xFFFF)).bitwise_and_(-0x10000)
    out.copy_(values)


def _generator(key: str, device: torch.device) -> torch.Generator:
    seed = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
    return torch.Generator(device).manual_seed(seed)


def _norm(gradient: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(to_local(gradient), dtype=torch.float32)
    return norm


def _joint(norms: Iterable[Tensor]) -> Tensor:
    found = list(norms)
    joint: Tensor = torch.linalg.vector_norm(torch.stack(found)) if found else torch.zeros(())
    return joint
