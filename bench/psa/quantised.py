"""What is left of a patch's behaviour in a quantised model: each way to get there, beside its own unpatched twin.

backbone and patches (as `steps` makes them) → a twin per format → a model per row → its answers, kept → the table.
A row is measured once; what is there is told after each, and a run that was stopped goes on with the next.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from safepatch_core.bench.psa.backbone import ordinary_questions
from safepatch_core.bench.psa.data import SIZES
from safepatch_core.bench.psa.measures import told as metrics_of
from safepatch_core.bench.psa.methods import METHODS, STRONG, recipe_of
from safepatch_core.bench.psa.steps import WITH_UTILITY, Evidence, make_backbone, settings
from safepatch_core.bench.psa.twins import LAYOUTS, as_floats, quantise
from safepatch_core.deriving import SafetyPatch, derive
from safepatch_core.evaluating import EvalConfig
from safepatch_core.evaluating.config import DEMO, DEMO_FILES, DEMO_TO_DERIVE
from safepatch_core.evaluating.data import Data, load
from safepatch_core.evaluating.measure import measure
from safepatch_core.files.filenames import MANIFEST
from safepatch_core.language.model import at_work, limits
from safepatch_core.language.rows import read_rows
from safepatch_core.merging.api import merge
from safepatch_core.merging.recipe import Quantized
from safepatch_core.runs.run import RunConfig
from safepatch_core.runs.run import run as run_file

FLOATS = "float"
PLAIN, MERGED = "unpatched", "merged"
STOCHASTIC, NEAREST, AFTERWARDS, OWN = "stochastic", "nearest", "merged, then quantised", "derived on the twin"
RESTORED = "restored by DPO"
WAYS = (PLAIN, MERGED, AFTERWARDS, STOCHASTIC, NEAREST, OWN, RESTORED)
INT4 = "int4-g32"
DRAWS = (0, 1, 2)
ORDERS = "120:320:4"  # of AdvBench, that the restored twin is asked: training may see them, the backbone did not
# Nothing is stopped here; what the guard of a usual recipe would say stands in each row.
UNGUARDED = [-1e9, 1e9]


class Row(NamedTuple):
    """One model: of floats or in a format, how it came to its patches, and the recipe's seed."""

    format: str
    way: str
    seed: int = 0

    @property
    def name(self) -> str:
        return "-".join((self.format, *self.way.replace(",", "").split(), str(self.seed)))

    @property
    def unpatched(self) -> Row:
        """What it is compared with."""
        return Row(self.format, PLAIN)


def rows() -> Iterator[Row]:
    """All of them; what says most comes first."""
    yield from (Row(FLOATS, PLAIN), Row(FLOATS, MERGED))
    for way in (PLAIN, STOCHASTIC):
        yield from (Row(format, way) for format in LAYOUTS)
    yield from (Row(INT4, OWN), Row(INT4, RESTORED))
    for way in (AFTERWARDS, NEAREST):
        yield from (Row(format, way) for format in LAYOUTS)
    for seed in DRAWS[1:]:
        yield from (Row(format, STOCHASTIC, seed) for format in LAYOUTS)
        yield from (Row(INT4, OWN, seed), Row(INT4, RESTORED, seed))


class Behaviour:
    """The rows' models and measurements, in OUT/quantised."""

    def __init__(self, job: Evidence, size: str) -> None:
        self.job, self.size, self.out = job, size, job.out / "quantised"
        step = SIZES[size]
        sets = job.corpora.held_out(step) | {"more_sets": [job.corpora.simple_tests(step)]}
        asked = EvalConfig.model_validate(sets | job.measuring | {"model": "any", "out": "any"})
        self.config = asked.fitted([limits(job.backbone).positions])
        self.data: Data = load(self.config)

    def found(self, row: Row) -> dict[str, Any]:
        """The row's measurement, and what its merge told of its codes; made if it is not there."""
        file = self.out / f"measured-{self.size}" / f"{row.name}.json"
        if not file.exists():
            self.job.say(row.name)
            file.parent.mkdir(parents=True, exist_ok=True)
            told = json.dumps(self._measure(row))
            staged = file.with_suffix(".part")
            staged.write_text(told)
            staged.rename(file)
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def _measure(self, row: Row) -> dict[str, Any]:
        model = self.model(row)
        floats = self.out / "floats"
        shutil.rmtree(floats, ignore_errors=True)
        if row.format != FLOATS:
            as_floats(model, floats)
        with at_work(self.job.threads, "take a smaller size"):
            measured = measure(
                model if row.format == FLOATS else floats, row.name, self.data, None, self.config, quiet=True
            )
        shutil.rmtree(floats, ignore_errors=True)
        manifest = model / MANIFEST
        patches = json.loads(manifest.read_text())["patches"] if manifest.exists() else []
        if row.way not in (PLAIN, MERGED):
            shutil.rmtree(model)  # its manifest is read
        codes = {patch["name"]: patch["codes"] for patch in patches if "codes" in patch}
        return {"measured": measured.model_dump(), "codes": codes}

    def model(self, row: Row) -> Path:
        """The row's checkpoint."""
        place = self.job.backbone if row == Row(FLOATS, PLAIN) else self.out / row.name
        if not place.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            if row.format == FLOATS:
                self._merge(self.patches(), row, place, {})
            elif row.way == PLAIN:
                quantise(self.job.backbone, place, row.format)
            elif row.way == AFTERWARDS:
                quantise(self.model(Row(FLOATS, MERGED)), place, row.format)
            elif row.way == RESTORED:
                self._merge(self.restored(), row, place, self._into_codes(row) | {"patches": [{}]})
            else:
                self._merge(self.patches(of_twin=row.way == OWN), row, place, self._into_codes(row))
        return place

    def _into_codes(self, row: Row) -> dict[str, Any]:
        rule = {"rounding": row.way, "reference": str(self.job.backbone.resolve())} if row.way == NEAREST else {}
        return {"base": str(self.model(row.unpatched).resolve()), "quantized": rule | {"survival": UNGUARDED}}

    def _merge(self, run: Path, row: Row, out: Path, changes: Mapping[str, Any]) -> None:
        """Patches strong enough to be seen, see the evidence's table."""
        recipe = run / "bench-recipe.yaml"
        method = {**METHODS[STRONG], **changes, "seed": row.seed}
        recipe.write_text(yaml.safe_dump(recipe_of(run, method), sort_keys=False))
        merge(recipe, out, backend="cpu", threads=self.job.threads, force=True)

    def patches(self, *, of_twin: bool = False) -> Path:
        """A run of `derive`: on the backbone, as differences from it, or on the floats of its twin in 4 bits."""
        run = self.out / ("patches-of-the-twin" if of_twin else "patches")
        changes = {"model": str(self.model(Row(INT4, PLAIN)))} if of_twin else {}
        config = settings(self.job, WITH_UTILITY, 0, run, save_as="delta", **changes)
        if not (run / "recipe.yaml").exists():
            self.job.say(f"derive: {run.name}")
            derive(config, resume=run.exists(), quiet=True)
        return run

    def restored(self) -> Path:
        """A run of `derive` in which the twin in 4 bits learns its float original's answers (Q-resafe's idea).

        Orders, harmless questions that look harmful and ordinary ones: what training may see of each.
        """
        out, questions = self.out / "restored", self.out / "questions.jsonl"
        run = out / "derive"
        if not (run / "recipe.yaml").exists():
            looks = read_rows(DEMO / DEMO_FILES["harmless"], ["question"], DEMO_TO_DERIVE["harmless"])
            harmful = read_rows(self.job.corpora.advbench, ["goal"], ORDERS)
            asked = [row.values["goal"] for row in harmful] + [row.values["question"] for row in looks]
            lines = (json.dumps({"question": text}) + "\n" for text in asked + ordinary_questions())
            questions.write_text("".join(lines))
            config = {
                "derive": settings(self.job, PLAIN, 0, run, **self._restoring(questions)).settings(),
                "answers": {"model": str(self.job.backbone.resolve()), "max_new_tokens": 32},
            }
            self.job.say(f"run: {out.name}")
            run_file(RunConfig.model_validate(config), out, resume=out.exists())
        return run

    def _restoring(self, questions: Path) -> dict[str, Any]:
        """How the run differs from others: Q-resafe trains six entries in ten (arXiv 2506.20251)."""
        patch = SafetyPatch(objective="dpo", mask_top=0.6, top=1.0, retain=1.0)
        columns = {"question_column": "question", "answer_column": "answer", "rows": None}
        data = {"model": str(self.model(Row(INT4, PLAIN)).resolve()), "data": str(questions.resolve())}
        return data | columns | {"patches": "safety", "safety": patch, "save_as": "delta"}


def told(of: Behaviour, found: Mapping[Row, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line per row: every measure with its interval, its change from the unpatched twin, and what became of codes.

    Rows whose twin has not been measured are left out.
    """
    lines = []
    for row in sorted(found, key=lambda row: ([FLOATS, *LAYOUTS].index(row.format), WAYS.index(row.way), row.seed)):
        if row.unpatched in found:
            pair = {"baseline": found[row.unpatched], "model": found[row]}
            codes = found[row]["codes"]
            stopped = sorted(name for name, of in codes.items() if not _guarded(of["survival"]))
            line = {"format": row.format, "way": row.way, "seed": row.seed, "size": of.size}
            metrics = metrics_of(of.config, of.data, pair if row.way != PLAIN else {"model": found[row]})
            lines.append(line | {"metrics": metrics, "codes": codes, "guard_stops": stopped})
    return lines


def _guarded(survival: float | None) -> bool:
    low, high = Quantized().survival
    return survival is None or low <= survival <= high


COLUMNS = {
    "harmful_compliance": ("harmful, AdvBench", "{:.1%}", 100),
    "harmful_compliance.sst": ("harmful, SimpleSafetyTests", "{:.1%}", 100),
    "over_refusal": ("over-refusal, XSTest", "{:.1%}", 100),
    "answer_nll": ("NLL of harmful answers", "{:.2f}", 1),
    "perplexity": ("perplexity", "{:.2f}", 1),
}


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row per model, with its change from the unpatched one and that change's 95% interval."""
    head = ["format", "way", "seed", *(title for title, _, _ in COLUMNS.values()), "survival", "codes changed"]
    body = [head, ["---"] * len(head), *([*_about(line), *_cells(line), *_kept(line)] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in body) + "\n"


def _about(line: Mapping[str, Any]) -> list[str]:
    return [line["format"], line["way"], str(line["seed"]) if line["way"] in (STOCHASTIC, OWN, RESTORED) else ""]


def _cells(line: Mapping[str, Any]) -> list[str]:
    cells = []
    for name, (_, shown, factor) in COLUMNS.items():
        of = line["metrics"][name]
        text = shown.format(of["value"])
        if "change" in of:
            digits = 1 if factor == 100 else 2
            change, low, high = (factor * of["change"]["value"], *(factor * end for end in of["change"]["interval"]))
            text += f" ({change:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}])"
        cells.append(text)
    return cells


def _kept(line: Mapping[str, Any]) -> list[str]:
    """Of each patch; a star where a usual recipe's guard would have stopped the merge."""
    codes = line["codes"].items()
    survival = [f"{of['survival']:.2f}{'*' * (name in line['guard_stops'])}" for name, of in codes]
    return [", ".join(survival), ", ".join(f"{of['changed'] / of['acted']:.2%}" for _, of in codes)]


def run(job: Evidence, size: str) -> list[dict[str, Any]]:
    """Every row, and OUT/results/behaviour.jsonl and .md after each; returns the lines."""
    make_backbone(job)
    of, found, lines = Behaviour(job, size), dict[Row, dict[str, Any]](), []
    results = job.out / "results"
    results.mkdir(exist_ok=True)
    for row in rows():
        found[row] = of.found(row)
        lines = told(of, found)
        for name, text in (
            ("behaviour.jsonl", "".join(json.dumps(line) + "\n" for line in lines)),
            ("behaviour.md", table(lines)),
        ):
            staged = results / f".{name}.part"
            staged.write_text(text)
            os.replace(staged, results / name)
    return lines
