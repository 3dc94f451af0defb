"""The order of a sweep: check everything, measure the backbone, score the trials, choose."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from safepatch_core.errors import InputError, UsageError
from safepatch_core.evaluating import EvalConfig, evaluate
from safepatch_core.evaluating.data import load
from safepatch_core.files.disk import failures_named
from safepatch_core.files.records import IDENTITY, RunIdentity, digest, read_record
from safepatch_core.merging.api import identity
from safepatch_core.merging.api import plan as make_plan
from safepatch_core.merging.engine import EngineOptions
from safepatch_core.merging.recipe import Recipe, parse_recipe
from safepatch_core.merging.series import Series, listing
from safepatch_core.runs.jobs import OutputFolder, files_digest, versions
from safepatch_core.runs.sweep import report
from safepatch_core.runs.sweep.candidates import Parameters, candidates, relocated, with_parameters
from safepatch_core.runs.sweep.choice import choose, costs, meets, pareto_front
from safepatch_core.runs.sweep.config import SweepConfig
from safepatch_core.settings import checked, read_yaml
from safepatch_core.threads import room_for_a_thread
from safepatch_core.version import __version__

FORMAT = 1
TRIALS, SUMMARY, RECIPE = "trials.jsonl", "sweep.json", "recipe.yaml"
SCRATCH = ".trial"

Record = dict[str, Any]


def run(config: SweepConfig, out: OutputFolder, engine: EngineOptions, *, quiet: bool) -> dict[str, Any]:
    """Does every trial that is not done yet; returns the content of OUT/sweep.json."""
    search = Search(config, out, engine, quiet)
    known = search.go_on()
    with _scratch(out.path / SCRATCH) as scratch:
        if "backbone" not in known:
            search.say("backbone")
            known["backbone"] = search.measure(search.backbone, scratch)
            search.check_metrics(known["backbone"]["metrics"])
            out.write(SUMMARY, _json(known))
        trials = search.score(known["backbone"]["metrics"], scratch)
    return search.conclude(known, trials)


class Search:
    """The checked inputs of a sweep, and its steps.

    Raises UsageError or InputError for settings, recipes and data that don't work, before anything is measured.
    """

    def __init__(self, config: SweepConfig, out: OutputFolder, engine: EngineOptions, quiet: bool) -> None:
        self._config, self._out, self._quiet = config, out, quiet
        self._origin = Path(config.recipe).resolve().parent
        self._data: Any = read_yaml(config.recipe, "recipe")
        recipe = parse_recipe(self._data, origin=self._origin, file=config.recipe)
        self._todo: dict[int, Parameters] = dict(enumerate(candidates(config)))
        recipes = [self._recipe(parameters) for parameters in self._todo.values()]
        self._lists = [listing(recipe) for recipe in recipes]

        plan = make_plan(recipe, **engine)
        self._engine: EngineOptions = {"backend": plan.engine, "memory_limit": plan.memory_limit}
        self._series = Series(recipes, **self._engine)
        self.backbone = str(plan.base.root or plan.base.ref)
        self._measuring = self._evaluation(model=self.backbone, out="-")
        data = load(self._measuring).about
        self._about = {
            "recipe": plan.resolved_recipe(),
            "evaluation": {"settings": self._measuring.with_data().settings(), "data": data},
            "search": config.model_dump(mode="json", exclude={"recipe", "trials", "eval"}),
        }
        merging = identity(plan).parts
        self._identity = RunIdentity(
            {
                "search": digest(self._about["search"]),
                "recipe": digest([merging["recipe"], merging["seed"]]),
                "inputs": digest([merging["input"], *self._other_inputs()]),
                "evaluation settings": digest(self._measuring.model_dump(mode="json", exclude={"model", "out"})),
                "evaluation data": digest(data),
                "versions": digest([merging["version"], versions()]),
            }
        )

    def say(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def go_on(self) -> dict[str, Any]:
        """What an earlier call left in OUT/sweep.json, or how it begins."""
        path = self._out.path / SUMMARY
        if not path.exists():
            if any(left.name != SCRATCH for left in self._out.path.iterdir()):
                raise InputError("not the output of a sweep", file=self._out.path)
            return {"format": FORMAT, "safepatch": __version__, IDENTITY: dict(self._identity.parts)}
        known, before = read_record(path, "sweep")
        self._identity.require(before, self._out.path)
        return {key: known[key] for key in ("format", "safepatch", IDENTITY, "backbone") if key in known}

    def check_metrics(self, measured: Mapping[str, Any]) -> None:
        """Refuses objectives and constraints that the evaluation doesn't measure."""
        wanted = [*self._config.objectives]
        if "constraints" in self._config.model_fields_set:
            wanted += self._config.constraints
        for name in wanted:
            if name not in measured:
                raise UsageError(f"the evaluation doesn't measure '{name}'", expected=" or ".join(measured))

    def measure(self, model: str, scratch: Path) -> Record:
        """The metrics of a model: value, interval and count of each."""
        report_folder = scratch / "eval"
        found = evaluate(self._evaluation(model=model, out=str(report_folder)), quiet=True).data["metrics"]
        shutil.rmtree(report_folder)
        return {
            "metrics": {
                m["name"]: {**{k: m[k] for k in ("title", "unit", "better", "n")}, **m["model"]} for m in found
            }
        }

    def score(self, backbone: Mapping[str, Any], scratch: Path) -> list[Record]:
        """The records of all trials: those in OUT/trials.jsonl, and the rest, each appended once it is measured."""
        path = self._out.path / TRIALS
        records = self._finished(path)
        for number, parameters in self._todo.items():
            if number < len(records):
                continue
            begin = time.monotonic()
            record = {"trial": number, "parameters": parameters, **self._trial(parameters, scratch)}
            with failures_named(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            records.append(record)
            took = f"{time.monotonic() - begin:.1f} s"
            self.say(f"trial {number + 1}/{len(self._todo)}: {report.one_line(record, backbone)}, {took}")
        return records

    def conclude(self, known: dict[str, Any], trials: list[Record]) -> dict[str, Any]:
        """Writes OUT/sweep.json, the plots and the chosen recipe."""
        config, backbone = self._config, known["backbone"]["metrics"]
        higher = frozenset(name for name, metric in backbone.items() if metric["better"] == "higher")
        constraints = {name: share for name, share in config.constraints.items() if name in backbone}
        before = {name: metric["value"] for name, metric in backbone.items()}
        values = {
            record["trial"]: {name: metric["value"] for name, metric in record["metrics"].items()}
            for record in trials
            if "metrics" in record
        }
        feasible = {n: v for n, v in values.items() if meets(v, before, constraints, higher)}
        points = {n: costs(v, higher, list(config.objectives)) for n, v in feasible.items()}
        chosen = choose(feasible, config.objectives, constraints, higher) if feasible else None
        data = {
            **known,
            **self._about,
            "trials": [record | {"meets_constraints": record["trial"] in feasible} for record in trials],
            "front": pareto_front(points),
            "chosen": chosen,
        }
        for name, picture in report.plots(data).items():
            self._out.write(name, picture)
        if chosen is None:
            (self._out.path / RECIPE).unlink(missing_ok=True)
        else:
            recipe = relocated(
                with_parameters(self._data, trials[chosen]["parameters"]), self._origin, self._out.path
            )
            text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
            self._out.write(
                RECIPE, f"# Trial {chosen} of this sweep. Merge it with: safepatch merge recipe.yaml -o OUT\n{text}"
            )
        self._out.write(SUMMARY, _json(data))
        return data

    def _recipe(self, parameters: Mapping[str, Any]) -> Recipe:
        data = with_parameters(self._data, parameters)
        return parse_recipe(data, origin=self._origin, file=f"{self._config.recipe} with {parameters}")

    def _evaluation(self, **places: str) -> EvalConfig:
        return checked(EvalConfig, {**self._config.eval, **places})

    def _other_inputs(self) -> Iterator[str]:
        """What identifies the files that only some trials read."""
        for key, parameter in self._config.parameters.items():
            if key.rpartition(".")[2] in ("source", "importance"):
                for value in parameter.values or []:
                    plan = make_plan(self._recipe({key: value}), **self._engine)
                    yield identity(plan).parts["input"]

    def _finished(self, path: Path) -> list[Record]:
        """The records of an earlier call; a line that was torn when it stopped is cut off."""
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return []
        lines = raw.split(b"\n")[:-1]
        try:
            records: list[Record] = [json.loads(line) for line in lines]
            numbers = [record["trial"] for record in records]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError("not the trials of a sweep", file=path) from error
        if numbers != list(range(len(lines))):
            raise InputError("trials are missing or out of order", file=path)
        whole = sum(len(line) + 1 for line in lines)
        if whole < len(raw):
            os.truncate(path, whole)
        return records

    def _trial(self, parameters: Parameters, scratch: Path) -> Record:
        merged = scratch / "merged"
        recipe = self._recipe(parameters)
        made = self._series.merge(recipe, merged)
        if made.found:
            self.say(f"no other look at the patches for {made.found} of {made.targets} targets")
        room_for_a_thread()
        with ThreadPoolExecutor(1, thread_name_prefix="safepatch-hash") as beside:
            weights = beside.submit(files_digest, merged)
            measured = self._measured(merged, scratch)
        shutil.rmtree(merged)
        return {
            "lists": self._lists.index(listing(recipe)),
            "weights": weights.result(),
            "applied": {name: counts["applied"] for name, counts in made.counts.items()},
            **measured,
        }

    def _measured(self, merged: Path, scratch: Path) -> Record:
        """The metrics of a candidate, or why it has none."""
        try:
            found = self.measure(str(merged), scratch)["metrics"]
        except InputError as error:
            # The backbone was measured on the same data: what breaks now is this candidate, like an infinite output.
            return {"failed": error.what}
        return {
            "metrics": {
                name: {key: metric[key] for key in metric if key not in ("title", "unit", "better", "n")}
                for name, metric in found.items()
            }
        }


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A directory that is empty now and gone afterwards; a killed sweep leaves it to the next."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
