"""Fixes applied and taken out, as a copy and in place: bits, refusals, stacks, ledger, sums."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from safepatch_core import merge, verify
from safepatch_core.commands.cli import cli
from safepatch_core.errors import Busy, InputError, IOFailure, OutputError, SafepatchError, UsageError
from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.files.disk import hold
from safepatch_core.files.filenames import BUSY, KEPT, LEDGER
from safepatch_core.fixes.apply import apply, revert
from safepatch_core.fixes.build import build
from safepatch_core.fixes.reading import open_fix
from safepatch_core.merging.recipe import load_recipe
from tests import fix_oracle
from tests.faults.harness import contents
from tests.fix_cases import STEM, changed, random_tensor, save_aligned, write_checkpoint, write_fix
from tests.oracle import Tensor, load_checkpoint, save_file
from tests.recipes import write_working

Table = dict[str, Tensor]


def table(rng: np.random.Generator) -> Table:
    return {
        "a.weight": random_tensor(rng, "F32", 300, 300),
        "b.weight": random_tensor(rng, "BF16", 300, 300),
        "c.norm": random_tensor(rng, "BF16", 300),
        "d.weight": random_tensor(rng, "F8_E4M3", 200, 100),
    }


def moved(rng: np.random.Generator, base: Table, *names: str, where: Any = 0.05) -> Table:
    return {n: changed(rng, t, where, "small") if n in names else t for n, t in base.items()}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


class Case:
    """A base and a stack of two fixes on it, which touch other entries."""

    def __init__(self, root: Path, rng: np.random.Generator) -> None:
        self.root = root
        self.base = table(rng)
        even, odd = np.arange(0, 90000, 20), np.arange(1, 90000, 20)
        self.one = moved(rng, self.base, "a.weight", "b.weight", where=even)
        self.two = moved(rng, self.one, "b.weight", where=odd)
        self.only_two = {**self.base, "b.weight": self.merged("b.weight", odd)}
        self.ckpt = write_checkpoint(root / "ckpt", self.base)
        self.fix1 = write_fix(root / "one.safetensors", self.base, self.one, {"seed": 1})
        self.fix2 = write_fix(root / "two.safetensors", self.one, self.two)
        self.before = contents(self.ckpt)

    def merged(self, name: str, at: Any) -> Tensor:
        t, two = self.base[name], self.two[name]
        entries = np.frombuffer(t.data, "<u2").copy()
        entries[at] = np.frombuffer(two.data, "<u2")[at]
        return Tensor(t.dtype, t.shape, entries.tobytes())

    def id(self, path: Path) -> str:
        with open_fix(path) as fix:
            return fix.id


@pytest.fixture
def case(tmp_path: Path, rng: np.random.Generator) -> Case:
    return Case(tmp_path, rng)


# As a copy


@pytest.mark.parametrize("seed", range(20))
def test_apply_gives_what_merge_gives(tmp_path: Path, seed: int) -> None:
    recipe = write_working(tmp_path / "r", 7000 + seed)
    merge(recipe, tmp_path / "merged", backend="cpu", threads=1)
    try:
        build(recipe, tmp_path / "fix.safetensors", backend="cpu", threads=1)
    except InputError as error:
        assert "nothing changes" in str(error)
        return
    base = recipe.parent / load_recipe(recipe).base
    apply(tmp_path / "fix.safetensors", base, tmp_path / "applied")
    assert load_checkpoint(tmp_path / "applied") == load_checkpoint(tmp_path / "merged")
    assert verify(tmp_path / "applied").ok
    revert(tmp_path / "fix.safetensors", tmp_path / "applied", tmp_path / "reverted")
    assert load_checkpoint(tmp_path / "reverted") == load_checkpoint(base)
    assert verify(tmp_path / "reverted").ok


def test_a_copy_is_a_whole_checkpoint(case: Case) -> None:
    result = apply(case.fix1, case.ckpt, case.root / "out", date="2026-01-02")
    out = result.out
    assert load_checkpoint(out) == case.one and contents(case.ckpt) == case.before
    files = {"README.md", "SHA256SUMS", "safepatch.json", LEDGER, KEPT}
    assert {path.name for path in out.iterdir()} == {path.name for path in case.ckpt.iterdir()} | files
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=out, check=True)
    assert result.id in (out / "README.md").read_text() and str(case.root) not in (out / "README.md").read_text()
    (entry,) = json.loads((out / LEDGER).read_text())["fixes"]
    assert entry == {
        "id": result.id,
        "direction": "apply",
        "under_way": False,
        "recipe": {"seed": 1},
        "date": "2026-01-02",
    }
    again = apply(case.fix2, out, case.root / "both")
    assert again.fixes == (result.id, case.id(case.fix2)) and load_checkpoint(again.out) == case.two
    less = revert(result.id, again.out, case.root / "less")
    assert load_checkpoint(less.out) == case.only_two and less.fixes == (case.id(case.fix2),)
    none = revert(case.fix2, less.out, case.root / "none")
    assert load_checkpoint(none.out) == case.base and none.fixes == ()
    assert {path.name for path in none.out.iterdir()} == {path.name for path in out.iterdir()} - {LEDGER, KEPT}


def test_a_single_file_becomes_a_directory(tmp_path: Path, rng: np.random.Generator) -> None:
    base = table(rng)
    save_file(tmp_path / "odd.safetensors", base, pad=3)  # data may start anywhere
    merged = moved(rng, base, "a.weight", "d.weight")
    fix = write_fix(tmp_path / "fix.safetensors", base, merged)
    apply(fix, tmp_path / "odd.safetensors", tmp_path / "out")
    assert load_checkpoint(tmp_path / "out" / "model.safetensors") == merged


# Refusals, the same for a copy and in place


def spoil_base(case: Case) -> str:
    """The checkpoint of another model of the same table."""
    other = table(np.random.default_rng(99))
    for name in (STEM.format(1), STEM.format(2)):
        path = case.ckpt / name
        save_aligned(path, {n: other[n] for n in load_checkpoint(path)})
    return "tensor 'a.weight': carries something else"


def spoil_entry(case: Case) -> str:
    """One touched entry of one tensor edited."""
    path = case.ckpt / STEM.format(1)
    data = bytearray(path.read_bytes())
    at = 8 + int.from_bytes(data[:8], "little")
    start = at + len(case.base["a.weight"].data)  # entry 0 of b.weight is touched
    data[start + 1] ^= 0x10
    path.write_bytes(data)
    return "tensor 'b.weight': carries something else"


def spoil_table(case: Case) -> str:
    path = case.ckpt / STEM.format(2)
    tensors = load_checkpoint(path)
    tensors["c.norm"] = Tensor("F16", *tensors["c.norm"][1:])
    save_aligned(path, tensors)
    return "another table of tensors"


def spoil_shape(case: Case) -> str:
    path = case.ckpt / STEM.format(1)
    tensors = load_checkpoint(path)
    tensors["a.weight"] = Tensor("F32", (10, 10), bytes(400))
    save_aligned(path, tensors)
    return "tensor 'a.weight': is not the tensor that the fix touches: found F32 [10, 10]"


def spoil_mixture(case: Case) -> str:
    path = case.ckpt / STEM.format(1)
    tensors = load_checkpoint(path)
    save_aligned(path, {**tensors, "a.weight": case.one["a.weight"]})
    return "a mixture of fix"


def spoil_fix(case: Case) -> str:
    """A byte of the XORs flipped: the sides are still right, what would come out is not."""
    data = bytearray(case.fix1.read_bytes())
    about, arrays = fix_oracle.read(bytes(data))
    at = bytes(data).index(arrays["a.weight::xor0"][2])
    data[at + 5] ^= 0x80
    case.fix1.write_bytes(data)
    return "tensor 'a.weight': its XORs"


SPOILS = [spoil_base, spoil_entry, spoil_table, spoil_shape, spoil_mixture, spoil_fix]


@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize("spoil", SPOILS, ids=[spoil.__name__ for spoil in SPOILS])
def test_refused_before_a_byte_changes(case: Case, spoil: Any, in_place: bool) -> None:
    says = spoil(case)
    before = contents(case.root)
    for run in (apply, revert):
        with pytest.raises(InputError) as refused:
            run(case.fix1, case.ckpt, None if in_place else case.root / "out", in_place=in_place)
        assert says in str(refused.value) and "\n" not in str(refused.value)
    assert contents(case.root) == before


@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in place"])
def test_carried_already(case: Case, in_place: bool) -> None:
    apply(case.fix1, case.ckpt, in_place=True)
    before = contents(case.root)
    out = None if in_place else case.root / "out"
    with pytest.raises(InputError, match="carries fix .* already"):
        apply(case.fix1, case.ckpt, out, in_place=in_place)
    with pytest.raises(InputError, match="does not carry fix"):
        revert(case.fix2, case.ckpt, out, in_place=in_place)
    with pytest.raises(InputError, match="keeps no such fix"):
        revert("0" * 32, case.ckpt, out, in_place=in_place)
    with pytest.raises(UsageError):
        apply(case.fix2, case.ckpt, case.root / "out", in_place=True)
    with pytest.raises(UsageError):
        apply(case.fix2, case.ckpt)
    assert contents(case.root) == before


# In place


def test_in_place_and_back(case: Case) -> None:
    result = apply(case.fix1, case.ckpt, in_place=True)
    assert load_checkpoint(case.ckpt) == case.one
    assert {path.name for path in case.ckpt.iterdir()} == {*case.before, LEDGER, KEPT}
    assert result.fixes == (result.id,) and not result.resumed
    assert (case.ckpt / KEPT / f"{result.id}.safetensors").read_bytes() == case.fix1.read_bytes()
    case.fix1.unlink()
    revert(result.id, case.ckpt, in_place=True)
    assert contents(case.ckpt) == case.before


def test_sums_and_manifest_follow(case: Case) -> None:
    apply(case.fix1, case.ckpt, case.root / "out")
    revert(case.fix1, case.root / "out", case.root / "base")
    before = contents(case.root / "base")
    for fix in (case.fix1, case.fix2):
        apply(fix, case.root / "base", in_place=True)
        assert verify(case.root / "base").ok
        subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=case.root / "base", check=True)
    assert load_checkpoint(case.root / "base") == case.two
    for fix in (case.fix1, case.fix2):
        revert(fix, case.root / "base", in_place=True)
        assert verify(case.root / "base").ok
    assert contents(case.root / "base") == before


def test_a_fix_under_others(case: Case, rng: np.random.Generator) -> None:
    """Fixes of other entries come out in any order; one that shares entries must come out first."""
    three = moved(rng, case.two, "b.weight", where=np.arange(0, 90000, 3000))  # 30 of them fix 1 touches
    fix3 = write_fix(case.root / "three.safetensors", case.two, three)
    for fix in (case.fix1, case.fix2, fix3):
        apply(fix, case.ckpt, in_place=True)
    before = contents(case.ckpt)
    for where in ({"in_place": True}, {"out": case.root / "out"}):
        with pytest.raises(InputError) as refused:
            revert(case.fix1, case.ckpt, **where)
        assert f"fix {case.id(fix3)} lies above" in str(refused.value)
        assert "tensor 'b.weight'" in str(refused.value) and "found 30 entries" in str(refused.value)
    assert contents(case.ckpt) == before
    for fix in (case.fix2, fix3, case.fix1):
        revert(fix, case.ckpt, in_place=True)
    assert contents(case.ckpt) == case.before


def test_what_may_not_be_changed_in_place(case: Case, rng: np.random.Generator) -> None:
    shard = case.ckpt / STEM.format(1)

    def refused(error: type[SafepatchError], says: str) -> None:
        before = contents(case.root)
        with pytest.raises(error, match=says):
            apply(case.fix1, case.ckpt, in_place=True)
        assert contents(case.root) == before

    os.link(shard, case.root / "link")
    refused(InputError, "hard-linked.*found 2 links")
    (case.root / "link").unlink()
    shard.chmod(0o444)
    refused(OutputError, "read-only")
    shard.chmod(0o644)
    lock = hold(case.ckpt, "checkpoint")
    refused(Busy, "another run")
    os.close(lock)
    (case.ckpt / "safepatch.json").write_text("{")
    refused(InputError, "safepatch.json")
    (case.ckpt / "safepatch.json").unlink()
    (case.ckpt / LEDGER).write_text('{"fixes": [{"id": 3}]}')
    refused(InputError, "not a ledger")
    (case.ckpt / LEDGER).unlink()
    tensors = load_checkpoint(shard)
    save_aligned(shard, tensors)
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little") + 1
    shard.write_bytes(length.to_bytes(8, "little") + data[8 : 7 + length] + b" " + data[7 + length :])
    refused(InputError, "not aligned to their width.*tensor|tensor.*not aligned to their width")
    save_aligned(shard, tensors)
    with pytest.raises(InputError, match="only a checkpoint's directory"):
        apply(case.fix1, shard, in_place=True)
    apply(case.fix1, case.ckpt, in_place=True)


def test_a_hub_cache_is_never_changed(case: Case) -> None:
    repo = case.root / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for i, path in enumerate(sorted(case.ckpt.iterdir())):
        (repo / "blobs" / str(i)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    before = contents(repo)
    with pytest.raises(InputError, match="hub cache"):
        apply(case.fix1, snapshot, in_place=True)
    assert contents(repo) == before
    apply(case.fix1, snapshot, case.root / "out")
    assert load_checkpoint(case.root / "out") == case.one


@pytest.mark.parametrize("step", ["link", "ledger"])
def test_nothing_stays_of_a_run_in_place_that_could_not_begin(
    case: Case, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """No room for the copy of the fix, or for the ledger."""

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:100])
        full()

    monkeypatch.setattr("safepatch_core.fixes.ledger.os.link", full)
    if step == "link":
        monkeypatch.setattr("safepatch_core.fixes.ledger.shutil.copyfile", half)
    else:
        monkeypatch.setattr("safepatch_core.fixes.ledger.replacing", full)
    with pytest.raises(IOFailure, match="No space left.*free some and run it again; no weight was changed"):
        apply(case.fix1, case.ckpt, in_place=True)
    assert contents(case.ckpt) == case.before
    monkeypatch.undo()
    apply(case.fix1, case.ckpt, in_place=True)
    assert load_checkpoint(case.ckpt) == case.one


def test_a_directory_that_may_not_be_written_is_left_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safepatch_core.fixes.inplace.os.access", lambda path, mode: False)
    with pytest.raises(OutputError, match="nothing may be written in this directory: apply to a copy"):
        apply(case.fix1, case.ckpt, in_place=True)


def test_a_checkpoint_that_is_under_way_is_no_input(case: Case) -> None:
    """Nothing of ours reads a mixture either."""
    entry = {"id": "0" * 32, "direction": "apply", "under_way": True, "recipe": None}
    (case.ckpt / LEDGER).write_text(json.dumps({"fixes": [entry]}))
    with pytest.raises(InputError, match="a fix is under way"):
        open_checkpoint(case.ckpt)
    with pytest.raises(InputError, match="a fix is under way"):
        apply(case.fix1, case.ckpt, case.root / "out")


def test_a_lost_ledger_loses_no_fix(case: Case) -> None:
    """Without a ledger a kept fix is still what takes it out; nothing removes it."""
    id_ = apply(case.fix1, case.ckpt, in_place=True).id
    (case.ckpt / LEDGER).unlink()
    apply(case.fix2, case.ckpt, in_place=True)
    revert(case.fix2, case.ckpt, in_place=True)
    revert(id_, case.ckpt, in_place=True)
    assert contents(case.ckpt) == case.before
    assert not (case.ckpt / BUSY).exists()


# On the command line


def run(*args: object, status: int = 0) -> str:
    """stdout, or the line of the failure."""
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    if status:
        assert isinstance(result.exception, SafepatchError) and result.exception.status == status, result.output
        return str(result.exception)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def test_the_commands(case: Case) -> None:
    fix = case.root / "built.safetensors"
    merged = write_checkpoint(case.root / "merged", case.one)
    built = json.loads(run("build", "--from", case.ckpt, "--to", merged, "-o", fix, "--json"))
    assert built["output"] == str(fix) and built["size"] == fix.stat().st_size and built["changes"] == 9000
    assert "2 tensors change (5.00%)" in run("build", "--from", case.ckpt, "--to", merged, "-o", fix, "--force")
    assert "either a RECIPE, or" in run("build", "--from", case.ckpt, "-o", fix, status=64)
    assert run("apply", fix, "--to", case.ckpt, "-o", case.root / "out", "--quiet") == ""
    told = json.loads(run("apply", fix, "--to", case.ckpt, "--in-place", "--date", "today", "--json"))
    assert told == {"output": str(case.ckpt), "id": built["id"], "direction": "apply", "tensors": 2} | {
        "changes": 9000,
        "resumed": False,
        "fixes": [built["id"]],
    }
    assert run("log", case.ckpt) == f"1. {built['id']}  today\n"
    listed = json.loads(run("log", case.ckpt, "--probe", fix, "--probe", case.fix2, "--json"))
    assert [probe["state"] for probe in listed["probes"]] == ["carried", "not carried"]
    assert listed["fixes"][0]["date"] == "today" and not listed["hidden"] and listed["under_way"] is None
    assert "carries fix" in run("apply", fix, "--to", case.ckpt, "--in-place", status=65)
    assert "taken out: 9,000 entries" in run("revert", built["id"], "--from", case.ckpt, "--in-place")
    assert "no fixes in the ledger" in run("log", case.ckpt) and contents(case.ckpt) == case.before
    assert "no such file" in run("log", case.root / "nowhere", status=65)


def test_probing_tells_sides_without_a_ledger(case: Case) -> None:
    mixed = {**case.base, "a.weight": case.one["a.weight"]}
    states = {"carried": case.one, "not carried": case.base, "mixed": mixed, "something else": table_of_another()}
    for name, tensors in states.items():
        save_file(case.root / "probed.safetensors", tensors)
        (probe,) = json.loads(run("log", case.root / "probed.safetensors", "--probe", case.fix1, "--json"))["probes"]
        assert probe["state"] == name
    assert "'a.weight': carries something else" in probe["reason"]


def table_of_another() -> Table:
    return table(np.random.default_rng(99))
