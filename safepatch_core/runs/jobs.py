"""What `run` and `sweep` share: a YAML file of settings, and a folder of outputs that a later run goes on with."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from safepatch_core.errors import InputError, UsageError
from safepatch_core.files.disk import failures_named, hash_file, hold, replacing
from safepatch_core.files.filenames import SUMS
from safepatch_core.version import __version__

M = TypeVar("M", bound=BaseModel)


class OutputFolder:
    """OUT, held by this process alone while the context lasts; what was refused before a step was begun is gone.

    Raises OutputError if the directory can't be created, InputError if it isn't empty without `resume`, Busy if
    another process holds it.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool) -> None:
        self.path, self._resume = Path(path), resume
        self._written: set[str] = set()

    def __enter__(self) -> OutputFolder:
        self._lock = hold(self.path, "output")
        if any(self.path.iterdir()) and not self._resume:
            os.close(self._lock)
            raise InputError("the output exists and is not empty; --resume goes on with it", file=self.path)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with contextlib.suppress(OSError):
            if isinstance(error, InputError | UsageError) and set(os.listdir(self.path)) <= self._written:
                for name in self._written:  # notes for steps of which none was begun
                    (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()
        os.close(self._lock)

    def write(self, name: str, content: str | bytes) -> Path:
        """OUT/name, replaced by one rename once it is on the disk."""
        target = self.path / name
        with failures_named(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        self._written.add(name)
        return target


def weights_digest(merged: Path) -> str:
    """SHA-256 over the lines of a merged checkpoint's SHA256SUMS that name safetensors files.

    `grep safetensors SHA256SUMS | sha256sum` gives the same.
    """
    lines = (merged / SUMS).read_text("utf-8").splitlines(keepends=True)
    return _digest_of(line for line in lines if ".safetensors" in line)


def files_digest(merged: Path) -> str:
    """`weights_digest` of a checkpoint that was written without sums: its files are read."""
    names = sorted(path.name for path in merged.iterdir() if ".safetensors" in path.name)
    return _digest_of(f"{hash_file(merged / name)}  {name}\n" for name in names)


def _digest_of(lines: Iterable[str]) -> str:
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Of what models are measured with: their figures may differ in the last bits."""
    found = {"safepatch": __version__}
    for library in ("torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[library] = version(library)
    return found
