"""The engine for AArch64, cross-compiled and run by an emulator: NEON and plain C++ give the known bits."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
FUZZ = Path(__file__).parent / "fuzz"
CXX, QEMU = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")

pytestmark = [
    pytest.mark.skipif(CXX is None, reason="needs aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)"),
    pytest.mark.skipif(QEMU is None, reason="needs qemu-aarch64 (Debian: qemu-user)"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="needs the sources"),
]

# A host that flushes subnormals and rounds upwards gets the same bits, and keeps its modes.
PROGRAM = r"""
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <safepatch.h>

static uint64_t mode() {
    uint64_t fpcr;
    asm volatile("mrs %0, fpcr" : "=r"(fpcr));
    return fpcr;
}

int main() {
    sp_engine* engine = nullptr;
    if (sp_engine_open(2, nullptr, &engine) != SP_OK) return 1;
    std::printf("%s %d\n", sp_engine_isa(engine), sp_isa_usable("scalar") + sp_isa_usable("avx2"));
    sp_engine_close(engine);
    for (uint64_t set : {UINT64_C(0), UINT64_C(1) << 24 | UINT64_C(1) << 22, UINT64_C(1) << 25 | UINT64_C(1) << 26}) {
        asm volatile("msr fpcr, %0" ::"r"(set));
        const sp_status status = sp_selftest();
        const bool kept = mode() == set;
        asm volatile("msr fpcr, %0" ::"r"(UINT64_C(0)));
        std::printf("%s, mode %s\n", status == SP_OK ? "ok" : sp_last_error(), kept ? "kept" : "LOST");
    }
}
"""
# What `replay` asks of a sanitizer, which these builds have none of.
STUB = 'extern "C" void __sanitizer_set_death_callback(void (*)()) {}\n'


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("aarch64")
    sources = [path for path in sorted(CSRC.glob("*.cpp")) if path.name != "bindings.cpp"]

    def compiled(source: Path) -> Path:
        to = folder / f"{source.stem}.o"
        build("-c", source, "-o", to)
        return to

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, sources))


def build(*arguments: object) -> None:
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]
    command = [str(CXX), *flags, "-I", str(CSRC / "include"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(QEMU), *map(str, command)], capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_known_results_in_every_mode_of_the_host(objects: list[Path], tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text(PROGRAM)
    build("-static", tmp_path / "a.cpp", *objects, "-o", tmp_path / "a", "-pthread")
    assert run(tmp_path / "a", cwd=tmp_path).splitlines() == ["neon 1", *["ok, mode kept"] * 3]


@pytest.mark.parametrize("target", ["abi", "fix", "fix_file"])
def test_any_input_gives_the_same_on_both(objects: list[Path], tmp_path: Path, target: str) -> None:
    """The fuzz targets: blocks of all kinds through NEON and plain C++; fix files."""
    (tmp_path / "stub.cpp").write_text(STUB)
    sources = [tmp_path / "stub.cpp", FUZZ / f"{target}.cpp", FUZZ / "replay.cpp"]
    build("-static", *sources, *objects, "-o", tmp_path / "replay", "-pthread")
    corpus = Path(__file__).parent / "corpus"
    told = run(tmp_path / "replay", 3, corpus / target, corpus / "abi", cwd=tmp_path)
    assert target != "abi" or "4 engines" in told
