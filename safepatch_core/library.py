"""Where the C library lies that ships with the package: `libsafepatch`, its header, its CMake package."""

from __future__ import annotations

from pathlib import Path

from safepatch_core.errors import UsageError

_PACKAGE = Path(__file__).parent


def get_include() -> str:
    """The directory of `safepatch.h`."""
    return str(_PACKAGE / "include")


def get_library_dir() -> str:
    """The directory of `libsafepatch`, shared and static; `pkgconfig/` and `cmake/` lie in it.

    Raises UsageError if the package was not built, as in a checkout that is not installed.
    """
    found = _PACKAGE / "lib"
    if not (found / "libsafepatch.a").is_file():
        raise UsageError("the C library is not built", found=str(found), expected="an installed safepatch")
    return str(found)


def get_cmake_dir() -> str:
    """The directory of `safepatchConfig.cmake`, for `-Dsafepatch_DIR=`. Raises as `get_library_dir`."""
    return str(Path(get_library_dir()) / "cmake" / "safepatch")
