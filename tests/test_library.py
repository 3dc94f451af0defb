"""libsafepatch as its users find it: by the usual tools, one binary for Python and C, nothing shown but sp_*."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import safepatch_core
from safepatch_core import _engine

CSRC = Path(__file__).parents[1] / "csrc"
HEADER = Path(safepatch_core.get_include()) / "safepatch.h"
LIB = Path(safepatch_core.get_library_dir())
CC = shutil.which("gcc")
ABI = re.search(r"#define SP_ABI_VERSION (\d+)", HEADER.read_text())

pytestmark = pytest.mark.skipif(CC is None, reason="needs gcc")

PROGRAM = r"""
#include <safepatch.h>
#include <stdio.h>
int main(void) {
    printf("%s %u %u %d\n", sp_version_string(), (unsigned)sp_abi_version(), (unsigned)sp_spec_version(),
           sp_isa_usable("scalar"));
    return 0;
}
"""


def run(*command: object, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def expected() -> str:
    return f"{safepatch_core.__version__} {_engine.abi_version()} {_engine.spec_version()} 1\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "program.c"
    path.write_text(PROGRAM)
    return path


def flags(*options: str) -> list[str]:
    return run(sys.executable, "-m", "safepatch_core", "config", *options).split()


@pytest.mark.parametrize("link", ["--libs", "--static"])
def test_the_flags_of_config_suffice(source: Path, link: str) -> None:
    run(CC, "-std=c99", source, *flags("--cflags", link), "-o", source.with_suffix(""))
    assert run(source.with_suffix("")) == expected()
    needed = run("readelf", "-d", source.with_suffix(""))
    assert ("libsafepatch" in needed) == (link == "--libs")


@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="needs pkg-config")
@pytest.mark.parametrize("static", [False, True])
def test_pkg_config_finds_it_wherever_the_package_lies(source: Path, static: bool, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(LIB, moved / "lib")
    shutil.copytree(HEADER.parent, moved / "include")
    env = {
        "PATH": "/usr/bin:/bin",
        "PKG_CONFIG_PATH": str(moved / "lib/pkgconfig"),
        "LD_LIBRARY_PATH": str(moved / "lib"),
    }
    if static:
        (moved / "lib/libsafepatch.so").unlink()  # so that the linker takes the other one
    words = run("pkg-config", "--cflags", "--libs", *["--static"] * static, "safepatch", env=env).split()
    assert all(str(moved) in w for w in words if w.startswith(("-I", "-L")))
    run(CC, "-std=c99", source, *words, "-o", source.with_suffix(""))
    assert run(source.with_suffix(""), env=env) == expected()
    assert run("pkg-config", "--modversion", "safepatch", env=env).strip() == safepatch_core.__version__


PROJECT = """
cmake_minimum_required(VERSION 3.16)
project(program LANGUAGES C)
find_package(safepatch 0.1 CONFIG REQUIRED)
add_executable(shared program.c)
target_link_libraries(shared safepatch::safepatch)
add_executable(static program.c)
target_link_libraries(static safepatch::static)
"""


def build_with_cmake(project: Path, text: str, *options: str) -> Path:
    (project / "CMakeLists.txt").write_text(text)
    build = project / "build"
    run("cmake", "-S", project, "-B", build, *options)
    run("cmake", "--build", build, "-j2")
    return build


needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")


@needs_cmake
@pytest.mark.parametrize("option", ["-Dsafepatch_DIR={cmake}", "-DCMAKE_PREFIX_PATH={prefix}"])
def test_cmake_finds_it(source: Path, option: str) -> None:
    given = option.format(cmake=safepatch_core.get_cmake_dir(), prefix=LIB.parent)
    build = build_with_cmake(source.parent, PROJECT, given)
    assert run(build / "shared") == run(build / "static") == expected()


@needs_cmake
def test_cmake_refuses_a_version_that_is_not_there(source: Path) -> None:
    (source.parent / "CMakeLists.txt").write_text(PROJECT.replace("0.1 CONFIG", "9.1 CONFIG"))
    command = [
        "cmake",
        "-S",
        str(source.parent),
        "-B",
        str(source.parent / "b"),
        f"-Dsafepatch_DIR={safepatch_core.get_cmake_dir()}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and f"version: {safepatch_core.__version__}" in done.stderr


@needs_cmake
@pytest.mark.skipif(not CSRC.is_dir(), reason="needs the sources")
def test_cmake_builds_and_installs_it_without_python(source: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "usr"
    run("cmake", "-S", CSRC, "-B", tmp_path / "b", "-DCMAKE_BUILD_TYPE=Debug", f"-DCMAKE_INSTALL_PREFIX={prefix}")
    run("cmake", "--build", tmp_path / "b", "-j2")
    run("cmake", "--install", tmp_path / "b")
    build = build_with_cmake(source.parent, PROJECT, f"-DCMAKE_PREFIX_PATH={prefix}")
    assert run(build / "shared") == run(build / "static") == expected()
    (found,) = prefix.rglob(f"libsafepatch.so.{_engine.abi_version()}")
    assert shown(found) == shown(LIB / f"libsafepatch.so.{_engine.abi_version()}")
    (pc,) = prefix.rglob("safepatch.pc")
    where = run(
        "pkg-config", "--cflags", "safepatch", env={"PATH": "/usr/bin:/bin", "PKG_CONFIG_PATH": str(pc.parent)}
    )
    assert (Path(where.strip().removeprefix("-I")) / "safepatch.h").is_file()


def shown(library: Path) -> set[str]:
    return {line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()}


def test_the_library_shows_the_header_and_nothing_else() -> None:
    declared = set(
        re.findall(r"\b(sp_\w+)\(", "".join(re.findall(r"^SP_API [^;]+;", HEADER.read_text(), re.M | re.S)))
    )
    assert shown(LIB / f"libsafepatch.so.{_engine.abi_version()}") == declared and "sp_merge" in declared


def test_its_name_carries_the_abi_and_python_runs_the_same_binary() -> None:
    name = f"libsafepatch.so.{_engine.abi_version()}"
    assert f"soname: [{name}]" in run("readelf", "-d", LIB / name)
    loaded = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if name in line}
    assert loaded == {(LIB / name).resolve()}
    assert "sp_merge" not in shown(Path(_engine.__file__))


def test_versions_are_one() -> None:
    assert _engine.version() == safepatch_core.__version__ == metadata.version("safepatch")
    from safepatch_core.spec import SPEC_VERSION

    assert _engine.spec_version() == SPEC_VERSION


def test_build_tools_find_it_by_entry_points() -> None:
    """pkgconf and scikit-build-core import the module that is named, and look in its folder."""
    for group, inside in [
        ("pkg_config", "safepatch.pc"),
        ("cmake.prefix", "lib/cmake/safepatch/safepatchConfig.cmake"),
    ]:
        (point,) = (p for p in metadata.entry_points(group=group) if p.name == "safepatch")
        assert any((Path(folder) / inside).is_file() for folder in point.load().__path__), group
