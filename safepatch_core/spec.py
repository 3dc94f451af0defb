"""Constants of the numeric contract. `SPEC.md` beside this file says what they mean."""

from __future__ import annotations

import hashlib
from typing import Literal

SPEC_VERSION = 1

Dtype = Literal["F32", "F16", "BF16"]
Kind = Literal["checkpoint", "delta", "lora"]
Importance = Literal["magnitude", "scores", "gradients"]
Weight = Literal["patched", "base", "delta"]
Combine = Literal["difference", "sum", "ties"]
Order = Literal["retain-first", "select-first"]
NonFinite = Literal["error", "skip"]
Missing = Literal["error", "skip"]
Scope = Literal["tensor", "model"]

ITEMSIZE: dict[str, int] = {"F32": 4, "F16": 2, "BF16": 2}

# Keys are the bits of a finite float32 score >= 0: 31 bits. A key above every score selects nothing.
KEY_BITS = 31
NO_KEY = 0xFFFF_FFFF
# A cut beyond every position takes all ties.
EVERY = (1 << 63) - 1
# Retention threshold of p >= 1: above every 32-bit random number.
KEEP_ALL = 1 << 32


def random_key(seed: int, patch: str, tensor: str) -> int:
    """The 64-bit Philox key of one tensor of one patch (SPEC section 2, "retained"); low word first."""
    text = b"safepatch\0" + seed.to_bytes(8, "little") + patch.encode() + b"\0" + tensor.encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def keep_threshold(retain: float) -> int:
    """Entries whose 32-bit random number lies below this survive; `KEEP_ALL` for `retain` >= 1."""
    return KEEP_ALL if retain >= 1 else int(retain * 4294967296.0)


def quota(top: float, entries: int) -> int:
    """k = round-half-even(top * N), the product in float64."""
    return round(float(top) * float(entries))
