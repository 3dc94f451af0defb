"""The fuzz targets on their corpus and on some blind mutations of it: what `make fuzz` does for longer and guided."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

import safepatch_core
from safepatch_core.files.parsing import read_shard
from tests.fuzz.targets import ROOT, TARGETS, Violation, header, safetensors_file, same_as_safetensors

CORPUS = Path(__file__).parents[1] / "corpus"
MUTATIONS = int(os.environ.get("FUZZ_MUTATIONS", "1500"))
TOKENS = [
    line[1:-1].encode().decode("unicode_escape").encode("latin-1")
    for line in Path(__file__).with_name("tokens.dict").read_text().splitlines()
]


def seeds(target: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


def mutated(data: bytes, other: bytes, dice: random.Random) -> bytes:
    result = bytearray(data)
    for _ in range(dice.randint(1, 5)):
        at = dice.randrange(len(result) + 1)
        kind = dice.randrange(5)
        if kind == 0 and result:
            result[at % len(result)] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del result[at : at + dice.randint(1, 12)]
        elif kind == 2:
            result[at:at] = dice.choice(TOKENS)
        elif kind == 3:
            result[at : at + 8] = other[at : at + dice.randint(0, 40)]
        else:
            result[at:at] = dice.randbytes(dice.randint(1, 4))
    return bytes(result)


@pytest.mark.parametrize("target", list(TARGETS))
def test_corpus_and_mutations(target: str) -> None:
    corpus, dice = seeds(target), random.Random(target)
    assert len(corpus) >= 5
    for data in corpus:
        TARGETS[target](data)
    for _ in range(MUTATIONS):
        data = mutated(dice.choice(corpus), dice.choice(corpus), dice)
        try:
            TARGETS[target](data)
        except Exception as error:
            pytest.fail(f"{target}({data!r}): {type(error).__name__}: {error}")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("target", ["abi", "fix", "fix_file"])
def test_the_c_interfaces_targets_fit_it(tmp_path: Path, target: str) -> None:
    program, here = tmp_path / "replay", Path(__file__).parent
    lib = safepatch_core.get_library_dir()
    command = ["g++", "-std=c++20", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    command += [f"-I{safepatch_core.get_include()}", str(here / f"{target}.cpp"), str(here / "replay.cpp")]
    command += [f"-L{lib}", "-lsafepatch", f"-Wl,-rpath,{lib}", "-o", str(program)]
    subprocess.run(command, check=True)
    subprocess.run([program, "1", *(CORPUS / name for name in {target, "abi"})], check=True, cwd=tmp_path)


def test_the_comparison_with_safetensors_can_fail() -> None:
    header((CORPUS / "header" / "two-tensors").read_bytes())
    shard = read_shard(ROOT / "fuzzed.safetensors")
    same_as_safetensors((ROOT / "fuzzed.safetensors").read_bytes(), shard)
    with pytest.raises(Violation, match="accepted, but safetensors says"):
        same_as_safetensors(b"not safetensors", shard)
    with pytest.raises(Violation, match="other tensors"):
        same_as_safetensors(safetensors_file({}), shard)
