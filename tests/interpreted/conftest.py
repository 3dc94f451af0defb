"""Here kernels run on the CPU. Triton decides when it is imported whether it interprets or compiles, for good.

So this folder has a session of its own: `pytest` leaves it out, `pytest tests/interpreted` (or any part of it) is it.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

if "triton" not in sys.modules:
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

if any(importlib.util.find_spec(name) is None for name in ("torch", "triton")):
    collect_ignore_glob = ["test_*.py"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    from safepatch_core.kernels.launch import INTERPRETED

    if not INTERPRETED:
        pytest.skip("triton was imported before and compiles; run tests/interpreted alone")
