"""All that one model shows on the data: its answers, its answer NLLs, its text NLLs, its scores in tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from safepatch_core.errors import InputError
from safepatch_core.evaluating.config import EvalConfig
from safepatch_core.evaluating.data import Data, Prompts, Text
from safepatch_core.evaluating.relearning import relearn, require_trainable
from safepatch_core.evaluating.spans import Span, windows
from safepatch_core.evaluating.subject import Subject, batch_count, opened
from safepatch_core.evaluating.tasks import Score, Tasks
from safepatch_core.language.chat import Example, encode_rows
from safepatch_core.language.rows import place
from safepatch_core.progress import Progress


class Replies(BaseModel):
    """A model's answers to one set of prompts, in the rows' order."""

    model_config = ConfigDict(frozen=True)

    answers: list[str]
    nll: list[float] | None = None  # of the harmful answers given in the data: mean nats per token of each


class Measurement(BaseModel):
    """What one model showed; as JSON it is what an interrupted evaluation keeps."""

    model_config = ConfigDict(frozen=True)

    parameters: int
    dtype: str
    replies: dict[str, Replies] = {}  # by set
    text: list[tuple[float, int]] | None = None  # per window: nats, scored tokens
    scores: list[Score] = []
    relearned: dict[int, dict[str, Replies]] = {}  # by steps of fine-tuning on harmful rows; harmful sets alone

    @property
    def stages(self) -> dict[int, dict[str, Replies]]:
        """What the model said as it is, at 0, and after so many steps."""
        return {0: self.replies, **self.relearned}


def measure(
    folder: Path, label: str, data: Data, tasks: Tasks | None, config: EvalConfig, *, quiet: bool
) -> Measurement:
    """Load the model in `folder`, measure it on `data` and `tasks`, and give its memory back.

    Raises InputError for a model or a row that can't be used (file and line), UsageError for settings.
    """
    progress = partial(Progress, quiet=quiet, report=None)
    with opened(folder, config) as subject:
        if data.relearn is not None:
            require_trainable(subject)
        replies = {of.name: _replies(subject, of, config, f"{label}: {of.name}", progress) for of in data.sets}
        text = None
        if data.text is not None:
            spans = _windows(subject, data.text, config)
            sums = _nll(subject, spans, config, progress(f"{label}: text", _steps(spans, config)))
            text = [(total, span.scored) for total, span in zip(sums, spans, strict=True)]
        scores = [] if tasks is None else tasks.score(subject, config, quiet=quiet)
        weights = list(subject.model.parameters())
        relearned: dict[int, dict[str, Replies]] = {}
        if data.relearn is not None:  # last, as it leaves another model

            def look(step: int) -> None:
                relearned[step] = {
                    of.name: _replies(subject, of, config, f"{label}: {of.name} after step {step}", progress)
                    for of in data.harmful
                }

            relearn(subject, data.relearn, config, look, f"{label}: relearning", quiet=quiet)
        return Measurement(
            parameters=sum(p.numel() for p in weights),
            dtype=str(weights[0].dtype).removeprefix("torch."),
            replies=replies,
            text=text,
            scores=scores,
            relearned=relearned,
        )


def _replies(
    subject: Subject, prompts: Prompts, config: EvalConfig, title: str, progress: Callable[[str, int], Progress]
) -> Replies:
    examples = _encode(subject, prompts, config)
    answers = _ask(subject, examples, config, progress(title, _steps(examples, config)))
    nll = None
    if prompts.answered:
        spans = [Span(e.ids, e.answer) for e in examples]
        sums = _nll(subject, spans, config, progress(f"{title}, NLL", _steps(spans, config)))
        nll = [total / span.scored for total, span in zip(sums, spans, strict=True)]
    return Replies(answers=answers, nll=nll)


def _steps(items: Sequence[object], config: EvalConfig) -> int:
    return batch_count(len(items), config.batch_size)


def _ask(subject: Subject, examples: list[Example], config: EvalConfig, progress: Progress) -> list[str]:
    prompts = [e.ids[: e.answer] for e in examples]
    ends = {e.ids[-1] for e in examples}  # the template's own end of turn
    with progress:
        return subject.ask(prompts, ends, config, progress)


def _nll(subject: Subject, spans: list[Span], config: EvalConfig, progress: Progress) -> list[float]:
    with progress:
        return subject.nll(spans, config.batch_size, progress)


def _encode(subject: Subject, prompts: Prompts, config: EvalConfig) -> list[Example]:
    """Each prompt with its answer, or with a stand-in where only the prompt is used, as `derive` sees it."""
    examples = encode_rows(subject.chat, prompts.path, prompts.rows, config.window.length)
    for row, example in zip(prompts.rows, examples, strict=True):
        needed = example.answer + config.max_new_tokens
        if subject.positions is not None and needed > subject.positions:
            raise InputError(
                f"{place(prompts.path, row.line)}: prompt and generated answer don't fit the model",
                file=prompts.path,
                found=f"{needed} tokens",
                expected=f"at most {subject.positions}",
            )
        if example.truncated:
            raise InputError(
                f"{place(prompts.path, row.line)}: prompt and answer don't fit",
                file=prompts.path,
                expected=f"at most max_length = {config.window.length} tokens",
            )
    return examples


def _windows(subject: Subject, text: Text, config: EvalConfig) -> list[Span]:
    ids = subject.tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
    try:
        subject.chat.check(ids)
    except InputError as error:
        raise InputError(str(error), file=text.path) from error
    found = windows(ids, subject.lead(), *config.window)
    if not found:
        raise InputError("too short for perplexity", file=text.path, found=f"{len(ids)} tokens")
    return found
