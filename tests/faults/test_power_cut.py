"""The power goes out: a filesystem image, copied while nothing but fsync has reached it, holds old or new, complete.

The image is mounted with all that ext4 offers to lose data that was not synced, and copied under the mounted
filesystem: what its page cache had not written yet is not in the copy, as after a power cut.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.harness import KILL, LONG, Bench, contents, fault

IMAGES = 20 if LONG else 4
HARSH = "loop,noauto_da_alloc,data=writeback,commit=300"


@contextmanager
def mounted(image: Path, at: Path, options: str = "loop") -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    ended = subprocess.run(["mount", "-t", "ext4", "-o", options, image, at], capture_output=True, text=True)
    if ended.returncode:
        pytest.skip(f"a filesystem image can't be mounted here: {ended.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", at], check=True)


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty ext4 image."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not here")
    image = tmp_path_factory.mktemp("image") / "blank"
    with open(image, "wb") as file:
        file.truncate(24 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", "has_journal", "-J", "size=4", image], check=True)
    return image


def start_from(blank: Path, bench: Bench, image: Path, old: bool) -> None:
    """An image that holds the older output, safely on its disk, or nothing."""
    shutil.copyfile(blank, image)
    with mounted(image, image.with_suffix(".at")) as disk:
        (disk / "place").mkdir()
        for name, data in bench.old.items() if old else ():
            (disk / "place" / "out" / name).parent.mkdir(parents=True, exist_ok=True)
            (disk / "place" / "out" / name).write_bytes(data)
    # Unmounted: all is written.


def test_an_unsynced_file_is_lost(blank: Path, tmp_path: Path) -> None:
    """The images do lose what was not synced: else the tests below would show nothing."""
    shutil.copyfile(blank, tmp_path / "disk")
    with mounted(tmp_path / "disk", tmp_path / "at", HARSH) as disk:
        (disk / "unsynced").write_bytes(b"x" * 100_000)
        shutil.copyfile(tmp_path / "disk", tmp_path / "after")
    with mounted(tmp_path / "after", tmp_path / "at") as disk:
        assert not (disk / "unsynced").exists() or (disk / "unsynced").stat().st_size == 0


@pytest.mark.parametrize("old", [True, False], ids=["over an older output", "into nothing"])
@pytest.mark.parametrize("past_cache", [False, True], ids=["through the cache", "past it"])
def test_power_cut_at_success(blank: Path, bench: Bench, tmp_path: Path, old: bool, past_cache: bool) -> None:
    bench = replace(bench, past_cache=past_cache)
    for i in range(IMAGES // 2):
        image, after = tmp_path / "disk", tmp_path / "after"
        start_from(blank, bench, image, old)
        deep = "" if old else f"new/{i}"  # directories that the merge itself has to create
        with mounted(image, tmp_path / "at", HARSH) as disk:
            place = disk / "place" / deep
            ended = bench.merge(place, "--force")
            shutil.copyfile(image, after)
            assert ended.status == 0, ended.text
        with mounted(after, tmp_path / "at") as disk:
            assert contents(disk / "place" / deep / "out") == bench.new
            sums = ["sha256sum", "--quiet", "-c", "SHA256SUMS"]
            subprocess.run(sums, cwd=disk / "place" / deep / "out", check=True)


@pytest.mark.parametrize("old", [True, False], ids=["over an older output", "into nothing"])
@pytest.mark.parametrize("past_cache", [False, True], ids=["through the cache", "past it"])
def test_power_cut_at_any_call(
    blank: Path, bench: Bench, place: Path, tmp_path: Path, old: bool, past_cache: bool
) -> None:
    bench = replace(bench, past_cache=past_cache)
    calls = bench.calls(place, old)
    for n in range(2, len(calls) + 1) if LONG else random.Random(1).sample(range(2, len(calls) + 1), 4):
        image, after = tmp_path / "disk", tmp_path / "after"
        start_from(blank, bench, image, old)
        with mounted(image, tmp_path / "at", HARSH) as disk:
            ended = bench.merge(disk / "place", "--force", fault=fault(disk / "place", n, KILL))
            shutil.copyfile(image, after)
            assert ended.status == -9
        with mounted(after, tmp_path / "at") as disk:
            bench.check_output(disk / "place", old)
            bench.check_finished(disk / "place", bench.merge(disk / "place", "--force", "--resume"))
