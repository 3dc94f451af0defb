"""Inputs that change while they are read, and runs that meet on one output."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from safepatch_core import merge
from safepatch_core.errors import Busy, InputError, IOFailure
from tests.faults.harness import KILL, LONG, STEM, Bench, contents, fault, restore


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def truncate_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-7, os.SEEK_END)
        file.write(b"changed")


def replace(path: Path) -> None:
    shutil.copyfile(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def remove(path: Path) -> None:
    path.unlink()


@pytest.fixture
def inputs(bench: Bench) -> Iterator[Path]:
    """A copy of the inputs, and a place to write to."""
    folder = bench.root / "copy"
    for name in ("base", "safety", "over-safety"):
        shutil.copytree(bench.root / name, folder / name)
    shutil.copyfile(bench.recipe, folder / "recipe.yaml")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("change", [truncate, truncate_to_nothing, overwrite, replace, remove])
@pytest.mark.parametrize("victim", [f"base/{STEM.format(3)}", f"safety/{STEM.format(2)}", "base/tokenizer.json"])
@pytest.mark.parametrize("when", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("past_cache", [False, True], ids=["through the cache", "past it"])
def test_an_input_that_changes_is_named(
    inputs: Path,
    change: Callable[[Path], None],
    victim: str,
    when: float,
    past_cache: bool,
    request: pytest.FixtureRequest,
) -> None:
    """At some share of the bytes read, from within the progress callback."""
    changed = False
    if past_cache:
        request.getfixturevalue("read_past_cache")

    def progress(done: int, total: int) -> None:
        nonlocal changed
        if not changed and done >= when * total:
            changed = True
            if victim.endswith(".json") and change is truncate:
                truncate_to_nothing(inputs / victim)
            else:
                change(inputs / victim)

    with pytest.raises(IOFailure) as caught:
        try:
            merge(inputs / "recipe.yaml", inputs / "out", backend="cpu", threads=1, progress=progress)
        except FileNotFoundError as error:  # the command line says the same of it
            assert change is remove and str(error.filename).endswith(victim)
            raise IOFailure("gone", file=error.filename) from None
    assert caught.value.status == 74 and str(caught.value.file).endswith(victim), caught.value
    assert not (inputs / "out").exists()


def test_resuming_with_another_input_is_refused(bench: Bench, inputs: Path) -> None:
    place = restore(inputs / "place", None).parent
    args = ("merge", inputs / "recipe.yaml", "-o", place / "out", "--backend", "cpu")
    for victim in (f"base/{STEM.format(1)}", f"over-safety/{STEM.format(3)}", "base/config.json"):
        assert bench.run(*args, fault=fault(place, 60, KILL)).status == -9
        overwrite(inputs / victim)
        ended = bench.run(*args, "--resume")
        assert ended.status == 65 and "another input" in ended.said()
        assert (place / ".out.safepatch").is_dir(), "the interrupted run is kept"


def test_two_runs_on_one_output(bench: Bench, place: Path) -> None:
    """Many at once: one finishes, the others are told, and the output is whole."""
    restore(place, None)
    outcomes: list[object] = []

    def run() -> None:
        try:
            outcomes.append(merge(bench.recipe, place / "out", backend="reference"))
        except (Busy, InputError) as error:
            outcomes.append(error)

    for _ in range(20 if LONG else 4):
        outcomes.clear()
        restore(place, None)
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        busy = [e for e in outcomes if isinstance(e, Busy)]
        late = [e for e in outcomes if isinstance(e, InputError)]
        assert all("not empty" in str(e) for e in late)
        assert len(outcomes) == 4 and len(busy) + len(late) == 3
        assert contents(place / "out") == bench.new and os.listdir(place) == ["out"]


def test_the_second_process_exits_75(bench: Bench, place: Path) -> None:
    restore(place, None)
    codes: list[int] = []
    started, go_on = threading.Event(), threading.Event()

    def progress(done: int, total: int) -> None:
        started.set()
        go_on.wait(20)

    first = threading.Thread(
        target=lambda: merge(bench.recipe, place / "out", backend="cpu", threads=1, progress=progress)
    )
    first.start()
    started.wait(20)
    for options in ([], ["--resume"], ["--force"], ["--resume", "--force"]):
        ended = bench.merge(place, *options)
        codes.append(ended.status)
        assert "another run is writing this output" in ended.said()
    go_on.set()
    first.join()
    assert codes == [75] * 4
    assert contents(place / "out") == bench.new and os.listdir(place) == ["out"]


def test_a_dead_run_frees_its_lock(bench: Bench, place: Path) -> None:
    restore(place, None)
    assert bench.merge(place, fault=fault(place, 30, KILL)).status == -9
    assert any(name.endswith("-lock") for name in os.listdir(place))
    begin = time.perf_counter()
    bench.check_finished(place, bench.merge(place))
    assert time.perf_counter() - begin < 10


def test_a_directory_that_fills_meanwhile_is_not_replaced(bench: Bench, place: Path) -> None:
    """Without --force nothing that another program put there is taken away."""
    out = restore(place, None)
    out.mkdir()

    def progress(done: int, total: int) -> None:
        (out / "theirs").write_text("theirs")

    with pytest.raises(IOFailure, match="not empty"):
        merge(bench.recipe, out, backend="cpu", threads=1, progress=progress)
    assert contents(out) == {"theirs": b"theirs"}
    bench.check_finished(place, bench.merge(place, "--resume", "--force"))
