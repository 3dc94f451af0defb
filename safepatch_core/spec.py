"""Constants of the numeric contract. `SPEC.md` beside this file says what they mean."""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

SPEC_VERSION = 1


class Acts(IntEnum):
    """Who acts on an entry that is in the T of one or more patches."""

    ALONE = 0  # a patch whose T alone holds it
    ALL = 1  # every patch whose T holds it
    ELECTED = 2  # those of them whose steps c·d have the sign of the sum of all their steps
    ELECTED_UP = 3  # the same, but a sum of 0 elects the positive steps


class Join(IntEnum):
    """What the steps of those who act do to the base value w, in the order of the recipe."""

    SUM = 0  # they are added to w one by one
    MEAN = 1  # they are added up from +0 and divided by their number; that is added to w
    TOTAL = 2  # they are added up from +0; that is added to w
    WEIGHTED = 3  # they are added up from +0 and divided by the sum of their c; that is added to w


class Rule(NamedTuple):
    """How patches combine. A new rule on these axes is a row of COMBINE; a new value of an axis, work per engine."""

    acts: Acts
    join: Join


COMBINE: dict[str, Rule] = {
    "difference": Rule(Acts.ALONE, Join.SUM),
    "sum": Rule(Acts.ALL, Join.SUM),
    "ties": Rule(Acts.ELECTED, Join.MEAN),
}

# Only the table says what is allowed; mypy can't read it.
if TYPE_CHECKING:
    Combine: TypeAlias = str
else:
    Combine = Literal[tuple(COMBINE)]

# A name's place here is its number in csrc/include/safepatch.h.
Dtype = Literal["F32", "F16", "BF16"]
Kind = Literal["checkpoint", "delta", "lora"]
Importance = Literal["magnitude", "scores", "gradients"]
Weight = Literal["patched", "base", "delta"]
Order = Literal["retain-first", "select-first"]
Quota = Literal["even", "floor"]

NonFinite = Literal["error", "skip"]
Missing = Literal["error", "skip"]
Scope = Literal["tensor", "model"]
Rows = Literal["all", "common"]

ITEMSIZE: dict[str, int] = {"F32": 4, "F16": 2, "BF16": 2}

# Keys are the bits of a finite float32 score >= 0: 31 bits. A key above every score selects nothing.
KEY_BITS = 31
NO_KEY = 0xFFFF_FFFF
# A cut beyond every position takes all ties.
EVERY = (1 << 63) - 1
# In so many lanes a sum over a tensor's entries is added up (SPEC.md, "cosines").
LANES = 4096
# Retention threshold of p >= 1: above every 32-bit random number.
KEEP_ALL = 1 << 32


def numbers(names: Any) -> dict[str, int]:
    """What the C interface calls the names of one of the Literals above."""
    return {name: i for i, name in enumerate(get_args(names))}


def random_key(seed: int, patch: str, tensor: str) -> int:
    """The 64-bit Philox key of one tensor of one patch (SPEC.md, "retained"); low word first."""
    return _key(b"safepatch\0" + seed.to_bytes(8, "little") + patch.encode() + b"\0" + tensor.encode())


def rounding_key(seed: int, tensor: str) -> int:
    """The 64-bit Philox key by which one tensor's codes are rounded (SPEC.md, "quantised bases")."""
    return _key(b"safepatch-round\0" + seed.to_bytes(8, "little") + b"\0" + tensor.encode())


def _key(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def keep_threshold(retain: float) -> int:
    """Entries whose 32-bit random number lies below this survive; `KEEP_ALL` for `retain` >= 1."""
    return KEEP_ALL if retain >= 1 else int(retain * 4294967296.0)


def quota(top: float, entries: int, how: Quota = "even") -> int:
    """k = round-half-even(top * N), the product in float64; `floor`: the whole part, at least 1 of any share."""
    product = float(top) * float(entries)
    return round(product) if how == "even" else max(int(product), int(product > 0))
