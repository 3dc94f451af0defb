"""The command line. Commands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import click

from safepatch_core.backends import ENGINES, find_engine
from safepatch_core.errors import IOFailure, SafepatchError, Stopped, UsageError, printable
from safepatch_core.version import __version__

F = TypeVar("F", bound=Callable[..., Any])


def _options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def _backend_option(help: str) -> Callable[[F], F]:
    def known(context: click.Context, parameter: click.Parameter, name: str) -> str:
        if name != "auto":
            find_engine(name)
        return name

    names = "|".join(["auto", *ENGINES, "…"])
    return click.option("--backend", metavar=names, callback=known, default="auto", show_default=True, help=help)


engine_options = _options(
    _backend_option("The engine: triton where a GPU is there, else cpu."),
    click.option("--device", metavar="DEV", help="GPU of the triton engine, like cuda:0."),
    click.option("--threads", type=click.IntRange(min=1), help="Threads of the cpu engine [default: all cores]."),
    click.option("--memory-limit", metavar="SIZE", help="Host memory for buffers, like 2GiB [default: 2GiB]."),
    click.option("--vram-limit", metavar="SIZE", help="GPU memory of the triton engine, like 8GiB [default: 4GiB]."),
)
output_options = _options(
    click.option("--quiet", is_flag=True, help="No progress and no summary."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
)
write_options = _options(
    click.option("--force", is_flag=True, help="Replace an existing output, in one step."),
    click.option("--resume", is_flag=True, help="Finish an interrupted run, to the same bytes."),
)


class Commands(click.Group):
    """A group whose larger commands live in rooms of their own and are imported when called."""

    elsewhere = {
        "derive": ("safepatch_core.commands.derive", "Train the two patches of a model and rank their entries."),
        "eval": ("safepatch_core.commands.evaluate", "Measure harmful rate, over-refusal and utility of a model."),
        "bench": ("safepatch_core.bench.command", "Measure the engine here, beside its limits and its peers."),
        "run": ("safepatch_core.runs.run", "Derive, merge and evaluate, from one YAML file."),
        "sweep": ("safepatch_core.commands.sweep", "Search the recipe that scores best, from one YAML file."),
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.commands, *self.elsewhere]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in self.elsewhere:
            from importlib import import_module

            command: click.Command = import_module(self.elsewhere[name][0]).command
            return command
        return super().get_command(ctx, name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, command.get_short_help_str(80)) for name, command in self.commands.items()]
        rows += [(name, text) for name, (_, text) in self.elsewhere.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="safepatch")
def cli() -> None:
    """Make a language model safer after alignment: two patches, merged bit for bit, without loading the model.

    Exit status: 0 done, 64 usage or recipe, 65 input, 73 output, 74 I/O while running, 75 busy or stopped.
    """


def emit(data: object) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(data, indent=2))


def human(nbytes: float) -> str:
    """Bytes for people, in decimal units as disks count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


class Progress:
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
            self._bar.update(done - self._bar.n)
        elif total and 10 * done // total > self._tenth:
            self._tenth = 10 * done // total
            click.echo(f"{self._what}: {10 * self._tenth}% of {human(total)}", err=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def count_table(counts: Any) -> str:
    width = max([5, *map(len, counts)])
    lines = [f"{'patch':{width}}  {'entries':>15}  {'eligible':>15}  {'selected':>15}  {'applied':>15}"]
    for name, of in counts.items():
        numbers = "  ".join(f"{of[key]:15,d}" for key in ("entries", "eligible", "selected", "applied"))
        lines.append(f"{name:{width}}  {numbers}")
    return "\n".join(lines)


@cli.command()
@click.argument("recipe", type=click.Path())
@click.option("-o", "--output", "out", required=True, type=click.Path(), help="Directory to create.")
@engine_options
@write_options
@output_options
def merge(
    recipe: str,
    out: str,
    backend: str,
    device: str | None,
    threads: int | None,
    memory_limit: str | None,
    vram_limit: str | None,
    force: bool,
    resume: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Merge a RECIPE's patches into its base: a new checkpoint."""
    from safepatch_core.merging.api import merge as run

    progress = Progress("merge", quiet)
    try:
        result = run(
            recipe,
            out,
            backend=backend,
            device=device,
            threads=threads,
            memory_limit=size_option(memory_limit),
            vram_limit=size_option(vram_limit),
            force=force,
            resume=resume,
            progress=progress,
        )
    finally:
        progress.close()
    for warning in () if quiet else result.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
    if as_json:
        emit(
            {
                "output": str(result.out),
                "counts": result.counts,
                "acted": result.acted,
                "changed": result.changed,
                "surviving": result.surviving,
                "bytes_read": result.bytes_read,
                "bytes_written": result.bytes_written,
            }
        )
    elif not quiet:
        click.echo(count_table(result.counts))
        if result.surviving is not None:
            click.echo(
                f"stored bits changed at {result.changed:,d} of {result.acted:,d} entries that patches act on "
                f"({result.surviving:.1%}); the others' steps are lost in rounding"
            )
        click.echo(f"written: {printable(result.out)}")


def size_option(text: str | None) -> int | None:
    """A size given on the command line. Raises UsageError."""
    from safepatch_core.merging.recipe import parse_size

    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise UsageError(str(error), found=repr(text)) from None


@cli.command()
@click.argument("recipe", type=click.Path())
@click.option("-o", "--output", "out", type=click.Path(), help="Where it would be written, for the free space.")
@click.option("--tensors", is_flag=True, help="Also list every target tensor.")
@engine_options
@output_options
def plan(
    recipe: str,
    out: str | None,
    tensors: bool,
    backend: str,
    device: str | None,
    threads: int | None,
    memory_limit: str | None,
    vram_limit: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """What a merge of RECIPE will do: bytes, passes, memory, free space. Writes nothing."""
    from safepatch_core.merging.api import describe, prepare

    made, engine = prepare(
        recipe,
        backend,
        device=device,
        threads=threads,
        memory_limit=size_option(memory_limit),
        vram_limit=size_option(vram_limit),
    )
    data = describe(made, engine, out or ".")
    if not tensors:
        data.pop("tensors")
    if as_json:
        emit(data)
        return
    if quiet:
        return
    for warning in made.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
    rows = [
        ("engine", data["engine"]),
        ("patches", ", ".join(f"{p['name']} ({p['kind']})" for p in data["patches"])),
        ("targets", f"{data['targets']} of {data['base_tensors']} tensors, {data['target_entries']:,d} entries"),
        ("read", f"{human(data['bytes_read'])} in {data['passes']} pass(es)"),
        ("write", f"{human(data['bytes_written'])} in {data['files']} file(s)"),
        ("memory", f"{human(data['memory'])} of buffers (limit {human(data['memory_limit'])})"),
        ("in chunks", f"{data['chunked']} target(s)"),
        ("free space", human(data["free_space"])),
        ("time", "unknown: `safepatch bench floor --save` measures this machine's rates"),
    ]
    if data["seconds"] is not None:
        rows[-1] = ("time", f"about {data['seconds']:.1f} s, inputs not in the page cache")
    for key, value in rows:
        click.echo(f"{key + ':':12} {printable(value)}")
    if tensors:
        click.echo(f"\n{'dtype':5} {'entries':>14} {'passes':>6}  {'k per patch':24} tensor")
        for row in data["tensors"]:
            quotas = ", ".join("-" if k is None else f"{k:,d}" for k in row["quotas"])
            click.echo(
                f"{row['dtype']:5} {row['entries']:14,d} {row['passes']:6d}  {quotas:24} {printable(row['name'])}"
            )


@cli.command()
@click.argument("out", type=click.Path())
@click.option("--recipe", type=click.Path(), help="Also recompute every byte from this recipe and compare.")
@engine_options
@output_options
def verify(
    out: str,
    recipe: str | None,
    backend: str,
    device: str | None,
    threads: int | None,
    memory_limit: str | None,
    vram_limit: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check a merged checkpoint: checksums, and with a recipe every byte."""
    from safepatch_core.merging.verification import verify as run

    verdict = run(
        out,
        recipe,
        backend=backend,
        device=device,
        threads=threads,
        memory_limit=size_option(memory_limit),
        vram_limit=size_option(vram_limit),
    )
    if as_json:
        emit(
            {
                "ok": verdict.ok,
                "files": verdict.files,
                "tensors": verdict.tensors,
                "recomputed": verdict.recomputed,
                "problems": verdict.problems,
            }
        )
    elif verdict.ok and not quiet:
        how = "recomputed from the recipe, all equal" if verdict.recomputed else "checksums match"
        click.echo(f"ok: {verdict.files} files, {verdict.tensors} tensors, {how}")
    if not verdict.ok:
        if not as_json:
            for problem in verdict.problems:
                click.echo(printable(problem), err=True)
        sys.exit(65)


@cli.command()
@_backend_option("The engine to test.")
@click.option("--device", metavar="DEV", help="GPU of the triton engine, like cuda:0.")
@click.option("--seconds", type=click.FloatRange(min=0), default=60, show_default=True, help="About how long.")
def selftest(backend: str, device: str | None, seconds: float) -> None:
    """Compare an engine with the reference on this machine, bit for bit."""
    from safepatch_core.backends.selftest import selftest as run

    if any(check.failure for check in run(backend, device, seconds, say=click.echo)):
        sys.exit(SafepatchError.status)


def _stop(number: int, frame: object) -> NoReturn:
    """The first signal unwinds; a second one ends the process where it stands, which a kill may do at any time."""
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, lambda number, frame: os._exit(Stopped.status))
    raise Stopped(f"stopped by {signal.Signals(number).name}; --resume goes on")


def main() -> NoReturn:
    """Entry point: every failure is one line on stderr and an exit status (SPEC section 5)."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        cli.main(standalone_mode=False)
        status = 0
    except click.exceptions.Exit as error:
        status = error.exit_code
    except click.ClickException as error:
        _tell(printable(error.format_message()), shared=True)
        status = UsageError.status
    except (SafepatchError, Stopped) as error:
        _tell(str(error), shared=error.shared)
        status = error.status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 74
    except Exception as error:
        status = _failed(error)
    # The outcome stands: a signal that comes now changes nothing.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)


def _tell(line: str, *, shared: bool) -> None:
    """The line of a failure; once, if it is shared by the ranks of a run."""
    from safepatch_core.ranks import is_first

    if is_first() or not shared:
        click.echo(f"safepatch: {line}", err=True)


def _failed(error: Exception) -> int:
    """Say what no command foresaw; the exit status."""
    if _lacks_memory(error):
        click.echo("safepatch: out of memory; a smaller --memory-limit or fewer --threads need less", err=True)
        return IOFailure.status
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"safepatch: {printable(f'{where}{error.strerror or error}')}", err=True)
        return IOFailure.status
    if os.environ.get("SAFEPATCH_DEBUG"):
        raise error
    text = printable(" ".join(str(error).split()))
    click.echo(f"safepatch: a bug: {type(error).__name__}: {text} (SAFEPATCH_DEBUG=1 shows where)", err=True)
    return SafepatchError.status


def _lacks_memory(error: Exception) -> bool:
    """Memory may also lack for a mapping, a thread or a library that is loaded late."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and "can't start new thread" in str(error))
        or (
            isinstance(error, ImportError)
            and ("failed to map segment" in str(error) or "cannot allocate" in str(error))
        )
    )
