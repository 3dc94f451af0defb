"""`safepatch config`: what a compiler needs to be told to use the C library."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from safepatch_core.errors import UsageError


@click.command(name="config")
@click.option("--cflags", is_flag=True, help="Flags for compiling.")
@click.option("--libs", is_flag=True, help="Flags for linking; the program finds the library where it lies now.")
@click.option("--static", is_flag=True, help="--libs of the static library.")
@click.option("--cmake-dir", is_flag=True, help="For -Dsafepatch_DIR=.")
@click.option("--pkg-config-dir", is_flag=True, help="For PKG_CONFIG_PATH.")
def command(cflags: bool, libs: bool, static: bool, cmake_dir: bool, pkg_config_dir: bool) -> None:
    """Flags for compiling and linking with the C library, all on one line."""
    from safepatch_core.library import get_cmake_dir, get_include, get_library_dir

    words = [f"-I{get_include()}"] if cflags else []
    lib = Path(get_library_dir())
    if static:
        words += [str(lib / "libsafepatch.a"), "-lstdc++", "-lm", "-pthread"]
    elif libs:
        words += [f"-L{lib}", "-lsafepatch", f"-Wl,-rpath,{lib}"]
    if cmake_dir:
        words.append(get_cmake_dir())
    if pkg_config_dir:
        words.append(str(lib / "pkgconfig"))
    if not words:
        raise UsageError("nothing asked for", expected="--cflags, --libs, --static, --cmake-dir or --pkg-config-dir")
    click.echo(shlex.join(words))
