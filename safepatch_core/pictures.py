"""Pictures for people: PNGs whose bytes repeat, and none of them where matplotlib is missing."""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

D = TypeVar("D")


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def picture(draw: Callable[[D, Any], bool], data: D) -> bytes | None:
    """The PNG that `draw` makes of `data` on a matplotlib figure; None if it says no, or without matplotlib."""
    if not can_draw():
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    if not draw(data, figure):
        return None
    buffer = io.BytesIO()
    # The name of the program is the only entry that tells one matplotlib from another.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
