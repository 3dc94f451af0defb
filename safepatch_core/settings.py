"""Settings: strict models, YAML files with one line for whatever is wrong in them, sizes, paths."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from safepatch_core.errors import UsageError

M = TypeVar("M", bound=BaseModel)

PathText = Annotated[
    str,
    BeforeValidator(lambda path: os.fspath(path) if isinstance(path, os.PathLike) else path),
    Field(min_length=1),
]
Value = str | bool | int | float
Where = dict[str, Value | list[Value]]  # column → the values of the rows that are taken
Device = Annotated[str, Field(description="cpu, cuda, cuda:1, or auto: cuda where there is one. Default auto.")]
Thinking = Annotated[
    Literal["close", "leave"],
    Field(
        description="Where the chat template opens a block for thoughts: close it before each answer, or leave it. "
        "Default close."
    ),
]
Threads = Annotated[int | None, Field(ge=1, description="CPU threads of torch. Default torch's own choice.")]


class Strict(BaseModel):
    """Settings in which unknown keys, and values of another type, are refused."""

    # A validator is built when it is needed: those of the parts of a recipe are parts of the recipe's own.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)


def checked(model: type[M], data: Any, file: str | os.PathLike[str] | None = None) -> M:
    """The model from plain data. Raises UsageError naming the key and what is allowed."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        refused = UsageError(explain(error, model), file=file)
        refused.shared = True  # every rank of a run is given the same
        raise refused from None


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
        message = "Input should be 'linear', 'language', 'all' or {include: [globs], exclude: [globs]}"
    elif "importance" in parts and parts[-1] == "importance":
        message = "Input should be magnitude, {scores: PATH} or {gradients: PATH, weight: patched|base|delta}"
    text = f"key '{key}': {message[0].lower()}{message[1:]}"
    if isinstance(first["input"], dict | list) and first["type"] == "value_error":
        return text  # a rule between several keys: the message says which
    found = repr(first["input"])
    return f"{text}, found {found if len(found) < 80 else found[:77] + '...'}"


# Keys of settings that name files, folders or models.
PATHS = {
    "model",
    "baseline",
    "data",
    "recipe",
    "harmful",
    "harmless",
    "text",
    "judge",
    "lm_eval_include",
    "relearn",
    "utility_data",
    "refused_data",
    "replay_data",
    "ewc_fisher",
    "file",
}
# Of these, those whose value may also be a hub id, or a word.
NAMES = {"model", "baseline", "judge"}


def read_settings(model: type[M], file: str | os.PathLike[str], what: str, changes: Sequence[str] = ()) -> M:
    """The settings in a YAML file, after `--set` changes like "derive.model=PATH".

    Raises UsageError, naming the key and what is allowed.
    """
    data = read_yaml(file, what)
    for change in changes:
        _set(data, change)
    return checked(model, data, file)


def loaded(model: type[M], config: str | os.PathLike[str] | M, what: str) -> M:
    """The settings themselves, or those in a YAML file, whose paths are relative to it.

    Raises:
        UsageError: the file can't be read, or a key is wrong.
    """
    if isinstance(config, model):
        return config
    path = Path(os.fspath(config))  # type: ignore[arg-type]
    data = read_yaml(path, what)
    return checked(model, rooted(data, path.resolve().parent) if isinstance(data, dict) else data, path)


def _set(data: Any, change: str) -> None:
    key, equals, text = change.partition("=")
    place = data
    *outer, last = key.split(".")
    for part in outer:
        place = place.setdefault(part, {}) if isinstance(place, dict) else None
    if not equals or not isinstance(place, dict):
        raise UsageError("--set takes section.key=value", found=change)
    place[last] = yaml.load(text, Loader=Loader)


def rooted(section: Mapping[str, Any], origin: Path) -> dict[str, Any]:
    """Paths relative to the settings file (or, given by --set, to here) made absolute; hub ids stay as they are."""

    def place(key: str, text: Any) -> Any:
        if not isinstance(text, str) or not text:
            return text
        places = [path for path in (origin / text, Path(text)) if path.exists()]
        if not places and (key in NAMES and not text.startswith((".", os.sep))):
            return text
        return os.path.abspath(places[0] if places else origin / text)

    def places(key: str, value: Any) -> Any:
        return [place(key, one) for one in value] if isinstance(value, list) else place(key, value)

    result = {key: places(key, value) if key in PATHS else value for key, value in section.items()}
    if isinstance(section.get("more_models"), list):
        result["more_models"] = [place("model", name) for name in section["more_models"]]
    if isinstance(section.get("more_sets"), list):
        result["more_sets"] = [rooted(s, origin) if isinstance(s, dict) else s for s in section["more_sets"]]
    return result
