"""The ranks of a derive run: the shards that each holds of the model, and full tensors made of them.

Under torchrun or accelerate launch the ranks train one model. torch's FSDP2 shards its weights, gradients and moments
along their first dimension: a rank holds a shard of every tensor, and the full weights of one layer while it is at
work (of the embeddings and the head, while the model is). With one process nothing is sharded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from safepatch_core.deriving.config import DeriveConfig
from safepatch_core.errors import Busy, InputError, OutputError, UsageError
from safepatch_core.language.model import find_device
from safepatch_core.ranks import Alone, Ranks, TorchRanks, launched

T = TypeVar("T")

# The first rank alone reads and writes models, which takes long for large ones.
PATIENCE = timedelta(days=1)


@contextmanager
def ranks_of_derive(config: DeriveConfig) -> Iterator[Ranks]:
    """The run's processes while the context lasts; each with a GPU of its own, cuda:LOCAL_RANK, if they are on GPUs.

    Raises UsageError for what several ranks can't do, and IOFailure if one of them is lost.
    """
    if launched() == 1:
        yield Alone()
        return
    try:
        on_gpus = _device(config).type == "cuda"
        # Tensors travel between GPUs, what ranks tell each other from host to host.
        ranks = TorchRanks("cpu:gloo,cuda:nccl" if on_gpus else "gloo", PATIENCE)
        with closing(ranks):
            try:
                yield ranks
            except RuntimeError as error:
                if isinstance(error, dist.DistError) or "gloo" in str(error):
                    raise ranks.lost(error) from error
                raise
    except (UsageError, InputError, OutputError, Busy) as error:
        error.shared = True  # all ranks are given the same, and decide alike
        raise


def _device(config: DeriveConfig) -> torch.device:
    if config.quantization != "none":
        raise UsageError(
            "a quantised backbone can't be sharded over ranks", expected="quantization none or one process"
        )
    device = find_device(config.device)
    if device.type == "cuda":
        if device.index is not None:
            raise UsageError("every rank takes a GPU of its own", found=f"device {config.device}", expected="cuda")
        own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(find_device(own))
    return device


def shard_model(model: Any, ranks: Ranks, device: torch.device) -> Any:
    """The model with its tensors sharded over the ranks, on their devices, in place.

    Args:
        model: on the first rank it is full, in host memory, which it leaves tensor by tensor; on the others it is on
            the meta device. Which parameters are trainable is the same on all.
        ranks: every rank calls this.
        device: of this rank's shards.
    """
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    built = ranks.gather([(name, tensor.shape, tensor.dtype) for name, tensor in held.items()])
    assert all(other == built[0] for other in built), "ranks would wait for each other's tensors"
    empty: dict[int, nn.Parameter] = {}  # one for each, so that what was tied stays so
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                shape = torch.empty_like(parameter, device="meta")
                made = empty.setdefault(id(parameter), nn.Parameter(shape, requires_grad=parameter.requires_grad))
                module._parameters[name] = made
    mesh = init_device_mesh(device.type, (ranks.size,))
    # Gradients in bfloat16 are added up in float32, and rounded once.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for module in (*_layers(model), model):
        # The head stays in the model's own group, whose weights are whole whenever objective.py reads them.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    model._apply(lambda tensor: torch.empty_like(tensor, device=device))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            full = held.pop(name)
            full = full.to(device) if ranks.rank == 0 else torch.empty_like(full, device=device)
            to_local(parameter).copy_(to_local(distribute_tensor(full, mesh, parameter.placements)))
        for name, buffer in model.named_buffers():
            if ranks.rank == 0:
                buffer.copy_(held.pop(name))
            dist.broadcast(buffer, 0)
    return model


def to_local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor; of one that isn't sharded, all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of which each rank holds a shard. Every rank calls it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def from_local(part: Tensor, parameter: Tensor) -> Tensor:
    """The tensor that is sharded over the ranks as `parameter` is, and of which this rank has the shard `part`."""
    if not isinstance(parameter, DTensor):
        return part
    mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
    return DTensor.from_local(part.to(parameter.device), mesh, parameter.placements, shape=shape, stride=stride)


def all_reduce(tensor: Tensor, ranks: Ranks) -> None:
    """Replaces `tensor` by its sum over the ranks."""
    if ranks.size > 1:
        dist.all_reduce(tensor)


def shard_rows(rows: Sequence[T], ranks: Ranks) -> Sequence[T]:
    """This rank's share of the rows; it may be empty."""
    return rows[ranks.rank :: ranks.size]


def _layers(model: Any) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
