"""Full disks, limits on files and memory, directories that can't be written: one line is said, nothing is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.faults.harness import LONG, Bench, contents, restore, write_model, write_recipe


@contextmanager
def small_disk(at: Path, options: str) -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", at], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs can't be mounted here: {mounted.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", at], check=True)


@pytest.mark.parametrize("room", range(1, 12, 1 if LONG else 3))
def test_a_disk_without_room_for_more_files(bench: Bench, tmp_path: Path, room: int) -> None:
    """Real ENOSPC when the journal, the stage or the nth file is created."""
    with small_disk(tmp_path / "disk", f"size=8m,nr_inodes={room + 1}") as place:
        ended = bench.merge(place)
        assert ended.status in (73, 74) and "No space left on device" in ended.said(), ended.text
        assert not (place / "out").exists()
        subprocess.run(["mount", "-o", "remount,nr_inodes=64", place], check=True)
        bench.check_finished(place, bench.merge(place, "--resume"))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(bench: Bench, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=512k") as place:
        ended = bench.merge(place)
        assert ended.status == 74 and "no space for the output" in ended.said()
        assert "bytes" in ended.said() and os.listdir(place) == []


@pytest.mark.parametrize("left", [0, 4096, 20480] if LONG else [4096])
def test_a_disk_that_fills_up_meanwhile(bench: Bench, tmp_path: Path, left: int) -> None:
    """Another program takes the space after the merge has begun; the old output stays, and resuming finishes."""
    with small_disk(tmp_path / "disk", "size=8m") as place:
        restore_into(place, bench.old)
        filler = place / "filler"

        def fill() -> None:
            while not (place / ".out.safepatch").exists():
                time.sleep(0.0005)
            with open(filler, "wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(64 << 10))
            os.truncate(filler, max(filler.stat().st_size - left, 0))

        for _ in range(20):  # until the filler wins the race
            thread = threading.Thread(target=fill)
            thread.start()
            ended = bench.merge(place, "--force", chunk=64)
            thread.join()
            filler.unlink()
            if ended.status:
                break
            shutil.rmtree(place / "out")
            restore_into(place, bench.old)
        assert ended.status == 74, ended.text
        said = ended.said()
        assert "No space left on device" in said and "bytes are needed" in said and "--resume" in said
        assert contents(place / "out") == bench.old
        bench.check_finished(place, bench.merge(place, "--force", "--resume"))


def restore_into(place: Path, out: dict[str, bytes]) -> None:
    for name, data in out.items():
        (place / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "out" / name).write_bytes(data)


@pytest.mark.parametrize("size", [300, 4096, 9000])
def test_a_limit_on_file_sizes(bench: Bench, place: Path, size: int) -> None:
    """Python ignores SIGXFSZ, so that the limit comes as EFBIG; Linux reserves no space beyond it either."""
    restore(place, bench.old)
    ended = bench.merge(place, "--force", limits={"FSIZE": size})
    assert ended.status == 74, (ended.status, ended.text)
    assert "File too large" in ended.said() and "ulimit -f" in ended.said()
    assert contents(place / "out") == bench.old
    bench.check_finished(place, bench.merge(place, "--force", "--resume"))


def test_a_limit_on_open_files(bench: Bench, place: Path) -> None:
    for limit in range(4, 24, 2):
        restore(place, bench.old)
        ended = bench.merge(place, "--force", limits={"NOFILE": limit})
        if ended.status:
            assert ended.status in (64, 65, 73, 74) and "Too many open files" in ended.said(), ended.text
            assert contents(place / "out") == bench.old
            ended = bench.merge(place, "--force", "--resume")
        bench.check_finished(place, ended)


def test_too_little_memory_is_a_message(tmp_path: Path) -> None:
    """From the limit at which everything can just be imported to the one at which the merge succeeds."""
    for seed, name in enumerate(("base", "safety", "over-safety")):
        write_model(tmp_path / name, seed, rows=900, cols=800)
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "safepatch_core", "merge", str(recipe), "-o", str(out)]
    command += ["--backend", "cpu", "--threads", "1"]
    limit, said = 100 << 20, 0
    imports = "from safepatch_core import _engine; import safepatch_core.merging.api, safepatch_core.backends.cpu"
    imports += ", safepatch_core.commands.cli"
    while subprocess.run(
        ["prlimit", f"--as={limit}", sys.executable, "-c", imports], capture_output=True, env=env
    ).returncode:
        limit += 4 << 20
    while True:
        args = ["prlimit", f"--as={limit}", *command, "--quiet", "--resume"]
        ended = subprocess.run(args, capture_output=True, text=True, env=env, timeout=60)
        if ended.returncode == 0:
            break
        assert ended.returncode == 74 and "out of memory" in ended.stderr, (limit >> 20, ended.stderr)
        assert len(ended.stderr.splitlines()) == 1 and not out.exists()
        said += 1
        limit += (2 if LONG else 8) << 20
        assert limit < 2 << 30
    assert said > 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out", "over-safety", "recipe.yaml", "safety"]


def test_a_thread_without_memory_is_never_waited_for() -> None:
    """Whatever is left of the address space when the pipeline starts: it works, or says that memory lacks."""
    script = """
import os, resource, signal, sys
import numpy as np
from safepatch_core.merging.pipeline import Ring, run

seen = set()
for left in (*range(0, 20 << 20, 64 << 10), 256 << 20):
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        ring, done = Ring(np.zeros(64, np.uint8)), []
        used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + left, used + left))
        try:
            run([1], lambda unit: 8, lambda unit, region: unit, done.append, lambda unit: None, ring)
        except MemoryError:
            os._exit(2)
        os._exit(0 if done == [1] else 1)
    seen.add(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(sorted(seen))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert ended.stdout == "[0, 2]\n", ended.stdout + ended.stderr


def test_directories_that_cannot_be_written(bench: Bench, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=8m") as place:
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        ended = bench.merge(place)
        assert ended.status == 73 and "Read-only file system" in ended.said()
    for parent in ("/proc", "/dev/null/x"):
        ended = bench.merge(Path(parent))
        assert ended.status == 73 and "cannot create the output" in ended.said()


def test_a_disk_that_becomes_read_only(bench: Bench, tmp_path: Path) -> None:
    """What ext4 does after an error, in the middle of a merge."""
    with small_disk(tmp_path / "disk", "size=8m") as place:
        restore_into(place, bench.old)
        assert bench.merge(place, "--force", limits={"FSIZE": 9000}).status == 74
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        ended = bench.merge(place, "--force", "--resume")
        assert ended.status == 73 and "Read-only file system" in ended.said() and "--resume" in ended.said()
        subprocess.run(["mount", "-o", "remount,rw", place], check=True)
        assert contents(place / "out") == bench.old
        bench.check_finished(place, bench.merge(place, "--force", "--resume"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_a_directory_of_another_user(bench: Bench, place: Path) -> None:
    restore(place, bench.old)
    place.chmod(0o755)
    bench.root.chmod(0o755)
    script = (
        "import os, sys; os.setgid(65534); os.setuid(65534);"
        f"sys.argv = ['safepatch', 'merge', {str(bench.recipe)!r}, '-o', {str(place / 'out')!r}, '--force'];"
        "from safepatch_core.commands.cli import main; main()"
    )
    # Imported before the user changes: that user need not be able to read the installation.
    script = (
        "import difflib, safepatch_core.merging.api, safepatch_core.commands.cli, safepatch_core.backends.cpu;"
        + script
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 73 and "Permission denied" in ended.stderr, ended.stderr
    assert contents(place / "out") == bench.old and os.listdir(place) == ["out"]
