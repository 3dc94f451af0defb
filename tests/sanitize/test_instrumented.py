"""Under `make test-asan` the engine is the instrumented one, and the sanitizer does end the process."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from safepatch_core import _engine, get_library_dir

SANITIZED = os.environ.get("SAFEPATCH_SANITIZED")
pytestmark = pytest.mark.skipif(not SANITIZED, reason="only under make test-asan")


def test_the_instrumented_engine_is_loaded() -> None:
    assert SANITIZED is not None
    assert Path(_engine.__file__).is_relative_to(Path(SANITIZED).resolve())
    library = Path(get_library_dir()) / f"libsafepatch.so.{_engine.abi_version()}"
    assert library.is_relative_to(Path(SANITIZED).resolve()) and b"__asan_init" in library.read_bytes()
    assert hasattr(ctypes.CDLL(None), "__asan_init"), "the runtime is not preloaded"


def test_a_write_past_a_buffer_is_reported() -> None:
    """One entry more than the buffer has, through the C interface."""
    code = """
import ctypes
from safepatch_core import _engine
class Bits(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32)]
class Block(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("base", Bits), ("entries", ctypes.c_int64), ("start", ctypes.c_int64),
                ("patches", ctypes.c_void_p), ("count", ctypes.c_size_t), ("acts", ctypes.c_int32),
                ("join", ctypes.c_int32), ("order", ctypes.c_int32), ("progress", ctypes.c_void_p),
                ("user", ctypes.c_void_p)]
lib, libc = ctypes.CDLL(_engine.__file__), ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
base, out, engine = libc.malloc(4096), libc.malloc(4096), ctypes.c_void_p()
assert lib.sp_engine_open(1, b"scalar", ctypes.byref(engine)) == 0
block = Block(ctypes.sizeof(Block), Bits(base, 0), 1025, 0, None, 0, 0, 0, 0, None, None)
report = (ctypes.c_int64 * 6)(48)
lib.sp_apply(engine, ctypes.byref(block), None, ctypes.c_void_p(out), ctypes.byref(report))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert ended.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in ended.stderr, ended.stderr
