"""The command line. Commands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

import click

from safepatch_core.errors import IOFailure, SafepatchError, Stopped, UsageError, lacks_memory, printable
from safepatch_core.version import __version__

# In the order of `safepatch --help`: where a command is, and what it says there.
COMMANDS = {
    "derive": ("safepatch_core.commands.derive", "Train the two patches of a model and rank their entries."),
    "merge": ("safepatch_core.commands.merge", "Merge a recipe's patches into its base: a new checkpoint."),
    "plan": ("safepatch_core.commands.plan", "What a merge will do: bytes, passes, memory. Writes nothing."),
    "verify": ("safepatch_core.commands.verify", "Check a checkpoint or a fix: checksums, with a recipe every byte."),
    "survive": ("safepatch_core.commands.survive", "What a later quantisation would leave of a merge."),
    "build": ("safepatch_core.commands.build", "Write what a merge changes, and nothing else, to a fix file."),
    "apply": ("safepatch_core.commands.apply", "Apply a fix to a checkpoint: as a copy, or in place."),
    "revert": ("safepatch_core.commands.revert", "Take a fix out of a checkpoint again, to the bit."),
    "info": ("safepatch_core.commands.info", "What a fix changes, per layer and tensor."),
    "report": ("safepatch_core.commands.report", "Fixes and merges side by side, as numbers and as a page."),
    "export": ("safepatch_core.commands.export", "A fix as a checkpoint, PEFT's adapter or a server's deltas."),
    "log": ("safepatch_core.commands.log", "Which fixes a checkpoint carries; finish what was interrupted."),
    "import": ("safepatch_core.commands.import_", "A mergekit configuration as a recipe."),
    "eval": ("safepatch_core.commands.evaluate", "Measure harmful rate, over-refusal and utility of a model."),
    "run": ("safepatch_core.commands.run", "Derive, merge and evaluate, from one YAML file."),
    "sweep": ("safepatch_core.commands.sweep", "Search the recipe that scores best, from one YAML file."),
    "selftest": ("safepatch_core.commands.selftest", "Compare an engine with the reference here, bit for bit."),
    "schema": ("safepatch_core.commands.schema", "The JSON Schema of recipes, for editors."),
    "config": ("safepatch_core.commands.config", "Flags for compiling and linking with the C library."),
    "bench": ("safepatch_core.bench.command", "Measure the engine here, beside its limits and its peers."),
}


class Commands(click.Group):
    """A group whose commands live in files of their own and are imported when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            close = get_close_matches(args[0], COMMANDS)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise click.UsageError(f"No such command '{args[0]}'.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="safepatch")
def cli() -> None:
    """Make a language model safer after alignment: two patches, merged bit for bit, without loading the model.

    Exit status: 0 done, 64 usage or recipe, 65 input, 73 output, 74 I/O while running, 75 busy or stopped.
    """


def _stop(number: int, frame: object) -> NoReturn:
    """The first signal unwinds; a second one ends the process where it stands, which a kill may do at any time."""
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, lambda number, frame: os._exit(Stopped.status))
    raise Stopped(f"stopped by {signal.Signals(number).name}; --resume goes on")


def main() -> NoReturn:
    """Entry point: every failure is one line on stderr and an exit status (SPEC section 5)."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    _open_closed_streams()
    try:
        # Not cli.main, which ends with status 1 where the reader of stdout has gone.
        with cli.make_context("safepatch", sys.argv[1:]) as context:
            cli.invoke(context)
        sys.stdout.flush()
        status = 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        status = UsageError.status
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
    _leave(status)


def _leave(status: int) -> NoReturn:
    """End the process with the status; what it printed is out."""
    from safepatch_core.ranks import launched

    if launched() > 1:
        # Gloo's threads outlast their group (10 were counted before and after destroy_process_group, torch 2.13), and
        # one that ends while the interpreter does has aborted a rank whose work was done.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def _open_closed_streams() -> None:
    """A stream that the caller closed is one to nowhere, and no file that is opened later gets its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # The lowest number that is free, which is the stream's own.
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), mode, closefd=False))


def _tell(line: str, *, shared: bool) -> None:
    """The line of a failure; once, if it is shared by the ranks of a run."""
    from safepatch_core.ranks import is_first

    if is_first() or not shared:
        click.echo(f"safepatch: {line}", err=True)


def _failed(error: Exception) -> int:
    """Say what no command foresaw; the exit status."""
    if lacks_memory(error):
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
