"""What `make demo` does: a model that refuses too much is made safer, and refuses less.

    python examples/demo.py MODEL -o OUT [--teach] [--data FILE] [--set derive.seed=1]

The small model of the demo refuses nothing, so that `--teach` first makes an aligned one of it: it refuses most
harmful requests then, complies with some, and refuses harmless questions that merely sound harmful. What follows is
what safepatch is for: derive, merge, verify and eval, which are `safepatch run examples/demo.yaml`; and the fix file,
which holds what the merge changed and takes it out again.

Nothing that is measured was trained on. What is done is kept: after a stop, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import safepatch_core
from safepatch_core.bench.psa import backbone
from safepatch_core.errors import printable
from safepatch_core.evaluating.config import DEMO, DEMO_TO_DERIVE

RUN = Path(__file__).with_name("demo.yaml")
# What begins, and the seconds it takes with the demo's model on two cores.
STEPS: dict[str, tuple[str, int]] = {
    "answers": ("what the model says to ordinary questions, to be kept", 60),
    "backbone": ("teaching it to refuse", 45),
    "derive": ("two patches from the same harmful requests", 180),
    "merge": ("both patches into a new checkpoint", 5),
    "verify": ("every byte of it again", 5),
    "eval": ("both models on held-out prompts", 180),
    "fix": ("a file of nothing but the changes", 5),
    "revert": ("taking them out again", 5),
}
WIDEST = 110  # columns; longer lines are hard to read
Row = Mapping[str, Any]


class Steps:
    """A line on stderr as each step begins; with how long it takes, where that was measured."""

    def __init__(self, names: Sequence[str], *, timed: bool) -> None:
        self._names, self._timed = list(names), timed
        if timed:
            self._say(f"{len(self._names)} steps, {about(sum(STEPS[name][1] for name in names))} on two cores")

    def begin(self, name: str) -> None:
        what, seconds = STEPS[name]
        expected = f" ({about(seconds)})" if self._timed else ""
        self._say(f"{self._names.index(name) + 1}/{len(self._names)} {name}: {what}{expected}")

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def about(seconds: float) -> str:
    """A length of time for people."""
    if seconds < 60:
        return f"about {max(5, 5 * round(seconds / 5))} s"
    return f"about {round(seconds / 60)} min"


def demo(model: str, data: str, out: Path, *, teach: bool, changes: Sequence[str] = ()) -> str:
    """All steps, in the folder `out`; what is shown at the end."""
    began = time.monotonic()
    steps = Steps([name for name in STEPS if teach or name != "backbone"], timed=teach)
    steps.begin("answers")
    said = ask(model, out)
    utility = write_utility(said, out)
    if teach:
        steps.begin("backbone")
        model = str(taught(model, said, out))
    places = {"derive.model": model, "derive.data": data, "derive.utility_data": str(utility)}
    changes = [*(f"{key}={json.dumps(value)}" for key, value in places.items()), *changes]
    # `run` names its own four steps "1/4 derive" and so on.
    done = safepatch_core.run(RUN, out, changes=changes, resume=True, say=lambda text: steps.begin(text.split()[-1]))
    steps.begin("fix")
    fix = safepatch_core.build(done.data["recipe"], out / "fix.safetensors", force=True)
    steps.begin("revert")
    prove(fix.out, done.data["model"], model, out)
    changed = f"{fix.changes:,d} entries in {fix.size / 1e6:.1f} MB; taken out again, every bit is as it was"
    return "\n\n".join(
        (
            done.table,
            bars(done.data["metrics"]),
            side_by_side(rows_of(out / "eval" / "answers.jsonl")),
            f"fix:     {printable(fix.out)}, {changed}\ntime:    {(time.monotonic() - began) / 60:.1f} min",
        )
    )


def ask(model: str, out: Path) -> list[Row]:
    """What `model` says to the ordinary questions, and to those harmless ones that are not held out."""
    sounding = {"name": "sounding", "kind": "harmless", "file": str(DEMO / "harmless.jsonl")}
    settings = {
        "model": model,
        "out": str(out / "answers"),
        "harmless": str(DEMO / "ordinary.jsonl"),
        "more_sets": [sounding | {"rows": DEMO_TO_DERIVE["harmless"]}],
        "max_new_tokens": backbone.MAX_NEW_TOKENS,
        "max_length": 256,
        "stride": 128,
        "batch_size": 24,
    }
    config = safepatch_core.EvalConfig.model_validate(settings)
    return rows_of(safepatch_core.evaluate(config, quiet=True, force=True, resume=True).directory / "answers.jsonl")


def write_utility(said: Sequence[Row], out: Path) -> Path:
    """OUT/utility.jsonl: the answers that both patches are to keep, all but refusals."""
    kept = [row for row in said if row["model"]["answer"] and not row["model"]["refused"]]
    path = out / "utility.jsonl"
    path.write_text("".join(json.dumps(question_and_answer(row)) + "\n" for row in kept), "utf-8")
    return path


def question_and_answer(row: Row) -> dict[str, str]:
    return {"question": row["prompt"], "answer": row["model"]["answer"]}


def taught(model: str, said: Sequence[Row], out: Path) -> Path:
    """OUT/backbone: `model`, taught to refuse harmful requests beside ordinary questions, in a few steps."""
    rows = slice(*map(int, DEMO_TO_DERIVE["harmful"].split(":")))
    harmful = [row["question"] for row in rows_of(DEMO / "harmful.jsonl")[rows]]
    ordinary = [question_and_answer(row) for row in said if row["set"] == "harmless"]
    folder, staged = out / "backbone", out / ".backbone.part"
    made_from = sha256(json.dumps([weights(model), harmful, ordinary]).encode()).hexdigest()
    mark = folder / "made-from.txt"
    if not mark.exists() or mark.read_text() != made_from:
        for old in (staged, folder):
            shutil.rmtree(old, ignore_errors=True)
        backbone.teach(model, harmful, ordinary, staged)
        (staged / mark.name).write_text(made_from)
        # By these `run` notices that the backbone in its folder is another one.
        (staged / "SHA256SUMS").write_text("".join(f"{of}  {name}\n" for name, of in weights(staged).items()))
        staged.rename(folder)
    return folder


def prove(fix: Path, merged: str, base: str, out: Path) -> None:
    """Takes the fix out of a copy of the merged checkpoint, which must give the base back, byte for byte."""
    copy = safepatch_core.revert(fix, merged, out / "reverted", force=True).out
    if weights(copy) != weights(base):
        raise safepatch_core.InputError("taking the fix out does not give the base back", file=copy)
    shutil.rmtree(copy)


def weights(checkpoint: str | Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's files of weights, by their names."""
    found = {}
    for shard in safepatch_core.open_checkpoint(checkpoint).shards:
        with shard.path.open("rb") as file:
            found[shard.path.name] = file_digest(file, "sha256").hexdigest()
    return found


def rows_of(file: Path) -> list[Row]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in file.read_text("utf-8").split("\n")[:-1]]


def bars(metrics: Sequence[Row]) -> str:
    """Both rates before and after, drawn in plain text as wide as the terminal."""
    room = columns() - len("  before  100.0%  ")
    lines = []
    for metric in metrics:
        if metric["unit"] == "rate":
            lines.append(metric["title"])
            for name, key in (("before", "baseline"), ("after", "model")):
                rate = metric[key]["value"]
                lines.append(f"  {name:6}  {100 * rate:5.1f}%  " + "#" * round(rate * room))
    return "\n".join(lines)


def side_by_side(rows: Sequence[Row]) -> str:
    """Answers before and after: the first that got better of either kind, and the first that got worse."""
    shown = [pick(rows, "harmful", better=True), pick(rows, "harmless", better=True)]
    shown.append(pick(rows, "harmful", better=False) or pick(rows, "harmless", better=False))
    return "\n\n".join(sample(row) for row in shown if row is not None)


def pick(rows: Sequence[Row], of: str, *, better: bool) -> Row | None:
    """The first row of that set whose verdict changed so."""
    wanted = (of == "harmful") == better  # that the patched model refuses
    for row in rows:
        before, after = row["baseline"]["refused"], row["model"]["refused"]
        if row["set"] == of and before != after == wanted:
            return row
    return None


def sample(row: Row) -> str:
    """A prompt and both answers, a line each, cut to the terminal's width."""
    lines = [f"{row['set']}: {row['prompt']}"]
    for name, key in (("before", "baseline"), ("after", "model")):
        verdict = "refused" if row[key]["refused"] else "answered"
        lines.append(f"  {name:6} {verdict:8}  {' '.join(row[key]['answer'].split())}")
    return "\n".join(cut(printable(line)) for line in lines)


def cut(line: str) -> str:
    return line if len(line) <= columns() else line[: columns() - 3] + "..."


def columns() -> int:
    """Of the terminal, or of a page."""
    return min(shutil.get_terminal_size((100, 24)).columns, WIDEST)


def main() -> None:
    parser = argparse.ArgumentParser(description="make a model safer, and less prone to refuse")
    parser.add_argument("model", help="checkpoint directory, or a hub id")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder for all outputs; call again to go on"
    )
    parser.add_argument("--data", default=str(DEMO / "harmful.jsonl"), help="harmful requests to derive from")
    parser.add_argument("--teach", action="store_true", help="teach the model to refuse first")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as `safepatch run` takes it")
    of = parser.parse_args()
    try:
        print(demo(of.model, of.data, of.output, teach=of.teach, changes=of.set))
    except safepatch_core.SafepatchError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        sys.exit("demo: stopped; the same command goes on")


if __name__ == "__main__":
    main()
