"""The page of `safepatch report`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from safepatch_core.fixes.comparing import ABSENT, Compared, Overlap, ReportResult, differ
from safepatch_core.fixes.info import Share, by_number, kind_of, layer_of
from safepatch_core.pages import document, shown
from safepatch_core.version import __version__

TITLE = {False: "What it changes", True: "What each changes, side by side"}
COUNTED = {
    "changed": "entries whose stored bits differ from the base's",
    "acted on": "entries that a patch acts on, as the manifest counts them: rounding may have left some as they were",
}


def page(result: ReportResult) -> str:
    """One HTML file that asks for nothing else."""
    names = ", ".join(item.name for item in result.items)
    sections = (_totals, _overlaps, _heat, _shares, _recipes, _sums)
    body = [
        f"<header>\n<h1>{TITLE[len(result.items) > 1]}</h1>\n{_cards(result)}\n</header>",
        "<main>",
        *(section(result) for section in sections),
        "</main>",
        f'<footer class="note">safepatch {__version__}. <code>--json</code> gives the numbers.</footer>',
    ]
    return document(f"Report on {names}", "\n".join(filter(None, body)) + "\n")


def _cards(result: ReportResult) -> str:
    cards = (
        f"<li><b>{_text(item.name)}</b>{item.kind}{f' {item.id[:8]}' if item.id else ''}, {item.size:,d} bytes</li>"
        for item in result.items
    )
    return f'<ul class="models">{"".join(cards)}</ul>'


def _text(value: object) -> str:
    return escape(shown(str(value)))


def _section(title: str, *parts: str) -> str:
    return "\n".join([f"<section>\n<h2>{title}</h2>", *parts, "</section>"])


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "figures") -> str:
    """Markup of cells in; the first of each row is its head."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = [
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table, scrolls sideways: {_text(title)}">',
        f'<table class="{kind}">\n<thead><tr>{top}</tr></thead>\n<tbody>',
        *(f'<tr><th scope="row">{first}</th>{"".join(rest)}</tr>' for first, *rest in rows),
        "</tbody>\n</table>\n</div>",
    ]
    return "\n".join(lines)


def _cell(value: object, note: str = "", style: str = "") -> str:
    small = f" <small>{_text(note)}</small>" if note else ""
    return f"<td{f' class={style}' if style else ''}>{_text(value)}{small}</td>"


def _bar(share: Share, most: float) -> str:
    width = 100 * share.share / most if most else 0
    return (
        f"<td><b>{share.share:.3%}</b> <small>{share.changes:,d}</small>"
        f'<span class="bar" aria-hidden="true"><i style="width:{width:.1f}%"></i></span></td>'
    )


def _totals(result: ReportResult) -> str:
    totals = [result.total(item) for item in result.items]
    most = max(of.share for of in totals)
    rows: list[list[str]] = [
        ["entries that change", *(_bar(of, most) for of in totals)],
        ["tensors that change", *(_cell(f"{len(item.tensors):,d}") for item in result.items)],
        ["base's table", *(_cell(item.base[:8] if item.base else "not told") for item in result.items)],
    ]
    patches = dict.fromkeys(name for item in result.items for name in item.patches)
    rows += [[f"patch {_text(name)}", *(_patch_cell(item, name) for item in result.items)] for name in patches]
    notes = [
        f"{', '.join(item.name for item in result.items if item.counted == counted)}: {what}."
        for counted, what in COUNTED.items()
        if any(item.counted == counted for item in result.items)
    ]
    head = ["", *(_text(item.name) for item in result.items)]
    share = "Shares are of all entries of the tensors that any of them changes."
    return _section(
        "Totals",
        _table("Totals", head, rows),
        *(f'<p class="note">{_text(note)}</p>' for note in (share, *notes)),
    )


def _patch_cell(item: Compared, patch: str) -> str:
    of = item.patches.get(patch)
    return _cell("—") if of is None else _cell(f"{of['applied']:,d} acted on", f"{of['selected']:,d} selected")


def _overlaps(result: ReportResult) -> str:
    if len(result.items) < 2:
        return ""
    by_name = {item.name: item for item in result.items}
    parts = [_overlap(of, by_name[of.a], by_name[of.b]) for of in result.overlaps]
    if len(parts) < len(result.items) * (len(result.items) - 1) // 2:
        parts.append(
            '<p class="note">Of a merge alone it is not known which entries change, so its overlap is not: '
            "<code>--base</code> tells.</p>"
        )
    return _section("Overlap", *parts)


def _overlap(of: Overlap, a: Compared, b: Compared) -> str:
    only_a, only_b = a.changes - of.shared, b.changes - of.shared
    most = sorted(of.tensors.items(), key=lambda pair: -pair[1])[:3]
    pieces = (("only-a", only_a), ("both", of.shared), ("only-b", only_b))
    facts = [
        ("both change", f"{of.shared:,d} entries"),
        ("intersection over union", f"{of.iou:.4f}"),
        (f"only {of.a}", f"{only_a:,d} entries"),
        (f"only {of.b}", f"{only_b:,d} entries"),
    ]
    if of.shared:
        facts.append(("both flip the same bits", f"{of.alike / of.shared:.1%} of what both change"))
        facts.append(("most in", ", ".join(f"{name} ({n:,d})" for name, n in most)))
    bar = "".join(f'<i class="{name}" style="flex-grow:{n}"></i>' for name, n in pieces if n)
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts)
    title = f"<h3>{_text(of.a)} and {_text(of.b)}</h3>"
    return f'{title}\n<div class="split" aria-hidden="true">{bar}</div>\n<dl>{rows}</dl>'


def _heat(result: ReportResult) -> str:
    """For each, layers down and kinds of matrices across: how much of it changes."""
    layered = [name for name in result.entries if layer_of(name) != name]
    if not layered:
        return ""
    kinds = sorted({kind_of(name) for name in layered}, key=by_number)
    layers = sorted({layer_of(name) for name in layered}, key=by_number)
    short = _short(kinds)
    most = max((share.share for item in result.items for share in _grid(result, item, layered).values()), default=0.0)
    parts = []
    for item in result.items:
        grid = _grid(result, item, layered)
        head = ["layer", *(f'<abbr title="{_text(kind)}">{_text(short[kind])}</abbr>' for kind in kinds)]
        rows = (
            [_text(layer.rpartition(".")[2]), *(_heat_cell(grid.get((layer, kind)), most) for kind in kinds)]
            for layer in layers
        )
        parts.append(f"<h3>{_text(item.name)}</h3>")
        parts.append(_table(f"Layers and matrices of {item.name}", head, rows, "heat"))
    return _section("Where it changes", '<p class="note">Share of the entries, in percent.</p>', *parts)


def _grid(result: ReportResult, item: Compared, names: Iterable[str]) -> dict[tuple[str, str], Share]:
    shares = result.shares(item)
    found: dict[tuple[str, str], Share] = {}
    for name in names:
        place = layer_of(name), kind_of(name)
        found[place] = found.get(place, Share(0, 0)) + shares[name]
    return found


def _heat_cell(share: Share | None, most: float) -> str:
    if share is None:
        return "<td></td>"
    depth = round(70 * share.share / most) if most else 0
    return f'<td style="--depth:{depth}%">{100 * share.share:.2f}</td>'


def _short(kinds: Sequence[str]) -> dict[str, str]:
    """The last part of each kind, where no other one ends so."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    return {kind: end if last.count(end) == 1 else kind for kind, end in zip(kinds, last, strict=True)}


def _shares(result: ReportResult) -> str:
    head = [_text(item.name) for item in result.items]
    parts = []
    for title, of in (("Per kind of matrix", ReportResult.kinds), ("Per layer", ReportResult.layers)):
        shares = [of(result, item) for item in result.items]
        most = max((share.share for found in shares for share in found.values()), default=0.0)
        rows = ([_text(key), *(_bar(found[key], most) for found in shares)] for key in shares[0])
        table = _table(title, ["", *head], rows, "figures compact")
        opened = " open" if len(shares[0]) <= 16 else ""
        parts.append(f"<details{opened}>\n<summary>{title}</summary>\n{table}\n</details>")
    return _section("Shares", *parts)


def _recipes(result: ReportResult) -> str:
    rows = []
    for key, values in result.recipe_rows():
        unlike = len(values) > 1 and differ(values)
        mark = ' <span class="worse">≠</span>' if unlike else ""
        rows.append(
            [f"{_text(key)}{mark}", *(_cell(_value(value), style="unlike" if unlike else "") for value in values)]
        )
    if not rows:
        return ""
    head = ["key", *(_text(item.name) for item in result.items)]
    note = '<p class="note">≠ marks what is not the same in all of them.</p>' if len(result.items) > 1 else ""
    return _section("Recipes", note, _table("Recipes", head, rows, "recipes"))


def _value(value: Any) -> str:
    if value is ABSENT:
        return "—"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _sums(result: ReportResult) -> str:
    parts = []
    for item in result.items:
        facts = {"id": item.id, "base's table": item.base, **item.files}
        rows = "".join(f"<dt>{_text(name)}</dt><dd><code>{_text(of)}</code></dd>" for name, of in facts.items() if of)
        if rows:
            parts.append(f"<details>\n<summary>{_text(item.name)}</summary>\n<dl>{rows}</dl>\n</details>")
    note = (
        '<p class="note">SHA-256 of files. Those of a merge are what its manifest lists; '
        "<code>safepatch verify</code> checks them.</p>"
    )
    return _section("Checksums", note, *parts) if parts else ""
