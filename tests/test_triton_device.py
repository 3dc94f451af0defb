"""Where the Triton engine can't run, it says why; finding that out costs no import of torch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

from safepatch_core.backends import device
from safepatch_core.backends.device import open_device, usable
from safepatch_core.backends.triton import TritonBackend
from safepatch_core.errors import UsageError


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    find = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name in names else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


@pytest.mark.parametrize("names", [("torch",), ("triton",), ("torch", "triton")])
def test_missing_packages_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    hide(monkeypatch, *names)
    reason = f"{' and '.join(names)} not installed; try: pip install 'safepatch[triton]'"
    assert usable() == reason
    for interpret in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        with pytest.raises(UsageError) as refusal:
            TritonBackend()
        assert str(refusal.value) == f"the triton engine can't run here: {reason}" and refusal.value.status == 64


def test_no_driver_is_noticed_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(device, "DRIVERS", ("/nowhere",))
    assert usable() == "no GPU driver here"
    with pytest.raises(UsageError, match="the triton engine can't run here: no GPU driver here"):
        open_device("cuda:0")


def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(device, "DRIVERS", ("/dev/null",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert usable() == "torch sees no GPU"


def test_asking_whether_a_gpu_is_usable_imports_nothing_heavy() -> None:
    code = (
        "import sys; from safepatch_core.backends import device, triton; device.DRIVERS = (); device.usable();"
        "print(sorted({'torch', 'triton'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
