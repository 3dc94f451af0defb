"""`safepatch selftest`: an engine against the reference."""

from __future__ import annotations

import sys

import click

from safepatch_core.commands.common import backend_option
from safepatch_core.errors import SafepatchError


@click.command(name="selftest")
@backend_option("The engine to test.")
@click.option("--device", metavar="DEV", help="GPU of the triton engine, like cuda:0.")
@click.option("--seconds", type=click.FloatRange(min=0), default=60, show_default=True, help="About how long.")
def command(backend: str, device: str | None, seconds: float) -> None:
    """Compare an engine with the reference on this machine, bit for bit."""
    from safepatch_core.backends.selftest import selftest as run

    if any(check.failure for check in run(backend, device, seconds, say=click.echo)):
        sys.exit(SafepatchError.status)
