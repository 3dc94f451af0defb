"""The pages: links lead somewhere, the reference is what the program says, messages are real, pictures are drawn."""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

import safepatch_core
from docs.scripts import pictures, reference
from safepatch_core.commands.cli import COMMANDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BESIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "safepatch_core/SPEC.md")
EVIDENCE = ("demo", "judge", "psa", "quantised")
PAGES = [
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / name for name in BESIDE),
    *(ROOT / "bench" / "results" / name for name in ("README.md", *(f"{part}/README.md" for part in EVIDENCE))),
]
LINK = re.compile(r"(?<!`)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def text_of(page: Path) -> str:
    return FENCE.sub("", page.read_text())


@cache
def anchors(page: Path) -> frozenset[str]:
    """What headings are called in links, by the rule of GitHub and of the site alike."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().lower().replace(" ", "-"))
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(text_of(page)):
        path, _, anchor = target.partition("#")
        if ":" in path:
            continue
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        if anchor:
            assert anchor in anchors(place), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lists_and_tables_begin_behind_an_empty_line(page: Path) -> None:
    """Without one, the site runs them together; GitHub doesn't."""
    lines = page.read_text().split("\n")
    glued = [
        line
        for before, line in pairwise(lines)
        if line.startswith(("- ", "|")) and not re.match(r"$|- |  |\||#|<!--", before)
    ]
    assert glued == []


def test_the_check_sees_links() -> None:
    found = LINK.findall(text_of(DOCS / "index.md"))
    assert "quickstart.md" in found and "../safepatch_core/SPEC.md" in found
    assert "quantised-bases" in anchors(ROOT / "safepatch_core/SPEC.md")


def test_the_reference_is_what_the_program_says() -> None:
    pages = reference.pages()
    assert {path.name for path in (DOCS / "reference").iterdir()} == pages.keys()
    for name, content in pages.items():
        written = (DOCS / "reference" / name).read_text()
        assert written == content.rstrip("\n") + "\n", f"{name}: python -m docs.scripts.reference"


def test_every_command_and_every_public_name_is_in_the_reference() -> None:
    pages = reference.pages()
    for name in COMMANDS:
        assert f"\n## safepatch {name}\n" in pages["command-line.md"], name
    shown = {line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)$", pages["python.md"], re.MULTILINE)}
    assert shown == {*safepatch_core.__all__} - {"__version__"}
    assert "`--memory-limit SIZE`" in pages["command-line.md"].replace("<code>", "`").replace("</code>", "`")


def test_the_pictures_are_what_the_script_draws() -> None:
    assert {path.name: path.read_text() for path in pictures.OUT.iterdir()} == pictures.pictures()


def test_messages_of_troubleshooting_are_the_programs_own() -> None:
    """Each is a piece of a string in the sources, up to what stands there for a value."""
    page = (DOCS / "troubleshooting.md").read_text()
    messages = re.findall(r"^- `([^`]+)`<br>", page, re.MULTILINE)
    joined = re.sub(r'"\s*\n\s*f?"', "", "".join(p.read_text() for p in (ROOT / "safepatch_core").rglob("*.py")))
    assert len(messages) >= 20
    assert [message for message in messages if message not in joined] == []


def test_every_page_is_in_the_navigation() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = {page if isinstance(page, str) else next(iter(page.values()))
              for part in site["nav"] for pages in part.values() for page in pages}  # fmt: skip
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert pages <= listed
    assert "mermaid" not in "".join(path.read_text() for path in PAGES)
