"""Several processes that do one merge or derive: what they tell each other, through torch.distributed under torchrun.

Ranks of a merge own contiguous runs of tensors and write disjoint ranges of the same files on a shared filesystem.
Only integer histograms, tie counts and the finished files' names and sums travel. Those of a derive also share a
model: `deriving/sharding.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from safepatch_core.errors import IOFailure, SafepatchError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray  # the command line asks here, and starts without numpy

T = TypeVar("T")
E = TypeVar("E", bound=SafepatchError)


class Ranks(Protocol):
    """The processes of one run. Every rank makes the same calls in the same order."""

    rank: int
    size: int

    def total(self, counts: NDArray[Any]) -> None:
        """Replace `counts` by its sum over all ranks."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank. Also a barrier."""

    def close(self) -> None:
        """Leave the group: an interpreter that ends within one is aborted by its threads. A program's own is kept."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def total(self, counts: NDArray[Any]) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def close(self) -> None:
        pass


class TorchRanks:
    """The processes that torchrun started. Counts live on the host, so their group is gloo whatever the GPUs use.

    `backend` is of the default group, which tensors travel through; a rank waits for the others no longer than
    `patience`.
    """

    def __init__(self, backend: str = "gloo", patience: timedelta | None = None) -> None:
        try:
            import torch.distributed as dist
        except ImportError:
            raise UsageError("several ranks need torch", expected="pip install 'safepatch[triton]'") from None
        self._dist = dist
        self._founded = not dist.is_initialized()
        if self._founded:
            dist.init_process_group(backend, timeout=patience)
        self._group = dist.new_group(backend="gloo", timeout=patience)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def total(self, counts: NDArray[Any]) -> None:
        import torch

        try:
            self._dist.all_reduce(torch.from_numpy(counts), group=self._group)
        except RuntimeError as error:
            raise self.lost(error) from None

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        try:
            self._dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise self.lost(error) from None
        return values

    def close(self) -> None:
        self._dist.destroy_process_group(None if self._founded else self._group)

    def lost(self, error: RuntimeError) -> IOFailure:
        """What a failed call of torch.distributed means. The first rank says so; if it is gone, its launcher does."""
        reason = str(error).splitlines()[0].partition(". ")[0]
        return _shared(IOFailure(f"rank {self.rank}: another rank is gone ({reason}); --resume goes on"))


def ranks_of_this_run() -> Ranks:
    """The ranks that torchrun set up, or a single one."""
    return TorchRanks() if launched() > 1 else Alone()


def launched() -> int:
    """How many processes torchrun, or a launcher that sets what it sets, has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process tells what all ranks of its run know: it is the first of them, or the only one."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"


def together(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work` gives this rank. Where it fails on any, every rank raises the first one's error."""
    try:
        result, error = work(), None
    except SafepatchError as failure:
        error = failure
    for failed in ranks.gather(error):
        if failed is not None:
            raise _shared(failed)
    return result


def first(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work` gives the first rank, which alone does it; every rank raises what it raises there."""
    done = together(ranks, work if ranks.rank == 0 else lambda: None)
    result: T = ranks.gather(done)[0]
    return result


def _shared(error: E) -> E:
    error.shared = True
    return error
