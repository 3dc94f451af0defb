"""The recipe: what is merged and how (SPEC.md section 3). Reads YAML, checks every key, resolves nothing on disk."""

from __future__ import annotations

import fnmatch
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from safepatch_core.errors import UsageError
from safepatch_core.settings import Strict, explain, read_yaml
from safepatch_core.sizes import parse_size
from safepatch_core.spec import (
    COMBINE,
    Acts,
    Combine,
    Importance,
    Join,
    Kind,
    Missing,
    NonFinite,
    Order,
    Quota,
    Rows,
    Rule,
    Scope,
    Weight,
    quota,
)

NOT_LINEAR = ("embed", "lm_head", "wte", "wpe", "shared.weight")
# What models that see or hear have beside the language model: towers, and what leads from them to it.
NOT_LANGUAGE = (
    *("visual.", "vision_tower.", "vision_model.", "vision_encoder.", "vqmodel.", "vpm.", "qformer."),
    *("audio_tower.", "audio_model.", "audio_encoder.", "talker.", "token2wav."),
    *("multi_modal_projector.", "mm_projector.", "language_projection.", "connector.", "aligner.", "resampler."),
    *("vision_projector.", "audio_projector.", "image_newline"),
)


def of_language(name: str) -> bool:
    """Whether a tensor of that name is the language model's, and not a tower's or a projector's."""
    return not any(part in name for part in NOT_LANGUAGE)


class Scores(Strict):
    """Importance read as it is."""

    scores: str


class Gradients(Strict):
    """Importance |x * g| with x named by `weight`."""

    gradients: str
    weight: Weight = "patched"


Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Override(Strict):
    """What a patch has instead for the tensors of these names; the first override that names a tensor counts."""

    names: Annotated[list[str], Field(min_length=1)]  # globs
    top: Share | None = None
    skip: Share | None = None
    retain: Share | None = None
    scale: Finite | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Override:
        if self.model_fields_set <= {"names"}:
            raise ValueError("an override has top, skip, retain or scale")
        return self


Cosine = Annotated[float, Field(ge=-1, le=1)]


class Agreement(Strict):
    """Which entries of a patch may be chosen, by the signs of its delta and that of another patch."""

    patch: str
    signs: Literal["same", "opposite"]


class Gate(Strict):
    """Which tensors a patch has, by the cosine of its delta and another patch's: `least` <= cosine < `below`."""

    patch: str
    least: Cosine | None = None
    below: Cosine | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Gate:
        if self.least is None and self.below is None:
            raise ValueError("a gate has least or below")
        if self.least is not None and self.below is not None and self.least >= self.below:
            raise ValueError("a gate is open from least to below: least is the lower one")
        return self

    def opens(self, cosine: float) -> bool:
        """Whether the patch has a tensor whose cosine is that."""
        return (self.least is None or cosine >= self.least) and (self.below is None or cosine < self.below)


class PatchSpec(Strict):
    """One patch: where its change comes from, and which share of it is kept."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    source: Annotated[str, Field(min_length=1)]
    kind: Kind | None = None
    importance: Literal["magnitude"] | Scores | Gradients = "magnitude"
    top: Share = 1.0
    skip: Share = 0.0  # of the highest scores, which is not selected
    retain: Share = 1.0
    rescale: bool = False
    scale: Finite = 1.0
    minus: Annotated[str, Field(min_length=1)] | None = None  # what the change is measured from, if not the base
    rows: Rows = "all"
    agreement: Agreement | None = None
    gate: Gate | None = None
    overrides: list[Override] = []

    def at(self, tensor: str) -> PatchSpec:
        """The patch as it is for one tensor: with what the first override that names it says."""
        for other in self.overrides:
            if any(fnmatch.fnmatchcase(tensor, glob) for glob in other.names):
                return self._with(other)
        return self

    def _with(self, other: Override) -> PatchSpec:
        return self.model_copy(update=other.model_dump(exclude_none=True, exclude={"names"}) | {"overrides": []})

    @model_validator(mode="after")
    def _minus_is_of_a_checkpoint(self) -> PatchSpec:
        if self.minus is not None and self.kind not in (None, "checkpoint"):
            raise ValueError("minus goes with kind: checkpoint")
        return self

    @model_validator(mode="after")
    def _factor_is_finite(self) -> PatchSpec:
        for spec in (self, *map(self._with, self.overrides)):
            if spec.rescale and spec.retain == 0:
                raise ValueError("rescale divides by retain, which is 0")
            if not np.isfinite(spec.factor):
                raise ValueError("scale (divided by retain, with rescale) does not fit float32")
        return self

    def quotas(self, entries: int, how: Quota) -> tuple[int, int]:
        """How many of so many entries are taken by their score, and how many of those, the best ones, are skipped."""
        return quota(min(self.skip + self.top, 1.0), entries, how), quota(self.skip, entries, how)

    @property
    def factor(self) -> float:
        """c of SPEC section 2: the scale, divided by the retention rate with `rescale`, in float32."""
        return _float32(self.scale / self.retain if self.rescale else self.scale)

    @property
    def importance_kind(self) -> Importance:
        if isinstance(self.importance, str):
            return self.importance
        return "scores" if isinstance(self.importance, Scores) else "gradients"

    @property
    def importance_path(self) -> str | None:
        if isinstance(self.importance, str):
            return None
        return self.importance.scores if isinstance(self.importance, Scores) else self.importance.gradients

    @property
    def weight(self) -> Weight:
        return self.importance.weight if isinstance(self.importance, Gradients) else "patched"


@lru_cache(maxsize=64)
def _float32(value: float) -> float:
    """Rounded to float32; infinite beyond its range. Asked once per target and patch, of few values."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


class Globs(Strict):
    """Targets by name, fnmatch patterns, case-sensitive."""

    include: Annotated[list[str], Field(min_length=1)] = ["*"]
    exclude: list[str] = []


class Elect(Strict):
    """How `ties` elects and divides; by default as the TIES paper does it."""

    zero: Literal["leave", "positive"] = "leave"
    divide: Literal["count", "weights", "none"] = "count"


DEQUANTISED = "dequantised"


class Quantized(Strict):
    """How a base whose weights are stored as codes is merged into, in place."""

    reference: Annotated[str, Field(min_length=1)] = DEQUANTISED  # or the float original of this quantised twin
    reference_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # what a trainer was handed
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    saturate: Literal["clamp", "error"] = "clamp"
    survival: Annotated[list[Finite], Field(min_length=2, max_length=2)] = [0.8, 1.25]

    @property
    def reference_path(self) -> str | None:
        """The float original, where there is one."""
        return None if self.reference == DEQUANTISED else self.reference

    @model_validator(mode="after")
    def _rounds_to_something(self) -> Quantized:
        if self.rounding == "nearest" and self.reference_path is None:
            raise ValueError(
                "rounding: nearest goes with a reference file: of a dequantised base it takes practically all of a "
                "patch back (or rounding: stochastic)"
            )
        if self.survival[0] > self.survival[1]:
            raise ValueError("survival is a range, the lower end first")
        return self


class Recipe(Strict):
    """A validated recipe. `origin` is the directory that its relative paths are relative to."""

    base: Annotated[str, Field(min_length=1)]
    patches: Annotated[list[PatchSpec], Field(min_length=1)]
    combine: Combine = "difference"
    scope: Scope = "tensor"
    order: Order = "retain-first"
    targets: Literal["linear", "language", "all"] | Globs = "linear"
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    nonfinite: NonFinite = "error"
    missing: Missing = "error"
    max_shard_size: str | int | None = None
    accumulate: Literal["base", "deltas"] = "base"
    lambda_: Annotated[Finite, Field(alias="lambda")] = 1.0  # what the sum of deltas is multiplied with
    elect: Elect = Elect()
    quota: Quota = "even"
    quantized: Quantized | None = None
    origin: Annotated[SkipJsonSchema[Path], Field(exclude=True)] = Path(".")

    @field_validator("max_shard_size")
    @classmethod
    def _is_size(cls, value: str | int | None) -> str | int | None:
        if value is not None:
            parse_size(value)
        return value

    @field_validator("patches")
    @classmethod
    def _names_differ(cls, patches: list[PatchSpec]) -> list[PatchSpec]:
        names = [p.name for p in patches]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two patches are named {twice[0]!r}; names are part of the random key")
        return patches

    @model_validator(mode="after")
    def _others_are_there(self) -> Recipe:
        for patch in self.patches:
            for key, rule in (("agreement", patch.agreement), ("gate", patch.gate)):
                if rule is not None and (rule.patch == patch.name or rule.patch not in self.names):
                    others = ", ".join(name for name in self.names if name != patch.name)
                    raise ValueError(
                        f"the {key} of patch '{patch.name}' is with another patch of the recipe, not '{rule.patch}'"
                        + (f"; there is {others}" if others else "")
                    )
        return self

    @property
    def names(self) -> list[str]:
        """Those of the patches, in order."""
        return [patch.name for patch in self.patches]

    @model_validator(mode="after")
    def _keys_fit_each_other(self) -> Recipe:
        elected = COMBINE[self.combine].acts == Acts.ELECTED
        if elected and self.accumulate != "base":
            raise ValueError("accumulate: deltas goes with combine: difference or sum; ties has elect.divide")
        if not elected and self.elect != Elect():
            raise ValueError("elect goes with combine: ties")
        if self.lambda_ != 1 and self.rule.join == Join.SUM:
            raise ValueError("lambda multiplies the sum of deltas: it goes with accumulate: deltas or combine: ties")
        with np.errstate(over="ignore"):
            if not np.isfinite(np.float32(self.lambda_)):
                raise ValueError("lambda does not fit float32")
        for key in ("top", "skip") if self.scope == "model" else ():
            if any(getattr(other, key) is not None for p in self.patches for other in p.overrides):
                raise ValueError(f"an override's {key} goes with scope: tensor")
        return self

    @property
    def rule(self) -> Rule:
        """Who acts and how steps join."""
        acts, join = COMBINE[self.combine]
        if self.elect.zero == "positive":
            acts = Acts.ELECTED_UP
        if self.accumulate == "deltas" or self.elect.divide == "none":
            join = Join.TOTAL
        return Rule(acts, Join.WEIGHTED if self.elect.divide == "weights" else join)

    def is_target(self, name: str, dimensions: int) -> bool:
        """Whether a float tensor of that name and rank is patched."""
        if self.targets == "all":
            return True
        if self.targets in ("linear", "language"):
            linear = dimensions >= 2 and not any(part in name for part in NOT_LINEAR)
            return linear and (self.targets == "linear" or of_language(name))
        assert isinstance(self.targets, Globs)
        return any(fnmatch.fnmatchcase(name, g) for g in self.targets.include) and not any(
            fnmatch.fnmatchcase(name, g) for g in self.targets.exclude
        )

    def written(self) -> dict[str, Any]:
        """Every key with its value, defaults included."""
        data = self.model_dump(mode="json", by_alias=True)
        # Later keys are shown where they are used, so that earlier recipes stay what they were.
        usual = {
            "accumulate": "base",
            "lambda": 1.0,
            "elect": Elect().model_dump(),
            "quota": "even",
            "quantized": None,
        }
        for key, value in usual.items():
            if data[key] == value:
                del data[key]
        for patch in data["patches"]:
            if patch["skip"] == 0:
                del patch["skip"]
            patch["overrides"] = [{k: v for k, v in of.items() if v is not None} for of in patch["overrides"]]
            if not patch["overrides"]:
                del patch["overrides"]
            for key in ("agreement", "gate"):
                if patch[key] is None:
                    del patch[key]
                else:
                    patch[key] = {k: v for k, v in patch[key].items() if v is not None}
        return data

    def resolved(self) -> dict[str, Any]:
        """As `written`; absolute paths are cut to their last component."""
        data = self.written()

        def shown(path: str) -> str:
            return Path(path).name if os.path.isabs(path) or path.startswith("~") else path

        data["base"] = shown(data["base"])
        if "quantized" in data:
            data["quantized"]["reference"] = shown(data["quantized"]["reference"])
        for patch in data["patches"]:
            patch["source"] = shown(patch["source"])
            patch["minus"] = patch["minus"] and shown(patch["minus"])
            for key in ("scores", "gradients"):
                if isinstance(patch["importance"], dict) and key in patch["importance"]:
                    patch["importance"][key] = shown(patch["importance"][key])
        return data


def parse_recipe(data: Any, *, origin: Path = Path("."), file: str | os.PathLike[str] | None = None) -> Recipe:
    """A recipe from a plain mapping. Raises UsageError naming the key and what is allowed."""
    if not isinstance(data, dict):
        raise UsageError("a recipe is a mapping of keys", file=file, found=type(data).__name__)
    if "origin" in data:
        raise UsageError("unknown key 'origin'", file=file)
    try:
        return Recipe.model_validate({**data, "origin": origin})
    except ValidationError as error:
        raise UsageError(explain(error, Recipe), file=file) from None


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read and check a recipe file; its relative paths are relative to its directory."""
    return parse_recipe(read_yaml(path, "recipe"), origin=Path(path).resolve().parent, file=path)


def is_mask(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a float tensor is a causal mask, which early GPT checkpoints hold beside the weights."""
    if re.fullmatch(r"(.*\.)?(attn|attention)\.(bias|masked_bias)", name) is None:
        return False
    return not shape or (len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3])


def match_targets(recipe: Recipe, floats: dict[str, int]) -> list[str]:
    """Target names in bytewise order, from float tensor names and their ranks."""
    return sorted((n for n, rank in floats.items() if recipe.is_target(n, rank)), key=str.encode)
