"""`safepatch run`: derive → merge → verify → eval from one YAML file, each step resumable by its outputs.

The file has three sections. `derive` and `eval` take the fields of `DeriveConfig` and `EvalConfig`; `merge` takes
what a recipe says outside its patches, which `derive` writes. Paths are relative to the file.

With `rounds`, a list, all of it is done once per round, and what a round merges is the backbone of the next. A round
has a `name` and its own changes to the sections; `where` says which rows, by column, both `derive` and `eval` take in
it. The model after each round is measured on the harmful prompts of every round. `remember: [ewc, replay]` gives
every round the Fisher importance and the rows of the ones before it, to hold on to what they did.

Data without answers is given some by `answers`: a model that complies, asked before each `derive`. With the objective
dpo it is a model to be like, such as the float original of a quantised backbone: its answers are chosen, and the
backbone's own rejected.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Unpack

import yaml
from pydantic import Field, field_validator, model_validator

from safepatch_core.deriving import DeriveConfig, derive
from safepatch_core.errors import InputError, UsageError, printable
from safepatch_core.evaluating import EvalConfig, before_after, evaluate
from safepatch_core.evaluating.data import load
from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.files.disk import hash_file
from safepatch_core.files.filenames import MANIFEST
from safepatch_core.files.records import RunIdentity
from safepatch_core.language.rows import read_rows
from safepatch_core.merging.api import identity, merge, plan
from safepatch_core.merging.engine import EngineOptions
from safepatch_core.merging.recipe import Globs
from safepatch_core.merging.text import count_table
from safepatch_core.merging.verification import verify
from safepatch_core.runs import rounds
from safepatch_core.runs.jobs import OutputFolder, versions, weights_digest
from safepatch_core.settings import Strict, Where, checked, read_settings, read_yaml, rooted
from safepatch_core.spec import Combine, Missing, NonFinite, Order, Scope

RECORD = "run.json"
PROMPTS = "harmful.jsonl"
DATA, REPLAY = "data.jsonl", "replay.jsonl"


class MergeSettings(Strict):
    """What the merge does beside the patches; keys left out stay as `derive` wrote them."""

    combine: Combine | None = None
    scope: Scope | None = None
    order: Order | None = None
    targets: str | Globs | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    nonfinite: NonFinite | None = None
    missing: Missing | None = None
    max_shard_size: str | int | None = None


class OwnPrompts(Strict):
    """The harmful prompts that belong to one round: fields of `EvalConfig`."""

    harmful: str | None = None
    harmful_column: str | None = None
    harmful_rows: str | None = None
    harmful_where: Where | None = None
    answer_column: str | None = None


class Answers(Strict):
    """A model that answers the questions of `derive.data`, greedily; what it refuses or leaves empty is left out.

    With dpo only what is empty is, or what the backbone says too.
    """

    model: Annotated[str, Field(min_length=1)]
    max_new_tokens: Annotated[int, Field(ge=1)] = 128


class Round(Strict):
    """What one round does otherwise than the sections of the run."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    where: Where = {}
    derive: dict[str, Any] = {}
    merge: MergeSettings = MergeSettings()
    eval: OwnPrompts = OwnPrompts()

    @field_validator("derive")
    @classmethod
    def _takes_the_model_of_the_last(cls, section: dict[str, Any]) -> dict[str, Any]:
        if "model" in section:
            raise ValueError(
                "a round starts from the model of the one before; the first, from the run's derive.model"
            )
        return section


class RunConfig(Strict):
    """The sections of a run file; `derive` and `eval` are checked where they are used."""

    derive: dict[str, Any]
    answers: Answers | None = None
    merge: MergeSettings = MergeSettings()
    eval: dict[str, Any] | None = None
    rounds: Annotated[list[Round], Field(min_length=1)] | None = None
    remember: list[Literal["ewc", "replay"]] = []  # how a round holds on to the ones before it

    @field_validator("rounds")
    @classmethod
    def _names_differ(cls, given: list[Round] | None) -> list[Round] | None:
        names = [rounds.BACKBONE, *(of.name for of in given or [])]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"the name {twice[0]!r} is taken")
        return given

    @model_validator(mode="after")
    def _there_is_something_to_remember(self) -> RunConfig:
        if self.remember and self.rounds is None:
            raise ValueError("remember goes with rounds")
        return self


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run did: `data` is what `--json` prints, `table` the same for people."""

    directory: Path
    data: dict[str, Any]
    table: str


def run(
    config: str | os.PathLike[str] | RunConfig,
    out: str | os.PathLike[str],
    *,
    changes: Sequence[str] = (),
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] | None = None,
    quiet: bool = True,
    **engine: Unpack[EngineOptions],
) -> RunResult:
    """Derive two patches, merge them, verify the result and evaluate it, once or in rounds.

    Args:
        config: a run file, whose paths are relative to it; or a `RunConfig`, whose paths are relative to here.
        out: directory for all outputs.
        changes: replaced values of the file, like "derive.model=PATH".
        resume: keep what is complete and unchanged in `out`, do the rest.
        say: told in a line what begins.
        progress: told (bytes done, bytes in all) while a merge reads its inputs.
        quiet: no progress of training and evaluation on stderr.
        **engine: see `EngineOptions`.

    Raises:
        UsageError: settings don't work, or a library is missing.
        InputError: an input breaks a rule, or `out` is not empty without `resume`.
        OutputError, IOFailure, Busy: the output can't be created, can't be written, is held by another run.
    """
    file = None if isinstance(config, RunConfig) else os.fspath(config)
    settings = config if isinstance(config, RunConfig) else read_settings(RunConfig, config, "run file", changes)
    with OutputFolder(out, resume=resume) as folder:
        work = _Work(file, folder, engine, say, progress, quiet)
        data, table = (_once if settings.rounds is None else _in_rounds)(settings, work)
    return RunResult(folder.path, data, table)


def _once(settings: RunConfig, work: _Work) -> tuple[dict[str, Any], str]:
    """A run without rounds: what `--json` prints, and what is printed otherwise."""
    training = work.training(settings, settings.derive, "")
    measuring = None
    if settings.eval is not None:
        places = {"model": str(work.root / "merged"), "baseline": training.model}
        measuring = work.measuring(settings.eval, "eval", **places)
    work.say("1/4 derive")
    work.answer(settings, settings.derive, "")
    recipe = work.derive("derive", training)
    work.say("2/4 merge")
    merged = work.merge("merged", recipe, settings.merge)
    work.say("3/4 verify")
    work.verify(merged)
    summary = {"recipe": str(merged.recipe), "model": str(merged.folder), "counts": merged.counts}
    parts = [count_table(merged.counts), f"model:   {printable(merged.folder)}"]
    if measuring is not None:
        work.say("4/4 eval")
        report = work.evaluate("eval", measuring)
        page = work.root / "eval" / "report.html"
        summary |= {"report": str(page), "metrics": report["metrics"]}
        parts = [before_after(report), *parts]
        parts[-1] += f"\nreport:  {printable(page)}"
    return summary, "\n\n".join(parts)


def _in_rounds(settings: RunConfig, work: _Work) -> tuple[dict[str, Any], str]:
    """A run with rounds, as `_once`; the forgetting matrix is in rounds.json, rounds.md and rounds.png."""
    assert settings.rounds is not None
    todo: list[tuple[str, Round, dict[str, Any], DeriveConfig]] = []
    model = settings.derive.get("model")
    for number, of in enumerate(settings.rounds, 1):
        place = f"round-{number}"
        where = {"data_where": of.where} if of.where else {}
        before = _before(settings, [training for *_, training in todo], work.replayed(place))
        section = _with(settings.derive, {**where, **of.derive, **before, "model": model})
        todo.append((place, of, section, work.training(settings, section, place)))
        model = os.path.abspath(work.root / place / "merged")
    common = None if settings.eval is None else _common_prompts(settings.rounds, settings.eval, work)

    def measure(place: str, model: str) -> Path:
        if common is not None:
            work.evaluate(f"{place}/eval", work.measuring(common, f"{place}/eval", model=model))
        return work.root / place / "eval"

    if common is not None:
        work.say("backbone: eval")
    reports = [measure(rounds.BACKBONE, todo[0][-1].model)]
    done: list[dict[str, Any]] = []
    for place, of, section, training in todo:
        title = f"{place.replace('-', ' ')} of {len(todo)}, {of.name}"
        work.say(f"{title}: derive")
        work.answer(settings, section, place)
        if training.replay_data == work.replayed(place):
            work.replay(place, [earlier for *_, earlier in todo[: len(done)]])
        recipe = work.derive(f"{place}/derive", training)
        work.say(f"{title}: merge")
        changes = settings.merge.model_copy(update={k: getattr(of.merge, k) for k in of.merge.model_fields_set})
        merged = work.merge(f"{place}/merged", recipe, changes)
        work.verify(merged)
        done.append({"name": of.name, "model": f"{place}/merged", "weights": merged.weights, "counts": merged.counts})
        if common is not None:
            work.say(f"{title}: eval")
            reports.append(measure(place, str(merged.folder)))
    if common is None:
        return {"rounds": done}, f"model:   {printable(merged.folder)}"
    summary = rounds.summary(done, reports)
    page = work.out.write("rounds.md", rounds.markdown(summary))
    picture = rounds.heat_map(summary)
    if picture is not None:
        work.out.write("rounds.png", picture)
    work.out.write("rounds.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    places = f"model:   {printable(merged.folder)}\nreport:  {printable(page)}"
    return summary, f"{rounds.plain(summary)}\n\n{places}"


def _before(settings: RunConfig, earlier: Sequence[DeriveConfig], replayed: str) -> dict[str, Any]:
    """What a round is told of the ones before it: their Fisher importance, and where their rows will be."""
    keys: dict[str, Any] = {}
    if earlier and "ewc" in settings.remember:
        if any(of.importance_kind != "fisher" or of.ranked_at != "patched" for of in earlier):
            expected = "importance_kind: fisher, importance: patched"
            raise UsageError("EWC needs the Fisher importance of every round", expected=expected)
        folders = [Path(of.out) / "importance" / patch for of in earlier for patch in of.trained]
        keys["ewc_fisher"] = [os.path.abspath(folder) for folder in folders]
    if earlier and "replay" in settings.remember:
        keys["replay_data"] = replayed
    return keys


def _common_prompts(every: list[Round], section: Mapping[str, Any], work: _Work) -> dict[str, Any]:
    """The eval section with the harmful prompts of all rounds, gathered in OUT/harmful.jsonl, as categories."""
    lines, answered = [], True
    for of in every:
        own = {**({"harmful_where": of.where} if of.where else {}), **of.eval.model_dump(exclude_none=True)}
        prompts = {k: v for k, v in {**section, **own}.items() if k in OwnPrompts.model_fields}
        if not prompts.get("harmful"):
            raise UsageError(f"round '{of.name}' has no harmful prompts to be measured on", expected="eval.harmful")
        read = work.measuring(prompts, "eval", model="-")
        columns = {"question": read.harmful_column}
        columns |= {} if read.answer_column is None else {"answer": read.answer_column}
        answered = answered and "answer" in columns
        assert read.harmful is not None
        for row in read_rows(read.harmful, columns, read.harmful_rows, read.harmful_where):
            lines.append({rounds.COLUMN: of.name, **row.values})
    shared = {k: v for k, v in section.items() if k not in OwnPrompts.model_fields}
    gathered = work.out.write(PROMPTS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return {
        **shared,
        "harmful": os.path.abspath(gathered),
        "harmful_column": "question",
        "harmful_category_column": rounds.COLUMN,
        "answer_column": "answer" if answered else None,
    }


def _with(section: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A section with some keys replaced; of its patches, those keys that are given."""
    patches = {k: {**section[k], **changes[k]} for k in ("safety", "over_safety") if k in section and k in changes}
    return {**section, **changes, **patches}


def _answered(row: Mapping[str, Any]) -> dict[str, str] | None:
    """A row of `derive`, from one of an evaluation's answers; None for a refusal."""
    said = row["model"]
    return {"question": row["prompt"], "answer": said["answer"]} if said["answer"] and not said["refused"] else None


def _pair(row: Mapping[str, Any]) -> dict[str, str] | None:
    """The same with two answers; None where they are one."""
    chosen, rejected = row["model"]["answer"], row["baseline"]["answer"]
    if not chosen or not rejected or chosen == rejected:
        return None
    return {"question": row["prompt"], "chosen": chosen, "rejected": rejected}


class _Merged(NamedTuple):
    folder: Path
    recipe: Path
    counts: dict[str, Any]
    weights: str


class _Work:
    """The steps of a run, in the folder OUT; `place` is where in it a step writes, and its name in the record.

    A step whose output is there and was made from the same is kept. One that was made from something else is done
    again.
    """

    def __init__(
        self,
        file: str | None,
        out: OutputFolder,
        engine: EngineOptions,
        say: Callable[[str], None],
        progress: Callable[[int, int], None] | None,
        quiet: bool,
    ) -> None:
        self.out, self.root = out, out.path
        self._file, self._engine, self._quiet = file, engine, quiet
        self.say, self._progress = say, progress
        self._origin = Path.cwd() if file is None else Path(file).resolve().parent
        try:
            self._made_from: dict[str, str] = json.loads((self.root / RECORD).read_bytes())
        except (OSError, ValueError):
            self._made_from = {}

    def training(self, settings: RunConfig, section: Mapping[str, Any], place: str) -> DeriveConfig:
        """The checked settings of a derive step; of the data that `answer` makes, where it does."""
        config = checked(
            DeriveConfig, {**rooted(section, self._origin), "out": str(self.root / place / "derive")}, self._file
        )
        if settings.answers is None:
            return config
        made: dict[str, Any] = {"data": os.path.abspath(self.root / place / DATA), "data_where": {}, "rows": None}
        columns = {"answer_column": "rejected", "chosen_column": "chosen"}
        columns = columns if config.prefers else {"answer_column": "answer"}
        return config.model_copy(update={**made, **columns, "question_column": "question"})

    def answer(self, settings: RunConfig, section: Mapping[str, Any], place: str) -> None:
        """Writes the data of a derive step, if `answers` asks for it: its questions and what that model says."""
        if settings.answers is None:
            return
        asked = checked(DeriveConfig, {**rooted(section, self._origin), "out": "-"}, self._file)
        asking = {
            k: v for k, v in (settings.eval or {}).items() if k in ("max_length", "stride", "batch_size", "dtype")
        }
        asking |= {
            "harmful": asked.data,
            "harmful_column": asked.question_column,
            "harmful_rows": asked.rows,
            "harmful_where": asked.data_where,
            "system_prompt": asked.system_prompt,
            "thinking": asked.thinking,
            "device": asked.device,
            "threads": asked.threads,
            "max_new_tokens": settings.answers.max_new_tokens,
        }
        step = f"{place}/answers".lstrip("/")
        model = rooted(settings.answers.model_dump(), self._origin)["model"]
        beside = {"baseline": asked.model} if asked.prefers else {}
        self.evaluate(step, self.measuring(asking, step, model=model, **beside))
        rows = [json.loads(line) for line in (self.root / step / "answers.jsonl").read_text("utf-8").split("\n")[:-1]]
        kept = [found for row in rows if (found := (_pair if asked.prefers else _answered)(row)) is not None]
        self.say(f"answers: {len(kept)} of {len(rows)} questions")
        if not kept:
            what = "answers every question as the backbone does" if asked.prefers else "refuses every question"
            raise InputError(f"the model of answers {what}", file=model)
        self.out.write(str(Path(place) / DATA), "".join(json.dumps(row) + "\n" for row in kept))

    def replayed(self, place: str) -> str:
        """Where the rows of earlier rounds are for the one at `place`."""
        return os.path.abspath(self.root / place / REPLAY)

    def replay(self, place: str, earlier: Sequence[DeriveConfig]) -> None:
        """Writes the rows of earlier rounds for the one at `place`."""
        lines = []
        for of in earlier:
            columns = {"question": of.question_column, "answer": of.answer_column}
            for row in read_rows(of.data, columns, of.rows, of.data_where):
                lines.append(json.dumps(row.values, ensure_ascii=False) + "\n")
        self.out.write(str(Path(place) / REPLAY), "".join(lines))

    def measuring(self, section: Mapping[str, Any], place: str, **models: str) -> EvalConfig:
        """The checked settings of an eval step; its data is there and can be read."""
        fixed = {**models, "out": str(self.root / place)}
        config = checked(EvalConfig, {**rooted(section, self._origin), **fixed}, self._file)
        load(config)
        return config

    def derive(self, place: str, config: DeriveConfig) -> Path:
        """The recipe of the two patches. Training that was cut off goes on where it stopped."""
        base, data = Path(config.model), Path(config.data)
        made_from = RunIdentity(
            {
                "settings": config.settings(),
                "data": hash_file(data) if data.is_file() else "",
                "base": weights_digest(base) if self.root.resolve() in base.resolve().parents else "",
            }
        )
        folder = Path(config.out)
        if place in self._made_from and not self._is_made_from(place, made_from) and folder.exists():
            self.say(f"{printable(folder)}: done again, its inputs or settings changed")
            shutil.rmtree(folder)
        self._note(place, made_from)
        return derive(config, resume=folder.exists(), quiet=self._quiet).recipe

    def merge(self, place: str, derived: Path, settings: MergeSettings) -> _Merged:
        recipe = self._recipe(derived, settings)
        folder = self.root / place
        made = plan(recipe, **self._engine)
        if not ((folder / MANIFEST).is_file() and self._is_made_from(place, identity(made))):
            merge(made, folder, force=True, progress=self._progress)
            self._note(place, identity(made))
        manifest = json.loads((folder / MANIFEST).read_bytes())
        counts = {patch["name"]: patch["total"] for patch in manifest["patches"]}
        return _Merged(folder, recipe, counts, weights_digest(folder))

    def verify(self, merged: _Merged) -> None:
        verdict = verify(merged.folder)
        if not verdict.ok:
            raise InputError("the merged checkpoint is damaged", file=merged.folder, found=verdict.problems[0])

    def evaluate(self, place: str, config: EvalConfig) -> dict[str, Any]:
        """The content of the report. What an evaluation of the same had measured when it was cut off is kept."""
        made_from = RunIdentity(
            {
                "settings": config.model_dump(mode="json"),
                "data": load(config).about,
                **versions(),
                **{
                    label: [(str(shard.path), shard.identity) for shard in open_checkpoint(ref).shards]
                    for label, ref in config.models.items()
                },
            }
        )
        resume = self._is_made_from(place, made_from)
        self._note(place, made_from)
        return evaluate(config, quiet=self._quiet, force=True, resume=resume).data

    def _recipe(self, written: Path, settings: MergeSettings) -> Path:
        """The recipe that `derive` wrote, or one beside it with the run's own settings."""
        changes = settings.model_dump(exclude_none=True)
        if not changes:
            return written
        recipe = read_yaml(written, "recipe") | changes
        path = written.with_name("recipe-run.yaml").relative_to(self.root)
        return self.out.write(str(path), yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))

    def _is_made_from(self, place: str, made_from: RunIdentity) -> bool:
        return self._made_from.get(place) == made_from.digest

    def _note(self, place: str, made_from: RunIdentity) -> None:
        self._made_from[place] = made_from.digest
        self.out.write(RECORD, json.dumps(self._made_from, indent=2) + "\n")
