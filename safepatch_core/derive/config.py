"""What a derive run is told: every field with its unit and default. Imports neither torch nor transformers."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

PathText = Annotated[
    str,
    BeforeValidator(lambda path: os.fspath(path) if isinstance(path, os.PathLike) else path),
    Field(min_length=1),
]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PatchConfig(_Strict):
    """How one of the two patches is trained, and what the recipe will say about it."""

    num_train_epochs: Rate = Field(default=2.0, description="Passes over the rows, at most. Default 2.")
    max_steps: int | None = Field(
        default=None, ge=1, description="Optimiser steps, instead of num_train_epochs. Default none."
    )
    learning_rate: Rate | None = Field(default=None, description="Instead of the run's learning_rate. Default none.")
    top: Share = Field(default=0.03, description="Share of each tensor's entries in the patch's top set.")
    retain: Share = Field(
        default=0.3, description="Probability that an entry survives random retention. Default 0.3."
    )
    scale: float = Field(default=1.0, allow_inf_nan=False, description="Factor of the patch in the merge. Default 1.")


class SafetyPatch(PatchConfig):
    """Gradient ascent on the answers; top 0.03."""


class OverSafetyPatch(PatchConfig):
    """Gradient descent on the answers; top 0.02."""

    top: Share = Field(default=0.02, description="Share of each tensor's entries in the patch's top set.")


class DeriveConfig(_Strict):
    """A derive run. NLLs are in nats per answer token, lengths in tokens."""

    model: PathText = Field(description="The backbone: a checkpoint directory, or a hub id org/name[@revision].")
    data: PathText = Field(description="Harmful questions with answers: .jsonl, .json, .csv or .parquet.")
    out: PathText = Field(description="The run directory; must be new or empty unless resumed.")
    question_column: str = Field(default="question", description="Column of the question. Default question.")
    answer_column: str = Field(default="answer", description="Column of the answer. Default answer.")
    rows: str | None = Field(default=None, description="Slice of the rows, as 0:400. Default all.")
    system_prompt: str | None = Field(
        default=None, description="System message before each question. Default none (the template's own, if any)."
    )

    method: Literal["full", "lora"] = Field(
        default="full", description="full (every trained weight) or lora. Default full."
    )
    trainable: Literal["targets", "all"] = Field(
        default="targets",
        description="With method full: train only what a merge with targets: linear uses, or everything. "
        "Default targets.",
    )
    lora_r: int = Field(default=16, ge=1, description="LoRA rank. Default 16.")
    lora_alpha: int = Field(default=32, ge=1, description="LoRA alpha. Default 32.")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="LoRA dropout probability. Default 0.")
    target_modules: str | list[str] = Field(
        default="all-linear", description="Modules that LoRA adapts, as PEFT takes them. Default all-linear."
    )

    learning_rate: Rate | None = Field(
        default=None, description="AdamW's step size, of both objectives. Default 1e-5; 1e-4 with method lora."
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="AdamW's decoupled decay; it would move every entry. Default 0.",
    )
    max_grad_norm: Rate | None = Field(
        default=1.0, description="Gradients are clipped to this L2 norm; null leaves them. Default 1."
    )
    batch_size: int = Field(default=8, ge=1, description="Rows per forward pass. Default 8.")
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="Forward passes per optimiser step. Default 1."
    )
    max_length: int = Field(
        default=512, ge=2, description="Longest question with answer, in tokens; longer answers are cut. Default 512."
    )
    ascent_bound: Rate | None = Field(
        default=5.0,
        description="Ascent stops once the mean answer NLL over ascent_window steps reaches this many nats per "
        "token; null switches it off. Default 5.",
    )
    ascent_window: int = Field(
        default=4, ge=1, description="Latest optimiser steps that ascent_bound averages. Default 4."
    )
    safety: SafetyPatch = Field(default=SafetyPatch(), description="The ascent patch.")
    over_safety: OverSafetyPatch = Field(default=OverSafetyPatch(), description="The descent patch.")

    importance: Literal["patched", "backbone", "none"] = Field(
        default="patched",
        description="Weights at which SNIP importance is taken: each patched model, the backbone (then both patches "
        "rank alike), or none (the recipe ranks by magnitude). Default patched.",
    )
    importance_samples: int | None = Field(
        default=128,
        ge=1,
        description="Rows drawn for importance and for the reported NLLs; null takes all. Default 128.",
    )

    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Of sampling, shuffling, dropout, LoRA and the recipe. Default 0."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Of weights and optimiser; small updates vanish in bfloat16. Default float32."
    )
    device: str = Field(
        default="auto", description="cpu, cuda, cuda:1, or auto: cuda where there is one. Default auto."
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch. Default torch's own choice.")

    def rate(self, patch: PatchConfig) -> float:
        """AdamW's step size for one patch."""
        return patch.learning_rate or self.learning_rate or (1e-4 if self.method == "lora" else 1e-5)

    def settings(self) -> dict[str, Any]:
        """Every field but `out`, as JSON types: what a resumed run must share with the one it goes on with."""
        return self.model_dump(mode="json", exclude={"out"})


def libraries(config: DeriveConfig) -> tuple[str, ...]:
    """The packages that a run trains with."""
    return ("torch", "transformers", "peft") if config.method == "lora" else ("torch", "transformers")
