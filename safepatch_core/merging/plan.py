"""The plan: everything a merge will do, decided before a byte of tensor data is read.

What `safepatch plan` prints is what `stream.py` runs: targets with their inputs, the files of the output with
every offset, how tensors are cut into units, and how much memory the ring of buffers takes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safepatch_core.backends.contract import Backend
from safepatch_core.errors import InputError, UsageError
from safepatch_core.files.checkpoint import FLOATS, Checkpoint, TensorEntry, companions, open_checkpoint
from safepatch_core.files.filenames import SINGLE
from safepatch_core.merging.quantised import module_of, quantised, refuse_base, refuse_patch
from safepatch_core.merging.recipe import Recipe, match_targets
from safepatch_core.merging.sources import (
    Factors,
    Source,
    extras,
    importance_of,
    lookup,
    open_importance,
    open_source,
)
from safepatch_core.settings import parse_size
from safepatch_core.spec import ITEMSIZE, Kind, keep_threshold, quota, random_key

ALIGN = 64
# Chunks of tensors that are not held whole: the reader's copy is still in the last-level cache when the engine
# reads it, and the Python work per unit stays under a percent.
CHUNK_BYTES = 6 << 20
# Entries read to guess the thresholds of a scope that is swept in chunks, in runs of SAMPLE_RUN.
SAMPLE_ENTRIES = 1 << 20
SAMPLE_RUN = 1 << 12
# Python, numpy and the thread stacks are not counted against the limit; this is for histograms and small objects.
FIXED_BYTES = 4 << 20
SMALLEST_LIMIT = 16 << 20
DEFAULT_LIMIT = 2 << 30


def align(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True)
class PatchInput:
    """What one patch brings to one target tensor."""

    delta: TensorEntry | Factors
    scores: TensorEntry | None
    key: int  # Philox key
    keep: int  # retention threshold

    @property
    def entry_bytes(self) -> int:
        """Bytes per entry that are read beside the base."""
        size = 0 if isinstance(self.delta, Factors) else ITEMSIZE[self.delta.dtype]
        return size + (ITEMSIZE[self.scores.dtype] if self.scores else 0)

    @property
    def fixed_bytes(self) -> int:
        """Bytes held while the tensor is worked on: LoRA factors as float32."""
        if not isinstance(self.delta, Factors):
            return 0
        return 4 * (self.delta.a.entries + self.delta.b.entries)

    @property
    def factor_file_bytes(self) -> int:
        return self.delta.a.nbytes + self.delta.b.nbytes if isinstance(self.delta, Factors) else 0


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor that is patched; `patches[p]` is None where patch p has nothing for it."""

    entry: TensorEntry
    patches: tuple[PatchInput | None, ...]
    quotas: tuple[int, ...]  # k per patch, for scope: tensor
    whole: bool  # done in one piece, read once

    @property
    def entry_bytes(self) -> int:
        return ITEMSIZE[self.entry.dtype] + sum(p.entry_bytes for p in self.patches if p)

    @property
    def fixed_bytes(self) -> int:
        return sum(p.fixed_bytes for p in self.patches if p)

    @property
    def factor_file_bytes(self) -> int:
        return sum(p.factor_file_bytes for p in self.patches if p)

    def unit_bytes(self, entries: int) -> int:
        """Ring bytes of a unit of so many entries: one aligned buffer per input."""
        # LoRA factors lie in the unit of a tensor that is done whole; chunks of one tensor share them.
        arrays = 1 + sum((not isinstance(p.delta, Factors)) + bool(p.scores) for p in self.patches if p)
        factors = self.fixed_bytes + 4 * len(self.patches) * ALIGN if self.whole else 0
        return align(self.entry_bytes * entries + arrays * ALIGN + factors)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One safetensors file of the output: its header bytes and, in order, where each base tensor goes."""

    name: str
    header: bytes
    tensors: tuple[TensorEntry, ...]
    sparse: bool = False  # zeros are left out as holes, because the base's file has holes

    @property
    def size(self) -> int:
        return len(self.header) + sum(t.nbytes for t in self.tensors)


@dataclass(frozen=True, slots=True)
class OutputPart:
    """Bytes [lo, hi) of an output file and the tensors in them; the header belongs to the part that starts at 0."""

    output: OutputFile
    tensors: tuple[TensorEntry, ...]
    lo: int
    hi: int

    @property
    def whole(self) -> bool:
        return self.lo == 0 and self.hi == self.output.size


@dataclass(frozen=True, slots=True)
class Unit:
    """Entries [lo, hi) of a target tensor, or bytes [lo, hi) of one that is copied; goes to `offset` of the file."""

    entry: TensorEntry
    target: Target | None
    lo: int
    hi: int
    offset: int
    ring_bytes: int


@dataclass(frozen=True)
class Plan:
    """See the module's docstring. `targets` are in bytewise order of their names."""

    recipe: Recipe
    engine: Backend
    kinds: tuple[Kind, ...]  # per patch
    adapters: tuple[Mapping[str, Any] | None, ...]  # per patch, a LoRA adapter's configuration
    base: Checkpoint
    inputs: tuple[Checkpoint, ...]  # everything that is read: base, sources, importance
    targets: Mapping[str, Target]
    outputs: tuple[OutputFile, ...]
    index: bytes | None
    companions: tuple[Path, ...]
    warnings: tuple[str, ...]
    memory_limit: int
    ring_bytes: int
    beside_bytes: int  # the engine's scratch, or the LoRA factors that chunks share
    chunk: int | None = None  # entries per chunk, set only by tests

    @property
    def patch_names(self) -> list[str]:
        return [p.name for p in self.recipe.patches]

    def resolved_recipe(self) -> dict[str, Any]:
        """The recipe with every default and every patch's kind written out."""
        recipe = self.recipe.resolved()
        for patch, kind in zip(recipe["patches"], self.kinds, strict=True):
            patch["kind"] = kind
        return recipe

    @property
    def whole_model(self) -> bool:
        return self.recipe.scope == "model"

    @cached_property
    def model_quotas(self) -> tuple[int, ...]:
        """k per patch over all targets, for scope: model."""
        return tuple(quota(p.top, self.total_entries) for p in self.recipe.patches)

    def sweeps(self, target: Target) -> int:
        """How often a target's inputs are read: once where no selection is needed or it is held whole, else twice.

        A third time only where the sampled guess of a threshold fails its exact check.
        """
        if target.whole:
            return 1
        if self.whole_model:
            return 2 if any(0 < k < self.total_entries for k in self.model_quotas) else 1
        given = zip(target.patches, target.quotas, strict=True)
        return 2 if any(p and 0 < k < target.entry.entries for p, k in given) else 1

    @cached_property
    def total_entries(self) -> int:
        return sum(t.entry.entries for t in self.targets.values())

    @cached_property
    def bytes_to_read(self) -> int:
        """Tensor bytes read in the normal case, where every sampled guess of a threshold passes its exact check."""
        total = sum(t.nbytes for output in self.outputs for t in output.tensors if t.name not in self.targets)
        sampled: list[Unit] = []
        for scope in self.sampled_scopes:
            sampled += self.sample_units(scope)
        total += sum((u.hi - u.lo) * u.target.entry_bytes for u in sampled if u.target)
        names = {u.entry.name for u in sampled}
        for name, target in self.targets.items():
            if target.entry.entries:
                sweeps = self.sweeps(target)
                total += sweeps * target.entry_bytes * target.entry.entries
                total += (sweeps + (name in names)) * target.factor_file_bytes
        return total

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
        room = min(SAMPLE_ENTRIES, self.ring_bytes // max(t.entry_bytes for t in scope) // 2)
        stride = max(entries // max(room // SAMPLE_RUN, 1), SAMPLE_RUN)
        units, at = [], 0
        for target in scope:
            size = target.entry.entries
            for lo in range(at, size, stride):
                hi = min(lo + SAMPLE_RUN, size)
                units.append(Unit(target.entry, target, lo, hi, 0, target.unit_bytes(hi - lo)))
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

    def units_of(self, target: Target, offset: int = 0) -> Iterator[Unit]:
        """The units of one target, in order of position."""
        entry = target.entry
        step = entry.entries if target.whole else self.chunk_entries(target)
        for lo in range(0, entry.entries, max(step, 1)):
            hi = min(lo + step, entry.entries)
            yield Unit(entry, target, lo, hi, offset + lo * ITEMSIZE[entry.dtype], target.unit_bytes(hi - lo))

    def chunk_entries(self, target: Target) -> int:
        if self.chunk is not None:
            return self.chunk
        room = min(CHUNK_BYTES, self.ring_bytes // 3)
        return max(ALIGN, (room - target.unit_bytes(0)) // target.entry_bytes // ALIGN * ALIGN)

    def owners(self, ranks: int) -> dict[str, int]:
        """Which rank does which tensor: contiguous runs in the order of the output, of about equal bytes."""
        work = [
            (t.name, self.targets[t.name].entry_bytes * t.entries if t.name in self.targets else t.nbytes)
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
        """The units of one part of an output file, in order of their offsets."""
        offset = part.lo or len(part.output.header)
        step = min(CHUNK_BYTES, self.ring_bytes // 3)
        for entry in part.tensors:
            target = self.targets.get(entry.name)
            if target is not None:
                yield from self.units_of(target, offset)
            else:
                for lo in range(0, entry.nbytes, step):
                    hi = min(lo + step, entry.nbytes)
                    yield Unit(entry, None, lo, hi, offset + lo, align(hi - lo))
            offset += entry.nbytes


def make_plan(recipe: Recipe, engine: Backend, memory_limit: int | None = None) -> Plan:
    """Open and check every input of the recipe and decide the work.

    Raises UsageError (recipe, limit) or InputError (inputs), before any tensor data is read.
    """
    limit = memory_limit or DEFAULT_LIMIT
    if limit < SMALLEST_LIMIT:
        raise UsageError("--memory-limit is too small", found=f"{limit} bytes", expected="at least 16MiB")
    base = open_checkpoint(recipe.base, relative_to=recipe.origin)
    sources = [open_source(p.name, p.source, p.kind, base, relative_to=recipe.origin) for p in recipe.patches]
    importance = [
        None if p.importance_path is None else open_importance(p.importance_path, relative_to=recipe.origin)
        for p in recipe.patches
    ]
    warnings = []
    names = _weights(recipe, base, sources)
    for source in sources:
        lost = extras(source, base)
        if lost and recipe.missing == "error":
            raise InputError(
                "the base has no such tensor, so the patch's change would be lost",
                file=source.checkpoint.ref,
                tensor=lost[0],
                found=f"{len(lost)} such tensors" if len(lost) > 1 else None,
                expected="a patch of this base (or missing: skip)",
            )
        warnings += [f"patch {source.name}: tensor '{name}' is not in the base, ignored" for name in lost]

    chunk = int(os.environ["SAFEPATCH_CHUNK"]) if "SAFEPATCH_CHUNK" in os.environ else None
    targets: dict[str, Target] = {}
    if not names:
        warnings.append("no tensor of the base is a target: the output will equal the base")
    for name in names:
        entry = base.tensors[name]
        if entry.dtype not in ITEMSIZE:
            raise InputError(
                "a target's dtype can't be patched",
                file=entry.path,
                tensor=name,
                found=entry.dtype,
                expected="F32, F16 or BF16 (or exclude it from targets)",
            )
        patches: list[PatchInput | None] = []
        for spec, source, scores in zip(recipe.patches, sources, importance, strict=True):
            delta = lookup(source, entry, missing=recipe.missing)
            score = None if scores is None or delta is None else importance_of(scores, entry, recipe.missing)
            if delta is None or (scores is not None and score is None):
                patches.append(None)
                continue
            patches.append(
                PatchInput(delta, score, random_key(recipe.seed, spec.name, name), keep_threshold(spec.retain))
            )
        quotas = tuple(quota(p.top, entry.entries) for p in recipe.patches)
        target = Target(entry, tuple(patches), quotas, whole=True)
        whole = recipe.scope == "tensor" and _fits(target, engine, limit)
        if chunk is not None:
            whole = whole and entry.entries <= chunk
        targets[name] = target if whole else replace(target, whole=False)

    outputs, index = _layout(base, recipe.max_shard_size)
    ring_bytes, beside_bytes = _memory(targets, engine, limit)
    return Plan(
        recipe=recipe,
        engine=engine,
        kinds=tuple(s.kind for s in sources),
        adapters=tuple(s.config for s in sources),
        base=base,
        inputs=(base, *(s.checkpoint for s in sources), *(c for c in importance if c is not None)),
        targets=targets,
        outputs=outputs,
        index=index,
        companions=tuple(companions(base)),
        warnings=tuple(warnings),
        memory_limit=limit,
        ring_bytes=ring_bytes,
        beside_bytes=beside_bytes,
        chunk=chunk,
    )


def _weights(recipe: Recipe, base: Checkpoint, sources: Sequence[Source]) -> list[str]:
    """The targets by name, once neither they nor what the patches bring for them is quantised."""
    names = match_targets(recipe, {t.name: len(t.shape) for t in base.tensors.values() if t.dtype in FLOATS})
    held = quantised(base)
    if held is not None:
        names = [name for name in names if not held.never_weights(name)]
        for source in sources:
            for name in source.names:
                if held.targeted(recipe, name):
                    codes = held.codes[module_of(name)].name
                    found = codes if codes in source.checkpoint.tensors else name
                    raise refuse_patch("this module of the base", source.checkpoint, found, held)
        if not names:
            raise refuse_base(base, held)
    for source in sources:
        of = quantised(source.checkpoint)
        for name in names:
            if of is not None and name in of:
                raise refuse_patch(
                    f"the patch '{source.name}'", source.checkpoint, of.codes[module_of(name)].name, of
                )
    return names


def _fits(target: Target, engine: Backend, limit: int) -> bool:
    entries, patches = target.entry.entries, len(target.patches)
    need = target.unit_bytes(entries) + engine.scratch(entries, patches)
    return need <= limit - FIXED_BYTES


def _memory(targets: Mapping[str, Target], engine: Backend, limit: int) -> tuple[int, int]:
    """Bytes of the ring, and of what lies beside it.

    The ring has room for three of the largest units where the limit allows it: one read, one worked on, one written.
    """
    beside = max(
        (engine.scratch(t.entry.entries, len(t.patches)) if t.whole else t.fixed_bytes for t in targets.values()),
        default=0,
    )
    room = limit - FIXED_BYTES - beside
    if room < (4 << 20):
        worst = max(targets.values(), key=lambda t: t.fixed_bytes)
        raise UsageError(
            f"--memory-limit is too small for the LoRA factors of '{worst.entry.name}'",
            found=f"{limit} bytes",
            expected=f"at least {limit + (4 << 20) - room} bytes",
        )
    largest = max((t.unit_bytes(t.entry.entries) for t in targets.values() if t.whole), default=0)
    return min(room, max(3 * largest, 6 * CHUNK_BYTES)) // ALIGN * ALIGN, beside


def _layout(base: Checkpoint, max_shard_size: str | int | None) -> tuple[tuple[OutputFile, ...], bytes | None]:
    if max_shard_size is None:
        if len(base.shards) == 1 and base.index is None:
            shard = base.shards[0]
            return (OutputFile(SINGLE, shard.header, shard.tensors, shard.sparse),), None
        outputs = tuple(OutputFile(s.file, s.header, s.tensors, s.sparse) for s in base.shards)
        return outputs, _index(outputs, base)
    room = parse_size(max_shard_size)
    groups: list[list[TensorEntry]] = [[]]
    for entry in (t for shard in base.shards for t in shard.tensors):
        if groups[-1] and sum(t.nbytes for t in groups[-1]) + entry.nbytes > room:
            groups.append([])
        groups[-1].append(entry)
    metadata = {k: v for shard in reversed(base.shards) for k, v in shard.metadata.items()}
    many = len(groups) > 1
    outputs = tuple(
        _output_file(
            f"model-{i:05d}-of-{len(groups):05d}.safetensors" if many else SINGLE,
            group,
            metadata,
            any(shard.sparse for shard in base.shards),
        )
        for i, group in enumerate(groups, 1)
    )
    return outputs, _index(outputs, base) if many else None


def _output_file(name: str, tensors: list[TensorEntry], metadata: dict[str, str], sparse: bool) -> OutputFile:
    # Widest entries first keeps every tensor aligned to its entry, as safetensors' own writer does.
    tensors = sorted(tensors, key=lambda t: -(t.nbytes // max(t.entries, 1)))
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for t in tensors:
        table[t.name] = {
            "dtype": t.dtype,
            "shape": list(t.shape),
            "data_offsets": [offset, offset + t.nbytes],
        }
        offset += t.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return OutputFile(name, len(text).to_bytes(8, "little") + text, tuple(tensors), sparse)


def _index(outputs: tuple[OutputFile, ...], base: Checkpoint) -> bytes:
    known = base.index.get("metadata") if base.index else None
    metadata = dict(known) if isinstance(known, dict) else {}
    metadata["total_size"] = sum(t.nbytes for o in outputs for t in o.tensors)
    weight_map = {t.name: o.name for o in outputs for t in o.tensors}
    data = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
