"""What commands share: options, progress, the formats of what they print."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from safepatch_core.backends import ENGINES, find_engine
from safepatch_core.sizes import size

# Bytes below which a line per tenth would be noise: a second's work.
LINES_FROM = 1_000_000_000

if TYPE_CHECKING:
    from safepatch_core.merging.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])


class OutPath(click.Path):
    """A path to write to. An empty one is a variable that was never set, and would be this directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty.", param, ctx)
        return super().convert(value, param, ctx)


def _options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def backend_option(help: str) -> Callable[[F], F]:
    """The option that names an engine: one of ours, or of an installed package."""

    def known(context: click.Context, parameter: click.Parameter, name: str) -> str:
        if name != "auto":
            find_engine(name)
        return name

    names = "|".join(["auto", *ENGINES, "…"])
    return click.option("--backend", metavar=names, callback=known, default="auto", show_default=True, help=help)


_engine_options = _options(
    backend_option("The engine: triton where a GPU is there, else cpu."),
    click.option("--device", metavar="DEV", help="GPU of the triton engine, like cuda:0."),
    click.option("--threads", type=click.IntRange(min=1), help="Threads of the cpu engine [default: all cores]."),
    click.option("--memory-limit", metavar="SIZE", help="Host memory for buffers, like 2GiB [default: 2GiB]."),
    click.option("--vram-limit", metavar="SIZE", help="GPU memory of the triton engine, like 8GiB [default: 4GiB]."),
)


memory_option = click.option("--memory-limit", metavar="SIZE", help="Refuse a fix that needs more memory than this.")


def engine_options(function: F) -> F:
    """Options of the engine. They arrive as one value, the keywords that `merge` takes: `engine`."""

    @_engine_options
    @functools.wraps(function)
    def collected(
        *args: Any,
        backend: str,
        device: str | None,
        threads: int | None,
        memory_limit: str | None,
        vram_limit: str | None,
        **rest: Any,
    ) -> Any:
        limits = {"memory_limit": size(memory_limit), "vram_limit": size(vram_limit)}
        engine = {"backend": backend, "device": device, "threads": threads, **limits}
        return function(*args, engine=engine, **rest)

    return cast(F, collected)


streams_option = click.option(
    "--streams",
    type=click.IntRange(min=1),
    help="Output shards at once [default: one per 4 threads, 4 at most; always 1 with scope: model and on a GPU].",
)
output_options = _options(
    click.option("--quiet", is_flag=True, help="No progress and no summary."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
)
write_options = _options(
    click.option("--force", is_flag=True, help="Replace an existing output, in one step."),
    click.option("--resume", is_flag=True, help="Finish an interrupted run, to the same bytes."),
)


def any_recipe(path: str, quiet: bool) -> Recipe:
    """The recipe in a file; of a mergekit configuration its recipe, and what it promises on stderr."""
    from safepatch_core.integrations.mergekit import is_mergekit, read_mergekit
    from safepatch_core.merging.recipe import parse_recipe
    from safepatch_core.settings import read_yaml

    given = read_yaml(path, "recipe")
    if not is_mergekit(given):
        return parse_recipe(given, origin=Path(path).resolve().parent, file=path)
    data, promise = read_mergekit(path)
    say_to_stderr(quiet)(f"{path}: {promise}")
    return parse_recipe(data, file=path)


def emit(data: object) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(data, indent=2))


def say_to_stderr(quiet: bool) -> Callable[[str], None]:
    """What tells people in a line what begins."""
    return (lambda text: None) if quiet else (lambda text: click.echo(text, err=True))


def human(nbytes: float) -> str:
    """Bytes for people, in decimal units as disks count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


class ByteProgress:
    """A bar on a terminal, a line per tenth elsewhere; all on stderr."""

    def __init__(self, what: str, quiet: bool) -> None:
        self._what, self._quiet, self._bar, self._tenth = what, quiet, None, 0  # type: Any, Any, Any, int

    def __call__(self, done: int, total: int) -> None:
        if self._quiet:
            return
        if sys.stderr.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=total, desc=self._what, unit="B", unit_scale=True, file=sys.stderr)
            if done < self._bar.n:  # another merge of the same run
                self._bar.reset(total)
            self._bar.update(done - self._bar.n)
        elif total >= LINES_FROM and (tenth := 10 * done // total) != self._tenth:
            self._tenth = tenth
            if tenth:
                click.echo(f"{self._what}: {10 * tenth}% of {human(total)}", err=True)

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(self, *of_error: object) -> None:
        if self._bar is not None:
            self._bar.close()
