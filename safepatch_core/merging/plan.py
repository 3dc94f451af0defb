"""The plan: everything a merge will do, decided before a byte of tensor data is read, but for what gates ask for.

What `safepatch plan` prints is what `stream.py` runs: targets with their inputs, the files of the output with
every offset, how tensors are cut into units, and how much memory the ring of buffers takes.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safepatch_core.backends.codes import takes_codes
from safepatch_core.backends.contract import Backend, Noting, takes_turns, threads_of
from safepatch_core.errors import InputError, UsageError
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint
from safepatch_core.files.companions import companions, left_out
from safepatch_core.files.parsing import FLOATS, uncollected
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.agreement import agreed
from safepatch_core.merging.beside import Beside, beside
from safepatch_core.merging.gates import Angles, bytes_of, gated, measure, open_gates, pair_of, pairs_of
from safepatch_core.merging.layout import IndexFile, OutputFile, OutputPart, lay_out
from safepatch_core.merging.names import lines as renaming
from safepatch_core.merging.pipeline import ALIGN, room
from safepatch_core.merging.quantised.modules import module_of, quantised, refuse_base, refuse_patch
from safepatch_core.merging.quantised.twin import Twin, refuse_weight, twin_of
from safepatch_core.merging.quantised.values import Dequantised, delta_of
from safepatch_core.merging.quantised.writing import Coded
from safepatch_core.merging.recipe import PatchSpec, Recipe, is_mask, match_targets
from safepatch_core.merging.sources import open_source
from safepatch_core.merging.sources.computed import scores_of
from safepatch_core.merging.sources.contract import PatchTensor, Source
from safepatch_core.merging.sources.dense import ImportanceFile, Named, fitted
from safepatch_core.merging.work import PatchInput, Target, Unit
from safepatch_core.spec import ITEMSIZE, Kind, keep_threshold, random_key, rounding_key

# Chunks of tensors that are not held whole: the reader's copy is still in the last-level cache when the engine
# reads it, and the Python work per unit stays under a percent.
CHUNK_BYTES = 6 << 20
RUN = 64  # entries: chunks begin at multiples of it
# Entries read to guess the thresholds of a scope that is swept in chunks, in runs of SAMPLE_RUN.
SAMPLE_ENTRIES = 1 << 20
SAMPLE_RUN = 1 << 12
# Python, numpy and the thread stacks are not counted against the limit; this is for histograms and small objects.
FIXED_BYTES = 4 << 20
SMALLEST_LIMIT = 16 << 20
DEFAULT_LIMIT = 2 << 30
# By `bench simulate` a second shard at once pays from 8 cores on, and four do from 16.
THREADS_PER_STREAM, MOST_STREAMS = 4, 4


@dataclass(frozen=True)
class Plan:
    """See the module's docstring. `targets` are in bytewise order of their names."""

    recipe: Recipe
    engine: Backend
    kinds: tuple[Kind, ...]  # per patch
    adapters: tuple[Mapping[str, Any] | None, ...]  # per patch, a LoRA adapter's configuration
    sources: tuple[Checkpoint, ...]  # per patch, its own files
    renamed: tuple[tuple[str, ...], ...]  # per patch, how its names become the base's
    beside: tuple[Beside, ...]  # per patch, what it brings and the output does not take
    base: Checkpoint
    inputs: tuple[Checkpoint, ...]  # everything that is read: base, sources, importance
    targets: Mapping[str, Target]
    ungated: Mapping[str, Target]  # with what the patches have for them also where their gates are shut
    angles: Angles  # what gates were told
    outputs: tuple[OutputFile, ...]
    index: IndexFile | None
    companions: tuple[Path, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]  # what is worth a line and no warning
    memory_limit: int
    ring_bytes: int
    beside_bytes: int  # the engine's scratch, or the LoRA factors that chunks share
    streams: int  # shards under way at once, each with so much of both
    chunk: int | None = None  # entries per chunk, set only by tests

    @property
    def patch_names(self) -> list[str]:
        return self.recipe.names

    def resolved_recipe(self) -> dict[str, Any]:
        """The recipe with every default and every patch's kind written out."""
        recipe = self.recipe.resolved()
        for patch, kind in zip(recipe["patches"], self.kinds, strict=True):
            patch["kind"] = kind
        return recipe

    @cached_property
    def lists(self) -> bool:
        """Whether what a sweep over the whole model lists is not read again, as far as there is room."""
        noting = self.whole_model and isinstance(self.engine, Noting)
        return noting and any(target.listable for target in self.targets.values())

    @property
    def list_bytes(self) -> int:
        """About what lists take: a key and a place for each entry that may be selected, and some more."""
        return min(7 * sum(self.model_quotas), max(self.room_for_lists, 0)) if self.lists else 0

    @property
    def room_beside(self) -> int:
        """Bytes that the limit leaves beside the merge itself."""
        return self.memory_limit - FIXED_BYTES - self.ring_bytes - self.beside_bytes

    @property
    def room_for_lists(self) -> int:
        """Bytes for lists of chunks (see `lists`), beside the one that is made and its copy."""
        chunk = max((self.chunk_entries(t) for t in self.targets.values()), default=0)
        return self.room_beside - 2 * self.engine.scratch(chunk, len(self.patch_names))

    def asks_nothing(self, p: int) -> bool:
        """Whether the recipe switches patch p off, or its gate is shut everywhere."""
        return _is_off(self.recipe.patches[p]) or self.is_shut(p)

    def is_shut(self, p: int) -> bool:
        """Whether no target has patch p."""
        return not any(target.patches[p] for target in self.targets.values())

    def cosines(self, p: int) -> dict[str, float] | None:
        """By target what the gate of patch p was told; None without a gate."""
        gate = self.recipe.patches[p].gate
        if gate is None:
            return None
        pair = pair_of(p, self.recipe.names.index(gate.patch))
        return {name: angle.cosine for name, angle in self.angles[pair].items()}

    @cached_property
    def gate_bytes(self) -> int:
        """Bytes that were read for gates, before there was a plan."""
        return bytes_of(self.ungated, [*self.angles])

    @property
    def gate_entries(self) -> int:
        """Entries of which gates were told the deltas of two patches."""
        return sum(self.ungated[name].entry.entries for of in self.angles.values() for name in of)

    @property
    def whole_model(self) -> bool:
        return self.recipe.scope == "model"

    @cached_property
    def model_quotas(self) -> tuple[int, ...]:
        """k per patch over all targets, for scope: model."""
        return tuple(p.quotas(self.total_entries, self.recipe.quota)[0] for p in self.recipe.patches)

    @cached_property
    def model_skips(self) -> tuple[int, ...]:
        """How many of `model_quotas` are skipped."""
        return tuple(p.quotas(self.total_entries, self.recipe.quota)[1] for p in self.recipe.patches)

    def sweeps(self, target: Target) -> int:
        """How often a target's inputs are read: once where no selection is needed or it is held whole, else twice.

        A third time only where the sampled guess of a threshold fails its exact check.
        """
        if target.whole:
            return 1
        if self.whole_model:
            counts = (*self.model_quotas, *self.model_skips)
            return 2 if any(0 < k < self.total_entries for k in counts) else 1
        given = zip(target.patches * 2, target.quotas + target.skips, strict=True)
        return 2 if any(p and 0 < k < target.entry.entries for p, k in given) else 1

    @cached_property
    def total_entries(self) -> int:
        return sum(t.entry.entries for t in self.targets.values())

    @cached_property
    def bytes_to_read(self) -> int:
        """Tensor bytes read in the normal case, where every sampled guess of a threshold passes its exact check.

        With `lists`, at most: which chunks have one that does is known once they are counted.
        """
        total = sum(t.nbytes for output in self.outputs for t in output.tensors if t.name not in self.by_stored)
        sampled: list[Unit] = []
        for scope in self.sampled_scopes:
            sampled += self.sample_units(scope)
        total += sum(u.target.bytes_of(u.hi - u.lo, selecting=True) for u in sampled if u.target)
        names = {u.entry.name for u in sampled}
        for name, target in self.targets.items():
            if entries := target.entry.entries:
                total += target.bytes_of(entries) + target.once_bytes()
                if selecting := self.sweeps(target) - 1:
                    total += selecting * target.bytes_of(entries, selecting=True)
                    total += (selecting + (name in names)) * target.once_bytes(selecting=True)
        return total

    @cached_property
    def by_stored(self) -> Mapping[str, Target]:
        """The targets by the names of the stored tensors whose bytes change."""
        return {target.stored.name: target for target in self.targets.values()}

    @property
    def sampled_scopes(self) -> list[list[Target]]:
        """The scopes whose thresholds are guessed from a sample before they are swept."""
        swept = [t for t in self.targets.values() if self.sweeps(t) > 1]
        if self.whole_model:
            return [list(self.targets.values())] if swept else []
        return [[t] for t in swept]

    def sample_units(self, scope: Sequence[Target]) -> list[Unit]:
        """Short units spread evenly over a scope."""
        entries = sum(t.entry.entries for t in scope)
        runs = min(SAMPLE_ENTRIES // SAMPLE_RUN, self.ring_bytes // max(t.unit_bytes(SAMPLE_RUN) for t in scope) // 2)
        stride = max(entries // max(runs, 1), SAMPLE_RUN)
        units, at = [], 0
        for target in scope:
            size = target.entry.entries
            for lo in range(at, size, stride):
                hi = min(lo + SAMPLE_RUN, size)
                units.append(Unit(target.entry, target, lo, hi, target.unit_bytes(hi - lo)))
            at = (at - size) % stride if at < size else at - size
        return units

    @cached_property
    def bytes_to_write(self) -> int:
        return sum(o.size for o in self.outputs)

    @cached_property
    def larger_than_memory(self) -> bool:
        """Whether the page cache can't hold the files anyway, so that their pages are better given back at once."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return self.bytes_to_read + self.bytes_to_write > memory // 2

    def units_of(self, target: Target) -> Iterator[Unit]:
        """The units of one target, in order of position."""
        entry = target.entry
        step = entry.entries if target.whole else self.chunk_entries(target)
        for lo in range(0, entry.entries, max(step, 1)):
            hi = min(lo + step, entry.entries)
            yield Unit(entry, target, lo, hi, target.unit_bytes(hi - lo))

    def chunk_entries(self, target: Target) -> int:
        if self.chunk is not None:
            return -(-self.chunk // target.step) * target.step
        left = min(CHUNK_BYTES, self.ring_bytes // 3)
        # A buffer of each input may be filled up to ALIGN.
        left -= target.unit_bytes(0) + target.buffers * ALIGN
        whole = math.lcm(RUN, target.step)
        return max(whole, int(left / target.ring_bytes) // whole * whole)

    def owners(self, ranks: int) -> dict[str, int]:
        """Which rank does which tensor: contiguous runs in the order of the output, of about equal bytes."""
        work = [
            (t.name, of.bytes_of(of.entry.entries) if (of := self.by_stored.get(t.name)) else t.nbytes)
            for output in self.outputs
            for t in output.tensors
        ]
        total, done, owner = sum(nbytes for _, nbytes in work), 0, {}
        for name, nbytes in work:
            owner[name] = min((2 * done + nbytes) * ranks // (2 * total), ranks - 1) if total else 0
            done += nbytes
        return owner

    def parts(self, rank: int, ranks: int) -> list[OutputPart]:
        """What one of so many ranks writes of each output file; files it has no part in are left out."""
        owner, parts = self.owners(ranks), []
        for output in self.outputs:
            whose = [owner[t.name] for t in output.tensors] or [0]
            if rank not in whose:
                continue
            first, count = whose.index(rank), whose.count(rank) if output.tensors else 0
            lo = 0 if first == 0 else len(output.header) + sum(t.nbytes for t in output.tensors[:first])
            tensors = output.tensors[first : first + count]
            hi = lo + sum(t.nbytes for t in tensors) + (0 if first else len(output.header))
            parts.append(OutputPart(output, tensors, lo, hi))
        return parts

    def units_in(self, part: OutputPart) -> Iterator[Unit]:
        """The units of one part of an output file, in order."""
        step = min(CHUNK_BYTES, self.ring_bytes // 3 - room(0) - ALIGN)
        for entry in part.tensors:
            target = self.by_stored.get(entry.name)
            if target is not None:
                yield from self.units_of(target)
            else:
                for lo in range(0, entry.nbytes, step):
                    hi = min(lo + step, entry.nbytes)
                    yield Unit(entry, None, lo, hi, room(hi - lo))


@uncollected()
def make_plan(
    recipe: Recipe,
    engine: Backend,
    memory_limit: int | None = None,
    *,
    chunk_entries: int | None = None,
    streams: int | None = None,
) -> Plan:
    """Open and check every input of the recipe and decide the work.

    Raises UsageError (recipe, limit) or InputError (inputs), before any tensor data is read but what gates are told.
    """
    limit = memory_limit or DEFAULT_LIMIT
    if limit < SMALLEST_LIMIT:
        raise UsageError("--memory-limit is too small", found=f"{limit} bytes", expected="at least 16MiB")
    given = _Opened.of(recipe)
    names = _weights(given)
    given.require_ranked(names)
    others = tuple(beside(recipe, given.base, source, frozenset(names)) for source in given.sources)
    ungated = {name: _target(given, name, takes_codes(engine)) for name in names}
    _require_inputs(recipe, ungated)
    angles = measure(ungated, pairs_of(recipe), given.checkpoints, recipe.nonfinite)
    let = gated(recipe, ungated, angles)
    targets = {name: _placed(target, recipe, engine, limit, chunk_entries) for name, target in let.items()}
    outputs, index = lay_out(given.stored, recipe.max_shard_size)
    ring_bytes, beside_bytes = _memory(targets, engine, limit)
    return Plan(
        recipe=recipe,
        engine=engine,
        kinds=tuple(s.kind for s in given.sources),
        adapters=tuple(s.config for s in given.sources),
        sources=tuple(s.checkpoints[0] for s in given.sources),
        renamed=tuple(s.exchange.lines for s in given.sources),
        beside=others,
        base=given.stored,
        inputs=given.checkpoints,
        targets=targets,
        ungated=ungated,
        angles=angles,
        outputs=outputs,
        index=index,
        companions=tuple(companions(given.base)),
        warnings=(*_warnings(given, others), *_narrowed(targets.values()), *_shut(recipe, targets)),
        notes=(*_codes(targets.values()), *_notes(given, others), *_cuts(given, names), *_gates(recipe, targets)),
        memory_limit=limit,
        ring_bytes=ring_bytes,
        beside_bytes=beside_bytes,
        streams=_streams(streams, recipe, engine, (limit - FIXED_BYTES) // (ring_bytes + beside_bytes), len(outputs)),
        chunk=chunk_entries,
    )


@dataclass(frozen=True, slots=True)
class _Opened:
    """All that a recipe reads."""

    recipe: Recipe
    stored: Checkpoint  # the base as its files have it
    twin: Twin
    original: Named | None  # the float original of a quantised base
    sources: tuple[Source, ...]  # per patch
    importance: tuple[ImportanceFile | None, ...]  # per patch

    @classmethod
    def of(cls, recipe: Recipe) -> _Opened:
        origin = recipe.origin
        stored = open_checkpoint(recipe.base, relative_to=origin)
        twin = twin_of(recipe, stored)
        base = twin.base
        sources = tuple(
            open_source(
                *(p.name, p.source, p.kind, base),
                relative_to=origin,
                minus=p.minus,
                takes=recipe.is_target,
                rows=p.rows,
            )
            for p in recipe.patches
        )
        importance = tuple(
            None
            if p.importance_path is None
            else ImportanceFile.open(p.importance_path, base, relative_to=origin, rows=p.rows)
            for p in recipe.patches
        )
        path = recipe.quantized and recipe.quantized.reference_path
        original = path and Named.of(open_checkpoint(path, relative_to=origin), base, recipe.is_target, "all")
        return cls(recipe, stored, twin, original or None, sources, importance)

    @property
    def base(self) -> Checkpoint:
        """The base as patches and targets see it: the float model's names and shapes."""
        return self.twin.base

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        original = [self.original.checkpoint] if self.original else []
        patches = (checkpoint for source in self.sources for checkpoint in source.checkpoints)
        return (
            *(self.stored, *original, *patches),
            *(of.named.checkpoint for of in self.importance if of is not None),
        )

    def require_ranked(self, names: Sequence[str]) -> None:
        """Raises InputError for an importance file that has none of the targets."""
        for spec, ranking in zip(self.recipe.patches, self.importance, strict=True):
            if ranking is not None and not any(name in ranking.named.tensors for name in names):
                raise _ranks_nothing(spec)


def _cuts(given: _Opened, names: Sequence[str]) -> Iterator[str]:
    """What `rows: common` leaves out, a line per tensor."""
    for spec, source in zip(given.recipe.patches, given.sources, strict=True):
        shapes = source.shapes if spec.rows == "common" else {}
        for name in names:
            rows = given.base.tensors[name].shape[:1]
            if shapes.get(name, ())[:1] > rows:
                more = f"{shapes[name][0] - rows[0]} rows of '{name}' beyond the base's {rows[0]} are left out"
                yield f"patch {spec.name}: {more}, as rows: common asks"


def _warnings(given: _Opened, others: Sequence[Beside]) -> Iterator[str]:
    """A line for whatever may be missed, or not be what was meant."""
    for spec, other in zip(given.recipe.patches, others, strict=True):
        if other.sure:
            yield other.line(spec.name)
    for spec in given.recipe.patches:
        if _is_off(spec):
            zero = "skip of 1" if spec.skip == 1 else "top, retain or scale of 0"
            yield f"patch {spec.name} changes nothing, as its {zero} asks"
    for checkpoint in given.checkpoints:
        yield from (f"{checkpoint.ref}: {line}" for line in checkpoint.warnings)
    yield from left_out(given.base)


def _codes(targets: Iterable[Target]) -> Iterator[str]:
    """How many targets are stored as codes, a line per kind."""
    for method, count in Counter(t.coded.weight.method for t in targets if t.coded).items():
        yield f"targets that are stored as codes: {count} in {method}"


def _narrowed(targets: Iterable[Target]) -> Iterator[str]:
    """A line where a trainer may have been handed more of the float original than `reference_dtype` says."""
    originals = {t.coded.rule.reference_dtype for t in targets if t.coded and _is_wide(t.coded.original)}
    for dtype in originals - {"float32"}:
        yield f"the float original is F32, and checkpoints are measured from it in {dtype}, as reference_dtype says"


def _shut(recipe: Recipe, targets: Mapping[str, Target]) -> Iterator[str]:
    """A line for a patch that no target is left of."""
    for name, count in open_gates(recipe, targets).items():
        if not count:
            yield f"patch {name} changes nothing: its gate is shut for all {len(targets)} targets"


def _gates(recipe: Recipe, targets: Mapping[str, Target]) -> Iterator[str]:
    """A line for a gate that leaves its patch some targets."""
    for name, count in open_gates(recipe, targets).items():
        if count:
            yield f"the gate of patch {name} is open for {count} of {len(targets)} targets"


def _is_wide(original: PatchTensor | None) -> bool:
    return original is not None and original.ring_bytes == ITEMSIZE["F32"]


def _notes(given: _Opened, others: Sequence[Beside]) -> Iterator[str]:
    """A line for what is worth knowing and no warning."""
    for spec, source, ranking in zip(given.recipe.patches, given.sources, given.importance, strict=True):
        yield from renaming(f"patch {spec.name}", source.exchange.lines)
        yield from renaming(f"the importance of patch {spec.name}", ranking.named.exchange.lines if ranking else ())
    for spec, other in zip(given.recipe.patches, others, strict=True):
        if other.tensors and not other.sure:
            yield other.line(spec.name)


def _require_inputs(recipe: Recipe, targets: Mapping[str, Target]) -> None:
    """Raises InputError for a patch whose importance leaves nothing of it."""
    for p, spec in enumerate(recipe.patches):
        if not any(target.patches[p] for target in targets.values()):
            raise _ranks_nothing(spec)


def _ranks_nothing(spec: PatchSpec) -> InputError:
    return InputError(
        f"the importance of patch '{spec.name}' has none of the targets that the patch has",
        file=spec.importance_path,
        expected="scores named as the base's tensors",
    )


def _is_off(spec: PatchSpec) -> bool:
    return not spec.overrides and (0 in (spec.top, spec.retain, spec.scale) or spec.skip == 1)


def _target(given: _Opened, name: str, direct: bool) -> Target:
    """A tensor of the base, once it and what every patch says about it can be merged.

    `direct`: the engine takes codes.
    """
    recipe, entry = given.recipe, given.base.tensors[name]
    entries = entry.entries
    if entry.dtype not in ITEMSIZE:
        raise InputError(
            "a target's dtype can't be patched",
            file=entry.path,
            tensor=entry.name,
            found=entry.dtype,
            expected="F32, F16 or BF16 (or exclude it from targets)",
        )
    coded = _coded(given, entry, direct)
    w: PatchTensor | None = None if coded is None else coded.original or Dequantised(coded.weight)
    patches: list[PatchInput | None] = []
    specs = [spec.at(entry.name) for spec in recipe.patches]
    for spec, source, ranking in zip(specs, given.sources, given.importance, strict=True):
        delta = source.lookup(entry, recipe.missing)
        scores = None if ranking is None or delta is None else ranking.lookup(entry, recipe.missing)
        if delta is None or (ranking is not None and scores is None):
            patches.append(None)
            continue
        importance = spec.importance_kind
        if w is not None and recipe.quantized is not None:
            if scores is not None and importance == "gradients" and spec.weight != "delta":
                scores, importance = scores_of(scores, spec.weight, delta, w, entry), "scores"
            delta = delta_of(delta, w, entry, recipe.quantized.reference_dtype)
        key = random_key(recipe.seed, spec.name, entry.name)
        patches.append(PatchInput(delta, scores, importance, key, keep_threshold(spec.retain), spec.factor))
    patches = _agreed(recipe, patches, entry)
    bands = [spec.quotas(entries, recipe.quota) for spec in specs]
    quotas, skips = tuple(k for k, _ in bands), tuple(skip for _, skip in bands)
    return Target(entry, tuple(patches), quotas, skips, whole=True, coded=coded)


def _agreed(recipe: Recipe, patches: list[PatchInput | None], entry: TensorEntry) -> list[PatchInput | None]:
    """The patches of a target, those whose signs have to fit another's with the scores that say so."""
    if all(spec.agreement is None for spec in recipe.patches):
        return patches
    by_name = dict(zip(recipe.names, patches, strict=True))
    return [
        patch
        if patch is None or spec.agreement is None
        else agreed(patch, by_name[spec.agreement.patch], spec.agreement, spec.weight, entry)
        for spec, patch in zip(recipe.patches, patches, strict=True)
    ]


def _coded(given: _Opened, entry: TensorEntry, direct: bool) -> Coded | None:
    """How a target is merged into where the base stores it as codes."""
    rule, weight = given.recipe.quantized, given.twin.weights.get(entry.name)
    if rule is None or weight is None:
        return None
    original = None
    if given.original is not None:
        original = fitted(given.original, entry, "checkpoint", "error", "the float original of the base")
    return Coded(weight, original, rounding_key(given.recipe.seed, entry.name), rule, direct)


def _placed(target: Target, recipe: Recipe, engine: Backend, limit: int, chunk: int | None) -> Target:
    """The target as the engine takes it, done in chunks where its scope or the limit asks for that."""
    if target.coded is not None and target.coded.direct:
        target = target.unmeasured
    entries = target.entry.entries
    need = target.unit_bytes(entries) + engine.scratch(entries, len(target.patches))
    fits = need <= limit - FIXED_BYTES and (chunk is None or entries <= chunk)
    return target if recipe.scope == "tensor" and fits else replace(target, whole=False)


def _weights(given: _Opened) -> list[str]:
    """The targets by name, once what is quantised of them can be merged into, and nothing of the patches is."""
    recipe, base, sources, twin = given.recipe, given.base, given.sources, given.twin
    floats = {n: t.shape for n, t in base.tensors.items() if t.dtype in FLOATS and n not in base.beyond}
    names = match_targets(recipe, {name: len(shape) for name, shape in floats.items() if not is_mask(name, shape)})
    if twin.held is not None:
        names = [name for name in names if name in twin.weights or not twin.held.never_weights(name)]
        for source in sources:
            for name in source.names:
                if (codes := twin.lost(recipe, name)) is not None:
                    raise _refused_module(given, codes, source.checkpoints[0], name)
        if not names:
            codes = next(iter(twin.held.codes.values()))
            if recipe.quantized is None:
                raise refuse_base(base, twin.held, twin.also)
            raise refuse_weight(twin, codes, base)
    for source in sources:
        for checkpoint in source.checkpoints:
            of = quantised(checkpoint)
            for name in names:
                if of is not None and name in of:
                    what = f"the patch '{source.name}'"
                    raise refuse_patch(what, checkpoint, of.codes[module_of(name)].name, of)
    return names


def _refused_module(given: _Opened, codes: TensorEntry, patch: Checkpoint, name: str) -> InputError:
    """A patch is of a module of the base that is quantised, in a way that the recipe or nobody accepts."""
    assert given.twin.held is not None
    if given.recipe.quantized is not None:
        return refuse_weight(given.twin, codes, given.stored)
    found = codes.name if codes.name in patch.tensors else name
    return refuse_patch("this module of the base", patch, found, given.twin.held, given.twin.also)


def _memory(targets: Mapping[str, Target], engine: Backend, limit: int) -> tuple[int, int]:
    """Bytes of the ring, and of what lies beside it.

    The ring has room for three of the largest units where the limit allows it: one read, one worked on, one written.
    """
    beside = max(
        (engine.scratch(t.entry.entries, len(t.patches)) if t.whole else t.held_bytes for t in targets.values()),
        default=0,
    )
    room = limit - FIXED_BYTES - beside
    if room < (4 << 20):
        worst = max(targets.values(), key=lambda t: t.held_bytes)
        raise _too_small(f"what all chunks of '{worst.entry.name}' share", limit, (4 << 20) - room)
    largest = max(targets.values(), key=_least_unit, default=None)
    least = 0 if largest is None else _least_unit(largest)
    if largest is not None and least > room:
        raise _too_small(
            f"a matrix of '{largest.entry.name}', which is stored the other way round", limit, least - room
        )
    return min(room, max(3 * least, 6 * CHUNK_BYTES)) // ALIGN * ALIGN, beside


def _streams(asked: int | None, recipe: Recipe, engine: Backend, room: int, shards: int) -> int:
    """How many shards are under way at once. A whole model's are written by one look at it, and a GPU is one.

    Raises UsageError where these are asked for several.
    """
    if recipe.scope == "model" or not takes_turns(engine):
        if (asked or 1) > 1:
            why = "scope: model writes" if recipe.scope == "model" else "this engine takes"
            raise UsageError(f"--streams: {why} one shard after another", found=f"{asked}", expected="1")
        return 1
    wanted = min(MOST_STREAMS, (threads_of(engine) or 1) // THREADS_PER_STREAM) if asked is None else asked
    return max(1, min(wanted, room, shards))


def _least_unit(target: Target) -> int:
    """Ring bytes of the smallest unit that a target can be cut into."""
    entries = target.entry.entries
    return target.unit_bytes(entries if target.whole else min(math.lcm(RUN, target.step), entries))


def _too_small(what: str, limit: int, lacks: int) -> UsageError:
    return UsageError(
        f"--memory-limit is too small for {what}", found=f"{limit} bytes", expected=f"at least {limit + lacks} bytes"
    )
