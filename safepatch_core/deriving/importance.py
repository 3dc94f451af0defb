"""Importance of every target parameter: what SNIP or Fisher say of it, sample by sample.

The data sample is `importance_samples` seeded rows of the run's data, the loss L of a sample its mean answer NLL in
nats per token, of the answer's tokens alone. Over n samples, with g = dL/dw of each by its own backward pass:

    snip    1/n * sum |w * g|     Lee et al. 2019 (arXiv 1810.02340), equation 4 without its normalisation (which does
                                  not change a ranking), absolute value per sample as SafePatching (arXiv 2405.13820)
    fisher  1/n * sum g^2         the diagonal of the empirical Fisher information, Kirkpatrick et al. 2017
                                  (arXiv 1612.00796), up to each answer's length

All arithmetic is float32. The recipe's own ranking, by magnitude |delta|, needs no pass.

Of a model that is sharded over ranks, all work on the same sample at the same time: |w * g| needs each sample's own
gradient, and what a rank sees is already averaged over the ranks. The average of equal gradients is the gradient, to
the bit if their number is a power of two. Sums are cut as the weights are. So ranks save memory here, not time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from safepatch_core.backends.device import interpreted
from safepatch_core.deriving.model import Target
from safepatch_core.deriving.objective import answer_nll
from safepatch_core.deriving.saving import Layer, by_layer
from safepatch_core.deriving.sharding import from_local, full_tensor, to_local
from safepatch_core.errors import InputError
from safepatch_core.language.chat import Example
from safepatch_core.language.model import freed_memory_returned
from safepatch_core.progress import Progress
from safepatch_core.ranks import Alone, Ranks

Kind = Literal["snip", "fisher"]
Memory = Literal["auto", "memory", "disk"]

# Sums may take this share of what is free once the model is loaded: gradients and activations come on top.
SHARE = 0.7
_PIECE = 1 << 20  # entries that are added at a time on disk


@dataclass(frozen=True, slots=True)
class Importance:
    """`layers` gives the scores of the model's `parameters`, named and shaped as they are, in float32: once, and one
    layer at a time, raising InputError at a layer that isn't finite. `nll` is the samples' mean answer NLL."""

    parameters: Mapping[str, Tensor]
    layers: Iterator[Layer]
    nll: float


def take_importance(
    model: Any,
    examples: Sequence[Example],
    is_target: Target,
    progress: Progress,
    *,
    kind: Kind = "snip",
    memory: Memory = "auto",
    folder: Path | None = None,
    ranks: Ranks | None = None,
) -> Importance:
    """The importance of every target parameter: one backward per sample.

    A gradient is folded into the float32 sums and dropped as soon as it exists, and the activations of a layer are
    made again when its turn comes: memory holds the weights, the sums, one layer's gradients and activations, and the
    logits of one answer.

    Args:
        model: Is left in eval mode with only its targets trainable.
        examples: The samples.
        is_target: Which parameters are scored.
        progress: Is told of every sample.
        kind: Of the score.
        memory: disk keeps the sums in nameless files in `folder` and changes them there, a few MiB at a time; auto
            does so where they would take more than 0.7 of the free memory of the model's device. The scores have the
            same bits either way.
        folder: None for memory alone.
        ranks: None for one process.

    Raises:
        OSError: The disk fails or is full.
    """
    model.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_target(name, parameter.ndim))
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = {name: to_local(parameter.detach()) for name, parameter in parameters.items()}
    sums: _Sums
    if folder is not None and _spills(memory, parts):
        sums = _OnDisk(parts, folder)
    else:
        sums = _InMemory(parts)
    nats = 0.0
    with freed_memory_returned(model, recomputed=True), _folded(parameters, sums, kind), _recomputed(model):
        for example in examples:
            nll = answer_nll(model, [example])
            torch.autograd.backward(nll / example.answer_tokens)
            nats += float(nll.detach())
            progress.advance(tokens=len(example.ids))
    means = _means(sums, len(examples), parameters, ranks or Alone())
    return Importance(parameters, means, nats / sum(e.answer_tokens for e in examples))


def highest(taken: Importance, top: float) -> dict[str, Tensor]:
    """Whether each entry is of the share `top` of its tensor that scores highest, scores of zero never; of sharded
    tensors this rank's part. Entries that score as the last one does are all taken."""
    masks = {}
    for layer in taken.layers:
        for name, scores in layer.items():
            whole, mine = full_tensor(scores).flatten(), to_local(scores)
            count = int(top * len(whole))
            last = torch.topk(whole, count).values[-1] if count else torch.inf
            masks[name] = (mine >= last) & (mine > 0)
    return masks


class _Sums(Protocol):
    def snip(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        """Adds |weight * gradient|; the gradient may be overwritten."""

    def fisher(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        """Adds gradient^2; the gradient may be overwritten."""

    def layers(self) -> Iterator[Layer]:
        """Hands the sums over, one layer at a time."""


class _InMemory:
    """Sums beside the weights, on their device."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}

    def snip(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        self._add(name, weight, gradient, _snip)

    def fisher(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        self._add(name, gradient, gradient, _fisher)

    def layers(self) -> Iterator[Layer]:
        for names in by_layer(list(self._sums)):
            yield {name: self._sums.pop(name) for name in names}

    def _add(self, name: str, factor: Tensor, gradient: Tensor, plain: Any) -> None:
        # Plain torch needs three temporaries of a gradient's size; the kernel reads and adds in one pass.
        if not (gradient.is_cuda or interpreted()):
            self._sums[name].add_(plain(factor, gradient))
            return
        from safepatch_core.kernels.importance import accumulate

        with torch.cuda.device(gradient.device) if gradient.is_cuda else nullcontext():
            accumulate(self._sums[name], factor.contiguous(), gradient.contiguous()).run()


class _OnDisk:
    """Sums in files that have no name and so vanish with the process; one for each layer.

    They are read and written, not mapped: a full disk is an error then and no signal, and what they hold is cache.
    """

    def __init__(self, parameters: Mapping[str, Tensor], folder: Path) -> None:
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._places: dict[str, tuple[Any, int]] = {}
        self._buffer = torch.empty(_PIECE)
        for names in by_layer(parameters):
            file: Any = tempfile.TemporaryFile(dir=folder)
            end = 0
            for name in names:
                self._places[name] = (file, end)
                end += 4 * self._shapes[name].numel()
            if end:
                os.posix_fallocate(file.fileno(), 0, end)

    def snip(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        self._add(name, _snip(weight, gradient))

    def fisher(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        self._add(name, _fisher(weight, gradient))

    def layers(self) -> Iterator[Layer]:
        for names in by_layer(list(self._places)):
            layer = {}
            for name in names:
                file, offset = self._places.pop(name)
                layer[name] = torch.empty(self._shapes[name])
                file.seek(offset)
                file.readinto(_bytes(layer[name]))
            file.close()
            yield layer

    def _add(self, name: str, term: Tensor) -> None:
        file, offset = self._places[name]
        for piece in torch.split(term.cpu().flatten(), _PIECE):
            total = self._buffer[: len(piece)]
            file.seek(offset)
            file.readinto(_bytes(total))
            total += piece
            file.seek(offset)
            file.write(_bytes(total))
            offset += total.nbytes


def _snip(weight: Tensor, gradient: Tensor) -> Tensor:
    return gradient.float().mul_(weight).abs_()


def _fisher(_: Tensor, gradient: Tensor) -> Tensor:
    return gradient.float().square_()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def _means(sums: _Sums, count: int, parameters: Mapping[str, Tensor], ranks: Ranks) -> Iterator[Layer]:
    for layer in sums.layers():
        for total in layer.values():
            total /= count
        faults = np.array([not bool(torch.isfinite(mean).all()) for mean in layer.values()], dtype=np.int64)
        ranks.total(faults)
        if faults.any():
            raise InputError("importance is not finite", tensor=list(layer)[int(faults.argmax())])
        yield {name: from_local(mean, parameters[name]) for name, mean in layer.items()}


@contextmanager
def _folded(parameters: Mapping[str, Tensor], sums: _Sums, kind: Kind) -> Iterator[None]:
    """Every gradient goes into the sums, and away, while the context lasts."""
    add = sums.snip if kind == "snip" else sums.fisher

    @torch.no_grad()
    def fold(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        add(name, to_local(parameter.detach()), to_local(gradient))

    hooked: Mapping[str, Any] = parameters
    hooks = [p.register_post_accumulate_grad_hook(partial(fold, name)) for name, p in hooked.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _recomputed(model: Any) -> Iterator[None]:
    """Layers forget their activations and make them again in the backward pass.

    transformers does so in training mode alone, where dropout is on too. Activations of one long row can outweigh a
    small model: of 512 tokens, SmolLM2-135M has 1.1 GB of them beside 1.0 GB of weights and sums. This way it is 0.2.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _spills(memory: Memory, parameters: Mapping[str, Tensor]) -> bool:
    if memory != "auto":
        return memory == "disk"
    needed = 4 * sum(parameter.numel() for parameter in parameters.values())
    devices = {parameter.device for parameter in parameters.values()}
    return needed > SHARE * sum(map(_free_memory, devices))


def _free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on a device; of the host's no more than a container is allowed, shared by the
    ranks that run there."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no container, or no limit
        used = dict(line.split() for line in (group / "memory.stat").read_text("ascii").splitlines())["anon"]
        free = min(free, int((group / "memory.max").read_text("ascii")) - int(used))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
