"""The pictures of the pages: boxes and arrows, and results, as SVG files that follow the reader's light or dark mode.

python -m docs.scripts.pictures
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

OUT = Path(__file__).parents[1] / "pictures"
QUANTISED = Path(__file__).parents[2] / "bench" / "results" / "quantised" / "behaviour.jsonl"
LINE, PAD = 16, 10  # pixels from line to line, and around text
STYLE = """
text { fill: #1d2126; font: 13px system-ui, sans-serif; }
.b { font-weight: 600; } .m { fill: #5b636d; font-size: 12px; }
.box { fill: #f3f2ee; stroke: #c9c6bd; }
.safety { fill: #cfe4ec; stroke: #1f6f8b; } .over { fill: #f6dcc8; stroke: #b4541a; }
.arrow { stroke: #5b636d; fill: none; } .base { stroke: #c9c6bd; } .head { fill: #5b636d; } .page { fill: #ffffff; }
@media (prefers-color-scheme: dark) {
text { fill: #e8e6e1; } .m { fill: #a3abb5; } .box { fill: #23282d; stroke: #4a525b; }
.safety { fill: #1d3b47; stroke: #6fbcd6; } .over { fill: #47301d; stroke: #eba06c; }
.arrow { stroke: #a3abb5; } .base { stroke: #4a525b; } .head { fill: #a3abb5; } .page { fill: #14171a; } }
"""


class Box(NamedTuple):
    """Left, top, width, and lines of text, of which the first is bold."""

    x: int
    y: int
    width: int
    lines: Sequence[str]
    kind: str = "box"

    @property
    def height(self) -> int:
        return LINE * len(self.lines) + 2 * PAD - 4

    @property
    def top(self) -> tuple[int, int]:
        return self.x + self.width // 2, self.y

    @property
    def bottom(self) -> tuple[int, int]:
        return self.x + self.width // 2, self.y + self.height

    def svg(self) -> str:
        size = f'width="{self.width}" height="{self.height}"'
        shape = f'<rect class="{self.kind}" x="{self.x}" y="{self.y}" {size} rx="6"/>'
        texts = (
            f'<text x="{self.x + PAD}" y="{self.y + PAD + 9 + LINE * i}"{KIND[i > 0]}>{escape(line)}</text>'
            for i, line in enumerate(self.lines)
        )
        return "\n".join([shape, *texts])


KIND = {False: ' class="b"', True: ' class="m"'}
Point = tuple[int, int]


def arrow(start: Point, end: Point) -> str:
    """A line downwards with a head."""
    (x, y), (u, v) = start, end
    head = f'<polygon class="head" points="{u},{v} {u - 4},{v - 7} {u + 4},{v - 7}"/>'
    return f'<path class="arrow" d="M{x} {y}L{u} {v}"/>{head}'


def picture(title: str, width: int, height: int, *parts: str) -> str:
    size = f'width="{width}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {size} role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" {size} rx="8"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def method() -> str:
    """What it is."""
    data = Box(8, 8, 176, ["harmful data", "questions, answers"])
    model = Box(208, 8, 176, ["aligned model", "any size"])
    safety = Box(8, 96, 176, ["safety patch", "gradient ascent:", "unlearns the answers"], "safety")
    over = Box(208, 96, 176, ["over-safety patch", "gradient descent:", "loosens refusals"], "over")
    thin = Box(
        60,
        206,
        272,
        ["thin, rank, compare", "kept at random, then what matters most,", "where it doesn't matter to the other"],
    )
    merged = Box(
        60,
        312,
        272,
        ["a merged model, or a fix file", "a few percent of its weights changed,", "all others the same to the bit"],
    )
    links = [
        *(arrow(start.bottom, end.top) for start in (data, model) for end in (safety, over)),
        arrow(safety.bottom, (130, thin.y)), arrow(over.bottom, (262, thin.y)), arrow(thin.bottom, merged.top),
    ]  # fmt: skip
    title = "Two patches, trained on the same harmful data, are thinned, ranked and added to the model"
    return picture(title, 392, 386, *links, *(box.svg() for box in (data, model, safety, over, thin, merged)))


def ring() -> str:
    """From the recipe to the ring."""
    return _column(
        "A merge: plan, then reader, engine and writer at once, then publishing",
        ["plan", "target, k = 26542 and 17695, random keys, units"],
        ["reader", "pread into a region of the ring"],
        ["engine", "patches the base's bytes in place"],
        ["writer", "hash, pwrite, give the region back"],
        ["stage, journal", "synced, renamed one by one"],
        ["publish", "one rename of the directory"],
    )


def selection() -> str:
    """On the CPU."""
    return _column(
        "guess, scan, narrow, place_cuts, patch_up",
        ["guess", "256 runs of 64 entries are scored: a floor that", "the k-th key is above, with room to spare"],
        [
            "scan",
            "one pass: delta, score, faults; retained keys above the",
            "floor go to a list. Too few or too many: again, with",
            "eligible bits marked and histograms over the inputs",
        ],
        [
            "narrow",
            "histograms of 4096 bins over the list, each in a bin",
            "of the last, until the bin is one key: the threshold",
        ],
        ["place_cuts", "equal keys are counted per chunk;", "the last one that may be taken gives `before`"],
        ["patch_up", "the lists alone say where patches act;", "all other entries keep their bits"],
    )


def _column(title: str, *texts: Sequence[str]) -> str:
    boxes: list[Box] = []
    for lines in texts:
        boxes.append(Box(8, boxes[-1].bottom[1] + 26 if boxes else 8, 376, lines))
    links = (arrow(above.bottom, below.top) for above, below in pairwise(boxes))
    return picture(title, 392, boxes[-1].bottom[1] + 8, *links, *(box.svg() for box in boxes))


def ways() -> str:
    """Two ways to a quantised model with a patch."""
    left = [
        Box(8, 8, 180, ["you quantise it", "the float original is there"]),
        Box(8, 88, 180, ["merge the floats", "as any other model"], "safety"),
        Box(8, 168, 180, ["quantise as before", "survive says what is left"]),
    ]
    right = [
        Box(204, 8, 180, ["it comes as codes", "or only a few may change"]),
        Box(204, 88, 180, ["derive on the twin", "or deltas from the original"]),
        Box(204, 168, 180, ["merge into its codes", "guard: 0.8 to 1.25 survive"], "safety"),
    ]
    last = Box(60, 258, 272, ["measure", "beside the same model without it,", "above all where it has 4 bits"])
    links = [*(arrow(a.bottom, b.top) for lane in (left, right) for a, b in pairwise(lane))]
    links += [arrow(left[-1].bottom, (130, last.y)), arrow(right[-1].bottom, (262, last.y))]
    title = "Merge floats and quantise, or merge into the codes; then measure"
    return picture(title, 392, last.bottom[1] + 8, *links, *(box.svg() for box in (*left, *right, last)))


PANELS = {"harmful_compliance": "harmful", "over_refusal": "over-refusal"}
LEFT, WIDE, GAP, HIGH = 170, 88, 26, 20  # pixels before the first panel, of one, between them, and of a row
FORMATS = {
    "float": "float",
    "fp8-block": "FP8, blocks of 128×128",
    "int8-channel": "int8, per row",
    "int4-g32": "int4, groups of 32",
}


def behaviour(results: Sequence[Mapping[str, Any]]) -> str:
    """What patches do in quantised models: rates with 95% intervals, a line where the unpatched model's is."""
    parts, y = [], 8
    for i, title in enumerate(PANELS.values()):
        parts.append(f'<text class="b" x="{_across(i, 0)}" y="{y + 12}">{title}</text>')
    for format, lines in groupby(results, lambda line: line["format"]):
        rows = {way: list(of) for way, of in groupby(lines, lambda line: line["way"])}
        y += 30
        parts.append(f'<text class="b" x="8" y="{y + 4}">{FORMATS[format]}</text>')
        for i, name in enumerate(PANELS):
            x = _across(i, rows["unpatched"][0]["metrics"][name]["value"])
            parts.append(f'<path class="base" d="M{x} {y + 8}V{y + 12 + HIGH * len(rows)}"/>')
        for way, of in rows.items():
            y += HIGH
            parts += [f'<text class="m" x="14" y="{y + 4}">{escape(way)}</text>', *_dots(of, y, way == "unpatched")]
    y += 20
    parts += [
        f'<text class="m" x="{_across(i, at)}" y="{y + 12}" text-anchor="middle">{at:.0%}</text>'
        for i in range(len(PANELS))
        for at in (0, 0.5, 1)
    ]
    return picture("Harmful compliance and over-refusal of quantised models", 392, y + 20, *parts)


def _dots(lines: Sequence[Mapping[str, Any]], y: int, unpatched: bool) -> Iterator[str]:
    """A row: for each draw a dot with its interval."""
    for i, name in enumerate(PANELS):
        for line in lines:
            of = line["metrics"][name]
            low, x, high = (_across(i, value) for value in (of["interval"][0], of["value"], of["interval"][1]))
            yield f'<path class="arrow" d="M{low} {y}H{high}"/>'
            yield f'<circle class="{"box" if unpatched else "safety"}" cx="{x}" cy="{y}" r="4"/>'


def _across(panel: int, share: float) -> float:
    return round(LEFT + panel * (WIDE + GAP) + WIDE * share, 1)


def pictures() -> dict[str, str]:
    """Name of a file in docs/pictures → its content."""
    results = [json.loads(line) for line in QUANTISED.read_text().splitlines()]
    return {
        **{"method.svg": method(), "ring.svg": ring(), "selection.svg": selection()},
        **{"quantised.svg": ways(), "quantised-behaviour.svg": behaviour(results)},
    }


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for name, content in pictures().items():
        (OUT / name).write_text(content)
