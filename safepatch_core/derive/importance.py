"""SNIP importance: |w * dL/dw| per sample, averaged over samples."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from safepatch_core.backends.device import interpreted
from safepatch_core.derive.model import Target
from safepatch_core.derive.objective import Example, answer_nll
from safepatch_core.derive.progress import Progress
from safepatch_core.errors import InputError


def snip(
    model: Any, examples: Sequence[Example], is_target: Target, progress: Progress
) -> tuple[dict[str, Tensor], float]:
    """Importance of every target parameter (float32, shaped like it, named as in the model); and the mean answer NLL.

    L is a sample's mean answer NLL; one backward per sample. A gradient is folded into the sum and dropped as soon
    as it exists, so that memory holds the weights, the sums and one layer's gradients. The model is left in eval
    mode, with only its targets trainable. Raises InputError if the importance isn't finite.
    """
    model.eval()
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_target(name, parameter.ndim))
        if parameter.requires_grad:
            sums[name] = torch.zeros_like(parameter, dtype=torch.float32)
            # Plain torch needs three temporaries of a gradient's size; the kernel reads and adds in one pass.
            fold = _fused(sums[name]) if parameter.is_cuda or interpreted() else _folder(sums[name])
            hooks.append(parameter.register_post_accumulate_grad_hook(fold))
    nats = 0.0
    try:
        for example in examples:
            nll = answer_nll(model, [example])
            torch.autograd.backward(nll / example.answer_tokens)
            nats += float(nll.detach())
            progress.advance(tokens=len(example.ids))
    finally:
        for hook in hooks:
            hook.remove()
    for name, total in sums.items():
        total /= len(examples)
        if not bool(torch.isfinite(total).all()):
            raise InputError("importance is not finite", tensor=name)
    return sums, nats / sum(e.answer_tokens for e in examples)


def _fused(total: Tensor) -> Any:
    from safepatch_core.kernels.importance import accumulate

    def fold(parameter: Tensor) -> None:
        assert parameter.grad is not None
        with torch.cuda.device(parameter.device) if parameter.is_cuda else nullcontext():
            accumulate(total, parameter.detach(), parameter.grad.contiguous()).run()
        parameter.grad = None

    return fold


def _folder(total: Tensor) -> Any:
    def fold(parameter: Tensor) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            total.add_(parameter.grad.float().mul_(parameter).abs_())
        parameter.grad = None

    return fold
