"""Sizes as people write them. Imports nothing heavy: `apply` needs no more of the settings."""

from __future__ import annotations

import re

from safepatch_core.errors import UsageError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str | int) -> int:
    """Bytes of "5GB" (decimal), "64MiB" (binary) or a plain number; raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if isinstance(text, bool) or match is None or match[2].upper() not in UNITS:
        raise ValueError("not a size like 500MB, 5GB or 2GiB")
    nbytes = int(float(match[1]) * UNITS[match[2].upper()])
    if nbytes < 1:
        raise ValueError("a size must be at least one byte")
    return nbytes


def size(text: str | int | None) -> int | None:
    """Bytes, as `parse_size`, of an optional size that is no field of a model.

    Raises:
        UsageError: it is no size.
    """
    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise UsageError(str(error), found=repr(text)) from None
