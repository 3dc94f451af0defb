"""A merged directory is signed as it is with OpenSSF model-signing, by the commands of docs/reliability.md."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from safepatch_core import merge
from tests.faults.harness import write_model, write_recipe

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("model_signing") is None, reason="needs model-signing: make develop"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a key"),
]
DOCS = Path(__file__).parent.parent / "docs" / "reliability.md"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_signed_output_verifies_until_a_byte_or_a_file_changes(tmp_path: Path) -> None:
    block = re.search(r"```sh\n(openssl ecparam.*?)```", DOCS.read_text(), re.DOTALL)
    assert block is not None
    *make, check = block[1].replace("\\\n", " ").splitlines()
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def sh(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)

    for seed, name in enumerate(("base", "safety", "over-safety")):
        write_model(tmp_path / name, seed)
    out = merge(write_recipe(tmp_path), tmp_path / "out", backend="reference").out
    for command in make:
        ended = sh(command)
        assert ended.returncode == 0, f"{command}\n{ended.stderr}"
    whole = {path: path.read_bytes() for path in out.iterdir()}
    ended = sh(check)
    assert ended.returncode == 0 and "succeeded" in ended.stdout + ended.stderr, ended.stderr

    shard = out / "model-00002-of-00003.safetensors"
    flip(shard, -1)
    changed = sh(check)
    shard.write_bytes(whole[shard])
    flip(out / "safepatch.json", 100)
    manifest = sh(check)
    (out / "safepatch.json").write_bytes(whole[out / "safepatch.json"])
    (out / "added").write_bytes(b"")
    added = sh(check)
    (out / "added").unlink()
    shard.unlink()
    removed = sh(check)
    shard.write_bytes(whole[shard])
    assert [run.returncode for run in (changed, manifest, added, removed)] == [1] * 4
    for run, file in ((changed, shard.name), (manifest, "safepatch.json"), (added, "added"), (removed, shard.name)):
        assert file in run.stdout + run.stderr, run.stdout + run.stderr
    assert sh(check).returncode == 0
