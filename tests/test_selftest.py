"""`safepatch selftest` passes on engines that are right, and fails, with what and where, on those that aren't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from safepatch_core.backends import open_backend
from safepatch_core.backends.contract import Backend
from safepatch_core.backends.reference import ReferenceBackend
from safepatch_core.backends.selftest import (
    CHECKS,
    DTYPES,
    FLAVOURS,
    check_far,
    check_settings,
    compare,
    examine,
    make_block,
    selftest,
    settings,
)
from safepatch_core.commands.cli import cli
from safepatch_core.errors import UsageError
from safepatch_core.spec import COMBINE, Join


def test_the_cpu_engine_passes_and_the_report_says_on_what() -> None:
    lines: list[str] = []
    checks = selftest("cpu", seconds=0, say=lines.append)
    assert [check.name for check in checks] == list(CHECKS)
    assert not any(check.failure for check in checks) and all(check.cases for check in checks)
    assert lines[0].startswith("engine   cpu (")
    assert "Python 3." in lines[1] and f"numpy {np.__version__}" in lines[1] and "SPEC 1" in lines[1]
    assert lines[-1].startswith("verdict  all bits equal the reference's")


def test_an_engine_that_cannot_run_is_refused() -> None:
    with pytest.raises(UsageError):
        selftest("abacus")


ABACUS = """
from safepatch_core.backends.reference import ReferenceBackend

class Abacus(ReferenceBackend):
    def describe(self):
        return "abacus (13 rods)"

def open_engine(*, threads, device, vram_limit):
    return Abacus()
"""


def test_an_installed_package_may_bring_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "abacus.py").write_text(ABACUS)
    installed = tmp_path / "abacus-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: abacus\nVersion: 1.0\n")
    entries = "abacus = abacus:open_engine\nbroken = abacus:nothing\ncpu = abacus:open_engine\n"
    (installed / "entry_points.txt").write_text(f"[safepatch.engines]\n{entries}")
    monkeypatch.syspath_prepend(tmp_path)
    assert open_backend("cpu", threads=1).describe().startswith("cpu (")  # names of ours stay ours
    with pytest.raises(UsageError, match="the broken engine can't be loaded: found module 'abacus' has no attribute"):
        open_backend("broken")
    run = CliRunner().invoke(cli, ["selftest", "--backend", "abacus", "--seconds", "0"])
    assert run.exit_code == 0 and run.output.startswith("engine   abacus (13 rods)"), run.output
    with pytest.raises(UsageError, match="found 'slate', expected auto or cpu or triton or reference or abacus or b"):
        CliRunner().invoke(cli, ["plan", "no-recipe.yaml", "--backend", "slate"], catch_exceptions=False)


def test_settings_cover_every_choice() -> None:
    shapes = [shape for setting in settings() for shape in setting.patches if shape]
    assert {s.rule for s in settings() if not s.skip} == set(COMBINE.values())
    assert {s.rule.join for s in settings()} == set(Join) and {s.skip for s in settings()} == {True, False}
    assert {s.order for s in settings()} == {"retain-first", "select-first"}
    assert {(s.dtype, s.rule) for s in settings()} >= {(d, COMBINE["difference"]) for d in DTYPES}
    assert {(s.kind, s.importance, s.weight) for s in shapes} >= {
        (kind, "gradients", weight)
        for kind in ("checkpoint", "delta", "lora")
        for weight in ("patched", "base", "delta")
    }
    assert {(s.kind, s.importance) for s in shapes} >= {
        ("lora", "magnitude"),
        ("lora", "scores"),
        ("delta", "scores"),
    }
    assert {s.values for s in shapes} == {s.scores for s in shapes} == set(DTYPES)
    assert {s.retain for s in shapes} == {True, False}
    assert {len(s.patches) for s in settings()} >= {1, 2, 4, 5} and any(None in s.patches for s in settings())


def test_flavours_bring_what_they_are_for() -> None:
    rng = np.random.default_rng(0)
    faults = {"bits": 0, "edges": 0, "tied": 0, "model": 0, "tiny": 0}
    tied = dict.fromkeys(FLAVOURS, 0)
    for setting in settings():
        for flavour in FLAVOURS:
            block = make_block(rng, setting, flavour, 2000)
            out = np.empty_like(block.base.data)
            cuts, report = ReferenceBackend().merge(block, [100] * len(block.patches), out)
            faults[flavour] += sum(p.bad_delta.count for p in report.patches)
            tied[flavour] += sum(0 < cut.before <= block.start + 2000 for cut in cuts)
    assert faults["bits"] and faults["edges"] and not faults["model"]
    assert tied["tied"] > len(settings())


class Broken:
    """The reference with one thing wrong."""

    def __init__(self, what: str) -> None:
        self._truth, self._what = ReferenceBackend(), what

    def describe(self) -> str:
        return f"broken ({self._what})"

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._truth, name)

        def call(block: Any, *args: Any) -> Any:
            if self._what == "start" and name != "histogram":
                object.__setattr__(block := block.slice(0, len(block)), "start", block.start & 0xFFFFFFFF)
            found = method(block, *args)
            out = args[-1]
            if name in ("apply", "merge") and self._what == "bit" and len(out):
                out[-1] ^= 1
            if name == "apply" and self._what == "count" and len(block):
                found.patches[0].applied += 1
            if name == "count_equal" and self._what == "equal" and len(block) > 200:
                found[0] += 1
            return found

        return call


@pytest.mark.parametrize("what", ["bit", "count", "equal", "start"])
def test_an_engine_with_anything_wrong_fails(what: str) -> None:
    lines: list[str] = []
    engine: Backend = Broken(what)
    checks = examine(engine, 0, entries=300, say=lines.append)
    failed = {check.name: check.failure for check in checks if check.failure}
    assert failed and any(line.startswith("FAILED") for line in lines)
    if what == "bit":
        assert "entries differ, first" in str(list(failed.values())[0])
    if what == "start":
        far = next(name for name, check in CHECKS.items() if check is check_far)
        settled = next(name for name, check in CHECKS.items() if check is check_settings)
        assert far in failed and settled not in failed


def test_compare_is_quiet_about_equals() -> None:
    rng = np.random.default_rng(0)
    engine = open_backend("cpu", threads=1)
    assert compare(engine, make_block(rng, settings()[0], "bits", 500, 7), rng) is None
