"""Packages are listed by hand.

`kernels/`, `bench/` and `csrc/include/` are links inside `safepatch_core`: one name serves the interpreter, mypy and
editors. The evidence (`bench/psa`) stays in the repository.
"""

from __future__ import annotations

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

HERE = Path(__file__).parent
# -ffp-contract=off: the contract allows no fused multiply-add, and GCC fuses even intrinsics without it.
# -fno-trapping-math: nobody reads the exception flags, and with them loops of floats that choose are no vectors.
FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra"]
HEADER = (HERE / "csrc/include/safepatch.h").read_text()
BINDINGS = "csrc/bindings.cpp"
SOURCES = sorted({str(path.relative_to(HERE)) for path in (HERE / "csrc").glob("*.cpp")} - {BINDINGS})
DEPENDS = sorted(
    str(path.relative_to(HERE))
    for pattern in ("*.cpp", "*.h", "*.inl", "*.map", "*.in", "cmake/*", "include/*.h")
    for path in (HERE / "csrc").glob(pattern)
)


def macro(name: str) -> str:
    """The number that the header gives a name."""
    found = re.search(rf"#define {name} (\d+)", HEADER)
    assert found is not None, name
    return found[1]


ABI = macro("SP_ABI_VERSION")
SHARED = f"libsafepatch.so.{ABI}"
VALUES = {
    "version": ".".join(macro(f"SP_VERSION_{part}") for part in ("MAJOR", "MINOR", "PATCH")),
    "abi": ABI,
    "include": "../../include",
}


class BuildExt(build_ext):
    """Builds libsafepatch in `safepatch_core/lib`, then the extension, which is linked to it.

    `SAFEPATCH_CXXFLAGS` adds flags (the sanitizer builds use it).
    """

    def build_extensions(self) -> None:
        extra = os.environ.get("SAFEPATCH_CXXFLAGS", "").split()
        (extension,) = self.extensions
        lib = Path(self.get_ext_fullpath(extension.name)).parent / "lib"
        lib.mkdir(parents=True, exist_ok=True)
        self.build_library(lib, [*FLAGS, *extra], [*extra, "-pthread"])
        extension.extra_compile_args += FLAGS + extra
        extension.extra_link_args += [*extra, str(lib / SHARED), "-Wl,-rpath,$ORIGIN/lib"]
        super().build_extensions()

    def build_library(self, lib: Path, compile_flags: list[str], link_flags: list[str]) -> None:
        """libsafepatch, shared and static, and the files by which pkg-config and CMake find it."""

        def compiled(source: str) -> str:
            # One at a time, so that they run beside each other.
            (found,) = self.compiler.compile(
                [source],
                self.build_temp,
                include_dirs=["csrc/include"],
                extra_postargs=["-std=c++20", *compile_flags],
            )
            return str(found)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(compiled, SOURCES))
        self.compiler.create_static_lib(objects, "safepatch", output_dir=str(lib))
        script = ["-Wl,--version-script=csrc/safepatch.map", f"-Wl,-soname,{SHARED}", *link_flags]
        self.compiler.link_shared_object(objects, str(lib / SHARED), extra_postargs=script, target_lang="c++")
        # A wheel holds no links, so the name that -lsafepatch looks for is a linker script.
        (lib / "libsafepatch.so").write_text(f"INPUT({SHARED})\n")
        fill("csrc/safepatch.pc.in", lib / "pkgconfig")
        fill("csrc/cmake/safepatchConfig.cmake.in", lib / "cmake/safepatch")
        fill("csrc/cmake/safepatchConfigVersion.cmake.in", lib / "cmake/safepatch")

    def copy_extensions_to_source(self) -> None:
        """An editable install has the library in its source tree, as it has the extension."""
        super().copy_extensions_to_source()
        shutil.copytree(Path(self.build_lib, "safepatch_core/lib"), HERE / "safepatch_core/lib", dirs_exist_ok=True)


def fill(template: str, folder: Path) -> None:
    """Write a template into a folder with its @names@ replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"@(\w+)@", lambda name: VALUES[name[1]], (HERE / template).read_text())
    (folder / Path(template).stem).write_text(text)


setup(
    ext_modules=[
        Pybind11Extension(
            "safepatch_core._engine",
            [BINDINGS],
            include_dirs=["csrc/include"],
            depends=DEPENDS,
            cxx_std=20,
        )
    ],
    cmdclass={"build_ext": BuildExt},
    packages=[
        "safepatch_core",
        "safepatch_core.backends",
        "safepatch_core.commands",
        "safepatch_core.data.demo",
        "safepatch_core.deriving",
        "safepatch_core.evaluating",
        "safepatch_core.files",
        "safepatch_core.fixes",
        "safepatch_core.integrations",
        "safepatch_core.language",
        "safepatch_core.merging",
        "safepatch_core.merging.quantised",
        "safepatch_core.merging.quantised.layouts",
        "safepatch_core.merging.sources",
        "safepatch_core.runs",
        "safepatch_core.runs.sweep",
        "safepatch_core.include",
        "safepatch_core.kernels",
        "safepatch_core.bench",
    ],
    package_data={
        "safepatch_core": ["py.typed", "*.pyi", "*.md", "*.json", "*.css"],
        "safepatch_core.data.demo": ["*"],
        "safepatch_core.evaluating": ["*.html", "*.json"],
        "safepatch_core.include": ["*.h"],
    },
)
