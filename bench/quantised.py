"""Merges into FP8 twins: beside those into the bfloat16 model itself, and the plan of the largest one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.merging.api import merge
from safepatch_core.spec import Kind

from . import models
from .measure import Red, alternate, prepared, remove, run, safepatch
from .merges import inputs, merge_subject, output_bytes, same_bytes
from .models import PAGE, SHAPES, TWIN, ModelShape, is_target
from .registry import Bench, Case, Measured
from .shape import extract

SIZES = ("0.1B", "0.3B", "1.1B")
KINDS: tuple[Kind, ...] = ("lora", "delta")
LARGEST = "DeepSeek-V3"
SAMPLE_ENTRIES = 50_000_000  # at most so many, in all, are recomputed by the reference engine


def equals_reference(bench: Bench) -> None:
    """The gate: on a small model the engine and the reference write the same bytes."""
    folder = bench.models(SHAPES["tiny"], KINDS, twin=True)
    for kind in KINDS:
        recipe = models.write_twin_recipe(folder, kind)
        with bench.scratch() as scratch:
            merge(recipe, scratch / "reference", backend="reference")
            merge(recipe, scratch / "engine", backend=bench.backend, threads=bench.threads)
            same_bytes(scratch / "reference", scratch / "engine")


def _measure(size: str, bench: Bench) -> Measured:
    """Both bases with the same patches, in turn."""
    folder = bench.models(SHAPES[size], KINDS, twin=True)
    twin = sorted((folder / TWIN).glob("*.safetensors"))
    files = list(dict.fromkeys([*(path for kind in KINDS for path in inputs(folder, kind)), *twin]))
    facts: dict[str, Any] = {"entries": SHAPES[size].entries}
    with bench.scratch() as scratch, prepared(files, "warm", 2 * output_bytes(folder)) as before:
        subjects: dict[str, Callable[[], dict[str, float]]] = {}
        for kind in KINDS:
            for base, recipe in (("bf16", models.recipe_path(folder, kind)), ("fp8", twin_recipe(folder, kind))):
                of = facts[f"{base}-{kind}"] = {}
                subjects[f"{base}-{kind}"] = merge_subject(bench, recipe, scratch / "out", of)
        series = alternate(subjects, bench.rounds, before)
    for kind in KINDS:
        moved = [facts[f"{b}-{kind}"]["bytes_read"] + facts[f"{b}-{kind}"]["bytes_written"] for b in ("fp8", "bf16")]
        facts[f"moved_share-{kind}"] = moved[0] / moved[1]
    return Measured(series, [(f"fp8-{kind}", f"bf16-{kind}") for kind in KINDS], facts)


def twin_recipe(folder: Path, kind: Kind) -> Path:
    """Of a set with a twin."""
    return folder / f"recipe-fp8-{kind}.yaml"


def sample(shape: ModelShape) -> list[str]:
    """A tensor of every kind that the twin holds as codes, of the last layer and its last expert, the smallest first
    as long as they are not too many entries."""
    kinds: dict[str, tuple[int, str]] = {}
    for name, dims in shape.tensors():
        if is_target(name, dims) and shape.is_quantised(name):
            kinds[".".join(part for part in name.split(".") if not part.isdigit())] = math.prod(dims), name
    chosen, left = [], SAMPLE_ENTRIES
    for entries, name in sorted(kinds.values()):
        left -= entries
        if left >= 0:
            chosen.append(name)
    return chosen


def check_sample(folder: Path, names: Sequence[str], scratch: Path, bench: Bench) -> None:
    """Raises Red unless engine and reference write the same bytes for these tensors of the set."""
    part = scratch / "sample"
    part.mkdir()
    twin = open_checkpoint(folder / TWIN).tensors
    extract([twin[of] for name in names for of in (name, f"{name}_scale_inv")], part / TWIN)
    (part / TWIN / "config.json").write_bytes((folder / TWIN / "config.json").read_bytes())
    for patch in models.PATCHES:
        source = folder / models.source_name(patch, "lora")
        tensors = open_checkpoint(source).tensors
        stems = [f"base_model.model.{name.removesuffix('.weight')}.lora_" for name in names]
        wanted = [entry for name, entry in tensors.items() if name.startswith(tuple(stems))]
        extract(wanted, part / source.name, "adapter_model.safetensors")
        (part / source.name / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    recipe = models.write_twin_recipe(part, "lora")
    merge(recipe, part / "reference", backend="reference")
    merge(recipe, part / "engine", backend=bench.backend, threads=bench.threads)
    same_bytes(part / "reference", part / "engine")
    if all(
        (part / "engine" / path.name).read_bytes() == path.read_bytes()
        for path in (part / TWIN).glob("*.safetensors")
    ):
        raise Red("the patches changed no code")
    remove(part)


def _plan(name: str, bench: Bench) -> Measured:
    shape = SHAPES[name]
    folder = bench.models(shape, ["lora"], sparse=PAGE, base=False, twin=True)
    facts: dict[str, Any] = {"entries": shape.entries, "sample": sample(shape)}

    def plan() -> dict[str, float]:
        cost, text = run(safepatch("plan", twin_recipe(folder, "lora"), "--json", "--threads", "1"))
        planned = json.loads(text)
        facts["planned_bytes"] = planned["bytes_read"] + planned["bytes_written"]
        facts["targets"] = planned["targets"] if isinstance(planned["targets"], int) else len(planned["targets"])
        return cost._asdict()

    with bench.scratch() as scratch:
        check_sample(folder, facts["sample"], scratch, bench)
        series = alternate({"plan": plan}, bench.rounds)
    return Measured(series, [], facts)


def cases() -> list[Case]:
    """Cases of the groups `merge` and `shape`."""
    found = [
        Case(
            f"merge/{size}/fp8-block/warm",
            f"safepatch merge into {size} FP8 parameters beside the bfloat16 ones, warm inputs",
            {"size": size, "entries": SHAPES[size].entries, "variant": "fp8-block", "cache": "warm"},
            equals_reference,
            partial(_measure, size),
        )
        for size in SIZES
    ]
    found.append(
        Case(
            f"shape/{LARGEST}/fp8",
            f"safepatch plan of adapters for the FP8 model of {LARGEST}'s shape",
            {"size": LARGEST, "entries": SHAPES[LARGEST].entries},
            equals_reference,
            partial(_plan, LARGEST),
        )
    )
    return found
