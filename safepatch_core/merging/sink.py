"""The merged shards go into a stage, with what was counted in them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from safepatch_core.backends.codes import CodesReport, Kept
from safepatch_core.backends.contract import PatchReport, Report
from safepatch_core.files.disk import Extent, HashedFile
from safepatch_core.files.staging import Staging
from safepatch_core.merging.layout import OutputPart

# After so many bytes a file's beginning is made durable and marked in the journal, where a tensor ends: the most that
# a kill costs. A mark waited 0.1 to 0.5 s for the disk (2 cores, others at work); shards of ordinary size need none.
MARK_BYTES = 4 << 30


class CheckpointSink:
    """Writes the merged shards into a stage; a `stream.Sink`."""

    def __init__(self, staging: Staging, drop: bool = False, mark_bytes: int | None = None) -> None:
        self._staging, self._drop = staging, drop
        self._step = MARK_BYTES if mark_bytes is None else mark_bytes
        self._file: HashedFile | None = None
        self.counts: dict[str, Report] = {}

    def begin(self, part: OutputPart, counts: dict[str, Report]) -> OutputPart | None:
        output = part.output
        line = self._staging.finished.get(output.name)
        if line is not None:
            self._staging.files[output.name] = {"size": line["size"], "sha256": line["sha256"]}
            self.counts.update(from_facts(line["facts"]))
            return None
        self._file = file = self._staging.open(
            output.name, output.size, part.lo, part.hi, sparse=output.sparse, drop=self._drop
        )
        # How many tensors of the part end there or before.
        sizes = (t.nbytes for t in part.tensors)
        ends = itertools.accumulate(sizes, initial=part.lo or len(output.header))
        self._ends = {end: done for done, end in enumerate(ends) if end > part.lo}
        done = self._ends.get(file.at, 0)
        counts.update(from_facts(self._staging.facts_before(output.name, file.at)))
        self._part, self._counts, self._marked = part, counts, (file.at, done)
        return OutputPart(output, part.tensors[done:], file.at, part.hi)

    def write(self, data: memoryview, source: Extent | None = None) -> Future[None] | None:
        file = self._file
        assert file is not None
        hashed = file.write(data, source)
        at, done = self._marked
        if file.whole and self._step <= file.at - at and file.at in self._ends and file.at < file.size:
            now = self._ends[file.at]
            names = [t.name for t in self._part.tensors[done:now] if t.name in self._counts]
            self._staging.mark(file, to_facts({name: self._counts[name] for name in names}))
            self._marked = (file.at, now)
        return hashed

    def end(self) -> None:
        assert self._file is not None
        self.counts.update(self._counts)
        self._staging.finish(self._file, to_facts(self._counts))
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def to_facts(counts: Mapping[str, Report]) -> dict[str, Any]:
    """Reports of tensors as the plain data that the journal keeps; faults aside, which end a merge."""
    return {name: _facts_of(report) for name, report in counts.items()}


def _facts_of(report: Report) -> list[Any]:
    kept = [list(of.numbers) for of in report.kept] if isinstance(report, CodesReport) else None
    return [[report.acted, report.changed], kept, *([p.eligible, p.selected, p.applied] for p in report.patches)]


def from_facts(facts: Mapping[str, Any]) -> dict[str, Report]:
    """What `to_facts` was given."""
    return {name: _report_of(*of) for name, of in facts.items()}


def _report_of(total: list[int], kept: list[list[int]] | None, *patches: list[int]) -> Report:
    found = [PatchReport(eligible, selected, applied) for eligible, selected, applied in patches]
    if kept is None:
        return Report(found, acted=total[0], changed=total[1])
    return CodesReport(found, acted=total[0], changed=total[1], kept=[Kept(*numbers) for numbers in kept])
