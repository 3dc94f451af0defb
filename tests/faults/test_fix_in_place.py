"""A fix applied or taken out in place, stopped at every call that changes a file: nothing that loads is a mixture.

Whatever was interrupted is finished by `log --finish`, by the same command or by the opposite one, byte for byte.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.faults.harness import INTERRUPT, KILL, LONG, TERM, TORN, Ended, Server, contents, fault, memory_directory
from tests.faults.test_power_cut import HARSH, blank, mounted
from tests.fix_cases import STEM, changed, random_tensor, write_checkpoint, write_fix
from tests.fix_oracle import encode
from tests.oracle import Tensor

__all__ = ["blank"]  # a fixture

Files = dict[str, bytes]
OPPOSITE = {"apply": ("revert", "--from"), "revert": ("apply", "--to")}
SHARDS = (STEM.format(1), STEM.format(2))


@dataclass(frozen=True)
class Case:
    """One command in place, what the checkpoint holds before it, and after it."""

    command: str
    fix: Path
    start: Files
    end: Files


@dataclass
class Fixes:
    """A checkpoint with sums and manifest, three fixes of other entries on top of each other, and one over them."""

    run: Server
    root: Path
    cases: dict[str, Case]

    def lay(self, files: Files) -> Path:
        """The checkpoint with these contents."""
        ckpt = self.root / "place" / "ckpt"
        shutil.rmtree(ckpt.parent, ignore_errors=True)
        for name, data in files.items():
            (ckpt / name).parent.mkdir(parents=True, exist_ok=True)
            (ckpt / name).write_bytes(data)
        return ckpt

    def do(self, case: Case, ckpt: Path, opposite: bool = False, **how: object) -> Ended:
        command, option = OPPOSITE["revert" if case.command == "apply" else "apply"]
        if opposite:
            command, option = OPPOSITE[case.command]
        return self.run(command, case.fix, option, ckpt, "--in-place", **how)  # type: ignore[arg-type]

    def calls(self, case: Case) -> list[str]:
        """The counted calls of an undisturbed run, in order."""
        ckpt = self.lay(case.start)
        ended = self.do(case, ckpt, fault=fault(ckpt, 0, KILL))
        assert ended.status == 0, ended.text
        assert contents(ckpt) == case.end
        return ended.calls

    def check_no_mixture(self, case: Case, ckpt: Path, what: object) -> bool:
        """What a loader may take is all old or all new. Whether it is under way."""
        if (ckpt / "config.json").exists():
            found = {name: (ckpt / name).read_bytes() for name in SHARDS}
            assert found in [{name: side[name] for name in SHARDS} for side in (case.start, case.end)], what
        listed = self.run("log", ckpt, "--json")
        assert listed.status == 0, listed.text
        return json.loads(listed.text)["under_way"] is not None

    def check_goes_on(self, case: Case, ckpt: Path, under_way: bool, which: int) -> None:
        """Finishing, the same command again, or the opposite one: each ends where it should."""
        if which == 0:
            ended = self.run("log", ckpt, "--finish")
            assert ended.status == 0, ended.text
            assert contents(ckpt) == case.end if under_way else contents(ckpt) in (case.start, case.end)
        elif which == 1:
            ended = self.do(case, ckpt)
            assert ended.status == 0 or "already" in ended.text or "does not carry" in ended.text, ended.text
            assert self.run("log", ckpt, "--finish").status == 0
            assert contents(ckpt) == case.end
        else:
            ended = self.do(case, ckpt, opposite=True)
            assert ended.status == 0 or "already" in ended.text or "does not carry" in ended.text, ended.text
            assert self.run("log", ckpt, "--finish").status == 0
            # Whoever applies a fix again puts it on top.
            assert same_but_for_order(contents(ckpt), case.start)


def same_but_for_order(found: Files, expected: Files) -> bool:
    def sorted_ledger(files: Files) -> Files:
        if "safepatch-fixes.json" not in files:
            return files
        fixes = json.loads(files["safepatch-fixes.json"])["fixes"]
        return {**files, "safepatch-fixes.json": json.dumps(sorted(fixes, key=lambda fix: str(fix["id"]))).encode()}

    return sorted_ledger(found) == sorted_ledger(expected)


def write_sums(root: Path) -> None:
    """Manifest and sums as `merge` writes them."""
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.iterdir())}
    files = {name: {"size": (root / name).stat().st_size, "sha256": digest} for name, digest in sums.items()}
    text = json.dumps({"recipe": None, "files": files}, indent=2) + "\n"
    (root / "safepatch.json").write_text(text)
    sums["safepatch.json"] = hashlib.sha256(text.encode()).hexdigest()
    (root / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))


def make_fixes(root: Path, run: Server) -> Fixes:
    rng = np.random.default_rng(4)
    state: dict[str, Tensor] = {
        "a.weight": random_tensor(rng, "BF16", 40, 50),
        "b.weight": random_tensor(rng, "F32", 40, 50),
        "c.weight": random_tensor(rng, "BF16", 20, 50),
        "d.weight": random_tensor(rng, "BF16", 3, 65536),
        "e.norm": random_tensor(rng, "BF16", 50),
    }
    base, paths = state, []
    touched = (("a.weight", "d.weight"), ("b.weight", "d.weight"), ("a.weight", "c.weight"), tuple(base))
    for i, names in enumerate(touched):
        at = np.arange(i, 1000, 7) if i < 3 else np.arange(0, 50, 2)
        after = {n: changed(rng, t, at, "small") if n in names else t for n, t in state.items()}
        paths.append(write_fix(root / f"fix{i}.safetensors", state, after))
        assert encode(state, after) == paths[-1].read_bytes()
        state = after
    ckpt = write_checkpoint(root / "clean", base)
    write_sums(ckpt)
    states = [contents(ckpt)]
    for path in paths:
        assert run("apply", path, "--to", ckpt, "--in-place").status == 0
        states.append(contents(ckpt))
    for path in (paths[3], paths[0]):
        assert run("revert", path, "--from", ckpt, "--in-place").status == 0
    cases = {
        "apply the first": Case("apply", paths[0], states[0], states[1]),
        "take out the only one": Case("revert", paths[0], states[1], states[0]),
        "apply on top of two": Case("apply", paths[2], states[2], states[3]),
        "take out the top of three": Case("revert", paths[2], states[3], states[2]),
        "take out the lowest of three": Case("revert", paths[0], states[3], contents(ckpt)),
        "apply over entries of three": Case("apply", paths[3], states[3], states[4]),
    }
    return Fixes(run, root, cases)


@pytest.fixture(scope="module")
def fixes(run: Server) -> Iterator[Fixes]:
    with memory_directory() as folder:
        yield make_fixes(folder, run)


CASES = [
    "apply the first",
    "take out the only one",
    "apply on top of two",
    "take out the top of three",
    "take out the lowest of three",
    "apply over entries of three",
]


@pytest.mark.parametrize("how", [KILL, TORN], ids=["before the call", "in the middle of a write"])
@pytest.mark.parametrize("name", CASES)
def test_killed_at_every_call(fixes: Fixes, name: str, how: int) -> None:
    case = fixes.cases[name]
    calls = fixes.calls(case)
    at = [n for n, call in enumerate(calls, 1) if how == KILL or "write " in call]
    assert len(at) >= (20 if how == KILL else 5)
    seen = set()
    for i, n in enumerate(at):
        for which in range(3) if LONG else [i % 3]:
            ckpt = fixes.lay(case.start)
            ended = fixes.do(case, ckpt, fault=fault(ckpt, n, how))
            assert ended.status == -9, (n, calls[n - 1], ended.text)
            under_way = fixes.check_no_mixture(case, ckpt, (n, calls[n - 1]))
            seen.add(under_way)
            fixes.check_goes_on(case, ckpt, under_way, which)
    assert seen == {True, False} or how == TORN


@pytest.mark.parametrize("name", ["apply the first", "take out the lowest of three"])
def test_killed_again_while_going_on(fixes: Fixes, name: str) -> None:
    """Killed in the middle, and the run that goes on, in either direction, is killed at each of its calls too."""
    case = fixes.cases[name]
    calls = fixes.calls(case)
    middle = [n for n, call in enumerate(calls, 1) if call.startswith("pwrite")][-1]
    ckpt = fixes.lay(case.start)
    assert fixes.do(case, ckpt, fault=fault(ckpt, middle, TORN)).status == -9
    left = contents(ckpt)
    for opposite in (False, True):
        count = len(fixes.do(case, fixes.lay(left), opposite, fault=fault(ckpt, 0, KILL)).calls)
        for n in range(1, count + 1):
            ckpt = fixes.lay(left)
            assert fixes.do(case, ckpt, opposite, fault=fault(ckpt, n, KILL)).status == -9
            under_way = fixes.check_no_mixture(case, ckpt, n)
            back = Case(OPPOSITE[case.command][0], case.fix, case.end, case.start) if opposite else case
            if under_way and not opposite:
                fixes.check_goes_on(back, ckpt, under_way, n % 2)
            else:
                fixes.check_goes_on(case, ckpt, under_way, 1)


@pytest.mark.parametrize("stays", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("name", ["apply the first", "take out the lowest of three"])
def test_an_error_at_every_call(fixes: Fixes, name: str, code: int, stays: bool) -> None:
    case = fixes.cases[name]
    calls = fixes.calls(case)
    for n in range(1, len(calls) + 1, 1 if LONG else 2):
        ckpt = fixes.lay(case.start)
        ended = fixes.do(case, ckpt, fault=fault(ckpt, n, code, stays))
        under_way = fixes.check_no_mixture(case, ckpt, (n, calls[n - 1]))
        if ended.status == 0:
            # The directory is there; what can't be linked is copied.
            assert calls[n - 1].startswith(("mkdir", "link")), (n, calls[n - 1])
            assert contents(ckpt) == case.end
            continue
        assert ended.status in (73, 74), (n, calls[n - 1], ended.text)
        assert os.strerror(code) in ended.said() and str(ckpt) in ended.said()
        assert "--finish" in ended.said(), (calls[n - 1], ended.said())
        fixes.check_goes_on(case, ckpt, under_way, n // 2 % 3)


@pytest.mark.parametrize("how", [TERM, INTERRUPT], ids=["SIGTERM", "SIGINT"])
def test_stopped_at_every_call(fixes: Fixes, how: int) -> None:
    case = fixes.cases["apply on top of two"]
    calls = fixes.calls(case)
    for n in range(1, len(calls) + 1, 1 if LONG else 3):
        ckpt = fixes.lay(case.start)
        ended = fixes.do(case, ckpt, fault=fault(ckpt, n, how))
        under_way = fixes.check_no_mixture(case, ckpt, (n, calls[n - 1]))
        if ended.status == 0:
            assert contents(ckpt) == case.end
            continue
        assert ended.status == 75 and "--finish" in ended.said(), ended.text
        fixes.check_goes_on(case, ckpt, under_way, n // 3 % 3)


def test_the_next_fix_finishes_the_last(fixes: Fixes) -> None:
    """Another fix is applied to a checkpoint in which one is under way: that one first."""
    first, third = fixes.cases["apply the first"], fixes.cases["apply on top of two"]
    middle = [n for n, call in enumerate(fixes.calls(first), 1) if call.startswith("pwrite")][-1]
    ckpt = fixes.lay(first.start)
    assert fixes.do(first, ckpt, fault=fault(ckpt, middle, KILL)).status == -9
    ended = fixes.run("apply", third.fix.with_name("fix1.safetensors"), "--to", ckpt, "--in-place")
    assert ended.status == 0, ended.text
    assert contents(ckpt) == third.start


def test_a_mixture_without_a_ledger_is_refused(fixes: Fixes) -> None:
    case = fixes.cases["apply the first"]
    last = [n for n, call in enumerate(fixes.calls(case), 1) if call.startswith("pwrite")][-1]
    ckpt = fixes.lay(case.start)
    assert fixes.do(case, ckpt, fault=fault(ckpt, last, KILL)).status == -9
    (ckpt / "safepatch-fixes.json").unlink()
    for opposite in (False, True):
        ended = fixes.do(case, ckpt, opposite)
        assert ended.status == 65 and "a mixture of fix" in ended.said(), ended.text


@pytest.mark.parametrize("name", ["apply the first", "take out the lowest of three"])
def test_power_cut(fixes: Fixes, blank: Path, tmp_path: Path, name: str) -> None:
    """Killed at a call, and what no fsync has written is lost: what the disk holds is finished to the same bytes."""
    case = fixes.cases[name]
    calls = fixes.calls(case)
    picked = random.Random(name).sample(range(2, len(calls) + 1), len(calls) - 1 if LONG else 4)
    for n in [*sorted(picked), 0]:
        image, after = tmp_path / "disk", tmp_path / "after"
        shutil.copyfile(blank, image)
        with mounted(image, tmp_path / "at") as disk:
            for file, data in case.start.items():
                (disk / "ckpt" / file).parent.mkdir(parents=True, exist_ok=True)
                (disk / "ckpt" / file).write_bytes(data)
        with mounted(image, tmp_path / "at", HARSH) as disk:
            ended = fixes.do(case, disk / "ckpt", fault=fault(disk / "ckpt", n, KILL))
            shutil.copyfile(image, after)
            assert ended.status == (-9 if n else 0), ended.text
        with mounted(after, tmp_path / "at") as disk:
            under_way = fixes.check_no_mixture(case, disk / "ckpt", (n, calls[n - 1]))
            if n == 0:
                assert contents(disk / "ckpt") == case.end
            else:
                fixes.check_goes_on(case, disk / "ckpt", under_way, n % 3)
