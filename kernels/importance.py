"""Importance: |w * g| added up in place, so that `derive` keeps no second copy of the gradients."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .bits import to_float
from .launch import BLOCK, Launch

if TYPE_CHECKING:
    import torch


@triton.jit
def importance_kernel(
    total, weight, gradient, size: tl.int64,
    weights: tl.constexpr, gradients: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < size
    w = to_float(tl.load(weight + lane, mask=inside, other=0), weights)
    g = to_float(tl.load(gradient + lane, mask=inside, other=0), gradients)
    tl.store(total + lane, tl.load(total + lane, mask=inside, other=0.0) + tl.abs(w * g), mask=inside)


def _bits(name: str, tensor: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, str]:
    """A float tensor as bit patterns, and their dtype."""
    import torch

    dtypes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    if tensor.dtype not in dtypes or tensor.shape != shape or not tensor.is_contiguous():
        found = f"{'' if tensor.is_contiguous() else 'strided '}{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{name}: found {found}, expected contiguous float32, float16 or bfloat16 {tuple(shape)}")
    dtype = dtypes[tensor.dtype]
    return tensor.view(torch.uint32 if dtype == "F32" else torch.uint16), dtype


def accumulate(total: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor) -> Launch:
    """total += |weight * gradient|, entry by entry in float32: one product, one sum, each rounded once.

    total: contiguous float32; weight, gradient: contiguous float32, float16 or bfloat16 of the same shape.
    Raises ValueError if they are not.
    """
    _, dtype = _bits("total", total, total.shape)
    if dtype != "F32":
        raise ValueError(f"total: found {total.dtype}, expected torch.float32")
    w, weights = _bits("weight", weight, total.shape)
    g, gradients = _bits("gradient", gradient, total.shape)
    args = (total, w, g, total.numel(), weights, gradients, BLOCK)
    return Launch(importance_kernel, triton.cdiv(total.numel(), BLOCK), args)
