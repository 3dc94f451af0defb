"""Going on with what was done: the identity of a run, and the JSON record that carries it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safepatch_core.errors import InputError

IDENTITY = "identity"  # where a record keeps it


def digest(value: object) -> str:
    """SHA-256 of plain data, whatever the order of its keys, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What makes two runs the same run: named parts, plain data each (or digests of it)."""

    parts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return digest(dict(self.parts))

    def differing(self, before: Mapping[str, Any]) -> list[str]:
        """Names of the parts that an earlier run had otherwise."""
        return sorted(k for k in before.keys() | self.parts.keys() if before.get(k) != self.parts.get(k))

    def require(self, before: Mapping[str, Any], file: Path, *, shown: bool = False) -> None:
        """Go on only with the same run.

        Args:
            before: the parts that `file` remembers.
            file: what the complaint names.
            shown: say both values of the first part that differs; for parts that people wrote.

        Raises:
            InputError: a part differs.
        """
        differing = self.differing(before)
        if differing:
            first = differing[0]
            raise InputError(
                f"--resume: the interrupted run had another {', '.join(differing)}",
                file=file,
                found=self.parts.get(first) if shown else None,
                expected=before.get(first) if shown else None,
            )


def read_record(
    file: Path, what: str, parts: Callable[[Any], Mapping[str, Any]] = lambda record: dict(record[IDENTITY])
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """A JSON object that an earlier run left, and the parts of its identity in it.

    Raises:
        InputError: it is not the record of a `what`.
    """
    try:
        record: dict[str, Any] = json.loads(file.read_bytes())
        return record, parts(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"not the record of a {what}", file=file) from error
