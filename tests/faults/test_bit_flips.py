"""`verify` finds every flipped bit of an output, wherever it lies."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from safepatch_core.errors import InputError
from safepatch_core.merging.verification import verify
from tests.faults.harness import LONG, Bench

FLIPS = 1000 if LONG else 120


@pytest.fixture
def out(bench: Bench) -> Path:
    """The new output, whole, in memory."""
    folder = bench.root / "flipped"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in bench.new.items():
        (folder / name).write_bytes(data)
    return folder


def header_length(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def is_found(out: Path, name: str) -> bool:
    try:
        verdict = verify(out)
    except InputError as error:
        return name in str(error)
    return any(name in problem for problem in verdict.problems)


@pytest.mark.parametrize("part", ["data", "headers", "small files"])
def test_every_flipped_bit_is_found(out: Path, part: str) -> None:
    assert verify(out).ok
    shards = sorted(p for p in out.iterdir() if p.suffix == ".safetensors")
    small = sorted(p for p in out.iterdir() if p.suffix != ".safetensors")
    dice = random.Random(part)
    for _ in range(FLIPS):
        path = dice.choice(small if part == "small files" else shards)
        whole = path.read_bytes()
        edge = header_length(whole) if path in shards else 0
        at = dice.randrange(edge, len(whole)) if part != "headers" else dice.randrange(edge)
        damaged = bytearray(whole)
        damaged[at] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        # A damaged list of sums may also blame the files whose names or sums it holds.
        blamed = "" if path.name == "SHA256SUMS" else path.name
        assert is_found(out, blamed), f"{path.name}: byte {at} of {len(whole)}"
        path.write_bytes(whole)
    assert verify(out).ok


def test_missing_added_and_shortened_files_are_found(out: Path) -> None:
    for path in sorted(out.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        assert is_found(out, path.name), path.name
        path.write_bytes(whole + b"\n")
        assert is_found(out, path.name), path.name
        path.unlink()
        assert is_found(out, path.name), path.name
        path.write_bytes(whole)
    (out / "config.json.bak").write_bytes(b"{}")
    assert is_found(out, "config.json.bak")


def test_a_forged_manifest_is_found_with_the_recipe(bench: Bench, out: Path) -> None:
    """Sums made to fit a changed manifest satisfy the sums; the recipe still tells."""
    import hashlib

    manifest = out / "safepatch.json"
    data = json.loads(manifest.read_bytes())
    data["patches"][0]["total"]["applied"] += 1
    manifest.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    sums = out / "SHA256SUMS"
    lines = [line for line in sums.read_text().splitlines(True) if "safepatch.json" not in line]
    lines.append(f"{hashlib.sha256(manifest.read_bytes()).hexdigest()}  safepatch.json\n")
    sums.write_text("".join(sorted(lines, key=lambda line: line.split("  ")[1])))
    assert verify(out).ok
    assert not verify(out, bench.recipe, backend="cpu").ok
