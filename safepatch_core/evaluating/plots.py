"""The report's plots as inline SVG: text stays text, colours are CSS variables of the page, the bytes repeat."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from safepatch_core.errors import printable
from safepatch_core.evaluating.text import cell, labels
from safepatch_core.pictures import name_points

# Stand-ins that matplotlib takes for colours, and what the page shows in their place, in light and dark alike.
INK, MUTED, LINE, ACCENT = "#010203", "#010204", "#010205", "#010206"
SERIES = ("#010210", "#010211", "#010212", "#010213", "#010214", "#010215")
STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


class Plot(NamedTuple):
    """A figure of the page; `svg` is markup, the rest is text. `alt` says what there is to see."""

    title: str
    caption: str
    alt: str
    svg: str


def trade_off(report: Mapping[str, Any]) -> list[Plot]:
    """For each harmful set, harmful compliance against over-refusal, one point per model, utility as colour."""
    metrics = report["metrics"]
    harmful = [m for m in metrics if m["name"].split(".")[0] == "harmful_compliance"]
    harmless = [m for m in metrics if m["name"].split(".")[0] == "over_refusal"]
    utility = next((m for m in metrics if m["name"] == "perplexity" or m["name"].startswith("lm_eval.")), None)
    models = report["models"]
    return [
        _plane(f"plane-{n}", models, across, up, utility) for across in harmless[:1] for n, up in enumerate(harmful)
    ]


def _plane(
    identity: str,
    models: Mapping[str, Mapping[str, Any]],
    across: Mapping[str, Any],
    up: Mapping[str, Any],
    utility: Mapping[str, Any] | None,
) -> Plot:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    title = f"{up['title']} against {across['title'].lower()}"
    with _figure(identity, 6.6, 4.2) as (figure, save):
        axes = figure.subplots()
        colours, coloured = {}, utility is not None and len(models) > 1
        if utility is not None and coloured:
            colours = _colours(figure, axes, {label: utility[label]["value"] for label in models}, utility)
        points = {label: (across[label]["value"], up[label]["value"]) for label in models}
        for label, (x, y) in points.items():
            (left, right), (low, high) = across[label]["interval"], up[label]["interval"]
            axes.errorbar(
                x, y, xerr=[[x - left], [right - x]], yerr=[[y - low], [high - y]],
                ecolor=MUTED, elinewidth=1.2, capsize=3, fmt="none", zorder=2,
            )  # fmt: skip
            axes.plot(
                x,
                y,
                marker="D" if label == "baseline" else "o",
                markersize=9,
                color=colours.get(label, ACCENT),
                markeredgecolor=INK,
                markeredgewidth=1.0,
                linestyle="none",
                zorder=3,
            )
        for axis, metric in ((axes.xaxis, across), (axes.yaxis, up)):
            low, high = _range([metric[label]["interval"] for label in models])
            ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
            axis.set_ticks([tick for tick in ticks if max(0.0, low) <= tick <= min(1.0, high)])
            axis.set_view_interval(low, high, ignore=True)
            axis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel(f"{across['title']}, {across['n']} prompts")
        axes.set_ylabel(f"{up['title']}, {up['n']} prompts")
        name_points(axes, [(models[label]["name"], x, y) for label, (x, y) in points.items()])
        caption = "Lower left is better on both axes. Bars are 95% Wilson intervals"
        caption += "; the diamond is the baseline" if "baseline" in models else ""
        caption += f"; colour is {utility['title'].lower()}" if utility is not None and coloured else ""
        alt = "; ".join(
            f"{models[label]['name']}: {cell(up, label)} and {cell(across, label)}"
            + (f", {utility['title'].lower()} {cell(utility, label)}" if utility is not None else "")
            for label in models
        )
        return Plot(title, caption + ".", alt, save())


def _colours(figure: Any, axes: Any, values: Mapping[str, float], utility: Mapping[str, Any]) -> dict[str, Any]:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    low, high = min(values.values()), max(values.values())
    if high == low:
        low, high = low - 0.5, high + 0.5
    scale: Any = ScalarMappable(Normalize(low, high), colormaps["viridis"].resampled(16))
    bar = figure.colorbar(scale, ax=axes, pad=0.03, fraction=0.05)
    bar.set_label(f"{utility['title']} ({utility['better']} is better)")
    bar.outline.set_visible(False)
    bar.solids.set_edgecolor("face")
    return {label: scale.to_rgba(value) for label, value in values.items()}


def _range(intervals: Sequence[Sequence[float]]) -> tuple[float, float]:
    """What the intervals need of the axis from 0 to 1, with room around them."""
    low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
    room = max(0.04, 0.08 * (high - low))
    return max(-0.03, low - room), min(1.03, high + room)


def layer_shares(report: Mapping[str, Any]) -> list[Plot]:
    """For each merged model, the share of every layer's entries that a patch selected and that were applied.

    Below, where it is known, the share of what patches acted on that survived rounding.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    found = []
    for n, (label, patches) in enumerate(report["patches"].items()):
        title = f"Entries patched per layer, {report['models'][label]['name']}"
        survival = report["survival"].get(label)
        layers = [of["layer"] for patch in patches for of in patch["layers"]]
        last = max((layer for layer in layers if layer is not None), default=0)
        heights = [2, 1] if survival else [1]
        with _figure(f"layers-{n}", 6.6, 4.8 if survival else 3.4) as (figure, save):
            panels = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
            alt = []
            for colour, patch in zip(SERIES, patches, strict=False):
                for key, style, filled in (("selected", "-", colour), ("applied", "--", "none")):
                    line = {"color": colour, "linestyle": style, "markerfacecolor": filled}
                    name = f"{patch['name']}, {key}"
                    alt.append(_curve(panels[0], name, patch["layers"], (key, "entries"), last + 2, line))
            panels[0].set_ylabel("share of entries")
            panels[0].set_ylim(0, 1.05 * (panels[0].dataLim.y1 or 1.0))
            if survival:
                alt.append(
                    _curve(panels[1], "surviving", survival["layers"], ("changed", "acted"), last + 2, {"color": INK})
                )
                panels[1].set_ylabel("surviving")
                panels[1].set_ylim(0, 1.05)
            for axes in panels:
                axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            ticks = {at: f"{at:.0f}" for at in MaxNLocator(9, integer=True).tick_values(0, last) if 0 <= at <= last}
            ticks |= {last + 2: "other"} if None in layers else {}
            panels[-1].set_xticks(*zip(*ticks.items(), strict=True))
            panels[-1].set_xlabel("layer")
            figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
            caption = "Selected: in the patch's set. Applied: kept by retention and added to the weights."
            caption += " Surviving: of the entries acted on, those whose stored bits changed." if survival else ""
            caption += " Other: the tensors outside the layers." if None in layers else ""
            found.append(Plot(title, caption, "; ".join(alt), save()))
    return found


def relearning(report: Mapping[str, Any]) -> list[Plot]:
    """For each harmful set, compliance of every model by steps of fine-tuning on harmful rows."""
    from matplotlib.ticker import PercentFormatter

    found = []
    for n, of in enumerate(report["relearning"]):
        metric = next(m for m in of["metrics"] if m["name"].startswith("harmful_compliance"))
        rows, models = metric["steps"], report["models"]
        at = range(len(rows))  # 0, 1, 2, 4, ... evenly
        with _figure(f"relearning-{n}", 6.6, 3.6) as (figure, save):
            axes = figure.subplots()
            colours = {label: SERIES[i % len(SERIES)] for i, label in enumerate(labels(report))}
            for label, model in models.items():
                colour = colours.get(label, INK)
                low, high = zip(*(row[label]["interval"] for row in rows), strict=True)
                axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
                name = printable(model["name"]).replace("$", r"\$")
                axes.plot(at, [row[label]["value"] for row in rows], marker="o", color=colour, label=name)
            if "baseline" in models:
                axes.axhline(rows[0]["baseline"]["value"], color=MUTED, linestyle="--", linewidth=1.2)
            axes.set_xticks(list(at), [str(row["step"]) for row in rows])
            axes.set_xlabel("steps of fine-tuning on harmful rows")
            axes.set_ylabel(f"{metric['title']}, {metric['n']} prompts")
            axes.set_ylim(-0.03, 1.03)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
            caption = "Bands are 95% Wilson intervals" + (
                "; the dashed line is the baseline as it was." if "baseline" in models else "."
            )
            alt = "; ".join(
                f"{model['name']}: " + ", ".join(f"{row[label]['value']:.1%} at {row['step']}" for row in rows)
                for label, model in models.items()
            )
            found.append(Plot(f"{metric['title']} by steps of relearning", caption, alt, save()))
    return found


def _curve(
    axes: Any,
    name: str,
    layers: Sequence[Mapping[str, Any]],
    key: tuple[str, str],
    beside: int,
    line: Mapping[str, Any],
) -> str:
    """Draws one count as a share of another, layer by layer, what is outside them at `beside`; returns its range."""
    part, whole = key
    shares = {of["layer"]: of[part] / of[whole] for of in layers if of[whole]}
    line = {"marker": "o", "markersize": 4.5, **line}
    inside = [layer for layer in shares if layer is not None]
    axes.plot(inside, [shares[layer] for layer in inside], label=printable(name).replace("$", r"\$"), **line)
    if None in shares:
        axes.plot([beside], [shares[None]], **line)
    return f"{name}: {min(shares.values(), default=0):.2%} to {max(shares.values(), default=0):.2%}"


@contextmanager
def _figure(identity: str, width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """A figure of that size in inches, and the function that turns it into markup."""
    import matplotlib
    from matplotlib.figure import Figure

    def save() -> str:
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
        return _for_page(file.getvalue(), identity)

    settings: Any = {**STYLE, "svg.hashsalt": identity}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
        matplotlib.rcParams.update(settings)
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, save


def _for_page(text: str, identity: str) -> str:
    """A whole SVG file as an element of the page: its colours, its font, and ids of its own."""
    svg = text[text.index("<svg") :].strip()
    svg = re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2)
    svg = re.sub(r' id="', f' id="{identity}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{identity}-", svg)
    svg = re.sub(r"<(metadata|style).*?</\1>\s*", "", svg, flags=re.DOTALL)
    variables = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent"}
    variables |= {colour: f"series-{n}" for n, colour in enumerate(SERIES, 1)}
    for colour, name in variables.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = svg.replace("'DejaVu Sans'", "inherit")
    return svg.replace("<svg", '<svg aria-hidden="true"', 1)
