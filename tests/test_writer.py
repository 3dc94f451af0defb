"""Outputs appear complete, by one rename, or not at all; what was interrupted can be resumed."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest

from safepatch_core.backends.contract import PatchReport, Report
from safepatch_core.errors import Busy, InputError, IOFailure, OutputError, Stopped
from safepatch_core.files.reading import TensorEntry
from safepatch_core.files.records import RunIdentity
from safepatch_core.files.staging import Journal, Staging
from safepatch_core.merging.layout import OutputFile, OutputPart
from safepatch_core.merging.sink import CheckpointSink

IDENTITY = {"recipe": "r", "input": "i", "seed": "0", "version": "1"}


def stage(
    out: Path, *, inputs: list[Path] | None = None, needed: int = 0, force: bool = False, resume: bool = False
) -> Staging:
    return Staging(out, inputs or [], RunIdentity(IDENTITY), needed=needed, force=force, resume=resume)


def write_all(staging: Staging, files: Mapping[str, bytes], stop_before: str | None = None) -> None:
    with staging:
        sink = CheckpointSink(staging)
        for name, data in files.items():
            if name == stop_before:
                raise Stopped("stopped")
            counts = {name: Report([PatchReport(3, 2, 1)])}
            if sink.begin(OutputPart(OutputFile(name, data, ()), (), 0, len(data)), counts):
                sink.write(memoryview(data))
                sink.end()
        assert sink.counts.keys() == files.keys()
        staging.publish()


FILES = {f"s{i}.safetensors": os.urandom(5000 + i) for i in range(3)}


def around(out: Path) -> list[str]:
    """Everything beside the output that a run may have left."""
    return sorted(p.name for p in out.parent.iterdir() if p != out)


def test_publishes_everything_and_leaves_nothing_beside(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    write_all(stage(out), FILES)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.name != "SHA256SUMS"} == FILES
    assert around(out) == []
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=out, check=True)


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_all(stage(tmp_path / "out"), FILES)
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "SHA256SUMS").stat().st_mode & 0o777 == 0o640


def test_an_interrupted_run_publishes_nothing_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        write_all(stage(out), FILES, stop_before="s2.safetensors")
    assert not out.exists()
    resumed = stage(out, resume=True)
    assert sorted(resumed.finished) == ["s0.safetensors", "s1.safetensors"]
    write_all(resumed, FILES)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.name != "SHA256SUMS"} == FILES
    assert around(out) == []


def test_resume_redoes_what_the_journal_or_the_file_contradicts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        write_all(stage(out), FILES, stop_before="s2.safetensors")
    damaged = tmp_path / ".out.safepatch" / "s0.safetensors"
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])
    with open(tmp_path / ".out.safepatch-journal-0", "ab") as file:
        file.write(b'00000000 {"file": "s2.safetensors"')
    resumed = stage(out, resume=True)
    assert sorted(resumed.finished) == ["s1.safetensors"]
    write_all(resumed, FILES)
    assert (out / "s0.safetensors").read_bytes() == FILES["s0.safetensors"]


@pytest.mark.parametrize("key", list(IDENTITY))
def test_resume_refuses_another_run_and_says_what_differs(tmp_path: Path, key: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        write_all(stage(out), FILES, stop_before="s1.safetensors")
    with pytest.raises(InputError, match=f"another {key}"):
        Staging(out, [], RunIdentity({**IDENTITY, key: "other"}), needed=0, resume=True)


class Shard:
    """One file of three small tensors and an empty one, written tensor by tensor."""

    def __init__(self, sparse: bool = False) -> None:
        self.data = {"a": os.urandom(90_000), "none": b"", "b": bytes(70_000), "c": os.urandom(5_000)}
        self.tensors = tuple(
            TensorEntry(name, "U8", (len(data),), Path("base"), "base", 0, len(data))
            for name, data in self.data.items()
        )
        self.output = OutputFile("model.safetensors", b"the header", self.tensors, sparse)
        self.whole = self.output.header + b"".join(self.data.values())

    def write(self, staging: Staging, stop_before: str | None = None, mark_bytes: int = 1) -> list[str]:
        """The tensors that had to be written; `none` is a target, and has its counts from the start."""
        with staging, closing(CheckpointSink(staging, mark_bytes=mark_bytes)) as sink:
            expected = {
                name: Report([PatchReport(len(data), 2, 1)], acted=2, changed=1) for name, data in self.data.items()
            }
            counts = {"none": expected["none"]}
            left = sink.begin(OutputPart(self.output, self.tensors, 0, self.output.size), counts)
            assert left is not None
            if left.lo == 0:
                sink.write(memoryview(self.output.header))
            for tensor in left.tensors:
                if tensor.name == stop_before:
                    raise Stopped("stopped")
                counts[tensor.name] = expected[tensor.name]
                sink.write(memoryview(self.data[tensor.name]))
            sink.end()
            assert sink.counts == expected
            staging.publish()
        return [tensor.name for tensor in left.tensors]


@pytest.mark.parametrize("sparse", [False, True], ids=["reserved", "sparse"])
def test_a_stopped_file_goes_on_behind_its_last_mark(tmp_path: Path, sparse: bool) -> None:
    """Nothing behind a mark is believed, and nothing before it that is not as it was."""
    shard, part = Shard(sparse), tmp_path / ".out.safepatch" / "model.safetensors.part"
    for stop_before, damaged, expected in (
        ("c", None, ["c"]),
        ("c", 100_000, ["b", "c"]),
        ("c", 5, ["a", "none", "b", "c"]),
        ("b", 120_000, ["b", "c"]),
    ):
        out = tmp_path / "out"
        with pytest.raises(Stopped):
            shard.write(stage(out, force=True), stop_before)
        with open(part, "r+b") as file:
            if damaged is not None:
                file.seek(damaged)
                file.write(b"damage")
            file.seek(len(shard.whole) - 3000)
            file.write(b"x" * 5000)
        assert shard.write(stage(out, resume=True, force=True)) == expected
        assert (out / "model.safetensors").read_bytes() == shard.whole
        assert around(out) == []


def test_a_mark_survives_another_stop_and_a_lost_file_does_not_matter(tmp_path: Path) -> None:
    shard, out = Shard(), tmp_path / "out"
    for stop_before in ("b", "b", "c", "c"):
        with pytest.raises(Stopped):
            shard.write(stage(out, resume=True), stop_before)
    with pytest.raises(Stopped):
        shard.write(stage(out, resume=True), "c", mark_bytes=1 << 30)
    part = tmp_path / ".out.safepatch" / "model.safetensors.part"
    part.rename(part.with_suffix(""))  # killed before its line was in the journal
    with pytest.raises(Stopped):
        shard.write(stage(out, resume=True), "c")
    part.unlink()
    assert shard.write(stage(out, resume=True)) == ["a", "none", "b", "c"]
    assert (out / "model.safetensors").read_bytes() == shard.whole


def test_a_run_that_ended_while_it_tidied_up_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal is gone and the lock file is not: `--resume` says so, of the same run only."""
    out, lock = tmp_path / "out", tmp_path / ".out.safepatch-lock"

    def stop(staging: Staging) -> None:
        discard(staging)
        raise Stopped("stopped")

    discard = Staging.discard
    staging = stage(out)
    monkeypatch.setattr(staging, "discard", lambda: stop(staging))
    with pytest.raises(Stopped):
        write_all(staging, FILES)
    assert around(out) == [lock.name]
    left = lock.read_bytes()
    with pytest.raises(InputError, match="not empty"):
        Staging(out, [], RunIdentity({**IDENTITY, "seed": "other"}), needed=0, resume=True)
    lock.write_bytes(left)
    with pytest.raises(InputError, match="not empty"):
        stage(out)
    lock.write_bytes(left)
    write_all(stage(out, resume=True), FILES)
    assert around(out) == []
    lock.write_bytes(left)
    (out / "s1.safetensors").write_bytes(b"\0")
    with pytest.raises(InputError, match="not empty"):
        stage(out, resume=True)


def test_without_resume_a_stale_stage_is_dropped(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        write_all(stage(out), {"old.safetensors": b"x" * 20, **FILES}, stop_before="s1.safetensors")
    write_all(stage(out), FILES)
    assert not (out / "old.safetensors").exists()


def test_a_refused_run_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError), stage(tmp_path / "out") as staging:
        staging.add("a", b"data")
        raise InputError("bad data")
    assert list(tmp_path.iterdir()) == []


def test_force_exchanges_and_an_old_output_survives_a_failure(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(InputError, match="--force"):
        stage(out)
    with pytest.raises(Stopped):
        write_all(stage(out, force=True), FILES, stop_before="s2.safetensors")
    assert [p.name for p in out.iterdir()] == ["old"]
    write_all(stage(out, force=True), FILES)
    assert not (out / "old").exists() and (out / "s0.safetensors").exists()
    assert around(out) == []


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_all(stage(tmp_path / "out"), FILES)
    assert (tmp_path / "out" / "s0.safetensors").exists()


def test_outputs_that_touch_inputs_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    (base / "model.safetensors").write_bytes(b"weights")
    inputs = [base, base / "model.safetensors"]
    for out in (base, base / "inside", tmp_path / "models", base / "model.safetensors"):
        with pytest.raises(InputError, match="overlaps an input"):
            stage(out, inputs=inputs, force=True)
    out = tmp_path / "out"
    out.mkdir()
    os.link(base / "model.safetensors", out / "linked.safetensors")
    with pytest.raises(InputError, match="hard-linked"):
        stage(out, inputs=inputs, force=True)
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(InputError, match="symlink"):
        stage(tmp_path / "link", force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="not a directory"):
        stage(tmp_path / "file", force=True)
    assert (base / "model.safetensors").read_bytes() == b"weights"


def test_a_second_run_is_told_that_the_output_is_busy_and_a_dead_one_frees_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with stage(out) as first:
        with pytest.raises(Busy):
            stage(out)
        first.add("a", b"data")
        first.publish()
    (tmp_path / ".out.safepatch-lock").touch()  # what a killed run leaves
    with stage(out, force=True):
        pass


def test_no_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(IOFailure, match="no space"):
        stage(tmp_path / "out", needed=1 << 60)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_says_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(IOFailure, match="1234 bytes are needed.*--resume"), stage(tmp_path / "out", needed=1234) as s:
        s.add("a", b"data")


def test_an_output_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        stage(tmp_path / "file" / "out")


def test_journal_ignores_a_torn_or_damaged_tail(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    assert journal.read() == []
    journal.rewrite([{"a": 1}])
    journal.append({"b": 2})
    assert journal.read() == [{"a": 1}, {"b": 2}]
    whole = journal.path.read_bytes()
    for end in range(len(whole)):
        journal.path.write_bytes(whole[:end])
        assert journal.read() in ([], [{"a": 1}])
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        journal.path.write_bytes(flipped)
        assert journal.read() in ([], [{"a": 1}])
