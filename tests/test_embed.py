"""The examples of embedding are built as their first lines say, and give the bytes that the Python merge gives."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import safepatch_core
from safepatch_core.backends.contract import Bits, Block, PatchData
from safepatch_core.backends.cpu import CpuBackend
from safepatch_core.spec import COMBINE, keep_threshold, quota, random_key
from tests.oracle import Tensor, save_file

EXAMPLES = Path(__file__).parents[1] / "examples/embed"
LIB = Path(safepatch_core.get_library_dir())
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the sources")


def needs(*tools: str) -> pytest.MarkDecorator:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def run(*command: object, **more: str) -> str:
    env = {**os.environ, "PKG_CONFIG_PATH": str(LIB / "pkgconfig"), **more}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- C: a checkpoint, in chunks


def tensor(rng: np.random.Generator, dtype: str, *shape: int) -> Tensor:
    values = rng.standard_normal(int(np.prod(shape)), np.float32) / 8
    if dtype == "F32":
        return Tensor(dtype, shape, values.tobytes())
    if dtype == "F16":
        return Tensor(dtype, shape, values.astype(np.float16).tobytes())
    return Tensor("BF16", shape, (values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def moved(rng: np.random.Generator, old: Tensor) -> Tensor:
    """The same tensor with a few low bits changed, so that many differences are equal."""
    if old.dtype == "I64":
        return old
    raw = np.frombuffer(old.data, np.uint32 if old.dtype == "F32" else np.uint16)
    flips = rng.integers(0, 4, len(raw)).astype(raw.dtype)
    return Tensor(old.dtype, old.shape, (raw ^ flips).tobytes())


def save_shards(folder: Path, shards: list[dict[str, Tensor]]) -> Path:
    folder.mkdir()
    index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": {}}
    for i, tensors in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(folder / name, tensors)
        index["weight_map"] |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def checkpoints(folder: Path, rows: int) -> None:
    rng = np.random.default_rng(8)
    shards = [
        {
            "b.weight": tensor(rng, "BF16", rows, 1000),
            "a.bias": tensor(rng, "F32", 77),
            "empty": Tensor("F16", (0,), b""),
        },
        {
            "c.weight": tensor(rng, "F16", 300, 11),
            "positions": Tensor("I64", (5,), bytes(40)),
            "A": tensor(rng, "BF16", 9),
        },
    ]
    save_shards(folder / "base", shards)
    save_shards(folder / "patched", [{n: moved(rng, t) for n, t in shard.items()} for shard in shards])
    recipe = {
        "base": str(folder / "base"),
        "patches": [{"name": "patch", "source": str(folder / "patched"), "top": 0.2, "retain": 0.7}],
        "scope": "model",
        "targets": "all",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    safepatch_core.merge(folder / "recipe.yaml", folder / "python", backend="cpu")
    (folder / "c").mkdir()


def same_shards(folder: Path) -> bool:
    return all((folder / "c" / p.name).read_bytes() == p.read_bytes() for p in folder.glob("python/*.safetensors"))


@pytest.fixture(scope="module")
def merge_c(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example") / "c"
    shutil.copytree(EXAMPLES / "c", folder)
    run("make", "-C", folder)
    return folder / "merge"


@needs("gcc", "make", "pkg-config")
@pytest.mark.parametrize("mib", ["1", "9"])
def test_c_gives_the_bytes_of_the_python_merge(merge_c: Path, tmp_path: Path, mib: str) -> None:
    checkpoints(tmp_path, 400)
    told = run(merge_c, tmp_path / "base", tmp_path / "patched", tmp_path / "c", 0.2, 0.7, mib)
    assert same_shards(tmp_path) and int(told.split()[0]) > 10_000


@needs("gcc", "make", "pkg-config")
def test_c_keeps_to_its_memory(merge_c: Path, tmp_path: Path) -> None:
    checkpoints(tmp_path, 40_000)  # 80 MB a tensor
    limited = ["bash", "-c", 'ulimit -d 32768 && exec "$@"', "-"]  # kB: buffers, the engine, a thread's stack
    run(*limited, merge_c, tmp_path / "base", tmp_path / "patched", tmp_path / "c", 0.2, 0.7, 8)
    assert same_shards(tmp_path)
    shutil.rmtree(tmp_path)


@needs("gcc", "make", "pkg-config", "valgrind")
def test_c_is_clean_under_valgrind(merge_c: Path, tmp_path: Path) -> None:
    checkpoints(tmp_path, 30)
    strict = ["valgrind", "--quiet", "--error-exitcode=99", "--leak-check=full", "--show-leak-kinds=all"]
    run(
        *strict,
        "--errors-for-leak-kinds=all",
        merge_c,
        tmp_path / "base",
        tmp_path / "patched",
        tmp_path / "c",
        0.2,
        0.7,
        1,
    )
    assert same_shards(tmp_path)


@pytest.fixture
def fixed(tmp_path: Path) -> Path:
    """base, python (the same with the fix), and fix.safetensors."""
    checkpoints(tmp_path, 400)
    safepatch_core.build(tmp_path / "recipe.yaml", tmp_path / "fix.safetensors", backend="cpu")
    shutil.copytree(tmp_path / "base", tmp_path / "c", dirs_exist_ok=True)
    return tmp_path


@needs("gcc", "make", "pkg-config")
def test_c_applies_and_reverts_a_fix_in_place(merge_c: Path, fixed: Path) -> None:
    program, fix, there = merge_c.with_name("fix"), fixed / "fix.safetensors", fixed / "c"
    changes = int(re.findall(r"(\d+) old and 0 new", run(program, "check", fix, there))[0])
    run(program, "apply", fix, there)
    assert same_shards(fixed) and changes > 10_000
    again = subprocess.run([program, "apply", fix, there], capture_output=True, text=True)
    assert again.returncode == 1 and "bad data: carries the fix already" in again.stderr
    assert f"0 old and {changes} new" in run(program, "revert", fix, there)
    for path in fixed.glob("base/*.safetensors"):
        assert (there / path.name).read_bytes() == path.read_bytes()


@needs("gcc", "make", "pkg-config", "valgrind")
def test_c_finishes_a_fix_that_was_cut_off(merge_c: Path, fixed: Path) -> None:
    """Under valgrind, as it is the longest way: one shard is new, and the other old."""
    program, fix, there = merge_c.with_name("fix"), fixed / "fix.safetensors", fixed / "c"
    shutil.copy(fixed / "python/model-00002-of-00002.safetensors", there)
    cut = subprocess.run([program, "apply", fix, there], capture_output=True, text=True)
    assert cut.returncode == 1 and "a mixture of both sides" in cut.stderr
    strict = ["valgrind", "--quiet", "--error-exitcode=99", "--leak-check=full", "--show-leak-kinds=all"]
    run(*strict, "--errors-for-leak-kinds=all", program, "apply", fix, there, "resume")
    assert same_shards(fixed)


@needs("gcc", "make", "pkg-config")
def test_c_leaves_another_base_alone(merge_c: Path, fixed: Path) -> None:
    program, fix = merge_c.with_name("fix"), fixed / "fix.safetensors"
    other = fixed / "patched"
    for path in other.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        for i in range(8 + int.from_bytes(data[:8], "little"), len(data)):
            data[i] ^= 0x10
        path.write_bytes(data)
    before = [path.read_bytes() for path in sorted(other.glob("*.safetensors"))]
    for arguments, line in [
        (["apply", fix, other], "carries something else where the fix acts"),
        (["revert", fix, fixed / "base"], "does not carry the fix"),
        (["check", fixed / "base/model-00001-of-00002.safetensors", fixed / "base"], "not a fix file"),
    ]:
        done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 1 and line in done.stderr, done.stderr
    assert before == [path.read_bytes() for path in sorted(other.glob("*.safetensors"))]


@needs("gcc", "make", "pkg-config")
def test_c_says_what_is_wrong(merge_c: Path, tmp_path: Path) -> None:
    checkpoints(tmp_path, 30)
    for arguments, line in [
        (["nowhere", "patched", "c", "0.2", "0.7", "1"], "nowhere: no model.safetensors"),
        (["base", "patched", "c", "1.2", "0.7", "1"], "bad argument: top: expected 0 to 1"),
    ]:
        done = subprocess.run([merge_c, *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1 and line in done.stderr


# --- other languages: one array


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """base.bin, patched.bin and what they should become, expected.bin: bf16 entries."""
    rng = np.random.default_rng(9)
    base = np.frombuffer(tensor(rng, "BF16", 100_003).data, np.uint16)
    patched = base ^ rng.integers(0, 4, len(base)).astype(np.uint16)
    key, keep = random_key(0, "patch", "array"), keep_threshold(0.7)
    patch = PatchData("checkpoint", Bits(patched, "BF16"), "magnitude", None, "patched", key, keep, 1.0)
    out = np.empty_like(base)
    block = Block(Bits(base, "BF16"), 0, len(base), (patch,), COMBINE["difference"], "retain-first")
    CpuBackend(1).merge(block, [quota(0.2, len(base))], out)
    assert np.count_nonzero(out != base) > 10_000
    for name, of in (("base", base), ("patched", patched), ("expected", out)):
        of.tofile(tmp_path / f"{name}.bin")
    return tmp_path


def gives_the_same(arrays: Path, *command: object, **more: str) -> None:
    told = run(*command, *(arrays / f"{name}.bin" for name in ("base", "patched", "out")), 0.2, 0.7, **more)
    assert (arrays / "out.bin").read_bytes() == (arrays / "expected.bin").read_bytes()
    assert re.fullmatch(r"20001 selected, \d+ changed\n", told)


@needs("cmake", "g++")
def test_cpp(arrays: Path) -> None:
    run("cmake", "-S", EXAMPLES / "cpp", "-B", arrays / "build", f"-Dsafepatch_DIR={safepatch_core.get_cmake_dir()}")
    run("cmake", "--build", arrays / "build")
    gives_the_same(arrays, arrays / "build/merge_array")


@needs("cargo", "pkg-config", "gcc")
def test_rust(arrays: Path) -> None:
    shutil.copytree(EXAMPLES / "rust", arrays / "rust", ignore=shutil.ignore_patterns("target"))
    cargo = ["cargo", "--offline", "--quiet", "--manifest-path", arrays / "rust/Cargo.toml"]
    run(cargo[0], "test", *cargo[1:])
    gives_the_same(arrays, cargo[0], "run", *cargo[1:], "--example", "merge_array")


def java() -> str | None:
    """A Java of which the Foreign Function & Memory API is part: 22 and later."""
    found = [shutil.which("java"), *map(str, Path("/usr/lib/jvm").glob("*/bin/java"))]
    if home := os.environ.get("JAVA_HOME"):
        found.insert(0, f"{home}/bin/java")
    for path in filter(None, found):
        told = subprocess.run([path, "-version"], capture_output=True, text=True).stderr
        version = re.search(r'version "(\d+)', told)
        if version and int(version[1]) >= 22:
            return path
    return None


def test_java(arrays: Path) -> None:
    path = java()
    if path is None:
        pytest.skip("needs Java 22 or later, whose foreign function API is final")
    (library,) = LIB.glob("libsafepatch.so.*")
    gives_the_same(arrays, path, "--enable-native-access=ALL-UNNAMED", EXAMPLES / "java/MergeArray.java", library)
