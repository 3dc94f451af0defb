"""Pictures of results, and one HTML page that holds everything."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safepatch_core.errors import UsageError
from safepatch_core.pages import document

from .measure import Spread, ratio
from .results import HEADLINES, Record, by_group, shown

Points = dict[str, dict[float, Spread]]  # name → size → value


ENGINE_MARKS = "osD^vP*"
MARKS = {"marker": "o", "markersize": 4, "capsize": 2}


def _median(values: Sequence[float], scale: float = 1.0) -> Spread:
    of = Spread.of(values)
    return Spread(of.median / scale, of.low / scale, of.high / scale)


def _lines(axes: Any, points: Points) -> None:
    """One line per name over the sizes, with bars from the lowest to the highest value."""
    for name, of in sorted(points.items()):
        x = sorted(of)
        axes.errorbar(x, [of[size].median for size in x], _bars(*(of[size] for size in x)), **MARKS, label=name)
    axes.set_xscale("log")
    sizes = sorted({size for of in points.values() for size in of})
    axes.set_xticks(sizes, [f"{size:.2g}" for size in sizes], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("parameters (billions)")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=7)


def _bars(*values: Spread) -> list[list[float]]:
    """Lengths of the bars below and above each median."""
    return [[v.median - v.low for v in values], [v.high - v.median for v in values]]


def _size(record: Record) -> float:
    return float(record["params"]["entries"]) / 1e9


def _gather(records: Sequence[Record], quantity: str, scale: float, label: Callable[[Record, str], str]) -> Points:
    points: Points = {}
    for record in records:
        for subject, quantities in record["series"].items():
            if quantity in quantities:
                points.setdefault(label(record, subject), {})[_size(record)] = _median(quantities[quantity], scale)
    return points


def throughput(records: Sequence[Record], figure: Any) -> bool:
    """Bytes read and written per second, over size."""
    points = _gather(
        by_group(records, "merge"),
        "moved_bytes_per_s",
        1e9,
        lambda record, subject: f"{subject} {record['params']['cache']}",
    )
    if points:
        axes = figure.add_subplot()
        _lines(axes, points)
        axes.set_ylabel("GB/s, read and written")
        axes.set_ylim(bottom=0)
        axes.set_title("Throughput over size")
    return bool(points)


def memory(records: Sequence[Record], figure: Any) -> bool:
    """Peak resident memory over size: under each limit, and the peers'."""
    points = _gather(
        by_group(records, "memory"),
        "peak_bytes",
        2**20,
        lambda record, _: f"safepatch, limit {record['params']['limit_bytes'] >> 20} MiB",
    )
    points |= _gather(by_group(records, "peers"), "peak_bytes", 2**20, lambda _, subject: subject)
    if points:
        axes = figure.add_subplot()
        _lines(axes, points)
        axes.set_yscale("log")
        axes.set_ylabel("peak memory of the process (MiB)")
        axes.set_title("Memory over size")
    return bool(points)


def stages(records: Sequence[Record], figure: Any) -> bool:
    """What each lane of a profiled merge did, stacked."""
    chosen = by_group(records, "profile")
    if not chosen:
        return False
    axes = figure.add_subplot()
    bars: list[tuple[str, dict[str, float]]] = []
    for record in chosen:
        lanes: dict[str, dict[str, float]] = {}
        for quantity, values in record["series"]["merge"].items():
            lane, slash, stage = quantity.removesuffix("_s").partition("/")
            if slash:
                lanes.setdefault(lane, {})[stage] = Spread.of(values).median
        bars += [(f"{record['case'].removeprefix('profile/')} {lane}", parts) for lane, parts in lanes.items()]
    names = sorted(dict.fromkeys(stage for _, parts in bars for stage in parts), key=lambda name: name == "waiting")
    left = [0.0] * len(bars)
    for name in names:
        widths = [parts.get(name, 0.0) for _, parts in bars]
        colour = {"color": "0.88"} if name == "waiting" else {}
        axes.barh([label for label, _ in bars], widths, left=left, label=name, **colour)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("seconds")
    axes.legend(fontsize=7)
    axes.set_title("Time by lane and stage")
    return True


def roofline(records: Sequence[Record], figure: Any) -> bool:
    """Entries per second of each pass over the bytes it must move, under what a memory copy allows."""
    chosen = by_group(records, "kernels")
    if not chosen:
        return False
    axes = figure.add_subplot()
    # A copy reads and writes every byte.
    roof = 2 * Spread.of([v for r in chosen for v in r["series"]["memcpy"]["bytes_per_s"]]).median
    widths = [2.0, 16.0]
    axes.plot(widths, [roof / w / 1e9 for w in widths], "k--", linewidth=1, label="memory copy, one thread")
    passes = list(dict.fromkeys(r["params"]["pass"] for r in chosen))
    engines = list(dict.fromkeys(r["params"]["engine"] for r in chosen))
    shown_labels = set()
    for record in chosen:
        pass_, engine = record["params"]["pass"], record["params"]["engine"]
        best = max(Spread.of(of["entries_per_s"]).median for of in record["series"].values() if "entries_per_s" in of)
        label = f"{engine} {pass_}"
        axes.plot(
            record["facts"]["bytes_per_entry"],
            best / 1e9,
            ENGINE_MARKS[engines.index(engine) % len(ENGINE_MARKS)],
            color=f"C{passes.index(pass_)}",
            markersize=6,
            label=None if label in shown_labels else label,
        )
        shown_labels.add(label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("bytes moved per entry")
    axes.set_ylabel("G entries/s, the best number of threads")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title("Roofline of the passes")
    return True


def peers(records: Sequence[Record], figure: Any) -> bool:
    """How many times longer the others took on the same files."""
    chosen = by_group(records, "peers")
    if not chosen:
        return False
    axes = figure.add_subplot()
    for record in chosen:
        (peer, ours), *_ = record["ratios"]
        of = ratio(record["series"][peer]["wall_s"], record["series"][ours]["wall_s"])
        label = record["case"].removeprefix("peers/")
        axes.barh(label, of.median, xerr=_bars(of), color="tab:blue")
    axes.axvline(1, color="k", linewidth=1)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("time ÷ safepatch's, same files, alternating runs")
    axes.set_title("Peers")
    return True


PLOTS: dict[str, Callable[[Sequence[Record], Any], bool]] = {
    "throughput": throughput,
    "memory": memory,
    "stages": stages,
    "roofline": roofline,
    "peers": peers,
}


def plots(records: Sequence[Record]) -> dict[str, bytes]:
    """PNG pictures by name, of what the records have data for. Raises UsageError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("plots need matplotlib", expected="pip install 'safepatch[bench]'") from None
    found = {}
    for name, draw in PLOTS.items():
        figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        if draw(records, figure):
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", metadata={"Software": ""})
            found[name] = buffer.getvalue()
    return found


def page(records: Sequence[Record], pictures: dict[str, bytes]) -> str:
    """One self-contained HTML page: machine, pictures, and a table per case."""
    settings = {
        json.dumps([r["machine"], r["versions"], r["commit"], r["options"].get("command")], sort_keys=True): r
        for r in records
    }
    machines = ""
    for record in settings.values():
        facts = {**record["machine"], **record["versions"], "commit": record["commit"], **record["options"]}
        row = ", ".join(f"{html.escape(str(k))} {html.escape(str(v))}" for k, v in facts.items() if v is not None)
        machines += f'<p class="note">{row}</p>'
    parts = []
    for name, png in pictures.items():
        data = base64.b64encode(png).decode("ascii")
        parts.append(f'<figure class="scroll"><img alt="{name}" src="data:image/png;base64,{data}"></figure>')
    parts += map(_table, records)
    title = "safepatch benchmark"
    return document(title, f"<header><h1>{title}</h1>{machines}</header><main>{''.join(parts)}</main>\n")


def _table(record: Record) -> str:
    quantities = [q for q in HEADLINES if any(q in of for of in record["series"].values())]
    head = "".join(f"<th>{q}</th>" for q in quantities)
    rows = []
    for name, of in record["series"].items():
        cells = ""
        for quantity in quantities:
            if quantity in of:
                spread = Spread.of(of[quantity])
                text = f"{shown(quantity, spread.median)} <small>[{shown(quantity, spread.low)} – "
                cells += f"<td>{text}{shown(quantity, spread.high)}]</small></td>"
            else:
                cells += "<td></td>"
        rows.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    ratios = []
    for a, b in record["ratios"]:
        spread = ratio(record["series"][a]["wall_s"], record["series"][b]["wall_s"])
        pair = f"{html.escape(a)} ÷ {html.escape(b)}"
        ratios.append(f"{pair}: <b>{spread.median:.2f}</b> [{spread.low:.2f} – {spread.high:.2f}]")
    head = f"<thead><tr><th>median [lowest – highest] of {record['rounds']}</th>{head}</tr></thead>"
    table = f'<table class="compact">{head}<tbody>{"".join(rows)}</tbody></table>'
    return f'<h3>{html.escape(record["case"])}</h3><div class="scroll">{table}</div><p>{"; ".join(ratios)}</p>\n'


def write(folder: Path, records: Sequence[Record]) -> list[Path]:
    """The pictures and the page of a results directory; the files written."""
    pictures = plots(records)
    paths = []
    for name, png in pictures.items():
        paths.append(folder / f"{name}.png")
        paths[-1].write_bytes(png)
    paths.append(folder / "report.html")
    paths[-1].write_text(page(records, pictures), encoding="utf-8")
    return paths
