"""What tests of several files ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from safepatch_core.files import direct


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread: the order of sums, and so their last bits, depends on how many there are."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def read_past_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every range of an input is read past the page cache, as long ones are that are not in it."""
    monkeypatch.setattr(direct, "DIRECT_READ", 0)
    monkeypatch.setattr(direct, "cached", lambda fd, at, nbytes: 0)
