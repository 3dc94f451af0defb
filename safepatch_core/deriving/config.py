"""What a derive run is told: every field with its unit and default. Imports neither torch nor transformers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from safepatch_core.settings import Device, PathText, Strict, Thinking, Threads, Where
from safepatch_core.spec import Kind

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
PATCHES = ("safety", "over-safety")  # as folders and recipes name them
# A tenth of a direction left the perplexity of a model of 135M parameters as it was, all of one raised it by a fifth.
DIRECTION_SCALE = 0.1


class PatchConfig(Strict):
    """How one of the two patches is trained, and what the recipe will say about it."""

    num_train_epochs: Rate = Field(default=2.0, description="Passes over the rows, at most. Default 2.")
    max_steps: int | None = Field(
        default=None, ge=1, description="Optimiser steps, instead of num_train_epochs. Default none."
    )
    learning_rate: Rate | None = Field(default=None, description="Instead of the run's learning_rate. Default none.")
    utility_weight: Weight | None = Field(
        default=None, description="Instead of the run's utility_weight. Default none."
    )
    top: Share = Field(default=0.03, description="Share of each tensor's entries in the patch's top set.")
    retain: Share = Field(
        default=0.3, description="Probability that an entry survives random retention. Default 0.3."
    )
    scale: float = Field(default=1.0, allow_inf_nan=False, description="Factor of the patch in the merge. Default 1.")
    mask_top: Share | None = Field(
        default=None,
        description="Only this share of each tensor's entries moves in training: those with the highest SNIP scores, "
        "mean |w * g| over importance_samples rows. All others keep their bits. Default none (all may move).",
    )
    mask_steps: int = Field(
        default=1000, ge=1, description="Optimiser steps after which mask_top chooses anew. Default 1000."
    )


class SafetyPatch(PatchConfig):
    """Unlearns the answers; top 0.03."""

    objective: Literal["ascent", "npo", "dpo"] = Field(
        default="ascent",
        description="ascent (of the answer NLL), npo (Negative Preference Optimization, which loses interest in an "
        "answer as it becomes unlikely) or dpo (Direct Preference Optimization, which rejects the answer for the one "
        "in chosen_column); ascent_bound ends any of them. Default ascent.",
    )
    npo_beta: Rate = Field(default=0.1, description="NPO's inverse temperature; towards 0 it is ascent. Default 0.1.")
    beta: Rate = Field(default=0.1, description="DPO's inverse temperature, as TRL's beta. Default 0.1.")
    loss_type: Literal["sigmoid", "hinge"] = Field(
        default="sigmoid", description="Of DPO, as TRL's: sigmoid (the paper's) or hinge (SLiC). Default sigmoid."
    )


class OverSafetyPatch(PatchConfig):
    """Gradient descent on the answers; top 0.02."""

    top: Share = Field(default=0.02, description="Share of each tensor's entries in the patch's top set.")


class DeriveConfig(Strict):
    """A derive run. NLLs are in nats per answer token, lengths in tokens."""

    model: PathText = Field(
        description="The backbone: a checkpoint directory, or a hub id org/name[@revision]. A quantised one is "
        "trained as floats, which lie in OUT.backbone, and the recipe merges into its codes."
    )
    data: PathText = Field(description="Harmful questions with answers: .jsonl, .json, .csv, .tsv or .parquet.")
    out: PathText = Field(description="The run directory; must be new or empty unless resumed.")
    question_column: str = Field(
        default="question",
        description="Column of the question, or of a chat. Default question, or what it is called.",
    )
    answer_column: str = Field(
        default="answer", description="Column of the answer, or of a chat. Default answer, or what it is called."
    )
    chosen_column: str = Field(
        default="chosen",
        description="With safety.objective dpo, column of the answer to prefer, or of a chat. Default chosen.",
    )
    data_where: Where = Field(
        default={}, description="Only rows with these values, as {category: fraud}. Default all."
    )
    rows: str | None = Field(
        default=None, description="Slice of the rows that data_where leaves, as 0:400. Default all."
    )
    system_prompt: str | None = Field(
        default=None, description="System message before each question. Default none (the template's own, if any)."
    )
    thinking: Thinking = "close"

    utility_data: PathText | None = Field(
        default=None,
        description="Ordinary questions with answers whose mean NLL is added to each step's loss, as many rows as "
        "the step has. Default none.",
    )
    utility_question_column: str = Field(default="question", description="Its question column. Default question.")
    utility_answer_column: str = Field(default="answer", description="Its answer column. Default answer.")
    utility_rows: str | None = Field(default=None, description="Slice of its rows. Default all.")
    utility_weight: Weight = Field(default=1.0, description="Factor of that term. Default 1.")

    ewc_fisher: list[PathText] = Field(
        default=[],
        description="Fisher importance of the rounds before (their importance folders, of importance_kind fisher): "
        "weights that matter there are drawn back to where this round began. Needs method full. Default none.",
    )
    ewc_weight: Weight = Field(
        default=1.0,
        description="Factor of half the sum of importance · change², importance having mean 1. Default 1.",
    )
    replay_data: PathText | None = Field(
        default=None,
        description="Rows of the rounds before, on whose answers the logits stay what they are when this round "
        "begins. All of these are held in memory: rows x answer tokens x vocabulary. Default none.",
    )
    replay_question_column: str = Field(default="question", description="Its question column. Default question.")
    replay_answer_column: str = Field(default="answer", description="Its answer column. Default answer.")
    replay_where: Where = Field(default={}, description="Only its rows with these values. Default all.")
    replay_rows: str | None = Field(
        default=None, description="Slice of the rows that replay_where leaves. Default all."
    )
    replay_weight: Weight = Field(
        default=1.0, description="Factor of the mean squared change of their logits. Default 1."
    )

    refused_data: PathText | None = Field(
        default=None,
        description="With method direction: harmless questions that look harmful and that the model refuses. "
        "Default none.",
    )
    refused_question_column: str = Field(default="question", description="Its question column. Default question.")
    refused_where: Where = Field(default={}, description="Only its rows with these values. Default all.")
    refused_rows: str | None = Field(
        default=None, description="Slice of the rows that refused_where leaves. Default all."
    )

    method: Literal["full", "lora", "direction"] = Field(
        default="full",
        description="full (every trained weight), lora, or direction (nothing is trained: the safety patch "
        "strengthens the direction of refusal, the other one takes out that of false refusal). Default full.",
    )
    direction_layer: int | None = Field(
        default=None,
        ge=0,
        description="With method direction, the layer, counted from 0, behind which both directions are read. "
        "Default two thirds of the way up.",
    )
    direction_own: bool = Field(
        default=False,
        description="Each layer's matrices get the direction that is read behind that layer, instead of the one of "
        "direction_layer. Default false.",
    )
    direction_layers: str | None = Field(
        default=None, description="Slice of the layers whose matrices are changed, as 8:24. Default all."
    )
    direction_modules: list[str] = Field(
        default=["o_proj", "down_proj"],
        min_length=1,
        description="Last names of the modules whose matrices are changed: those that write to the residual stream. "
        "Default o_proj and down_proj.",
    )
    trainable: Literal["targets", "all"] = Field(
        default="targets",
        description="With method full: train only what a merge with targets: linear uses, or everything; of a model "
        "that sees or hears, of its language model. Default targets.",
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        default="none",
        description="With method lora, how the frozen backbone is held while the adapter is trained (bitsandbytes). "
        "Importance and the merge are of the full weights. Default none.",
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
        default=1.0,
        description="Gradients are clipped to this L2 norm: of all together, or with adamw_in_backward of each "
        "tensor; null leaves them. Default 1.",
    )
    optim: Literal["auto", "adamw", "adamw_in_backward"] = Field(
        default="auto",
        description="adamw keeps all gradients until the step; adamw_in_backward takes it in the backward pass, "
        "one tensor at a time, and can't accumulate. auto takes the latter where all gradients are over 1 GiB and "
        "gradient_accumulation_steps is 1. Default auto.",
    )
    optim_state_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Of AdamW's two moments. Default float32."
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        default="stochastic",
        description="Of float32 results to bfloat16 weights; to nearest, an update below half a step of its weight "
        "vanishes. Default stochastic.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass to save memory. Default false."
    )
    save_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps after which training is saved each time, for --resume to go on from. Default none.",
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
    patches: Literal["both", "safety", "over-safety"] = Field(
        default="both", description="Which patches are trained and in the recipe. Default both."
    )
    safety: SafetyPatch = Field(default=SafetyPatch(), description="The ascent patch.")
    over_safety: OverSafetyPatch = Field(default=OverSafetyPatch(), description="The descent patch.")

    save_as: Literal["checkpoint", "delta"] = Field(
        default="checkpoint",
        description="With method full, what a patch is saved as: a whole checkpoint, or the targets' trained - base. "
        "Default checkpoint.",
    )
    delta_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Of a delta's values; bfloat16 halves the file and rounds them to 8 bits. Default float32.",
    )

    importance: Literal["patched", "backbone", "none"] = Field(
        default="patched",
        description="Weights at which importance is taken: each patched model, the backbone (then both patches rank "
        "alike), or none (the recipe ranks by magnitude). Default patched.",
    )
    importance_kind: Literal["snip", "fisher", "magnitude"] = Field(
        default="snip",
        description="snip (mean |w * g| over the rows), fisher (mean g^2), or magnitude (|delta|, no pass; the same "
        "as importance none). Default snip.",
    )
    importance_memory: Literal["auto", "memory", "disk"] = Field(
        default="auto",
        description="Where importance is summed up: in memory, on disk, or auto: on disk where it would take more "
        "than 0.7 of the free memory. Default auto.",
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
        default="float32", description="Of the weights in training; see rounding. Default float32."
    )
    device: Device = "auto"
    threads: Threads = None

    @model_validator(mode="after")
    def _delta_holds_what_was_trained(self) -> Self:
        if self.save_as == "delta" and (self.method, self.trainable) != ("full", "targets"):
            raise ValueError("save_as: delta holds the targets alone: it needs method full and trainable targets")
        return self

    @model_validator(mode="after")
    def _only_what_is_frozen_is_quantised(self) -> Self:
        if self.quantization != "none" and self.method != "lora":
            raise ValueError("quantization is of a frozen backbone: it needs method lora")
        return self

    @model_validator(mode="after")
    def _what_is_masked_stays(self) -> Self:
        if all(patch.mask_top is None for patch in self.trained.values()):
            return self
        if (self.method, self.trainable) != ("full", "targets"):
            raise ValueError("mask_top is of the targets' weights: it needs method full and trainable targets")
        if self.weight_decay:
            raise ValueError("mask_top leaves entries as they are, weight_decay moves all: it must be 0")
        return self

    @model_validator(mode="after")
    def _directions_have_their_rows(self) -> Self:
        if self.method == "direction" and None in (self.utility_data, self.refused_data):
            raise ValueError(
                "method direction reads harmful questions (data), ordinary ones (utility_data), and harmless ones "
                "that are refused (refused_data)"
            )
        if self.method == "direction" and self.prefers:
            raise ValueError("safety.objective dpo goes with training: method full or lora")
        if self.method != "direction" and self.refused_data is not None:
            raise ValueError("refused_data goes with method direction")
        return self

    @model_validator(mode="after")
    def _what_is_remembered_is_trained(self) -> Self:
        if self.ewc_fisher and self.method != "full":
            raise ValueError("ewc_fisher is of the weights themselves: it needs method full")
        if self.replay_data is not None and self.method == "direction":
            raise ValueError("replay_data goes with training: method full or lora")
        return self

    @property
    def trained(self) -> dict[str, PatchConfig]:
        """The patches of the run by name, in the recipe's order."""
        every = dict(zip(PATCHES, (self.safety, self.over_safety), strict=True))
        return every if self.patches == "both" else {self.patches: every[self.patches]}

    @property
    def prefers(self) -> bool:
        """Whether each question has two answers, of which one is chosen."""
        return "safety" in self.trained and self.safety.objective == "dpo"

    @property
    def ranked_at(self) -> Literal["patched", "backbone", "none"]:
        """The weights at which importance is taken; none where the recipe ranks by magnitude."""
        return "none" if self.importance_kind == "magnitude" or self.method == "direction" else self.importance

    @model_validator(mode="after")
    def _step_can_be_taken(self) -> DeriveConfig:
        if self.optim == "adamw_in_backward" and self.gradient_accumulation_steps > 1:
            raise ValueError("optim adamw_in_backward can't accumulate: gradient_accumulation_steps must be 1")
        return self

    def weight(self, patch: PatchConfig) -> float:
        """Factor of the utility term, for one patch."""
        return self.utility_weight if patch.utility_weight is None else patch.utility_weight

    def rate(self, patch: PatchConfig) -> float:
        """AdamW's step size for one patch."""
        return patch.learning_rate or self.learning_rate or (1e-4 if self.method == "lora" else 1e-5)

    @property
    def kind(self) -> Kind:
        """What the recipe calls the form of a patch."""
        return self.save_as if self.method == "full" else "lora"

    def in_recipe(self, patch: PatchConfig) -> dict[str, float]:
        """Top, retain and scale of one patch in the recipe; a direction is whole and weak if nothing is said."""
        said = {name: getattr(patch, name) for name in ("top", "retain", "scale")}
        if self.method != "direction":
            return said
        return {"top": 1.0, "retain": 1.0, "scale": DIRECTION_SCALE} | {
            name: value for name, value in said.items() if name in patch.model_fields_set
        }

    def settings(self) -> dict[str, Any]:
        """What a resumed run must share with the one it goes on with, as JSON types: all that the bytes depend on."""
        return self.model_dump(mode="json", exclude={"out", "importance_memory"})


def libraries(config: DeriveConfig) -> tuple[str, ...]:
    """The packages that a run trains with."""
    lora = ("peft",) if config.method == "lora" else ()
    return ("torch", "transformers", *lora, *(("bitsandbytes",) if config.quantization != "none" else ()))
