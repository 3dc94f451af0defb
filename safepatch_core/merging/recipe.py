"""The recipe: what is merged and how (SPEC.md section 3). Reads YAML, checks every key, resolves nothing on disk."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from safepatch_core.errors import UsageError
from safepatch_core.spec import Combine, Importance, Kind, Missing, NonFinite, Order, Scope, Weight

NOT_LINEAR = ("embed", "lm_head", "wte", "wpe", "shared.weight")
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str | int) -> int:
    """Bytes of "5GB" (decimal), "64MiB" (binary) or a plain number; raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if isinstance(text, bool) or match is None or match[2].upper() not in UNITS:
        raise ValueError("not a size like 500MB, 5GB or 2GiB")
    size = int(float(match[1]) * UNITS[match[2].upper()])
    if size < 1:
        raise ValueError("a size must be at least one byte")
    return size


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Scores(_Strict):
    """Importance read as it is."""

    scores: str


class Gradients(_Strict):
    """Importance |x * g| with x named by `weight`."""

    gradients: str
    weight: Weight = "patched"


class PatchSpec(_Strict):
    """One patch: where its change comes from, and which share of it is kept."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    source: Annotated[str, Field(min_length=1)]
    kind: Kind | None = None
    importance: Literal["magnitude"] | Scores | Gradients = "magnitude"
    top: Annotated[float, Field(ge=0, le=1)] = 1.0
    retain: Annotated[float, Field(ge=0, le=1)] = 1.0
    rescale: bool = False
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0

    @model_validator(mode="after")
    def _factor_is_finite(self) -> PatchSpec:
        if self.rescale and self.retain == 0:
            raise ValueError("rescale divides by retain, which is 0")
        if not np.isfinite(self.factor):
            raise ValueError("scale (divided by retain, with rescale) does not fit float32")
        return self

    @property
    def factor(self) -> float:
        """c of SPEC section 2: the scale, divided by the retention rate with `rescale`, in float32."""
        with np.errstate(over="ignore"):
            return float(np.float32(self.scale / self.retain if self.rescale else self.scale))

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


class Globs(_Strict):
    """Targets by name, fnmatch patterns, case-sensitive."""

    include: Annotated[list[str], Field(min_length=1)] = ["*"]
    exclude: list[str] = []


class Recipe(_Strict):
    """A validated recipe. `origin` is the directory that its relative paths are relative to."""

    base: Annotated[str, Field(min_length=1)]
    patches: Annotated[list[PatchSpec], Field(min_length=1)]
    combine: Combine = "difference"
    scope: Scope = "tensor"
    order: Order = "retain-first"
    targets: Literal["linear", "all"] | Globs = "linear"
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    nonfinite: NonFinite = "error"
    missing: Missing = "error"
    max_shard_size: str | int | None = None
    origin: Annotated[Path, Field(exclude=True)] = Path(".")

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

    def is_target(self, name: str, dimensions: int) -> bool:
        """Whether a float tensor of that name and rank is patched."""
        if self.targets == "all":
            return True
        if self.targets == "linear":
            return dimensions >= 2 and not any(part in name for part in NOT_LINEAR)
        assert isinstance(self.targets, Globs)
        return any(fnmatch.fnmatchcase(name, g) for g in self.targets.include) and not any(
            fnmatch.fnmatchcase(name, g) for g in self.targets.exclude
        )

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults included; absolute paths are cut to their last component."""
        data = self.model_dump(mode="json")

        def shown(path: str) -> str:
            return Path(path).name if os.path.isabs(path) else path

        data["base"] = shown(data["base"])
        for patch in data["patches"]:
            patch["source"] = shown(patch["source"])
            for key in ("scores", "gradients"):
                if isinstance(patch["importance"], dict) and key in patch["importance"]:
                    patch["importance"][key] = shown(patch["importance"][key])
        return data


class Loader(yaml.SafeLoader):
    """YAML where a key may not appear twice and 1e-3 is a number, as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", node.start_mark)
            if key in seen:
                mark = key_node.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str | os.PathLike[str], what: str) -> Any:
    """The document in a YAML file. Raises UsageError, naming line and column, if it can't be read."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} is not UTF-8", file=path, found=f"a bad byte at {error.start}") from None
    except OSError as error:
        raise UsageError(f"cannot read the {what}: {error.strerror}", file=path) from None
    try:
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"{what} is not valid YAML{place}: {reason}", file=path) from None


# Models that are one of several forms of a value: pydantic names them in the path of a complaint.
_CHOICES = {"Scores", "Gradients", "Globs", "str", "int"}


def _model_at(kind: Any, path: Sequence[str | int]) -> type[BaseModel] | None:
    """The model that `path` leads to from the annotation `kind`."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if not path:
            return kind
        field = kind.model_fields.get(str(path[0]))
        return _model_at(field.annotation, path[1:]) if field else _model_at(kind, path[1:])
    found = (_model_at(a, path[1:] if get_origin(kind) is list else path) for a in get_args(kind))
    named = [m for m in found if m]
    return next((m for m in named if path and m.__name__ == path[-1]), named[0] if named else None)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first complaint of pydantic in one line: key, what was found, what is allowed."""
    complaints = error.errors(include_url=False)
    # A misspelt key also leaves the right one missing: name the misspelt one.
    unknown = ("extra_forbidden", "invalid_key")
    misspelt = [c for c in complaints if c["type"] in unknown and not _CHOICES & {*c["loc"]}]
    first = (misspelt or complaints)[0]
    parts = [str(p) for p in first["loc"] if p not in _CHOICES]
    parts = [p for p in parts if not p.startswith(("literal[", "function-", "constrained-"))]
    key = ".".join(parts) or "the document"
    if first["type"] in unknown:
        owner = _model_at(model, first["loc"][:-1])
        keys = ", ".join(k for k in owner.model_fields if k != "origin") if owner else "another"
        return f"unknown key '{key}': allowed are {keys}"
    if first["type"] == "missing":
        return f"key '{key}' is missing"
    message = first["msg"].removeprefix("Value error, ")
    options = {e["msg"].removeprefix("Input should be ") for e in complaints if e["loc"][:1] == first["loc"][:1]}
    if len(options) > 1 and first["loc"][:1] in (("targets",),):
        message = "Input should be 'linear', 'all' or {include: [globs], exclude: [globs]}"
    elif "importance" in parts and parts[-1] == "importance":
        message = "Input should be magnitude, {scores: PATH} or {gradients: PATH, weight: patched|base|delta}"
    text = f"key '{key}': {message[0].lower()}{message[1:]}"
    if isinstance(first["input"], dict | list) and first["type"] == "value_error":
        return text  # a rule between several keys: the message says which
    found = repr(first["input"])
    return f"{text}, found {found if len(found) < 80 else found[:77] + '...'}"


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


def match_targets(recipe: Recipe, floats: dict[str, int]) -> list[str]:
    """Target names in bytewise order, from float tensor names and their ranks."""
    return sorted((n for n, rank in floats.items() if recipe.is_target(n, rank)), key=str.encode)
