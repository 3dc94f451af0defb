"""Writes docs/reference from what the program itself says: click, pydantic, the contract, the public API.

python -m docs.scripts.reference
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

import safepatch_core
from safepatch_core import errors
from safepatch_core.commands.cli import COMMANDS, cli
from safepatch_core.files import filenames
from safepatch_core.fixes.format import BLOCK, WIDTH
from safepatch_core.merging.keys import described_schema

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "reference"
NOTE = "<!-- Written by `python -m docs.scripts.reference`; change what it reads. -->\n\n"
# Groups of the public API, by the room that a name comes from.
ROOMS = {
    "Merging": ("merging.", "backends"),
    "Fix files": ("fixes.",),
    "Training, measuring, searching": ("deriving", "evaluating", "runs."),
    "Other toolchains and the C library": ("integrations.", "library"),
    "Checkpoints": ("files.",),
    "Errors": ("errors",),
}
FILES = {
    "MANIFEST": "what `merge` and `apply` tell of their output: recipe, versions, counts, a SHA-256 per file",
    "SUMS": "`sha256sum -c` checks the output with it",
    "LEDGER": "which fixes a checkpoint carries, the lowest first, and what is under way",
    "KEPT": "folder with a copy of every fix that was applied in place",
    "BUSY": "the name of `config.json` while a fix is under way, so that nothing loads a mixture",
    "INDEX": "which shard holds which tensor",
    "ADAPTER_CONFIG": "makes a source a PEFT adapter",
}


def pages() -> dict[str, str]:
    """Name of a file in docs/reference → its content."""
    return {
        "command-line.md": NOTE + "".join(_command_line()),
        "recipe.md": NOTE + "".join(_recipe()),
        "settings.md": NOTE + "".join(_settings()),
        "files.md": NOTE + "".join(_files()),
        "python.md": NOTE + "".join(_python()),
    }


def _cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "&#124;").replace("<", "&lt;")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n" if rows else ""


def _command_line() -> Iterator[str]:
    yield "# Command line\n\n"
    yield (
        "Results go to stdout, everything else to stderr. `safepatch COMMAND --help` shows the same. "
        "A failure is one line and an exit status:\n\n"
    )
    yield _table(
        ("status", "what", "error"),
        [("0", "Done.", "")]
        + [
            (str(kind.status), _cell((kind.__doc__ or "").split("\n")[0]), f"`{kind.__name__}`")
            for kind in sorted(_kinds(), key=lambda kind: kind.status)
        ]
        + [(str(errors.SafepatchError.status), "A bug in safepatch; `SAFEPATCH_DEBUG=1` shows where.", "")],
    )
    for name, (_, line) in COMMANDS.items():
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        yield from _command(f"safepatch {name}", command, line)


def _kinds() -> list[type[errors.SafepatchError]]:
    return errors.SafepatchError.__subclasses__()


def _command(path: str, command: click.Command, line: str, level: int = 2) -> Iterator[str]:
    context = click.Context(command, info_name=path)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    yield f"{'#' * level} {path}\n\n{_cell(line)}\n\n```\n{usage}\n```\n\n"
    text = " ".join((command.help or "").replace("\b", "").split())
    if text and text != line:
        yield f"{_cell(text)}\n\n"
    options = [option for option in command.params if isinstance(option, click.Option) and not option.hidden]
    yield _table(("option", "what it does"), [_option(option, context) for option in options])
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _command(f"{path} {name}", inner, inner.get_short_help_str(200), level + 1)


def _option(option: click.Option, context: click.Context) -> tuple[str, str]:
    record = option.get_help_record(context)
    assert record is not None
    names, text = record
    return f"<code>{_cell(names)}</code>", _cell(text)


def _recipe() -> Iterator[str]:
    schema = described_schema()
    models = {"": schema} | schema["$defs"]
    yield (
        "# Recipe\n\nA YAML file. Unknown keys, values of another type and values out of range are errors that "
        "name the key. Relative paths are relative to the recipe's file. What the keys mean to the bit: "
        "[the contract](../../safepatch_core/SPEC.md). For editors: `safepatch schema`.\n\n"
    )
    for title, model in models.items():
        if title:
            yield f"## {title}\n\n{_cell(model.get('description', ''))}\n\n"
        needed = model.get("required", ())
        yield _table(
            ("key", "what it says"),
            [
                (f"`{key}`", _says(of, _kind(of), "needed" if key in needed else _default(of)))
                for key, of in model["properties"].items()
            ],
        )


def _says(of: Mapping[str, Any], *notes: str) -> str:
    """Description and, on a line of its own, what values there are: more columns are too many for a phone."""
    return f"{_cell(of.get('description', ''))}<br>*{'; '.join(note for note in notes if note)}*"


def _kind(of: Mapping[str, Any]) -> str:
    """What JSON Schema says of a value, for people."""
    if "$ref" in of:
        name = of["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in of:
        return " or ".join(dict.fromkeys(_kind(one) for one in of["anyOf"]))
    if "enum" in of or "const" in of:
        return ", ".join(f"`{value}`" for value in of.get("enum", [of.get("const")]))
    if of.get("type") == "array":
        return f"list of {_kind(of.get('items', {}))}"
    limits = {"minimum": "at least", "maximum": "at most", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}
    said = [f"{words} {_number(of[key])}" for key, words in limits.items() if key in of]
    names = {"string": "text", "object": "mapping", "boolean": "true or false"}
    return " ".join([names.get(str(of.get("type")), str(of.get("type", "any"))), *said])


def _number(value: float) -> str:
    return "2^64" if value == 2**64 else f"{value:g}"


def _default(of: Mapping[str, Any]) -> str:
    value = of.get("default")
    if isinstance(value, dict):
        value = ", ".join(f"{key}: {one}" for key, one in value.items())
    return "" if value in (None, [], "") else f"default `{str(value).lower() if isinstance(value, bool) else value}`"


def _settings() -> Iterator[str]:
    yield (
        "# Settings of derive, eval, run and sweep\n\nThe options of the command line are these keys with dashes. "
        "`run` and `sweep` read them from YAML; in Python they are the fields of the classes.\n\n"
    )
    for command, name in (
        ("derive", "DeriveConfig"), ("eval", "EvalConfig"), ("run", "RunConfig"), ("sweep", "SweepConfig"),
    ):  # fmt: skip
        model = getattr(safepatch_core, name)
        yield f"## {command}\n\n`{name}`: {_cell(model.__doc__ or '')}\n\n"
        yield _fields(model)
        example = ROOT / "examples" / {"run": "demo.yaml", "sweep": "sweep.yaml"}.get(command, "-")
        if example.is_file():
            yield f"`examples/{example.name}`:\n\n```yaml\n{example.read_text()}```\n\n"


def _fields(model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    rows = list(_keys(schema, schema.get("$defs", {})))
    return _table(("key", "what it says"), rows)


def _keys(model: Mapping[str, Any], inner: Mapping[str, Any], under: str = "") -> Iterator[tuple[str, str]]:
    """Keys with dots for those of nested models."""
    for key, of in model["properties"].items():
        nested = inner.get(of.get("$ref", "").rpartition("/")[2])
        if nested is not None and "properties" in nested:
            yield from _keys(nested, inner, f"{under}{key}.")
        else:
            kind = re.sub(r"\[(\w+)\]\(#\w+\)", r"\1", _kind(of))
            yield f"`{under}{key}`", _says(of, kind, "needed" if key in model.get("required", ()) else "")


def _files() -> Iterator[str]:
    yield "# Files\n\nWhat safepatch reads and writes beside safetensors shards.\n\n"
    yield _table(("name", "what"), [(f"`{getattr(filenames, key)}`", what) for key, what in FILES.items()])
    yield "## Small files that are carried\n\n"
    yield "Of the base's other files those of these names, up to 64 MiB each:\n\n"
    yield " ".join(f"`{glob}`" for glob in filenames.COMPANIONS) + "\n\n"
    contract = (ROOT / "safepatch_core" / "SPEC.md").read_text()
    for title in ("Output", "The fix file"):
        found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", contract, re.DOTALL | re.MULTILINE)
        assert found is not None, title
        yield f"## {title}\n{found[1].rstrip()}\n\n"
        if title == "The fix file":
            yield f"A block is {BLOCK} entries. Bytes of an entry by dtype:\n\n"
            yield _table(("dtype", "bytes"), [(f"`{name}`", str(width)) for name, width in WIDTH.items()])


def _python() -> Iterator[str]:
    yield (
        "# Python\n\nThe names of `safepatch_core`. They are imported on first use; merging and fix files need no "
        "torch. Every failure is a [`SafepatchError`](#errors) with one line of text.\n\n"
    )
    homes = {name: home for home, names in safepatch_core._HOMES.items() for name in names}
    for title, rooms in ROOMS.items():
        names = [name for name, home in homes.items() if any(f"{home}.".startswith(room) for room in rooms)]
        yield f"## {title}\n\n"
        for name in sorted(names, key=lambda name: (name[0].isupper(), name)):
            yield f"::: {import_module(f'safepatch_core.{homes[name]}').__name__}.{name}\n\n"


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    for file, content in pages().items():
        (OUT / file).write_text(content.rstrip("\n") + "\n")
