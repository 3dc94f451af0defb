"""The engines' passes by themselves, on data in memory, beside a memory copy of the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np

from safepatch_core.backends import open_backend
from safepatch_core.backends.contract import Backend, Bits, Block, Cut, Lora, PatchData, Window
from safepatch_core.backends.reference import ReferenceBackend
from safepatch_core.backends.select import COARSE, FINE, LOW_BITS
from safepatch_core.errors import UsageError
from safepatch_core.spec import COMBINE, keep_threshold, quota, random_key

from . import models
from .floor import memcpy_subject
from .measure import Red, Skipped, alternate
from .registry import Bench, Case, Measured

Source = Literal["checkpoint", "delta", "lora", "gradients"]
SOURCES: tuple[Source, ...] = ("checkpoint", "delta", "lora", "gradients")
PASSES = ("histogram", "count_equal", "apply", "merge")
ENGINES = ("cpu-scalar", "cpu-avx2", "cpu-avx512", "triton", "reference")
COLS = 2048
ENTRIES = 4096 * COLS  # 48 MB of inputs and output: larger than most caches
SMALL = 128 * COLS  # for the reference
SECONDS = 0.2  # at least, per round


def open_engine(name: str, threads: int) -> Backend:
    """An engine by the name of its cases. Raises Skipped where it can't run here."""
    try:
        if name.startswith("cpu-"):
            from safepatch_core.backends.cpu import CpuBackend

            return CpuBackend(threads, name.removeprefix("cpu-"))
        return open_backend(name, threads=threads)
    except UsageError as error:
        raise Skipped(str(error)) from None


def make_block(source: Source, entries: int, start: int = 0) -> Block:
    """A block like those of a merge with the suite's recipe: bfloat16, two patches."""
    pools = models.pools(0)

    def stretch(part: str, at: int = 0) -> Bits:
        return Bits(np.resize(pools[part][at:], entries), "BF16")

    def lora(part: str) -> Lora:
        rows = (start + entries) // COLS + 1
        a, b = (np.resize(pools[part][at:], n * models.RANK) for at, n in ((0, COLS), (7, rows)))
        wide = [(x.astype(np.uint32) << np.uint32(16)).view(np.float32) for x in (a, b)]
        return Lora(wide[0].reshape(models.RANK, COLS), wide[1].reshape(rows, models.RANK), 2.0)

    patches = []
    for name in models.PATCHES:
        part = f"{name}/delta" if source == "delta" else name
        patches.append(
            PatchData(
                kind="checkpoint" if source == "gradients" else source,
                values=lora(part) if source == "lora" else stretch(part),
                importance="gradients" if source == "gradients" else "magnitude",
                scores=stretch(f"{name}/delta", 5) if source == "gradients" else None,
                weight="patched",
                random_key=random_key(0, name, "kernels"),
                keep=keep_threshold(models.RETAIN),
                scale=1.0,
            )
        )
    return Block(stretch("base"), start, COLS, tuple(patches), COMBINE["difference"], "retain-first")


def block_bytes(block: Block, pass_: str) -> int:
    """Bytes of the block that a pass reads and writes at least; LoRA factors are few and not counted."""
    total = block.base.data.nbytes * (2 if pass_ in ("apply", "merge") else 1)
    for patch in block.patches:
        for bits in (patch.values, patch.scores) if patch else ():
            total += bits.data.nbytes if isinstance(bits, Bits) else 0
    return total


def quotas(block: Block) -> list[int]:
    return [quota(models.TOP[name], len(block)) for name in models.PATCHES]


def windows(cuts: Sequence[Cut]) -> list[list[Window]]:
    """What a sweep counts: all keys coarsely, and finely the bin that holds the threshold."""
    return [
        [
            Window(0, LOW_BITS, np.zeros(COARSE, np.int64)),
            Window(cut.key >> LOW_BITS << LOW_BITS, 0, np.zeros(FINE, np.int64)),
        ]
        for cut in cuts
    ]


def make_pass(engine: Backend, pass_: str, block: Block, cuts: Sequence[Cut]) -> Callable[[], object]:
    """One call of a pass, ready to be repeated; what it returns tells right from wrong."""
    out = np.zeros_like(block.base.data)
    counts = windows(cuts)
    keys, wanted = [cut.key for cut in cuts], quotas(block)

    def histogram() -> object:
        return engine.histogram(block, counts), [w.counts for of in counts for w in of]

    def count_equal() -> object:
        return engine.count_equal(block, keys)

    def apply() -> object:
        return engine.apply(block, cuts, out), [out]

    def merge() -> object:
        return engine.merge(block, wanted, out), [out]

    return {"histogram": histogram, "count_equal": count_equal, "apply": apply, "merge": merge}[pass_]


def _gate(name: str, pass_: str, source: Source, bench: Bench) -> None:
    """The engine and the reference agree on a block that starts and ends in the middle of everything."""
    engine, reference = open_engine(name, bench.threads), ReferenceBackend()
    block = make_block(source, 20_011, start=1_003)
    cuts, _ = reference.merge(block, quotas(block), np.zeros_like(block.base.data))
    found = [make_pass(e, pass_, block, cuts)() for e in (engine, reference)]
    if repr(found[0]) != repr(found[1]) or _arrays(found[0]) != _arrays(found[1]):
        raise Red(f"{name} and the reference disagree on {pass_} of {source}")


def _arrays(found: object) -> list[bytes]:
    return [array.tobytes() for array in found[1]] if isinstance(found, tuple) else []


def _measure(name: str, pass_: str, source: Source, bench: Bench) -> Measured:
    entries = SMALL if name == "reference" else ENTRIES
    block = make_block(source, entries)
    nbytes = block_bytes(block, pass_)
    cuts, _ = open_engine(name, bench.threads).merge(block, quotas(block), np.zeros_like(block.base.data))

    def subject(threads: int) -> Callable[[], dict[str, float]]:
        call = make_pass(open_engine(name, threads), pass_, block, cuts)
        call()

        def timed() -> dict[str, float]:
            repeats, begin = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - begin) < SECONDS or not repeats:
                call()
                repeats += 1
            return {
                "entries_per_s": repeats * entries / elapsed,
                "bytes_per_s": repeats * nbytes / elapsed,
                "ns_per_entry": 1e9 * elapsed / repeats / entries,
            }

        return timed

    counts = sorted({1, bench.threads}) if name.startswith("cpu") else [1]
    subjects = {f"{n} thread{'s' if n > 1 else ''}": subject(n) for n in counts}
    series = alternate(subjects | {"memcpy": memcpy_subject()}, max(bench.rounds, 3))
    return Measured(series, [], {"entries": entries, "bytes_per_entry": nbytes / entries})


def cases() -> list[Case]:
    """Cases of the group `kernels`."""
    return [
        Case(
            f"kernels/{engine}/{pass_}/{source}",
            f"{pass_} of {source} patches by the {engine} engine, in memory",
            {"engine": engine, "pass": pass_, "source": source},
            partial(_gate, engine, pass_, source),
            partial(_measure, engine, pass_, source),
            short=source == "checkpoint" and engine != "reference",
        )
        for engine in ENGINES
        for pass_ in PASSES
        for source in SOURCES
    ]
