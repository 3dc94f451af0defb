"""Pictures for people: PNGs whose bytes repeat, none of them where matplotlib is missing; names beside points."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

from safepatch_core.errors import printable

D = TypeVar("D")
NAME = 32  # characters of a name beside its point
GAP = 15.0  # points between two names


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


def name_points(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Each point's name beside it, towards the middle; names that would touch are moved apart. To be called last."""
    axes.figure.canvas.draw()  # places the axes
    left, right = axes.get_xlim()
    sides: dict[bool, list[tuple[float, float, str]]] = {True: [], False: []}
    for name, x, y in points:
        sides[x > (left + right) / 2].append((y, x, name))
    to_pixels, scale = axes.transData, 72 / axes.figure.dpi
    for is_right, found in sides.items():
        at = -1e9
        for y, x, name in sorted(found):
            place = to_pixels.transform((x, y))[1] * scale
            at = max(place + 5, at + GAP)
            text = printable(name) if len(name) <= NAME else f"…{printable(name[-NAME:])}"
            axes.annotate(
                text.replace("$", r"\$"),
                (x, y),
                xytext=(-9 if is_right else 9, at - place),
                textcoords="offset points",
                ha="right" if is_right else "left",
                va="baseline",
                zorder=4,
            )
