"""Several processes that do one merge: what they tell each other, through torch.distributed under torchrun.

Ranks own contiguous runs of tensors and write disjoint ranges of the same files on a shared filesystem. Only integer
histograms, tie counts and the finished files' names and sums travel.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from safepatch_core.errors import IOFailure, UsageError


class Ranks(Protocol):
    """The processes of one merge. Every rank makes the same calls in the same order."""

    rank: int
    size: int

    def total(self, counts: NDArray[np.int64]) -> None:
        """Replace `counts` by its sum over all ranks."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank. Also a barrier."""

    def close(self) -> None:
        """Leave the group: an interpreter that ends within one is aborted by its threads."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def total(self, counts: NDArray[np.int64]) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def close(self) -> None:
        pass


class TorchRanks:
    """The processes that torchrun started. Counts live on the host, so the group is gloo whatever the GPUs use."""

    def __init__(self) -> None:
        try:
            import torch.distributed as dist
        except ImportError:
            raise UsageError("several ranks need torch", expected="pip install 'safepatch[triton]'") from None
        self._dist = dist
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        self._group = dist.new_group(backend="gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def total(self, counts: NDArray[np.int64]) -> None:
        import torch

        try:
            self._dist.all_reduce(torch.from_numpy(counts), group=self._group)
        except RuntimeError as error:
            raise self._lost(error) from None

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        try:
            self._dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise self._lost(error) from None
        return values

    def close(self) -> None:
        self._dist.destroy_process_group()

    def _lost(self, error: RuntimeError) -> IOFailure:
        return IOFailure(f"rank {self.rank}: another rank is gone ({str(error).splitlines()[0]}); --resume goes on")


def ranks_of_this_run() -> Ranks:
    """The ranks that torchrun set up, or a single one."""
    return TorchRanks() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Alone()
