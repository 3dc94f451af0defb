"""What survives rounding: every engine counts the entries whose stored bits a merge changes, and it is those."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from safepatch_core import merge
from safepatch_core.backends import open_backend
from safepatch_core.backends.contract import SELECT_ALL, Backend, Bits, Block, PatchData, Report
from safepatch_core.backends.reference import ReferenceBackend
from safepatch_core.commands.cli import cli
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint
from safepatch_core.spec import COMBINE, ITEMSIZE, KEEP_ALL
from tests.recipes import write_working
from tests.test_ranks import ROOT, model, recipe, torchrun

_engine = pytest.importorskip("safepatch_core._engine", reason="the extension isn't built")


def engines() -> list[Backend]:
    from safepatch_core.backends.cpu import CpuBackend

    isas = [isa for isa in ("scalar", "avx2", "avx512") if _engine.isa_usable(isa)]
    return [ReferenceBackend(), *(CpuBackend(1, isa) for isa in isas)]


def bf16(*values: float) -> Bits:
    return Bits((np.array(values, np.float32).view(np.uint32) >> 16).astype(np.uint16), "BF16")


@pytest.mark.parametrize(
    ("combine", "acted", "changed"),
    # Entries 0 to 7 below: `sum` loses 1, 4, 5 and 6; where both act `difference` lets neither; in `ties` 5 cancels.
    [("sum", 8, 4), ("difference", 5, 3), ("ties", 7, 4)],
)
def test_known_entries(combine: str, acted: int, changed: int) -> None:
    """Steps that are too small for the base, that cancel, or that meet an infinite base act and change nothing."""
    inf = float("inf")
    base = bf16(1, 1, 1, 0, inf, 1, 1, 0, 1)
    one = bf16(0.5, 0.001, 0, 1e-40, 1, 0.5, 0.001, 2, 0)
    other = bf16(0, 0, 0.5, 0, 0, -0.5, 0.001, 2, 0)
    patches = tuple(
        PatchData("delta", values, "magnitude", None, "patched", 0, KEEP_ALL, 1.0) for values in (one, other)
    )
    block = Block(base, 3, 1, patches, COMBINE[combine], "retain-first")
    for engine in engines():
        out = np.empty_like(base.data)
        report = engine.apply(block, [SELECT_ALL] * 2, out)
        assert (report.acted, report.changed) == (acted, changed), engine.describe()
        assert report.changed == np.count_nonzero(out != base.data)
        in_place = base.data.copy()
        again = Block(Bits(in_place, "BF16"), 3, 1, patches, COMBINE[combine], "retain-first")
        assert engine.merge(again, [9, 9], in_place)[1] == report
        # Blocks of one entry each add up to the same.
        parts = [block.slice(i, i + 1) for i in range(len(block))]
        total = Report([type(p)() for p in report.patches])
        for part in parts:
            total += engine.apply(part, [SELECT_ALL] * 2, np.empty_like(part.base.data))
        assert (total.acted, total.changed) == (acted, changed)


def differing(base: Checkpoint, merged: Checkpoint) -> int:
    """Entries of two checkpoints with the same tensors that are not stored alike."""
    count = 0
    for name, entry in base.tensors.items():
        if entry.dtype in ("F32", "F16", "BF16"):
            kind = np.dtype(f"<u{ITEMSIZE[entry.dtype]}")
            a, b = (
                np.fromfile(t.path, kind, t.entries, offset=t.start) if t.entries else np.zeros(0, kind)
                for t in (entry, merged.tensors[name])
            )
            count += int(np.count_nonzero(a != b))
    return count


@pytest.mark.parametrize("seed", range(30))
def test_random_merges_count_what_their_files_show(tmp_path: Path, seed: int) -> None:
    path = write_working(tmp_path / "in", seed)
    found = [merge(path, tmp_path / name, backend=name, threads=1) for name in ("reference", "cpu")]
    document = yaml.safe_load(path.read_text())
    base = open_checkpoint(path.parent / document["base"])
    changed = differing(base, open_checkpoint(tmp_path / "cpu"))
    for result in found:
        assert result.changed == changed and result.acted >= changed
        applied = sum(counts["applied"] for counts in result.counts.values())
        assert result.acted == applied if document.get("combine", "difference") == "difference" else True
        assert result.surviving == (changed / result.acted if result.acted else None)
    assert found[0].acted == found[1].acted


def test_the_command_shows_it_and_no_file_holds_it(tmp_path: Path) -> None:
    model(tmp_path, 50)
    path = recipe(tmp_path, "tensor")
    shown = CliRunner().invoke(cli, ["merge", str(path), "-o", str(tmp_path / "one"), "--backend", "cpu"])
    told = CliRunner().invoke(cli, ["merge", str(path), "-o", str(tmp_path / "two"), "--backend", "cpu", "--json"])
    assert shown.exit_code == told.exit_code == 0
    data = json.loads(told.stdout)
    assert 0 < data["changed"] <= data["acted"] and data["surviving"] == data["changed"] / data["acted"]
    line = f"stored bits changed at {data['changed']:,d} of {data['acted']:,d} entries"
    assert line in shown.output, shown.output
    for name in ("safepatch.json", "README.md", "SHA256SUMS"):
        text = (tmp_path / "one" / name).read_text()
        assert not re.search(r"acted|changed|surviv", text), name


def test_ranks_add_up(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="ranks talk through torch.distributed")
    model(tmp_path, 50)
    path = recipe(tmp_path, "model")
    alone = merge(path, tmp_path / "alone", backend=open_backend("reference"))
    command = [*torchrun(2, 64, path, "-o", tmp_path / "out", "--backend", "cpu")[:-1], "--json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(f'"acted": {alone.acted}') == run.stdout.count(f'"changed": {alone.changed}') == 2
