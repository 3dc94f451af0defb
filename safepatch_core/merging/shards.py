"""The output's shards, one after another or several at once: each with a reader, a hash and a writer of its own.

One thread reads for a shard and one SHA-256 runs over it, about 2 GB/s on current cores: a fast disk and many cores
have more to give. The bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from threading import Lock, Thread
from typing import Any

from safepatch_core.files.staging import Staging
from safepatch_core.merging.layout import OutputPart
from safepatch_core.merging.pipeline import Trace
from safepatch_core.merging.plan import Plan
from safepatch_core.merging.sink import CheckpointSink
from safepatch_core.merging.stream import Counts, Merge
from safepatch_core.ranks import Ranks
from safepatch_core.threads import room_for_a_thread


class _Stop(Exception):
    """Another stream has failed, or the run is stopped: this one is to end."""


class _Shared:
    """What the streams of one merge share: the parts that are left, progress, and whether to go on."""

    def __init__(self, parts: Sequence[OutputPart], advance: Callable[[int], None]) -> None:
        self._parts, self._advance, self._lock = iter(parts), advance, Lock()
        self.stopped = False
        self.failures: list[BaseException] = []

    def parts(self) -> Iterator[OutputPart]:
        """Parts for one stream, each given out once."""
        while True:
            with self._lock:
                part = None if self.stopped else next(self._parts, None)
            if part is None:
                return
            yield part

    def advance(self, nbytes: int) -> None:
        """Told by every stream as it reads. Raises _Stop where it is to end."""
        with self._lock:
            if self.stopped:
                raise _Stop
            self._advance(nbytes)

    def guarded(self, work: Callable[[], None]) -> None:
        """`work`, whose failure ends the others."""
        try:
            work()
        except BaseException as error:
            with self._lock:
                self.stopped = True
                self.failures.append(error)


def write_shards(
    plan: Plan, staging: Staging, ranks: Ranks, advance: Callable[[int], None], trace: Trace | None = None
) -> tuple[Counts, int]:
    """Merge this rank's share of the plan into the stage.

    Returns:
        What was counted in each tensor, and the bytes that were read.

    Raises:
        InputError: data breaks a rule.
        IOFailure: reading or writing failed.
    """
    parts = plan.parts(ranks.rank, ranks.size)
    shared = _Shared(parts, advance)
    streams = max(1, min(plan.streams, len(parts)))
    with ExitStack() as opened:
        sinks = [
            opened.enter_context(closing(CheckpointSink(staging, plan.larger_than_memory))) for _ in range(streams)
        ]
        jobs = [Merge(plan, plan.engine, shared.advance, ranks=ranks, trace=trace) for _ in sinks]
        work = [partial(job.run, sink, shared.parts()) for job, sink in zip(jobs, sinks, strict=True)]
        if len(work) == 1:
            work[0]()
        else:
            _together(work, shared)
    counts: Counts = {}
    for sink in sinks:
        counts.update(sink.counts)
    return counts, sum(job.bytes_read for job in jobs)


def _together(work: Sequence[Callable[[], Any]], shared: _Shared) -> None:
    """Each in a thread; raises the first failure once all have ended. A signal that comes meanwhile ends them."""
    threads = [Thread(target=shared.guarded, args=(of,), name=f"safepatch-stream-{i}") for i, of in enumerate(work)]
    started = []
    try:
        for thread in threads:
            room_for_a_thread()
            thread.start()
            started.append(thread)
        for thread in started:
            thread.join()
    finally:
        shared.stopped = True  # nothing, where all have ended
        for thread in started:
            thread.join()
    if shared.failures:
        raise next((error for error in shared.failures if not isinstance(error, _Stop)), shared.failures[0])
