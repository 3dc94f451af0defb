"""A command line made from settings: an `--option` per field, its description as help."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from safepatch_core.errors import UsageError
from safepatch_core.settings import Loader, checked

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=BaseModel)


def _fields(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _fields(kind, (*path, name))
        else:
            yield (*path, name), field


def _is_text(annotation: Any) -> bool:
    """Whether every value of the option is text, so that `0:400` or `1e5` stay as typed."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _is_text(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return all(_is_text(a) for a in typing.get_args(annotation) if a is not type(None))
    return annotation is str


def model_options(model: type[BaseModel], *, skip: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Decorator: an option per field of `model`; nested models give `--outer-field`. Values arrive as keywords."""

    def apply(function: F) -> F:
        for path, field in reversed(list(_fields(model))):
            if path[0] in skip:
                continue
            name = "_".join(path)
            needed = field.is_required()
            option = click.option(
                "--" + name.replace("_", "-"), name, metavar="TEXT", required=needed, help=field.description
            )
            function = option(function)
        return function

    return apply


def model_from_options(model: type[M], given: dict[str, Any], **fixed: Any) -> M:
    """The model from `model_options`' keywords (None: not given). Raises UsageError naming the key."""
    data: dict[str, Any] = dict(fixed)
    for path, field in _fields(model):
        text = given.get("_".join(path))
        if text is None or path[0] in fixed:
            continue
        place = data
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = text if _is_text(field.annotation) else _value(path, text)
    return checked(model, data)


def _value(path: tuple[str, ...], text: str) -> Any:
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError:
        raise UsageError(f"option --{'-'.join(path)}: not a value", found=repr(text)) from None
