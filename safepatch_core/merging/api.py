"""A recipe becomes a checkpoint: plan, stream, write, publish. The function behind `safepatch merge`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Unpack

import yaml

from safepatch_core.backends.contract import Backend, Report, threads_of
from safepatch_core.errors import IOFailure, UsageError
from safepatch_core.files.filenames import MANIFEST
from safepatch_core.files.parsing import uncollected
from safepatch_core.files.reading import Identity, identify
from safepatch_core.files.records import RunIdentity, digest
from safepatch_core.files.staging import Staging
from safepatch_core.merging.effect import require_deltas, require_eligible, require_survival
from safepatch_core.merging.engine import EngineOptions, open_engine
from safepatch_core.merging.gates import measure
from safepatch_core.merging.pipeline import Trace
from safepatch_core.merging.plan import Plan, make_plan
from safepatch_core.merging.quantised.survival import in_all
from safepatch_core.merging.rates import load_rates, predict
from safepatch_core.merging.recipe import Recipe, load_recipe
from safepatch_core.merging.shards import write_shards
from safepatch_core.merging.sink import from_facts, to_facts
from safepatch_core.ranks import ranks_of_this_run
from safepatch_core.spec import SPEC_VERSION
from safepatch_core.version import __version__

SMALL_FILES = 1 << 20  # room that card, manifest, sums and index may need beside the shards and companions


@dataclass(frozen=True)
class MergeResult:
    """What a merge did."""

    out: Path
    counts: Mapping[str, Mapping[str, int]]  # per patch: entries, eligible, selected, applied over all targets
    bytes_read: int
    bytes_written: int
    warnings: tuple[str, ...]
    notes: tuple[str, ...]  # what patches may bring beside the targets
    # Over all targets:
    acted: int  # entries on which at least one patch acts
    changed: int  # those of them whose stored bits are not the base's
    # Per patch, what rounding to the codes of a quantised base left of it; None where nothing is stored as codes.
    kept: Mapping[str, Mapping[str, float | None]] | None = None

    @property
    def surviving(self) -> float | None:
        """The share of the entries acted on that rounding into the base's dtype doesn't take back."""
        return self.changed / self.acted if self.acted else None


def merge(
    recipe: str | os.PathLike[str] | Recipe | Plan,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
    trace: Trace | None = None,
    **engine: Unpack[EngineOptions],
) -> MergeResult:
    """Merge a recipe's patches into its base and write the new checkpoint to `out`.

    Under torchrun every rank calls it with the same arguments; the ranks share the work and the first publishes.

    Args:
        recipe: a recipe file, a `Recipe`, or what `plan` made of one.
        out: directory to create; it appears complete, by one rename, or not at all.
        force: replace an existing output, in one step.
        resume: finish an interrupted run of the same recipe, to the same bytes.
        progress: called with (bytes done, bytes in all) as inputs are read.
        trace: called with (stage, unit, begin, end) for every unit that a stage has done, in seconds of
            time.perf_counter.
        **engine: see `EngineOptions`; a `Plan` has its engine.

    Raises:
        UsageError: the recipe or an option is wrong.
        InputError: an input breaks a rule, or the output may not be replaced.
        OutputError: the output can't be created.
        IOFailure: reading or writing failed.
        Busy: another run holds the output.
    """
    plan = planned(recipe, engine)
    require_deltas(plan)
    inputs = [shard.path for checkpoint in plan.inputs for shard in checkpoint.shards]
    inputs += [checkpoint.root for checkpoint in plan.inputs if checkpoint.root is not None]
    # A sparse output takes what its base takes, and a little more where patches act: it is not asked for up front.
    needed = (
        sum(o.size for o in plan.outputs if not o.sparse)
        + sum(path.stat().st_size for path in plan.companions)
        + SMALL_FILES
    )
    small = {path: _fingerprint(path) for path in plan.companions}
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, plan.bytes_to_read)

    with (
        closing(ranks_of_this_run()) as ranks,
        Staging(Path(out), inputs, identity(plan), needed=needed, force=force, resume=resume, ranks=ranks) as staging,
    ):
        found, read = write_shards(plan, staging, ranks, advance, trace)
        counts = from_facts(staging.join(to_facts(found)))
        require_eligible(plan, counts)
        require_survival(plan, counts)
        if ranks.rank == 0:
            if plan.index is not None:
                staging.add(plan.index.name, plan.index.data)
            for path, before in small.items():
                data = path.read_bytes()
                if _fingerprint(path) != before:
                    raise IOFailure("the file changed during the merge", file=path)
                staging.add(path.name, data)
            staging.add("README.md", model_card(plan).encode())
            staging.add(MANIFEST, manifest(plan, counts, staging.files).encode())
            staging.publish()
        bytes_read = sum(ranks.gather(plan.gate_bytes + read))
    acted, changed = (sum(getattr(report, name) for report in counts.values()) for name in ("acted", "changed"))
    warnings = plan.warnings + (() if changed else (_unchanged(acted),))
    return MergeResult(
        *(staging.out, totals(plan, counts), bytes_read, plan.bytes_to_write, warnings, plan.notes, acted, changed),
        kept=kept_facts(plan, counts),
    )


def _unchanged(acted: int) -> str:
    if acted:
        return "the output equals the base: rounding into its dtype took every step back"
    return "the output equals the base: no patch acts on any entry"


def plan(recipe: str | os.PathLike[str] | Recipe, **engine: Unpack[EngineOptions]) -> Plan:
    """Everything that a merge will do, and the engine that will do it. Writes nothing.

    Args:
        recipe: a recipe file, or a `Recipe`.
        **engine: see `EngineOptions`.

    Raises:
        UsageError: the recipe or an option is wrong.
        InputError: an input breaks a rule.
    """
    opened, limit = open_engine(engine)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    with uncollected():
        asked = {"chunk_entries": engine.get("chunk_entries"), "streams": engine.get("streams")}
        return make_plan(recipe, opened, limit, **asked)


def planned(recipe: str | os.PathLike[str] | Recipe | Plan, engine: EngineOptions) -> Plan:
    """The plan itself, where there is one already, or that of a recipe."""
    if not isinstance(recipe, Plan):
        return plan(recipe, **engine)
    if engine:
        raise UsageError("a plan has its engine", found=", ".join(engine), expected="none of these beside a plan")
    return recipe


def prepare(recipe: str | os.PathLike[str] | Recipe, **engine: Unpack[EngineOptions]) -> tuple[Plan, Backend]:
    """`plan`, and its engine beside it."""
    made = plan(recipe, **engine)
    return made, made.engine


def describe(plan: Plan, where: str | os.PathLike[str] = ".", *, tensors: bool = True) -> dict[str, Any]:
    """What `merge` will do, as plain data; `where` is on the filesystem that the output would be written to.

    tensors: list the targets.
    """
    targets = plan.targets.values()
    place = Path(os.path.abspath(where))
    while not place.exists():
        place = place.parent
    quotas = _selected(plan.model_quotas, plan.model_skips) if plan.whole_model else None
    data: dict[str, Any] = {
        "engine": plan.engine.describe(),
        "threads": threads_of(plan.engine),
        "patches": [
            {"name": spec.name, "kind": kind, "top": spec.top, "retain": spec.retain, "scale": spec.factor}
            | ({"skip": spec.skip} if spec.skip else {})
            | {"beside": other.facts()}
            for spec, kind, other in zip(plan.recipe.patches, plan.kinds, plan.beside, strict=True)
        ],
        "scope": plan.recipe.scope,
        "combine": plan.recipe.combine,
        "base_tensors": len(plan.base.tensors),
        "targets": len(targets),
        "target_entries": plan.total_entries,
        "model_quotas": quotas,
        "passes": max((plan.sweeps(t) for t in targets), default=1),
        "chunked": sum(not t.whole for t in targets),
        "bytes_read": plan.gate_bytes + plan.bytes_to_read,
        "bytes_read_at_most": plan.lists,
        "gates": {"entries": plan.gate_entries, "bytes_read": plan.gate_bytes},
        "bytes_written": plan.bytes_to_write,
        "files": len(plan.outputs),
        "memory": plan.streams * (plan.ring_bytes + plan.beside_bytes) + plan.list_bytes,
        "streams": plan.streams,
        "memory_limit": plan.memory_limit,
        "free_space": shutil.disk_usage(place).free,
    }
    rates = load_rates()
    listed = _listed(plan) if tensors or rates is not None else []
    if tensors:
        data["tensors"] = listed
    # Cold inputs, as for a model that was just fetched; None until `safepatch bench floor --save` has measured.
    data["seconds"] = None if rates is None else predict({**data, "tensors": listed}, rates, streams=plan.streams)
    return data


def _listed(plan: Plan) -> list[dict[str, Any]]:
    """The targets, as plain data."""
    return [
        {
            "name": t.entry.name,
            "dtype": t.stored.dtype,
            "entries": t.entry.entries,
            "passes": plan.sweeps(t),
            "forms": [None if p is None else p.delta.form for p in t.patches],
            "quotas": [
                None if plan.whole_model or p is None else k
                for k, p in zip(_selected(t.quotas, t.skips), t.patches, strict=True)
            ],
        }
        for t in plan.targets.values()
    ]


def cosines(plan: Plan) -> dict[str, dict[str, float]]:
    """The cosine of the deltas of every two patches, by "first, second" and target; whole deltas, gates or not.

    Raises:
        InputError: a delta is NaN or infinite, and the recipe says nonfinite: error.
        IOFailure: reading failed.
    """
    names = plan.patch_names
    found = measure(plan.ungated, [*combinations(range(len(names)), 2)], plan.inputs, plan.recipe.nonfinite)
    return {
        f"{names[p]}, {names[q]}": {name: angle.cosine for name, angle in angles.items()}
        for (p, q), angles in found.items()
    }


def _selected(quotas: Sequence[int], skips: Sequence[int]) -> list[int]:
    """Per patch how many entries are selected at most."""
    return [k - skip for k, skip in zip(quotas, skips, strict=True)]


def identity(plan: Plan) -> RunIdentity:
    """What must agree between an interrupted run and the one that resumes it."""
    recipe = plan.resolved_recipe()
    shards = [shard for checkpoint in plan.inputs for shard in checkpoint.shards]
    return RunIdentity(
        {
            "version": f"{__version__}/{SPEC_VERSION}",
            "seed": str(recipe.pop("seed")),
            "recipe": digest((recipe, plan.adapters)),
            "input": digest(
                [(str(of.path), of.identity, hashlib.sha256(of.header).hexdigest()) for of in shards]
                + [(str(path), _fingerprint(path)) for path in plan.companions]
            ),
        }
    )


def _fingerprint(path: Path) -> Identity:
    return identify(path.stat())


def totals(plan: Plan, counts: Mapping[str, Report]) -> dict[str, dict[str, int]]:
    """Per patch, the counts summed over all targets."""
    result = {}
    for p, name in enumerate(plan.patch_names):
        of = [(t.entry.entries, counts[t.stored.name].patches[p]) for t in plan.targets.values()]
        result[name] = {
            "entries": sum(entries for entries, _ in of),
            "eligible": sum(found.eligible for _, found in of),
            "selected": sum(found.selected for _, found in of),
            "applied": sum(found.applied for _, found in of),
        }
    return result


def kept_facts(plan: Plan, counts: Mapping[str, Report]) -> dict[str, dict[str, Any]] | None:
    """Per patch, what rounding to codes left of it; None where no target is stored as codes."""
    found = in_all(plan.patch_names, counts)
    return None if found is None else {name: kept.facts() for name, kept in found.items()}


def manifest(plan: Plan, counts: Mapping[str, Report], files: Mapping[str, Mapping[str, Any]]) -> str:
    """`safepatch.json`: recipe, versions, counts per patch and tensor, size and SHA-256 per file."""
    sums, kept = totals(plan, counts), kept_facts(plan, counts)
    cosines = [plan.cosines(p) for p in range(len(plan.patch_names))]
    data = {
        "tool": {"name": "safepatch", "version": __version__},
        "spec": SPEC_VERSION,
        "recipe": plan.resolved_recipe(),
        "patches": [
            {
                "name": name,
                "kind": plan.kinds[p],
                "names": list(plan.renamed[p]),
                "beside": plan.beside[p].facts(),
                "total": sums[name],
                **({} if kept is None else {"codes": kept[name]}),
                "tensors": {
                    name: {
                        "entries": t.entry.entries,
                        "eligible": counts[t.stored.name].patches[p].eligible,
                        "selected": counts[t.stored.name].patches[p].selected,
                        "applied": counts[t.stored.name].patches[p].applied,
                        **({} if (told := cosines[p]) is None else {"cosine": told[name]}),
                    }
                    for name, t in plan.targets.items()
                },
            }
            for p, name in enumerate(plan.patch_names)
        ],
        "files": {name: dict(files[name]) for name in sorted(files)},
    }
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def model_card(plan: Plan) -> str:
    """The output's README.md, with the metadata that model hubs read."""
    recipe = plan.resolved_recipe()
    head = {
        "base_model": recipe["base"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["safepatch", "merge", "safety", "post-safety-alignment"],
    }
    patches = "\n".join(
        f"- `{p['name']}` ({p['kind']} `{p['source']}`{f' minus `{m}`' if (m := p['minus']) else ''}): "
        f"top {p['top']}, retain {p['retain']}, scale {p['scale']}"
        for p in recipe["patches"]
    )
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n"
        f"# {Path(recipe['base']).name}, safety-patched\n\n"
        f"A merge of `{recipe['base']}` with {len(recipe['patches'])} patch(es), combined by `{recipe['combine']}`, "
        f"made with safepatch {__version__} (SafePatching, arXiv 2405.13820).\n\n{patches}\n\n"
        "Counts per patch and tensor, and a SHA-256 per file, are in `safepatch.json`; "
        "`sha256sum -c SHA256SUMS` checks the files.\n\n"
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```\n"
    )
