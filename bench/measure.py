"""How things are measured: whole processes, alternating, on files that are in memory or that are not."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
ISOLATED = [sys.executable, "-I", "-S"]
Cache = Literal["warm", "cold"]
PINNED_SHARE = 0.7  # of the memory that is free may be locked or dirtied by a run


class Skipped(Exception):
    """A case can't run here; the text says why."""


class Red(Exception):
    """A correctness gate has failed; the text says where. No figure of the case may be shown."""


class Cost(NamedTuple):
    """What one process took. Seconds and bytes; `read_bytes` are those of read calls, not of mapped files."""

    wall_s: float
    cpu_s: float
    system_s: float
    peak_bytes: int  # resident, mapped files included
    private_bytes: int  # resident without mapped files, sampled 20 times a second
    read_bytes: int
    written_bytes: int
    disk_read_bytes: int
    disk_written_bytes: int


class Failed(Exception):
    """A measured command ended with an error or ran out of time."""

    def __init__(self, command: Sequence[str], status: int, output: str, timed_out: bool) -> None:
        lines = output.strip().splitlines() or ["no output"]
        how = "ran out of time" if timed_out else f"ended with {status}"
        super().__init__(f"{Path(command[0]).name} {how}: {lines[-1][:300]}")
        self.status, self.output, self.timed_out = status, output, timed_out


def run(
    command: Sequence[str | os.PathLike[str]], *, timeout: float = 7200, env: Mapping[str, str] | None = None
) -> tuple[Cost, str]:
    """Run a command to its end; what it cost, and its standard output. Raises Failed."""
    words = [os.fspath(word) for word in command]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "cost"
        done = subprocess.run(
            [*ISOLATED, HERE / "launch.py", result, str(timeout), *words],
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, **(env or {})},
        )
        if not result.exists():
            raise Failed(words, done.returncode, done.stderr, False)
        cost = json.loads(result.read_text())
    status, timed_out = cost.pop("status"), cost.pop("timed_out")
    if status:
        raise Failed(words, status, done.stderr or done.stdout, timed_out)
    return Cost(**cost), done.stdout


def safepatch(*words: str | os.PathLike[str]) -> list[str]:
    """The command line of this very safepatch."""
    return [sys.executable, "-m", "safepatch_core", *(os.fspath(word) for word in words)]


def drop(files: Sequence[Path]) -> None:
    """Take files out of the page cache."""
    for path in files:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def resident(files: Sequence[Path]) -> float:
    """The share of the files' pages that is in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    pages = present = 0
    for path in files:
        size = path.stat().st_size
        if not size:
            continue
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        os.close(fd)
        count = -(-size // mmap.PAGESIZE)
        found = np.zeros(count, np.uint8)
        if address in (None, ctypes.c_void_p(-1).value) or libc.mincore(address, size, found.ctypes.data):
            raise OSError(ctypes.get_errno(), f"mincore of {path}")
        libc.munmap(address, size)
        pages, present = pages + count, present + int(np.count_nonzero(found & 1))
    return present / pages if pages else 1.0


def free_memory() -> int:
    """Bytes that programs may still take."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE


@contextmanager
def prepared(files: Sequence[Path], cache: Cache, spare: int) -> Iterator[Callable[[], None]]:
    """Yields what to call before each run so that `files` are in memory, or are not, as `cache` says.

    spare: bytes that a run writes and that must fit beside warm files. Raises Skipped where they don't.
    """
    if cache == "cold":

        def out() -> None:
            drop(files)
            if (share := resident(files)) > 0.01:
                raise Skipped(f"{share:.0%} of the inputs stay in the page cache")

        yield out
        return
    needed = sum(path.stat().st_size for path in files) + spare
    if needed > PINNED_SHARE * free_memory():
        raise Skipped(f"{needed / 1e9:.1f} GB of inputs and output don't fit in memory for a warm run")
    holder = subprocess.Popen(
        [*ISOLATED, HERE / "pin.py", *files], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        pinned = holder.stdout.readline().strip() == "pinned"

        def again() -> None:
            for path in () if pinned else files:
                with open(path, "rb", buffering=0) as file:
                    while file.read(1 << 22):
                        pass

        yield again
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()


def remove(path: Path) -> None:
    """Delete a file or a directory that may not be there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


Series = dict[str, dict[str, list[float]]]  # subject → quantity → one value per round


def alternate(
    subjects: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int, before: Callable[[], None] = lambda: None
) -> Series:
    """Run every subject in turn, `rounds` times over, so that a slow minute meets them all."""
    series: Series = {name: {} for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            before()
            for quantity, value in subject().items():
                series[name].setdefault(quantity, []).append(value)
    return series


class Spread(NamedTuple):
    """A median with the lowest and the highest value."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The spread of paired quotients."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])
