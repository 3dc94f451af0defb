"""Packages are listed by hand.

`kernels/` and `bench/` are links inside `safepatch_core`: one name serves the interpreter, mypy and editors.
`csrc/include/` ships inside it too; the evidence (`bench/psa`) stays in the repository.
"""

from __future__ import annotations

import os
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

HERE = Path(__file__).parent
# -ffp-contract=off: the contract allows no fused multiply-add, and GCC fuses even intrinsics without it.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]


class BuildExt(build_ext):
    """Compiles the sources in parallel; `SAFEPATCH_CXXFLAGS` adds flags (the sanitizer builds use it)."""

    def build_extensions(self) -> None:
        extra = os.environ.get("SAFEPATCH_CXXFLAGS", "").split()
        for extension in self.extensions:
            extension.extra_compile_args += FLAGS + extra
            extension.extra_link_args += [*extra, "-pthread"]
        super().build_extensions()


setup(
    ext_modules=[
        Pybind11Extension(
            "safepatch_core._engine",
            sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc").glob("*.cpp")),
            include_dirs=["csrc/include", "csrc"],
            depends=sorted(
                str(path.relative_to(HERE))
                for pattern in ("*.h", "*.inl", "include/*.h")
                for path in (HERE / "csrc").glob(pattern)
            ),
            cxx_std=20,
        )
    ],
    cmdclass={"build_ext": BuildExt},
    packages=[
        "safepatch_core",
        "safepatch_core.backends",
        "safepatch_core.commands",
        "safepatch_core.deriving",
        "safepatch_core.evaluating",
        "safepatch_core.files",
        "safepatch_core.fixes",
        "safepatch_core.language",
        "safepatch_core.merging",
        "safepatch_core.merging.sources",
        "safepatch_core.runs",
        "safepatch_core.runs.sweep",
        "safepatch_core.include",
        "safepatch_core.kernels",
        "safepatch_core.bench",
    ],
    package_dir={
        "safepatch_core.include": "csrc/include",
    },
    package_data={
        "safepatch_core": ["py.typed", "*.pyi", "*.md", "data/demo/*"],
        "safepatch_core.evaluating": ["*.html"],
        "safepatch_core.include": ["*.h"],
    },
)
