"""What the site takes from beside docs/, links that lead there, and that no page loads anything from outside."""

from __future__ import annotations

import os
import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
# Place in the repository → place in the site.
BESIDE = {
    "safepatch_core/SPEC.md": "contract.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "README.md": "index.md",
    "bench/results/README.md": "evidence/results.md",
    "bench/results/demo/README.md": "evidence/demo.md",
    "bench/results/psa/README.md": "evidence/psa.md",
    "bench/results/quantised/README.md": "evidence/quantised.md",
    "bench/results/judge/README.md": "evidence/judge.md",
}
PLOTS = "bench/results/psa/"
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"(<code\b[^>]*>)(.*?)(?=</code>)", re.DOTALL)
_TAG_OR_OPTION = re.compile(r"<[^>]*>|(?<![\w-])--?[a-z][\w-]*")
_OUTSIDE = re.compile(r"""<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)="?(?:https?:)?//[^">]+""")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and plots that lie beside docs/."""
    added = {page: ROOT / source for source, page in BESIDE.items() if page != "index.md"}
    added |= {f"evidence/{path.name}": path for path in sorted((ROOT / PLOTS).glob("*.png"))}
    for uri, path in added.items():
        files.append(File.generated(config, uri, abs_src_path=os.fspath(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links are written as they work in the repository; here they lead to the site's pages, or nowhere. Code gets
    empty lines around it, without which it would become a part of a paragraph."""
    origin = {site: source for source, site in BESIDE.items() if site != "index.md"}.get(
        page.file.src_uri, f"docs/{page.file.src_uri}"
    )

    def link(found: re.Match[str]) -> str:
        target, _, anchor = found[3].partition("#")
        if not target or ":" in target:
            return found[0]
        place = _in_site(normpath(join(dirname(origin), target)))
        if place is None:
            return found[2]
        anchor = f"#{anchor}" if anchor else ""
        return f"{found[1]}[{found[2]}]({relpath(place, dirname(page.file.src_uri) or '.')}{anchor})"

    pieces = _FENCE.split(markdown)
    return "".join(f"\n{piece}\n" if i % 2 else _LINK.sub(link, piece) for i, piece in enumerate(pieces))


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Options in code stay whole: a browser would break a line behind their hyphens."""

    def whole(found: re.Match[str]) -> str:
        return found[0] if found[0].startswith("<") else f'<span class="option">{found[0]}</span>'

    return _CODE.sub(lambda found: found[1] + _TAG_OR_OPTION.sub(whole, found[2]), html)


def _in_site(path: str) -> str | None:
    if path in BESIDE:
        return BESIDE[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"evidence/{path.removeprefix(PLOTS)}" if path.startswith(PLOTS) and path.endswith(".png") else None


def on_post_build(config: Any) -> None:
    """Raises PluginError where a page would load something from elsewhere."""
    for path in Path(config["site_dir"]).rglob("*.html"):
        for found in _OUTSIDE.findall(path.read_text()):
            if 'rel="canonical"' not in found:
                raise PluginError(f"{path}: asks for something outside: {found}")
