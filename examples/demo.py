"""What `make demo` does: a model that refuses too much is made safer, and refuses less.

    python examples/demo.py MODEL -o OUT [--teach] [--data FILE] [--set derive.seed=1]

The small model of the demo refuses nothing, so that `--teach` first makes an aligned one of it: it refuses most
harmful requests then, complies with some, and refuses harmless questions that merely sound harmful. What follows is
what safepatch is for: derive, merge, verify and eval, which are `safepatch run examples/demo.yaml`; and the fix file,
which holds what the merge changed and takes it out again.

Nothing is trained on what is measured, or chosen by it. What is done is kept: after a stop, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from hashlib import file_digest, sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import safepatch_core
from safepatch_core.bench.psa import backbone
from safepatch_core.errors import printable
from safepatch_core.evaluating import before_after
from safepatch_core.evaluating.config import DEMO, DEMO_TO_DERIVE

RUN = Path(__file__).with_name("demo.yaml")
# What begins, and the seconds it takes with the demo's model on two cores.
STEPS: dict[str, tuple[str, int]] = {
    "answers": ("what the model says to harmless questions, to be kept", 20),
    "backbone": ("teaching it to refuse", 30),
    "derive": ("two patches from the same harmful requests", 120),
    "merge": ("both patches into a new checkpoint", 5),
    "verify": ("every byte of it again", 5),
    "eval": ("both models on held-out prompts", 115),
    "fix": ("a file of nothing but the changes", 5),
    "revert": ("taking them out again", 5),
}
MAX_NEW_TOKENS = 32  # of an answer that is trained on
WIDEST = 110  # columns; longer lines are hard to read
Row = Mapping[str, Any]


class Steps:
    """A line on stderr as each step begins: what is done, and how long it and all that is left take, where that was
    measured. On a terminal a clock runs at its end."""

    def __init__(self, names: Sequence[str], *, timed: bool) -> None:
        self._names, self._timed = list(names), timed
        self._line, self._began = "", 0.0
        self._terminal, self._ended = sys.stderr.isatty(), threading.Event()

    def __enter__(self) -> Steps:
        if self._terminal:
            threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._terminal:
            self._say("\n")

    def begin(self, name: str) -> None:
        """The one before is done."""
        what, seconds = STEPS[name]
        at = self._names.index(name)
        left = sum(STEPS[later][1] for later in self._names[at:])
        expected = f" (about {length(seconds)}, {length(left)} to go)" if self._timed else ""
        before = "\n" if self._terminal and self._line else ""
        self._line, self._began = f"{at + 1}/{len(self._names)} {name}: {what}{expected}", time.monotonic()
        self._say(before + (cut(self._line) if self._terminal else f"{self._line}\n"))

    def hear(self, text: str) -> None:
        """`run` names its own steps "2/4 merge" and so on; its remarks are passed over."""
        name = text.rpartition(" ")[2]
        if name in STEPS:
            self.begin(name)

    def _tick(self) -> None:
        while not self._ended.wait(1):
            passed = int(time.monotonic() - self._began)
            clock = f"  {passed // 60}:{passed % 60:02d}"
            self._say(f"\r{cut(self._line, columns() - len(clock))}{clock}" if self._line else "")

    @staticmethod
    def _say(text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)


def length(seconds: float) -> str:
    """A length of time for people, roughly."""
    if seconds < 60:
        return f"{max(5, 5 * round(seconds / 5))} s"
    return f"{round(seconds / 60)} min"


def demo(model: str, data: str, out: Path, *, teach: bool, changes: Sequence[str] = ()) -> str:
    """All steps, in the folder `out`; what is shown at the end."""
    began = time.monotonic()
    with Steps([name for name in STEPS if teach or name != "backbone"], timed=teach) as steps:
        steps.begin("answers")
        said = ask(model, out)
        utility = write_utility(said, out)
        if teach:
            steps.begin("backbone")
            model = str(taught(model, said, out))
        places = {"derive.model": model, "derive.data": data, "derive.utility_data": str(utility)}
        settings = [*(f"{key}={json.dumps(value)}" for key, value in places.items()), *changes]
        done = safepatch_core.run(RUN, out, changes=settings, resume=True, say=steps.hear)
        steps.begin("fix")
        fix = safepatch_core.build(done.data["recipe"], out / "fix.safetensors", force=True)
        steps.begin("revert")
        prove(fix.out, done.data["model"], model, out)
    changed = f"{fix.changes:,d} entries in {fix.size / 1e6:.1f} MB; taken out again, every bit is as it was"
    return "\n\n".join(
        (
            before_after(json.loads((out / "eval" / "report.json").read_bytes())),
            bars(done.data["metrics"]),
            side_by_side(rows_of(out / "eval" / "answers.jsonl")),
            f"model:   {printable(done.data['model'])}\n"
            f"fix:     {printable(fix.out)}, {changed}\n"
            f"report:  {printable(done.data['report'])}\n"
            f"time:    {(time.monotonic() - began) / 60:.1f} min",
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
        "max_new_tokens": MAX_NEW_TOKENS,
        "max_length": 256,
        "stride": 128,
        "batch_size": 72,
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
    """The rates before and after with what became of them, drawn in plain text as wide as the terminal."""
    rates = [metric for metric in metrics if metric["unit"] == "rate"]
    room = columns() - len("  before  100.0%  ")
    widest = max(metric[key]["interval"][1] for metric in rates for key in ("baseline", "model"))
    lines = ["# the rate; - up to the end of its 95% interval"]
    for metric in rates:
        lines.append(f"{metric['title']}: {outcome(metric['difference'])}")
        for name, key in (("before", "baseline"), ("after", "model")):
            rate, end = metric[key]["value"], metric[key]["interval"][1]
            drawn, spread = (round(value / widest * room) for value in (rate, end))
            lines.append(f"  {name:6}  {100 * rate:5.1f}%  {'#' * drawn}{'-' * (spread - drawn)}")
    return "\n".join(lines)


def outcome(change: Row) -> str:
    """What became of a rate that is better low."""
    low, high = change["interval"]
    if low <= 0 <= high:
        return "no clear change"
    return "better" if high < 0 else "worse"


def side_by_side(rows: Sequence[Row]) -> str:
    """Answers before and after: two of either kind that got better, and the first of either that got worse."""
    shown = []
    for of in ("harmful", "harmless"):
        shown += [*picked(rows, of, better=True)[:2], *picked(rows, of, better=False)[:1]]
    return "\n\n".join(map(sample, shown))


def picked(rows: Sequence[Row], of: str, *, better: bool) -> list[Row]:
    """The rows of that set whose verdict changed so."""
    wanted = (of == "harmful") == better  # that the patched model refuses
    return [
        row for row in rows if row["set"] == of and row["baseline"]["refused"] != row["model"]["refused"] == wanted
    ]


def sample(row: Row) -> str:
    """A prompt and both answers, a line each, cut to the terminal's width."""
    lines = [f"{row['set']}: {row['prompt']}"]
    for name, key in (("before", "baseline"), ("after", "model")):
        verdict = "refused" if row[key]["refused"] else "answered"
        lines.append(f"  {name:6} {verdict:8}  {' '.join(row[key]['answer'].split())}")
    return "\n".join(cut(printable(line)) for line in lines)


def cut(line: str, room: int | None = None) -> str:
    """The line, as much of it as there is room for: the terminal's width."""
    room = room or columns()
    return line if len(line) <= room else line[: room - 3] + "..."


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
