"""What an evaluation is told: every field with its unit and default. Imports neither torch nor transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

DEMO = Path(__file__).parent.parent / "data" / "demo"
# The first rows of the demo's harmful requests are there to derive patches from.
DEMO_HELD_OUT = "64:96"

Path_ = Annotated[
    str, BeforeValidator(lambda v: os.fspath(v) if isinstance(v, os.PathLike) else v), Field(min_length=1)
]
Where = dict[str, str | list[str]]


class EvalConfig(BaseModel):
    """An evaluation. Without `harmful`, `harmless` and `text`, all three are the bundled demo data.

    Data files are .csv, .jsonl, .json, .parquet or .txt, as `safepatch_core.rows` reads them.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: Path_ = Field(description="The model to measure: a checkpoint directory, or a hub id org/name[@revision].")
    baseline: Path_ | None = Field(default=None, description="The model to compare with. Default none.")
    out: Path_ = Field(description="The report directory; must be new or empty.")

    harmful: Path_ | None = Field(default=None, description="Harmful prompts. Default none.")
    harmful_column: str = Field(default="question", description="Their column. Default question.")
    answer_column: str | None = Field(
        default=None, description="Column of a harmful answer to each; its NLL is measured. Default none."
    )
    harmful_rows: str | None = Field(default=None, description="Slice of the rows, as 400:520. Default all.")
    harmful_where: Where = Field(
        default={}, description="Only rows with these values, as {column: value}. Default all."
    )

    harmless: Path_ | None = Field(default=None, description="Harmless prompts that look harmful. Default none.")
    harmless_column: str = Field(default="question", description="Their column. Default question.")
    harmless_rows: str | None = Field(
        default=None, description="Slice of the rows that harmless_where leaves. Default all."
    )
    harmless_where: Where = Field(
        default={}, description="Only rows with these values, as {label: safe}. Default all."
    )

    text: Path_ | None = Field(default=None, description="Plain text, for perplexity. Default none.")
    text_rows: str | None = Field(default=None, description="Slice of its lines. Default all.")

    system_prompt: str | None = Field(
        default=None, description="System message before each prompt. Default none (the template's own, if any)."
    )
    batch_size: int = Field(default=16, ge=1, description="Prompts or windows per forward pass. Default 16.")
    max_new_tokens: int = Field(
        default=32, ge=1, description="Length of the generated answers; the judge reads how they open. Default 32."
    )
    max_length: int = Field(
        default=512, ge=2, description="Tokens of a perplexity window, and of a prompt with its answer. Default 512."
    )
    stride: int = Field(
        default=256,
        ge=1,
        description="Tokens from one window to the next; the rest is context. Default 256.",
    )
    samples: int = Field(default=4, ge=0, description="Answers shown side by side in the report, per set. Default 4.")
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Of the bootstrap intervals; answers are greedy. Default 0."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Of the weights; auto is float32 on the CPU, the checkpoint's own elsewhere. Default auto.",
    )
    device: str = Field(
        default="auto", description="cpu, cuda, cuda:1, or auto: cuda where there is one. Default auto."
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch. Default torch's own choice.")

    @model_validator(mode="after")
    def _consistent(self) -> EvalConfig:
        if self.stride >= self.max_length:
            raise ValueError("stride must be less than max_length")
        if not self.uses_demo:
            of_sets = {
                "harmful": ("answer_column", "harmful_rows", "harmful_where"),
                "harmless": ("harmless_rows", "harmless_where"),
                "text": ("text_rows",),
            }
            for name, fields in of_sets.items():
                given = [field for field in fields if getattr(self, field)]
                if getattr(self, name) is None and given:
                    raise ValueError(f"{given[0]} needs {name}")
        return self

    @property
    def uses_demo(self) -> bool:
        """Whether the bundled demo data is measured."""
        return self.harmful is self.harmless is self.text is None

    def with_data(self) -> EvalConfig:
        """This configuration with the demo's files filled in where it uses them."""
        if not self.uses_demo:
            return self
        files = {name: str(DEMO / file) for name, file in DEMO_FILES.items()}
        rows = {"harmful_rows": self.harmful_rows or DEMO_HELD_OUT, "answer_column": self.answer_column or "answer"}
        return self.model_copy(update=files | rows)

    def settings(self) -> dict[str, Any]:
        """How it was measured, without names of files and places: what the report shows."""
        places = {"model", "baseline", "out", "harmful", "harmless", "text", "device", "threads"}
        return self.model_dump(mode="json", exclude=places)


DEMO_FILES = {"harmful": "harmful.jsonl", "harmless": "harmless.jsonl", "text": "text.txt"}
