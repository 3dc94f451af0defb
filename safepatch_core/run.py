"""`safepatch run`: derive → merge → verify → eval from one YAML file, each step resumable by its outputs.

The file has three sections. `derive` and `eval` take the fields of `DeriveConfig` and `EvalConfig`; `merge` takes
what a recipe says outside its patches, which `derive` writes. Paths are relative to the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any

import click
import yaml
from pydantic import BaseModel, ConfigDict, Field

from safepatch_core.api import MANIFEST, identity, merge, prepare
from safepatch_core.cli import Progress, count_table, emit, engine_options, output_options, size_option
from safepatch_core.derive import DeriveConfig, derive
from safepatch_core.errors import InputError, UsageError, printable
from safepatch_core.evaluate import EvalConfig, before_after, evaluate
from safepatch_core.options import checked
from safepatch_core.recipe import Globs, Loader, load_recipe, read_yaml
from safepatch_core.spec import Combine, Missing, NonFinite, Order, Scope
from safepatch_core.verification import verify

PATHS = {"model", "data", "harmful", "harmless", "text"}


class MergeSettings(BaseModel):
    """What the merge does beside the patches; keys left out stay as `derive` wrote them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    combine: Combine | None = None
    scope: Scope | None = None
    order: Order | None = None
    targets: str | Globs | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    nonfinite: NonFinite | None = None
    missing: Missing | None = None
    max_shard_size: str | int | None = None


class RunConfig(BaseModel):
    """The sections of a run file, unchecked but for their names."""

    model_config = ConfigDict(extra="forbid", strict=True)

    derive: dict[str, Any]
    merge: MergeSettings = MergeSettings()
    eval: dict[str, Any] | None = None


@click.command(name="run")
@click.argument("config", type=click.Path())
@click.option("-o", "--output", "out", required=True, type=click.Path(), help="Directory for all of its outputs.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Replace a value: derive.model=PATH.")
@click.option("--resume", is_flag=True, help="Keep what is complete and unchanged in OUT, do the rest.")
@engine_options
@output_options
def command(
    config: str,
    out: str,
    changes: tuple[str, ...],
    resume: bool,
    backend: str,
    device: str | None,
    threads: int | None,
    memory_limit: str | None,
    vram_limit: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Derive two patches, merge them, verify the result and evaluate it, as CONFIG says."""
    data = read_yaml(config, "run file")
    for change in changes:
        _set(data, change)
    settings = checked(RunConfig, data, config)
    origin, root = Path(config).resolve().parent, Path(out)
    if root.exists() and any(root.iterdir()) and not resume:
        raise InputError("the output exists and is not empty; --resume goes on with it", file=root)
    root.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        if not quiet:
            click.echo(text, err=True)

    say("1/4 derive")
    training = checked(DeriveConfig, {**_rooted(settings.derive, origin), "out": str(root / "derive")}, config)
    derived = derive(training, resume=(root / "derive").exists(), quiet=quiet)

    say("2/4 merge")
    recipe = _recipe(derived.recipe, settings.merge)
    merged = root / "merged"
    plan, engine = prepare(
        load_recipe(recipe),
        backend,
        device=device,
        threads=threads,
        memory_limit=size_option(memory_limit),
        vram_limit=size_option(vram_limit),
    )
    done = _Done(root / "run.json")
    if not done.holds("merge", identity(plan), merged / MANIFEST):
        progress = Progress("merge", quiet)
        try:
            merge(plan.recipe, merged, backend=engine, memory_limit=plan.memory_limit, force=True, progress=progress)
        finally:
            progress.close()
        done.note("merge", identity(plan))
    manifest = json.loads((merged / MANIFEST).read_bytes())
    counts = {patch["name"]: patch["total"] for patch in manifest["patches"]}

    say("3/4 verify")
    verdict = verify(merged)
    if not verdict.ok:
        raise InputError("the merged checkpoint is damaged", file=merged, found=verdict.problems[0])

    summary: dict[str, Any] = {"recipe": str(recipe), "model": str(merged), "counts": counts}
    table = ""
    if settings.eval is not None:
        say("4/4 eval")
        fixed = {"model": str(merged), "baseline": training.model, "out": str(root / "eval")}
        measuring = checked(EvalConfig, {**_rooted(settings.eval, origin), **fixed}, config)
        mark = {"merge": json.dumps(identity(plan)), "settings": measuring.model_dump_json()}
        report_file = root / "eval" / "report.json"
        if not done.holds("eval", mark, report_file):
            evaluate(measuring, quiet=quiet, force=True)
            done.note("eval", mark)
        report = json.loads(report_file.read_bytes())
        summary["report"] = str(root / "eval" / "report.md")
        summary["metrics"] = report["metrics"]
        table = before_after(report)
    if as_json:
        emit(summary)
    elif not quiet:
        click.echo(f"{table}\n\n{count_table(counts)}\n")
        for key in ("model", "report"):
            if key in summary:
                click.echo(f"{key + ':':8} {printable(summary[key])}")


class _Done:
    """What each finished step was made from; a step whose inputs changed is done again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._steps: dict[str, str] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            self._steps = {}

    @staticmethod
    def _digest(made_from: dict[str, str]) -> str:
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()

    def holds(self, step: str, made_from: dict[str, str], output: Path) -> bool:
        return output.is_file() and self._steps.get(step) == self._digest(made_from)

    def note(self, step: str, made_from: dict[str, str]) -> None:
        self._steps[step] = self._digest(made_from)
        part = self._path.with_suffix(".part")
        with open(part, "w") as file:
            file.write(json.dumps(self._steps, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._path)


def _set(data: Any, change: str) -> None:
    key, equals, text = change.partition("=")
    place = data
    *outer, last = key.split(".")
    for part in outer:
        place = place.setdefault(part, {}) if isinstance(place, dict) else None
    if not equals or not isinstance(place, dict):
        raise UsageError("--set takes section.key=value", found=change)
    place[last] = yaml.load(text, Loader=Loader)


def _rooted(section: dict[str, Any], origin: Path) -> dict[str, Any]:
    """Paths relative to the run file (or, given by --set, to here) made absolute; hub ids stay as they are."""
    rooted = dict(section)
    for key in PATHS & section.keys():
        if isinstance(section[key], str) and section[key]:
            places = [p for p in (origin / section[key], Path(section[key])) if p.exists()]
            rooted[key] = os.path.abspath(places[0]) if places else section[key]
    return rooted


def _recipe(written: Path, settings: MergeSettings) -> Path:
    """The recipe that `derive` wrote, or one beside it with the run's own settings."""
    changes = settings.model_dump(exclude_none=True)
    if not changes:
        return written
    recipe = read_yaml(written, "recipe") | changes
    path = written.with_name("recipe-run.yaml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    return path
