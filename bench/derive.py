"""Training a patch beside transformers.Trainer: same model, rows, optimiser and threads, each in its own process."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

from .measure import Red, Skipped, alternate, run
from .models import SHAPES
from .registry import Bench, Case, Measured

SCRIPT = Path(__file__).resolve().parent / "derive_steps.py"
STEPS, ROWS, LENGTH = 4, 4, 96
ALLOWANCE = 1.15  # of weights and optimiser state, for the peak of memory
AGREE = 1e-4  # relative; a sum in another order
WHO = ("safepatch", "trainer")


def steps_of(
    bench: Bench, who: str, model: Path, what: str, steps: int, recompute: bool, device: str = "cpu"
) -> dict[str, Any]:
    """What `derive_steps.py` prints."""
    words = [sys.executable, "-P", str(SCRIPT), who, str(model), what]
    words += [str(steps), str(ROWS), str(LENGTH), str(int(recompute)), device]
    env = {"OMP_NUM_THREADS": str(bench.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found: dict[str, Any] = json.loads(run(words, timeout=bench.timeout, env=env)[1].splitlines()[-1])
    return found


def _gate(what: str, recompute: bool, bench: Bench) -> None:
    """Both lose the same NLL, step by step, on a small model."""
    missing = [name for name in ("torch", "transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"{', '.join(missing)} is not installed")
    base = bench.models(SHAPES["tiny"]) / "base"
    ours, theirs = (steps_of(bench, who, base, what, 3, recompute)["losses"] for who in WHO)
    if len(ours) != len(theirs) or not all(map(partial(math.isclose, rel_tol=AGREE), ours, theirs)):
        raise Red(f"other losses than the Trainer's: {ours}, {theirs}")


def _measure(shape: str, what: str, recompute: bool, bench: Bench) -> Measured:
    base = bench.models(SHAPES[shape]) / "base"
    facts: dict[str, Any] = {"tokens_per_step": ROWS * LENGTH, "allowance": ALLOWANCE}

    def subject(who: str) -> dict[str, float]:
        found = steps_of(bench, who, base, what, STEPS, recompute)
        needed = found["weight_bytes"] + found["state_bytes"]
        facts["weight_and_state_bytes"] = needed
        return {
            "wall_s": found["wall_s"],
            "cpu_s": found["cpu_s"],
            "peak_bytes": found["peak_bytes"],
            "tokens/s": found["tokens"] / found["wall_s"],
            "tokens/cpu_s": found["tokens"] / found["cpu_s"],
            "peak/(weights+state)": found["peak_bytes"] / needed,
        }

    series = alternate({who: partial(subject, who) for who in WHO}, bench.rounds)
    return Measured(series, [("trainer", "safepatch")], facts)


def cases() -> list[Case]:
    """Cases of the group `derive`."""
    return [
        Case(
            f"derive/{shape}/{what}/{'recomputed' if recompute else 'kept'}",
            f"{STEPS} steps of {ROWS}×{LENGTH} tokens of {shape} ({what} weights, activations "
            f"{'recomputed' if recompute else 'kept'}) beside transformers.Trainer",
            {"shape": shape, "entries": SHAPES[shape].entries, "trainable": what, "recompute": recompute},
            partial(_gate, what, recompute),
            partial(_measure, shape, what, recompute),
            short=(shape, what, recompute) == ("0.1B", "linear", True),
        )
        for shape in ("0.1B", "SmolLM2-135M", "1.1B")
        for what in ("linear", "all")
        for recompute in (False, True)
    ]
