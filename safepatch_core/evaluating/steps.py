"""The order of an evaluation: read the data, hold the output, measure each model, judge, publish."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from safepatch_core.deriving.model import require_floats
from safepatch_core.evaluating.coherence import read_by
from safepatch_core.evaluating.config import BUILT_IN, TRAINED, EvalConfig
from safepatch_core.evaluating.data import Data, load
from safepatch_core.evaluating.judge import Judge, Verdict, prefix_verdict
from safepatch_core.evaluating.judge_model import Classifier
from safepatch_core.evaluating.judge_trained import TrainedJudge
from safepatch_core.evaluating.measure import Measurement, measure
from safepatch_core.evaluating.patches import layers_of, survivals
from safepatch_core.evaluating.report import answers, build, files, names
from safepatch_core.evaluating.statistics import kappa
from safepatch_core.evaluating.subject import locate
from safepatch_core.evaluating.tasks import Tasks
from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.files.companions import companions
from safepatch_core.files.disk import hash_file
from safepatch_core.files.filenames import MANIFEST, SUMS
from safepatch_core.files.records import RunIdentity, digest
from safepatch_core.files.staging import Staging
from safepatch_core.language.model import at_work, limits
from safepatch_core.merging.manifest import read_manifest
from safepatch_core.progress import warn
from safepatch_core.version import __version__

# The report's own size hardly matters; a disk with less room than this is full.
ROOM = 1 << 20
# What an interrupted evaluation keeps of the last pass: the baseline's view of all answers.
READ = "read-by-baseline.json"
_READ = TypeAdapter(dict[str, dict[str, list[tuple[float, int]]]])


def run(config: EvalConfig, *, quiet: bool, force: bool, resume: bool) -> dict[str, Any]:
    """Everything; returns the content of report.json."""
    data = load(config, lambda line: warn(line, quiet, None))
    folders = {label: locate(ref) for label, ref in config.models.items()}
    judge = None if config.judge in BUILT_IN else locate(config.judge)
    if data.relearn is not None:
        for folder in folders.values():
            require_floats(folder)
    config = config.fitted([limits(folder).positions for folder in folders.values()])
    with at_work(config.threads, "lower batch_size or max_length"):
        trained = TrainedJudge() if config.judge == TRAINED else None
        classifier: Judge | None = trained if judge is None else Classifier(judge, config)
        tasks = Tasks(config) if config.tasks else None
        merged = {label: folder for label, folder in folders.items() if (folder / MANIFEST).is_file()}
        manifests = {label: read_manifest(folder / MANIFEST) for label, folder in merged.items()}
        facts: dict[str, Any] = {
            "models": _models(config, folders),
            "patches": {label: layers_of(manifest) for label, manifest in manifests.items()},
            "tasks": None if tasks is None else tasks.about,
        }
        by = config.judge if judge is None else _digest(judge)
        identity = _identity(config, data, facts, by if trained is None else trained.sha256)
        facts["fingerprint"] = identity.digest
        inputs = [*folders.values(), *data.paths, *([] if judge is None else [judge])]
        out = Path(config.out)
        done = _complete(out, facts["fingerprint"]) if resume else None
        with (
            Staging(out, inputs, identity, needed=ROOM, force=force or done is not None, resume=resume) as staging,
            _only_what_helps_is_left(staging),
        ):
            if done is not None:
                staging.discard()
                return done
            facts["survival"] = survivals(manifests, folders, facts["models"], config.later)
            measured = _measured(staging, folders, facts["models"], data, tasks, config, quiet)
            facts["read"] = _read(staging, folders, measured, data, config, quiet)
            stages = _verdicts(data, measured, classifier, quiet)
            verdicts = {label: of[0] for label, of in stages.items()}
            facts["stages"] = stages
            if classifier is not None:
                facts["judge"] = {
                    "name": names({"judge": config.judge})["judge"],
                    "sha256": identity.parts["judge"],
                    **classifier.about,
                    "same_as_prefix": _agreement(measured, verdicts),
                }
            report = build(config, data, measured, verdicts, facts)
            rows = answers(data, measured, verdicts, classifier is not None)
            for name, content in files(report, rows).items():
                staging.add(name, content)
            staging.publish()
    return report


def _models(config: EvalConfig, folders: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Label → name and digest; a folder that stands under two labels is read once."""
    hashed = {folder: _digest(folder) for folder in {folder.resolve() for folder in folders.values()}}
    return {
        label: {"name": name, "sha256": hashed[folders[label].resolve()]}
        for label, name in names(config.models).items()
    }


def _identity(config: EvalConfig, data: Data, facts: Mapping[str, Any], judge: str) -> RunIdentity:
    return RunIdentity(
        {
            "version": f"{__version__}, torch {torch.__version__}, transformers {version('transformers')}",
            "settings": digest([config.with_data().settings(), config.device, config.threads]),
            "data": digest([data.about, facts["tasks"]]),
            "models": digest(facts["models"]),
            "judge": judge,
        }
    )


def _measured(
    staging: Staging,
    folders: Mapping[str, Path],
    models: Mapping[str, Mapping[str, str]],
    data: Data,
    tasks: Tasks | None,
    config: EvalConfig,
    quiet: bool,
) -> dict[str, Measurement]:
    """Label → its measurement. Models that are the same, often the baseline, are measured once."""
    same = {label: next(of for of in models if models[of]["sha256"] == models[label]["sha256"]) for label in folders}
    once = {
        label: _one(staging, folders[label], label, data, tasks, config, quiet)
        for label in dict.fromkeys(same.values())
    }
    return {label: once[of] for label, of in same.items()}


def _one(
    staging: Staging,
    folder: Path,
    label: str,
    data: Data,
    tasks: Tasks | None,
    config: EvalConfig,
    quiet: bool,
) -> Measurement:
    """One model, measured now or by the interrupted run."""
    name = f"measured-{label}.json"
    known = staging.recall(name)
    if known is not None:
        with contextlib.suppress(ValidationError):
            return Measurement.model_validate_json(known)
    found = measure(folder, label, data, tasks, config, quiet=quiet)
    staging.keep(name, found.model_dump_json().encode())
    return found


def _read(
    staging: Staging,
    folders: Mapping[str, Path],
    measured: Mapping[str, Measurement],
    data: Data,
    config: EvalConfig,
    quiet: bool,
) -> dict[str, dict[str, list[tuple[float, int]]]]:
    """How likely the baseline finds every model's answers; nothing where there is none."""
    if "baseline" not in folders or not data.sets:
        return {}
    known = staging.recall(READ)
    if known is not None:
        with contextlib.suppress(ValidationError):
            return _READ.validate_json(known)
    said = {label: {name: of.answers for name, of in found.replies.items()} for label, found in measured.items()}
    found = read_by(folders["baseline"], data, said, config, quiet=quiet)
    staging.keep(READ, _READ.dump_json(found))
    return found


def _verdicts(
    data: Data, measured: Mapping[str, Measurement], classifier: Judge | None, quiet: bool
) -> dict[str, dict[int, dict[str, list[Verdict]]]]:
    """Label of a model → steps of relearning → set → a verdict on each answer.

    Models that share a measurement are judged once.
    """
    first: dict[int, str] = {}
    for label, measurement in measured.items():
        first.setdefault(id(measurement), label)
    places = [
        (label, step, prompts)
        for label in first.values()
        for step, replies in measured[label].stages.items()
        for prompts in data.sets
        if prompts.name in replies
    ]
    said = [measured[label].stages[step][prompts.name].answers for label, step, prompts in places]
    if classifier is None:
        found = [list(map(prefix_verdict, of)) for of in said]
    else:
        asked = [[row.values["question"] for row in prompts.rows] for _, _, prompts in places]
        found = classifier.verdicts(list(zip(asked, said, strict=True)), quiet=quiet)
    verdicts: dict[str, dict[int, dict[str, list[Verdict]]]] = {
        label: {step: {} for step in measured[label].stages} for label in first.values()
    }
    for (label, step, prompts), of in zip(places, found, strict=True):
        verdicts[label][step][prompts.name] = of
    return {label: verdicts[first[id(measurement)]] for label, measurement in measured.items()}


def _agreement(
    measured: Mapping[str, Measurement], verdicts: Mapping[str, Mapping[str, list[Verdict]]]
) -> dict[str, Any]:
    """Of how many answers the prefix judge says the same, refused or not, and how far beyond chance."""
    pairs = [
        (prefix_verdict(answer).refused, said.refused)
        for label, of in measured.items()
        for name, replies in of.replies.items()
        for answer, said in zip(replies.answers, verdicts[label][name], strict=True)
    ]
    agree, both = sum(a == b for a, b in pairs), [[pair[side] for pair in pairs] for side in (0, 1)]
    return {"n": len(pairs), "agree": agree, "kappa": kappa(*both) if pairs else None}


def _digest(folder: Path) -> str:
    """Of all that makes the model: the report says which weights it measured; a piece is believed for them alone."""
    opened = open_checkpoint(folder)
    files = {shard.path for shard in opened.shards} | set(companions(opened))
    return digest([(path.name, hash_file(path)) for path in sorted(files)])


def _complete(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """The report in `out`, if it is the one that would be made, whole and undamaged."""
    try:
        report: dict[str, Any] = json.loads((out / "report.json").read_bytes())
        sums = [line.split("  ", 1) for line in (out / SUMS).read_text().splitlines()]
        whole = all(hash_file(out / name) == digest for digest, name in sums)
        return report if whole and report["fingerprint"] == fingerprint else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _only_what_helps_is_left(staging: Staging) -> Iterator[None]:
    """A failed evaluation with no model measured has nothing to resume from."""
    try:
        yield
    except BaseException:
        if not (staging.finished or staging.files):
            staging.discard()
        raise
