"""Where the time of a merge goes: a trace for Chrome or Perfetto with a lane per thread, and a summary in words."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from safepatch_core.merging.api import merge
from safepatch_core.spec import Kind

from . import models
from .measure import Cache, alternate, prepared, remove
from .merges import CACHES, SIZES, equals_reference, inputs, output_bytes
from .models import SHAPES
from .registry import Bench, Case, Measured

JOBS: tuple[tuple[Kind, str], ...] = (("checkpoint", "tensor"), ("checkpoint", "model"), ("lora", "tensor"))


class Span(NamedTuple):
    """Something that a thread did; seconds since the merge began."""

    lane: str
    stage: str
    name: str
    begin: float
    end: float


class Recorder:
    """A trace callback for `merge`: what was done, on which thread."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._begin = time.perf_counter()

    def __call__(self, stage: str, item: Any, begin: float, end: float) -> None:
        unit = getattr(item, "unit", item)
        entry = getattr(unit, "entry", None)
        name = stage if entry is None else f"{entry.name} [{unit.lo}:{unit.hi}]"
        lane = threading.current_thread().name.removeprefix("safepatch-")
        self.spans.append(
            Span("engine" if lane == "MainThread" else lane, stage, name, begin - self._begin, end - self._begin)
        )


def chrome_trace(spans: Sequence[Span], wall: float) -> str:
    """The JSON that chrome://tracing and ui.perfetto.dev open."""
    lanes = {lane: i for i, lane in enumerate(dict.fromkeys(span.lane for span in spans), 1)}
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": lane}}
        for lane, tid in lanes.items()
    ]
    events.append({"ph": "X", "pid": 1, "tid": 0, "name": "merge", "ts": 0, "dur": 1e6 * wall})
    events += [
        {
            "ph": "X",
            "pid": 1,
            "tid": lanes[span.lane],
            "name": span.name,
            "cat": span.stage,
            "ts": round(1e6 * span.begin, 1),
            "dur": round(1e6 * (span.end - span.begin), 1),
        }
        for span in spans
    ]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def summary(spans: Sequence[Span], wall: float) -> dict[str, dict[str, float]]:
    """Seconds per lane and stage, and how long each lane waited; `ends` is the time before the first and after the
    last span of all."""
    lanes: dict[str, dict[str, float]] = {}
    for span in spans:
        of = lanes.setdefault(span.lane, {})
        of[span.stage] = of.get(span.stage, 0.0) + span.end - span.begin
    begin, end = min(s.begin for s in spans), max(s.end for s in spans)
    for of in lanes.values():
        of["waiting"] = max(end - begin - sum(of.values()), 0.0)
    lanes["ends"] = {"before": begin, "after": wall - end}
    return lanes


def _measure(size: str, kind: Kind, scope: str, cache: Cache, bench: Bench) -> Measured:
    shape = SHAPES[size]
    folder = bench.models(shape, (kind,))
    recipe = models.recipe_path(folder, kind, scope)
    traces: list[str] = []
    written = output_bytes(folder)
    with bench.scratch() as scratch, prepared(inputs(folder, kind), cache, 2 * written) as before:

        def subject() -> dict[str, float]:
            recorder, begin = Recorder(), time.perf_counter()
            merge(
                recipe,
                scratch / "out",
                backend=bench.backend,
                threads=bench.threads,
                memory_limit=bench.memory_limit,
                trace=recorder,
            )
            wall = time.perf_counter() - begin
            remove(scratch / "out")
            traces.append(chrome_trace(recorder.spans, wall))
            parts = summary(recorder.spans, wall)
            return {"wall_s": wall} | {
                f"{lane}/{stage}_s": seconds for lane, of in parts.items() for stage, seconds in of.items()
            }

        series = alternate({"merge": subject}, bench.rounds, before)
    walls = series["merge"]["wall_s"]
    median = sorted(range(len(walls)), key=walls.__getitem__)[len(walls) // 2]
    name = f"trace-{size}-{kind}-{scope}-{cache}.json"
    return Measured(series, [], {"entries": shape.entries, "trace": name}, {name: traces[median]})


def cases() -> list[Case]:
    """Cases of the group `profile`."""
    return [
        Case(
            f"profile/{size}/{kind}-{scope}/{cache}",
            f"where a merge of {size} parameters spends its time: {kind} sources, scope {scope}, {cache}",
            {"size": size, "entries": SHAPES[size].entries, "variant": f"{kind}-{scope}", "cache": cache},
            partial(equals_reference, jobs=[(kind, scope)]),
            partial(_measure, size, kind, scope, cache),
            short=(size, kind, cache) == ("0.3B", "checkpoint", "warm"),
        )
        for size in SIZES
        for kind, scope in JOBS
        for cache in CACHES
    ]
