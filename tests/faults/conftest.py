"""Fixtures of the fault tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Bench, Server, build_shim, make_bench, memory_directory


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="session")
def run(shim: Path) -> Iterator[Server]:
    server = Server(shim)
    yield server
    server.close()


@pytest.fixture(scope="session")
def bench(run: Server) -> Iterator[Bench]:
    with memory_directory() as folder:
        yield make_bench(folder, run)


@pytest.fixture
def place(bench: Bench) -> Path:
    """An empty directory beside the inputs of the bench."""
    folder = bench.root / "place"
    folder.mkdir(exist_ok=True)
    return folder
