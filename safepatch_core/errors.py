"""Every failure a user can meet: one line of text and an exit status (sysexits)."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

# Names and values come from files; a name of megabytes must not flood the line.
_LONGEST = 200

# Controls, zero-width and direction marks, line separators, lone surrogates.
_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\ufeff\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: object) -> str:
    """`text` with every control character escaped, so that a name can't drive a terminal."""
    return _CONTROL.sub(lambda m: m.group().encode("unicode_escape").decode("ascii"), str(text))


def _cut(value: object) -> str | None:
    text = None if value is None else str(value)
    return text if text is None or len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


class SafepatchError(Exception):
    """Base of all errors raised on purpose; `status` is the exit status of the command line.

    `shared`: every rank of the run raises it, so the first one's line is enough.
    """

    status = 70
    shared = False

    def __init__(
        self,
        what: str,
        *,
        file: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        found: object = None,
        expected: object = None,
    ) -> None:
        self.what, self.file, self.tensor = what, file, tensor
        self.found, self.expected = found, expected
        tensor, found, expected = (_cut(x) for x in (tensor, found, expected))
        where = "" if file is None else f"{Path(file)}: "
        name = "" if tensor is None else f"tensor '{tensor}': "
        facts = "" if found is None else f": found {found}"
        if expected is not None:
            facts += f"{',' if facts else ':'} expected {expected}"
        super().__init__(printable(f"{where}{name}{what}{facts}"))


class UsageError(SafepatchError):
    """Bad usage or recipe."""

    status = 64


class InputError(SafepatchError):
    """An input file, its table or its contents break the rules."""

    status = 65


class OutputError(SafepatchError):
    """The output can't be created where it was asked for."""

    status = 73


class IOFailure(SafepatchError):
    """Reading or writing failed while running; what was published before is untouched."""

    status = 74


class Busy(SafepatchError):
    """Another run holds the output."""

    status = 75


class Stopped(BaseException):
    """Stopped by a signal; `--resume` goes on.

    Like KeyboardInterrupt it may be raised anywhere, so it is no Exception: what handles any failure of a library,
    and what the standard library does where a thread can't be started, must not take it for one. A launcher stops all
    ranks.
    """

    status = 75
    shared = True


def lacks_memory(error: Exception) -> bool:
    """Memory may also lack for a mapping, a thread or a library that is loaded late."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and "can't start new thread" in str(error))
        or (
            isinstance(error, ImportError)
            and ("failed to map segment" in str(error) or "cannot allocate" in str(error))
        )
    )
