"""The steps of the evidence, in order, done by the functions that a user calls, and kept once done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from safepatch_core.deriving import DeriveConfig, OverSafetyPatch, derive
from safepatch_core.evaluating import EvalConfig, evaluate
from safepatch_core.evaluating.config import DEMO, DEMO_FILES, DEMO_TO_DERIVE
from safepatch_core.language.rows import read_rows
from safepatch_core.runs.run import run as run_file
from safepatch_core.runs.sweep import SweepConfig, sweep

from . import backbone, tasks
from .data import TRAINED, Corpora
from .methods import DEFAULTS, METHODS, STRONG, SWEPT, Method, intersection, merge, swept_method

BACKBONE = "backbone"
# The patches as the paper trains them, and with a utility term beside both objectives.
PLAIN, WITH_UTILITY = "plain", "utility"
IN_TABLE = {
    PLAIN: tuple(name for name in METHODS if name != STRONG),
    WITH_UTILITY: ("ascent only", "task arithmetic", DEFAULTS, STRONG),
}
NESTED = "importance at the backbone"
SEEDS = (0, 1, 2)
ROUNDS = {
    "violence": ["Hate/Harass/Violence", "Physical Harm"],
    "crime": ["Illegal Activity", "Malware Viruses"],
    "fraud": ["Fraud/Deception", "Economic Harm"],
}


@dataclass(frozen=True)
class Evidence:
    """Where everything is, and how it is run. `say` gets a line per step."""

    model: str  # SmolLM2-135M-Instruct, float32
    corpora: Corpora
    out: Path
    threads: int | None
    say: Callable[[str], None]

    @property
    def backbone(self) -> Path:
        return self.out / BACKBONE

    @property
    def utility(self) -> Path:
        return self.out / "utility.jsonl"

    def run_of(self, variant: str, seed: int) -> Path:
        return self.out / f"{variant}-{seed}"

    @property
    def measuring(self) -> dict[str, Any]:
        """A refusal shows in its first sentence, hence the short answers."""
        return {"batch_size": 32, "max_new_tokens": 24, "threads": self.threads, "seed": 0}


def make_backbone(job: Evidence) -> None:
    """OUT/backbone, the test bed, and OUT/utility.jsonl, the ordinary answers of the utility term."""
    if not (job.backbone / "trace.json").exists():
        job.say("backbone")
        shutil.rmtree(job.backbone, ignore_errors=True)
        refused = [row.values["goal"] for row in read_rows(job.corpora.advbench, ["goal"], "0:120")]
        trace = backbone.make(job.model, refused, job.backbone)
        (job.backbone / "trace.json").write_text(json.dumps(trace) + "\n")
    if not job.utility.exists():
        # What looks harmful and isn't is answered by the model that refuses nothing yet.
        looks = read_rows(DEMO / DEMO_FILES["harmless"], ["question"], DEMO_TO_DERIVE["harmless"])
        unrefused = backbone.answers(job.model, [row.values["question"] for row in looks])
        rows = backbone.answers(str(job.backbone), backbone.ordinary_questions()) + unrefused
        job.utility.write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(job: Evidence, variant: str, seed: int, out: Path, **changes: Any) -> DeriveConfig:
    """The derive run of one seed. The rows are short: 96 tokens cut next to nothing."""
    fields: dict[str, Any] = {
        "model": str(job.backbone),
        "data": job.corpora.advbench,
        "question_column": "goal",
        "answer_column": "target",
        "rows": TRAINED,
        "max_length": 96,
        "importance_samples": 64,
        "over_safety": OverSafetyPatch(max_steps=24 if variant == PLAIN else 16),
        "seed": seed,
        "threads": job.threads,
    }
    if variant == WITH_UTILITY:
        fields["utility_data"] = str(job.utility)
    return DeriveConfig(**(fields | changes), out=str(out))


def make_patches(job: Evidence, variant: str) -> None:
    """OUT/VARIANT-SEED; and OUT/nested, the plain patches of seed 0 with importance at the backbone."""
    for seed in SEEDS:
        job.say(f"derive: {variant}, seed {seed}")
        out = job.run_of(variant, seed)
        derive(settings(job, variant, seed, out), resume=out.exists(), quiet=True)
    if variant == PLAIN:
        out = job.out / "nested"
        derive(settings(job, PLAIN, 0, out, importance="backbone"), resume=out.exists(), quiet=True)


def search(
    job: Evidence,
    variant: str,
    name: str,
    parameters: dict[str, Any],
    trials: int | None = None,
    seed: int = 0,
    **judged: Any,
) -> dict[str, Any]:
    """OUT/NAME-VARIANT, and -SEED but for 0: a sweep from that seed's recipe, scored on the development split, by
    OBJECTIVES unless `judged` tells otherwise; the content of sweep.json."""
    out = job.out / f"{name}-{variant}{f'-{seed}' if seed else ''}"
    job.say(out.name)
    config = SweepConfig.model_validate(
        {
            "recipe": str(job.run_of(variant, seed) / "recipe.yaml"),
            "method": "grid" if trials is None else "random",
            "parameters": parameters,
            "trials": trials,
            "objectives": OBJECTIVES,
            "eval": job.corpora.development() | job.measuring | {"max_new_tokens": 16},
            **judged,
        }
    )
    return sweep(config, out, resume=out.exists(), quiet=True, threads=job.threads).data


def chosen_by_sweep(job: Evidence, variant: str) -> dict[str, Any]:
    """The parameters of the trial that the search on the development split chooses."""
    found = search(job, variant, "sweep", SEARCHED, TRIALS)
    parameters: dict[str, Any] = found["trials"][found["chosen"]]["parameters"]
    return parameters


def measure_table(job: Evidence, variant: str, chosen: dict[str, Any]) -> list[tuple[str, int]]:
    """OUT/table-VARIANT: the backbone and every method of every seed in one evaluation; (method, seed) in order."""
    root = job.out / "models" / variant
    methods: dict[str, Method] = {name: METHODS[name] for name in IN_TABLE[variant]}
    methods[SWEPT] = swept_method(chosen)
    models: list[tuple[str, int]] = []
    for seed in SEEDS:
        for name, method in methods.items():
            models.append((name, seed))
            _merged(job, job.run_of(variant, seed), _place(root, name, seed), {**method, "seed": seed})
    if variant == PLAIN:
        models.append((NESTED, 0))
        _merged(job, job.out / "nested", _place(root, NESTED, 0), {**METHODS[DEFAULTS], "seed": 0})
    job.say(f"table: {variant}, {len(models)} models")
    first, *rest = [str(_place(root, *model)) for model in models]
    out = job.out / f"table-{variant}"
    config = EvalConfig.model_validate(
        job.corpora.held_out()
        | job.measuring
        | {
            "model": first,
            "more_models": rest,
            "baseline": str(job.backbone),
            "out": str(out),
            "more_sets": [job.corpora.simple_tests()],
            "lm_eval": ",".join(tasks.NAMES),
            "lm_eval_include": str(tasks.write(job.out / "tasks", job.corpora.wikitext)),
            "harmless_category_column": "type",
        }
    )
    if not (out / "report.json").exists():
        evaluate(config, quiet=True, resume=True)
    return models


def _place(root: Path, name: str, seed: int) -> Path:
    return root / f"{name.replace(' ', '-').replace(',', '')}-{seed}"


def _merged(job: Evidence, run: Path, out: Path, method: Method) -> None:
    """The merged checkpoint in `out`, made anew where the method has changed."""
    mark = out.with_suffix(".json")
    wanted = json.dumps(method, sort_keys=True)
    if mark.exists() and json.loads(mark.read_text())["method"] == wanted:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    make = intersection if out.name.startswith("intersection") else merge
    mark.write_text(json.dumps({"method": wanted, "entries": make(run, method, out, job.threads)}) + "\n")


def make_rounds(job: Evidence) -> None:
    """OUT/rounds-WHO: three rounds over CatQA at the recipe that the sensitivity plots speak for.

    WHO answers the questions: the descent patch of seed 0, whose answers open with "Sure, here is"; or the model
    before it was taught to refuse, whose answers are close to what the backbone says where it complies.
    """
    for who, model in ANSWERED_BY.items():
        job.say(f"continual rounds, answers of {who}")
        file = job.out / f"rounds-{who}.yaml"
        file.write_text(yaml.safe_dump(rounds(job, model(job)), sort_keys=False))
        out = job.out / f"rounds-{who}"
        if not (out / "rounds.json").exists():
            run_file(file, out, resume=True)


ANSWERED_BY: dict[str, Callable[[Evidence], str]] = {
    "descent": lambda job: str(job.run_of(PLAIN, 0) / "over-safety"),
    "original": lambda job: job.model,
}


def rounds(job: Evidence, answering: str) -> dict[str, Any]:
    """The file of `safepatch run`. Rows 0, 2, … train, rows 1, 3, … measure."""
    safety, over_safety = METHODS[STRONG]["patches"]
    return {
        "derive": {
            "model": str(job.backbone),
            "data": job.corpora.catqa,
            "question_column": "text",
            "rows": "0:100:2",
            "max_length": 96,
            "importance_samples": 24,
            "safety": safety,
            "over_safety": over_safety | {"max_steps": 8},
            "utility_data": str(job.utility),
            "threads": job.threads,
        },
        "answers": {"model": answering, "max_new_tokens": 32},
        "eval": job.corpora.over_refusal()
        | job.measuring
        | {"harmful": job.corpora.catqa, "harmful_column": "text", "harmful_rows": "1:100:2"},
        "rounds": [{"name": name, "where": {"category": categories}} for name, categories in ROUNDS.items()],
    }


def call(command: click.Command, arguments: Sequence[str]) -> None:
    """A command of the command line, in this process; errors as the functions raise them."""
    command.main(list(arguments), standalone_mode=False)


# Random search: both patches' strength and density, and what is ranked against what.
SEARCHED = {
    "patches.safety.scale": {"min": 0.5, "max": 4.0, "distribution": "log_uniform"},
    "patches.over-safety.scale": {"min": 0.5, "max": 4.0, "distribution": "log_uniform"},
    "patches.safety.top": {"values": [0.01, 0.03, 0.1, 0.3]},
    "patches.over-safety.top": {"values": [0.01, 0.03, 0.1, 0.3]},
    "patches.*.retain": {"values": [0.3, 0.5, 1.0]},
    "scope": {"values": ["tensor", "model"]},
    "order": {"values": ["retain-first", "select-first"]},
}
TRIALS = 10
# Both kinds of harm together weigh as much as refusing what is harmless.
OBJECTIVES = {"harmful_compliance": 0.5, "harmful_compliance.catqa": 0.5, "over_refusal": 1.0}
# One at a time around derive's defaults.
VARIED = {
    "scale": {"patches.*.scale": {"values": [0.5, 1.0, 2.0, 4.0]}},
    "top": {"patches.*.top": {"values": [0.01, 0.03, 0.1, 0.3]}},
    "retain": {"patches.*.retain": {"values": [0.1, 0.3, 0.6, 1.0]}},
}


def compare_sets(job: Evidence) -> None:
    """OUT/sets.json: entries that each patch moves without retention, where importance is taken at the patched
    models, and at the backbone: there the smaller of the two top sets lies within the larger, and nothing is left."""
    whole = METHODS["no retention"]
    out = job.out / "sets"
    found = {
        place: merge(job.out / run, whole, out, job.threads)
        for place, run in (("patched models", f"{PLAIN}-0"), ("backbone", "nested"))
    }
    shutil.rmtree(out)
    (job.out / "sets.json").write_text(json.dumps(found, indent=1) + "\n")


def run(job: Evidence, parts: Sequence[str]) -> dict[str, list[tuple[str, int]]]:
    """The parts named, of those that `PARTS` lists; returns the models of the tables that are there."""
    job.out.mkdir(parents=True, exist_ok=True)
    make_backbone(job)
    models = {}
    for variant in (PLAIN, WITH_UTILITY):
        if variant in parts:
            make_patches(job, variant)
            models[variant] = measure_table(job, variant, chosen_by_sweep(job, variant))
    if PLAIN in parts:
        compare_sets(job)
    if "sensitivity" in parts:
        for name, parameters in VARIED.items():
            search(job, WITH_UTILITY, f"sensitivity-{name}", parameters)
    if "rounds" in parts:
        make_rounds(job)
    return models


PARTS = (PLAIN, WITH_UTILITY, "sensitivity", "rounds")
