"""How kernels are launched: the block size, the compiler options that keep IEEE arithmetic, and `Launch`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
# Entries per program. Eight per thread (VECTOR) make one 16-byte access of 16-bit entries. The interpreter pays
# per operation, not per entry, so it gets long blocks.
BLOCK = 1 << 14 if INTERPRETED else 1 << 10
VECTOR = 8  # entries per thread
ALIGN = 16  # pieces start at multiples of it in their tensor, which makes vectors and Philox counters whole
COPIES = 32  # of every counter that programs add to, so that they don't queue at one address
HISTOGRAMS = 8  # likewise, of histograms, where ties make single bins popular


def options(warp: int) -> dict[str, Any]:
    """Compiler options for a device whose warps have `warp` lanes; fusion off because SPEC rounds twice."""
    return {"enable_fp_fusion": False, "num_warps": BLOCK // VECTOR // warp if not INTERPRETED else 4}


def padded(entries: int) -> int:
    """Entries a buffer must hold: kernels read and write whole blocks and mind only those inside."""
    return -(-entries // BLOCK) * BLOCK


class Launch(NamedTuple):
    """A kernel with its grid and arguments, ready to run (or to compile ahead of time)."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]

    def run(self, warp: int = 32) -> None:
        """Enqueue on the current stream of the current device."""
        if self.programs:
            with np.errstate(all="ignore"):
                self.kernel[(self.programs,)](*self.args, **options(warp))
