"""Progress of one phase: a bar on a terminal, plain lines elsewhere, events for a program."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

Listener = Callable[[dict[str, Any]], None]
LINE_SECONDS = 10.0  # plain lines come at most this often


def warn(text: str, quiet: bool, report: Listener | None) -> None:
    """One line on stderr, one event {"warning": text}."""
    if not quiet:
        print(f"warning: {text}", file=sys.stderr)
    if report is not None:
        report({"warning": text})


class Progress:
    """Counts `total` steps of the phase `name`; all of it goes to stderr, nothing of it with `quiet`.

    `report` gets one dict per step: phase, done, total, tokens_per_second and what `advance` was told.
    """

    def __init__(self, name: str, total: int, *, quiet: bool, report: Listener | None) -> None:
        self._name, self._total, self._report = name, total, report
        self._done = self._tokens = 0
        self._start = time.monotonic()
        self._last_line = self._start - LINE_SECONDS
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=name, unit="step", leave=False, disable=quiet or not terminal)
        self._lines = not quiet and not terminal

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def skip(self, steps: int) -> None:
        """So many steps were done by an earlier run."""
        self._done += steps
        self._bar.update(steps)

    def advance(self, *, tokens: int, **facts: float) -> None:
        """One step is done; `tokens` went through the model in it."""
        self._done += 1
        self._tokens += tokens
        now = time.monotonic()
        speed = self._tokens / max(now - self._start, 1e-9)
        shown = {key: value for key, value in facts.items() if key == "nll"}
        self._bar.set_postfix({**{k: f"{v:.3f}" for k, v in shown.items()}, "tok/s": f"{speed:.0f}"}, refresh=False)
        self._bar.update()
        if self._lines and (now - self._last_line >= LINE_SECONDS or self._done == self._total):
            self._last_line = now
            extra = "".join(f", {key} {value:.3f}" for key, value in shown.items())
            print(f"{self._name}: {self._done}/{self._total}{extra}, {speed:.0f} tokens/s", file=sys.stderr)
        if self._report is not None:
            event = {"phase": self._name, "done": self._done, "total": self._total, "tokens_per_second": speed}
            self._report(event | facts)
