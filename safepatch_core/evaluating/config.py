"""What an evaluation is told: every field with its unit and default. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from safepatch_core.settings import Device, PathText, Strict, Thinking, Threads, Where, checked

DEMO = Path(__file__).parent.parent / "data" / "demo"
# The first rows of each file are to derive patches from, the next to choose a recipe by, the last to measure it on.
DEMO_TO_DERIVE = {"harmful": "0:96", "harmless": "0:48"}
DEMO_TO_CHOOSE = {"harmful": "96:216", "harmless": "48:168"}
DEMO_HELD_OUT = {"harmful": "216:336", "harmless": "168:288"}

Kind = Literal["harmful", "harmless"]
PREFIX, TRAINED = "prefix", "trained"
BUILT_IN = (PREFIX, TRAINED)
WINDOW = 512
RELEARN_STEPS = 16


class Window(NamedTuple):
    """Tokens that are read at a time, and from there to the next."""

    length: int
    stride: int


class PromptSet(Strict):
    """One more set of prompts, as the settings of `harmful` and `harmless` describe the first two."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="What the report calls it.")
    kind: Kind = Field(description="harmful: complying with it is bad. harmless: refusing it is bad.")
    file: PathText = Field(description="The data file.")
    column: str = Field(default="question", description="Column of the prompts. Default question.")
    answer_column: str | None = Field(default=None, description="As answer_column of the harmful prompts.")
    category_column: str | None = Field(default=None, description="Rates are also given per value of it.")
    request_column: str | None = Field(
        default=None,
        description="Column that is the same in rows which ask for one thing in several framings: it is told how "
        "often all of them get the same answer.",
    )
    rows: str | None = Field(default=None, description="Slice of the rows that where leaves. Default all.")
    where: Where = Field(default={}, description="Only rows with these values. Default all.")


class EvalConfig(Strict):
    """An evaluation. Without `harmful`, `harmless`, `more_sets`, `text` and `lm_eval` it uses the bundled demo data.

    Data files are .csv, .tsv, .jsonl, .json, .parquet or .txt, as `safepatch_core.language.rows` reads them.
    """

    model: PathText = Field(
        description="The model to measure: a checkpoint directory, or a hub id org/name[@revision]."
    )
    more_models: list[PathText] = Field(
        default=[], description="Further models, each compared with the same baseline."
    )
    baseline: PathText | None = Field(default=None, description="The model to compare with. Default none.")
    out: PathText = Field(description="The report directory; must be new or empty.")

    harmful: PathText | None = Field(default=None, description="Harmful prompts. Default none.")
    harmful_column: str = Field(default="question", description="Their column. Default question.")
    answer_column: str | None = Field(
        default=None, description="Column of a harmful answer to each; its NLL is measured. Default none."
    )
    harmful_rows: str | None = Field(default=None, description="Slice of the rows, as 400:520. Default all.")
    harmful_where: Where = Field(
        default={}, description="Only rows with these values, as {column: value}. Default all."
    )

    harmful_category_column: str | None = Field(
        default=None, description="Column of their categories; results are also given for each. Default none."
    )

    harmless: PathText | None = Field(default=None, description="Harmless prompts that look harmful. Default none.")
    harmless_column: str = Field(default="question", description="Their column. Default question.")
    harmless_rows: str | None = Field(
        default=None, description="Slice of the rows that harmless_where leaves. Default all."
    )
    harmless_where: Where = Field(
        default={}, description="Only rows with these values, as {label: safe}. Default all."
    )

    harmless_category_column: str | None = Field(
        default=None, description="Column of their categories; results are also given for each. Default none."
    )
    more_sets: list[PromptSet] = Field(
        default=[],
        description="Further sets: [{name: sst, kind: harmful or harmless, file: PATH, column: prompt, ...}], with "
        "answer_column, category_column, rows and where as above, and request_column, the same in rows that ask for "
        "one thing in several framings. Default none.",
    )

    text: PathText | None = Field(default=None, description="Plain text, for perplexity. Default none.")
    text_rows: str | None = Field(default=None, description="Slice of its lines. Default all.")

    lm_eval: str | None = Field(
        default=None, description="Tasks of EleutherAI's lm-eval to score too, as arc_easy,hellaswag. Default none."
    )
    lm_eval_include: PathText | None = Field(
        default=None,
        description="Directory with task files of your own (lm-eval's include_path; Python in them is run). "
        "Default none.",
    )
    lm_eval_limit: int | None = Field(
        default=None, ge=1, description="Only the first so many documents of each task. Default all."
    )
    lm_eval_fewshot: int | None = Field(
        default=None, ge=0, description="Solved examples before each document. Default the task's own."
    )

    relearn: PathText | None = Field(
        default=None,
        description="Harmful questions with answers, none of them measured: each model is fine-tuned on them in "
        "memory, and asked the harmful prompts after 1, 2, 4, ... steps. How few undo a patch? Default none.",
    )
    relearn_question_column: str = Field(default="question", description="Its question column. Default question.")
    relearn_answer_column: str = Field(default="answer", description="Its answer column. Default answer.")
    relearn_where: Where = Field(default={}, description="Only its rows with these values. Default all.")
    relearn_rows: str | None = Field(
        default=None, description="Slice of the rows that relearn_where leaves. Default all."
    )
    relearn_steps: int = Field(
        default=RELEARN_STEPS, ge=1, description=f"Optimiser steps, at most. Default {RELEARN_STEPS}."
    )
    relearn_batch_size: int = Field(default=8, ge=1, description="Rows per step. Default 8.")
    relearn_learning_rate: float = Field(
        default=1e-5,
        gt=0,
        allow_inf_nan=False,
        description="AdamW's step size, of all weights; clipping and decay are derive's. Default 1e-5.",
    )

    survive: str | None = Field(
        default=None,
        description="Formats of a later quantisation, as fp8-block,int4-g32: what each would leave of the patches, "
        "where the baseline is the base. Default none.",
    )

    judge: PathText = Field(
        default=PREFIX,
        description="What calls an answer refused or harmful: prefix (how it opens), trained (a small classifier "
        "taught by human labels; needs safepatch[judge]), or a sequence classifier (directory or hub id). Default "
        "prefix.",
    )
    judge_labels: dict[str, Literal["refusal", "harmful"]] = Field(
        default={},
        description="What the classifier's labels mean, as {REJECTION: refusal} or {unsafe: harmful}. Default: the "
        "labels that are called so.",
    )
    judge_reads: Literal["answer", "pair"] = Field(
        default="answer", description="What the classifier reads: the answer, or prompt and answer. Default answer."
    )

    system_prompt: str | None = Field(
        default=None, description="System message before each prompt. Default none (the template's own, if any)."
    )
    thinking: Thinking = "close"
    batch_size: int = Field(default=16, ge=1, description="Prompts or windows per forward pass. Default 16.")
    max_new_tokens: int = Field(
        default=32, ge=1, description="Length of the generated answers; the judge reads how they open. Default 32."
    )
    max_length: int | None = Field(
        default=None,
        ge=2,
        description="Tokens of a perplexity window, and of a prompt with its answer. Default 512, or as many as all "
        "models take.",
    )
    stride: int | None = Field(
        default=None,
        ge=1,
        description="Tokens from one window to the next; the rest is context. Default half of max_length.",
    )
    samples: int = Field(default=4, ge=0, description="Answers shown side by side in the report, per set. Default 4.")
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Of the bootstrap intervals; answers are greedy. Default 0."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Of the weights; auto is float32 on the CPU, the checkpoint's own elsewhere. Default auto.",
    )
    device: Device = "auto"
    threads: Threads = None

    @model_validator(mode="after")
    def _consistent(self) -> EvalConfig:
        if self.window.stride >= self.window.length:
            raise ValueError("stride must be less than max_length")
        if not self.uses_demo:
            for name, fields in OF_SETS.items():
                given = [field for field in fields if getattr(self, field)]
                if getattr(self, name) is None and given:
                    raise ValueError(f"{given[0]} needs {name}")
        self._require_what_relearning_needs()
        names = ["harmful", "harmless", "text", "relearn", *(more.name for more in self.more_sets)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"more_sets: the name '{twice}' is taken")
        if self.lm_eval is not None and not self.tasks:
            raise ValueError("lm_eval names no task")
        if self.lm_eval is None and (self.lm_eval_include or self.lm_eval_limit or self.lm_eval_fewshot is not None):
            raise ValueError("lm_eval_include, lm_eval_limit and lm_eval_fewshot need lm_eval")
        if self.later:
            self._require_formats()
        if self.judge in BUILT_IN and self.judge_labels:
            raise ValueError("judge_labels needs a classifier as judge")
        return self

    def _require_what_relearning_needs(self) -> None:
        if self.relearn is None:
            given = [name for name in type(self).model_fields if name.startswith("relearn_")]
            for name in given:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} needs relearn")
        elif not self.uses_demo and all(of.kind != "harmful" for of in self.sets):
            raise ValueError("relearn needs harmful prompts")
        elif self.dtype == "float16":
            raise ValueError("relearn trains in float32 or bfloat16, not in float16")

    def _require_formats(self) -> None:
        from safepatch_core.merging.quantised.formats import FORMATS  # numpy, which --help needs not wait for

        if not set(self.later) <= FORMATS.keys():
            raise ValueError(f"survive: allowed are {', '.join(FORMATS)}")

    @property
    def window(self) -> Window:
        """What is read at a time."""
        length = self.max_length or WINDOW
        return Window(length, self.stride or max(length // 2, 1))

    def fitted(self, positions: Iterable[int | None]) -> EvalConfig:
        """This configuration with the lengths that all models take, given the longest sequence of each.

        Raises UsageError if the stride doesn't fit the length.
        """
        length = self.max_length or min([WINDOW, *(limit for limit in positions if limit is not None)])
        return checked(EvalConfig, self.model_dump() | {"max_length": length, "stride": self.stride or length // 2})

    @property
    def uses_demo(self) -> bool:
        """Whether the bundled demo data is measured."""
        return self.harmful is self.harmless is self.text is self.lm_eval is None and not self.more_sets

    @property
    def relearn_looks(self) -> list[int]:
        """The steps of fine-tuning after which a model is asked."""
        doubled = (1 << power for power in range(self.relearn_steps.bit_length()))
        return [] if self.relearn is None else sorted({*doubled, self.relearn_steps})

    @property
    def tasks(self) -> list[str]:
        """The names of the lm-eval tasks."""
        return list(_names(self.lm_eval))

    @property
    def later(self) -> tuple[str, ...]:
        """The names of the formats of a later quantisation."""
        return _names(self.survive)

    @property
    def models(self) -> dict[str, str]:
        """Label in the report → model: baseline, where there is one, then model, model_2, …"""
        labels = ["model", *(f"model_{n}" for n in range(2, len(self.more_models) + 2))]
        refs = dict(zip(labels, [self.model, *self.more_models], strict=True))
        return refs if self.baseline is None else {"baseline": self.baseline, **refs}

    @property
    def sets(self) -> list[PromptSet]:
        """All sets of prompts, those of `harmful` and `harmless` first."""
        found = list(self.more_sets)
        if self.harmless is not None:
            found.insert(
                0,
                PromptSet(
                    name="harmless",
                    kind="harmless",
                    file=self.harmless,
                    column=self.harmless_column,
                    category_column=self.harmless_category_column,
                    rows=self.harmless_rows,
                    where=self.harmless_where,
                ),
            )
        if self.harmful is not None:
            found.insert(
                0,
                PromptSet(
                    name="harmful",
                    kind="harmful",
                    file=self.harmful,
                    column=self.harmful_column,
                    answer_column=self.answer_column,
                    category_column=self.harmful_category_column,
                    rows=self.harmful_rows,
                    where=self.harmful_where,
                ),
            )
        return found

    def with_data(self) -> EvalConfig:
        """This configuration with the demo's files filled in where it uses them."""
        if not self.uses_demo:
            return self
        files = {name: str(DEMO / file) for name, file in DEMO_FILES.items()}
        rest = {
            "harmful_rows": self.harmful_rows or DEMO_HELD_OUT["harmful"],
            "answer_column": self.answer_column or "answer",
            "harmful_category_column": self.harmful_category_column or "category",
            "harmless_rows": self.harmless_rows or DEMO_HELD_OUT["harmless"],
            "harmless_category_column": self.harmless_category_column or "kind",
        }
        return self.model_copy(update=files | rest)

    def settings(self) -> dict[str, Any]:
        """How it was measured, without names of files and places: what the report shows."""
        places = {
            *("model", "more_models", "baseline", "out", "harmful", "harmless", "text", "device", "threads"),
            *("judge", "lm_eval_include", "relearn"),
        }
        settings = self.model_dump(mode="json", exclude=places)
        for more in settings["more_sets"]:
            del more["file"]
        return settings


def _names(text: str | None) -> tuple[str, ...]:
    """What lies between commas."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


OF_SETS = {
    "harmful": ("answer_column", "harmful_category_column", "harmful_rows", "harmful_where"),
    "harmless": ("harmless_category_column", "harmless_rows", "harmless_where"),
    "text": ("text_rows",),
}
DEMO_FILES = {"harmful": "harmful.jsonl", "harmless": "harmless.jsonl", "text": "text.txt"}
