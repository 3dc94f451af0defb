"""`safepatch bench`: the suite from the command line. Everything heavy is imported when it is needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from safepatch_core.errors import UsageError

if TYPE_CHECKING:
    from .registry import Bench, Case

F = TypeVar("F", bound=Callable[..., Any])

KINDS = ("checkpoint", "delta", "lora")
RED_STATUS = 70  # wrong bytes are a bug in safepatch


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Measure safepatch on this machine, beside what the machine could do and what others do.

    Figures are medians of runs that alternate. A case whose results are wrong shows none, and fails the run.
    """


# The evidence that the method helps is run from the repository: no wheel carries it.
if find_spec(f"{__package__}.psa") is not None:
    evidence = import_module(f"{__package__}.psa.command")
    command.add_command(evidence.command)
    command.add_command(evidence.quantised)


def bench_options(function: F) -> F:
    """Where and how cases run."""
    options = (
        click.option("--workdir", type=click.Path(), help="Where models are written and kept [default: temporary]."),
        click.option("--keep", is_flag=True, help="Keep the temporary working directory."),
        click.option("--disk", default="25GB", show_default=True, help="Disk space that may be used at once."),
        click.option("--threads", type=click.IntRange(min=1), help="Of merges and copies [default: all cores]."),
        click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Runs of each."),
        click.option("--backend", default="auto", show_default=True, help="The engine of merges."),
        click.option("--memory-limit", metavar="SIZE", help="Of merges, where the case doesn't set it."),
        click.option("--mergekit", metavar="PATH", help="The mergekit-yaml to compare with [default: on the PATH]."),
        click.option("--timeout", default=7200.0, show_default=True, help="Seconds that one process may take."),
        click.option("-o", "--output", type=click.Path(), help="Directory of results [default: a new one]."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@command.command("list")
@click.argument("patterns", nargs=-1)
def list_(patterns: tuple[str, ...]) -> None:
    """The cases, all or those that match PATTERNS."""
    from .registry import select

    for case in select(patterns or ("*",)):
        click.echo(f"{case.name:44} {case.description}")


@command.command()
@click.argument("patterns", nargs=-1, required=True)
@bench_options
def run(patterns: tuple[str, ...], **options: Any) -> None:
    """Run the cases that match PATTERNS: names, groups or globs like 'merge/1.1B/*/warm'."""
    from .registry import select

    _run(select(patterns), options)


@command.command()
@bench_options
def short(**options: Any) -> None:
    """A selection of every group that takes a few minutes."""
    from .registry import cases

    _run([case for case in cases().values() if case.short], options)


@command.command()
@click.option("--save", is_flag=True, help="Keep the rates, so that `safepatch plan` can predict times.")
@bench_options
def floor(save: bool, **options: Any) -> None:
    """This machine's rates: reading, writing, hashing, the engine."""
    from safepatch_core.merging.rates import save_rates

    from .rates import measure_rates

    with _bench(options) as bench:
        rates = measure_rates(bench, lambda text: click.echo(text, err=True))
    for name, value in rates.items():
        click.echo(f"{name:36} {value:.6g}")
    if save:
        click.echo(f"saved: {save_rates(rates)}", err=True)


@command.command()
@click.argument("shape", default="Llama-3-8B")
@click.option("--cores", "cores", multiple=True, type=click.IntRange(min=1), help="A machine's [default: 4 to 64].")
@click.option("--disk", "disks", multiple=True, metavar="SIZE", help="Per second [default: 3GB, 7GB, 14GB].")
@click.option("--streams", multiple=True, type=click.IntRange(min=1), help="Shards at once [default: 1, 4].")
@click.option("--rate", "changes", multiple=True, metavar="NAME=VALUE", help="Instead of what `floor --save` kept.")
@click.option("--warm", is_flag=True, help="Inputs are in the page cache.")
def simulate(
    shape: str,
    cores: tuple[int, ...],
    disks: tuple[str, ...],
    streams: tuple[int, ...],
    changes: tuple[str, ...],
    warm: bool,
) -> None:
    """How long a merge in a model's SHAPE would take on other machines, and which part of it bounds that.

    Rates are those of one thread here, as `safepatch bench floor --save` has measured them, or given one by one.
    """
    import tempfile

    from safepatch_core.merging.rates import MACHINE, load_rates

    from . import simulate as machines
    from .models import shape_named
    from .registry import Bench

    try:
        rates = machines.given(changes, load_rates())
    except ValueError as error:
        raise UsageError(str(error)) from None
    if missing := [name for name in MACHINE if name not in rates and not name.startswith(("disk", "cores"))]:
        raise UsageError(f"no rate {missing[0]}", expected="`safepatch bench floor --save`, or --rate for each")
    with tempfile.TemporaryDirectory(prefix="safepatch-bench-") as folder:
        description = machines.described(Bench(Path(folder), threads=1), shape_named(shape))
    speeds = [_size(disk) for disk in disks or machines.DISKS]
    found = machines.predictions(
        description, rates, cores or machines.CORES, speeds, streams or machines.STREAMS, 1.0 if warm else 0.0
    )
    click.echo("\n".join(machines.table(list(found))))


@command.command()
@click.option("--device", metavar="DEV", help="The GPU, like cuda:0 [default: the first].")
@click.option("--seconds", default=450.0, show_default=True, help="Time for all of it; what doesn't fit is skipped.")
@click.option("--workdir", type=click.Path(), help="Where models are written and kept [default: temporary].")
@click.option("--threads", type=click.IntRange(min=1), help="Of the CPU engine and of copies [default: all cores].")
@click.option("--mergekit", metavar="PATH", help="The mergekit-yaml to compare with [default: on the PATH].")
@click.option("-o", "--output", type=click.Path(), help="File of results [default: bench/results/CARD/gpu.json].")
def gpu(output: str | None, seconds: float, device: str | None, **options: Any) -> None:
    """A GPU from its memory to whole merges: the selftest first, then kernels, links, merges, a trace and peers."""
    from safepatch_core.backends.device import open_device

    opened = open_device(device)
    from .gpu import measure, slug
    from .measure import Red

    file = Path(output) if output else Path("bench/results") / slug(opened.name) / "gpu.json"
    fixed = {
        "rounds": 3,
        "disk": "25GB",
        "memory_limit": None,
        "timeout": seconds,
        "backend": "triton",
        "keep": False,
    }
    try:
        with _bench({**options, **fixed}) as bench:
            measure(opened, device, bench, seconds, file, click.echo)
    except Red as reason:
        click.echo(f"RED: {reason} ({file})", err=True)
        sys.exit(RED_STATUS)
    click.echo(f"results: {file}", err=True)


@command.command()
@click.argument("shape")
@click.argument("folder", type=click.Path())
@click.option(
    "--kind", "kinds", multiple=True, type=click.Choice(["checkpoint", "delta", "lora"]), help="Of patches."
)
@click.option("--sparse", metavar="SIZE", help="Write only so much of each tensor and leave holes for the rest.")
@click.option("--seed", default=0, show_default=True)
def models(shape: str, folder: str, kinds: tuple[Any, ...], sparse: str | None, seed: int) -> None:
    """Write a base, two patches and recipes in a model's SHAPE to FOLDER."""
    from .models import shape_named, write_set

    size = None if sparse is None else _size(sparse)
    if os.path.lexists(folder):
        raise UsageError("exists already", file=folder)
    write_set(Path(folder), shape_named(shape), kinds or ("checkpoint",), seed=seed, sparse=size)


@command.command()
@click.argument("before", type=click.Path())
@click.argument("after", type=click.Path())
def compare(before: str, after: str) -> None:
    """How the medians of two results, directories or files, differ."""
    from . import results

    click.echo("\n".join(results.compare(results.load(Path(before)), results.load(Path(after)))))


@command.command()
@click.argument("folder", type=click.Path())
def report(folder: str) -> None:
    """Draw the pictures and the page of a directory of results again."""
    from . import report as pictures
    from . import results

    for path in pictures.write(Path(folder), results.load(Path(folder))):
        click.echo(str(path))


def _size(text: str) -> int:
    from safepatch_core.sizes import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(str(error)) from None


class _bench:
    """A `Bench` from the options; its temporary directory is removed at the end."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._temporary: str | None = None

    def __enter__(self) -> Bench:
        import tempfile

        from .registry import Bench

        given = self._options
        if given["workdir"] is None:
            self._temporary = tempfile.mkdtemp(prefix="safepatch-bench-")
        workdir = Path(self._temporary or given["workdir"]).resolve()
        workdir.mkdir(parents=True, exist_ok=True)
        return Bench(
            workdir=workdir,
            threads=given["threads"] or len(os.sched_getaffinity(0)),
            rounds=given["rounds"],
            disk=_size(given["disk"]),
            memory_limit=given["memory_limit"],
            mergekit=given["mergekit"],
            timeout=given["timeout"],
            backend=given["backend"],
        )

    def __exit__(self, *error: object) -> None:
        from .measure import remove

        if self._temporary is not None:
            if self._options["keep"]:
                click.echo(f"kept: {self._temporary}", err=True)
            else:
                remove(Path(self._temporary))


def _output(given: str | None) -> Path:
    """The directory of results: in a checkout, a new one in bench/results."""
    from datetime import UTC, datetime

    if given is not None:
        return Path(given)
    home = Path("bench/results") if Path("bench/registry.py").exists() else Path("safepatch-bench")
    return home / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")


def _run(chosen: list[Case], options: dict[str, Any]) -> None:
    """Run cases, print the green ones, store them, and end with an error if any was red."""
    from . import report as pictures
    from . import results
    from .registry import run as run_case

    folder = _output(options["output"])
    red = []
    with _bench(options) as bench:
        used = {
            "threads": bench.threads,
            "backend": bench.backend,
            "memory_limit": bench.memory_limit,
            "command": results.command_line(),
        }
        for case in chosen:
            click.echo(f"{case.name}: {case.description}", err=True)
            outcome = run_case(case, bench)
            if outcome.measured is None:
                red += [case.name] if outcome.red else []
                click.echo(f"{'RED' if outcome.red else 'skipped'} {case.name}: {outcome.why}", err=True)
                continue
            record = results.make_record(case, outcome.measured, bench.rounds, used)
            results.append(folder, record)
            for name, text in outcome.measured.files.items():
                (folder / name).write_text(text)
            click.echo("\n".join(results.lines(record)))
    if (folder / results.FILE).exists():
        try:
            pictures.write(folder, results.load(folder))
        except UsageError as error:
            click.echo(str(error), err=True)
        click.echo(f"results: {folder}", err=True)
    if red:
        click.echo(f"{len(red)} case(s) with wrong results, no figures shown: {', '.join(red)}", err=True)
        sys.exit(RED_STATUS)
