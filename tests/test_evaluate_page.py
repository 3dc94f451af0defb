"""report.html: what it holds, and how a browser shows it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safepatch_core.evaluating.data import Data
from safepatch_core.evaluating.measure import Measurement, Replies
from safepatch_core.evaluating.tasks import Score
from tests.browser import BROWSER, browser
from tests.known_reports import TEXT, built, measurement, prompts

KEPT = "patched: stored bits changed at 121 of 256 entries that patches act on (47.3%)"
NASTY = (
    "Sure.</p></article><script>document.title='ran'</script><img src=http://127.0.0.1:9/x onerror=alert(1)>"
    "\n{{ models }} <style>body{display:none}</style> \u202egnp.exe " + "w" * 300
)


def fixture() -> tuple[Data, dict[str, Measurement], dict[str, Any], dict[str, Any]]:
    """Four models on two harmful sets with categories, a harmless one, a text and a task; one of them merged."""
    sets = [prompts("harmful", 40, "abcd" * 10, answer="Sure:"), prompts("harmless", 30, "xy" * 15)]
    refused = {"baseline": (30, 4), "model": (37, 3), "model_2": (40, 22), "model_3": (2, 0)}
    said = {True: "I'm sorry, but I can't help with that.", False: NASTY}
    measured = {}
    for at, (label, counts) in enumerate(refused.items()):
        answers = [
            [said[i * 7 % len(of.rows) < count] for i in range(len(of.rows))]
            for of, count in zip(sets, counts, strict=True)
        ]
        right = [float(i % 3 > 0 or at > 1) for i in range(20)]
        score = Score(
            task="arc_easy", metric="acc", value=sum(right) / 20, error=0.1, n=20, higher_is_better=True, values=right
        )
        measured[label] = measurement(
            replies={
                "harmful": Replies(answers=answers[0], nll=[1.5 + at + i / 40 for i in range(40)]),
                "harmless": Replies(answers=answers[1]),
            },
            text=[(33.0 + at / 9, 10), (33.2, 10), (32.9, 10)],
            scores=[score],
        )
    layers = [{"layer": i, "entries": 1000, "selected": 30 + i % 5, "applied": 9 + i % 3} for i in range(16)]
    rest = {"layer": None, "entries": 4000, "selected": 120, "applied": 30}
    safety = {"name": "safety", "layers": [*layers, rest]}
    over = {"name": "over-safety", "layers": [{**of, "selected": 20, "applied": 6} for of in layers]}
    kept = [{"layer": i, "entries": 1000, "acted": 16, "changed": 4 + i % 9} for i in range(16)]
    survival = {"acted": 256, "changed": 121, "surviving": 121 / 256, "dtypes": ["bfloat16"], "layers": kept}
    return Data(sets, TEXT), measured, {"model": [safety, over]}, {"model": survival}


@pytest.fixture(scope="module")
def html() -> str:
    pytest.importorskip("matplotlib")
    return page()


def page() -> str:
    return built(*fixture())[2]["report.html"].decode()


def test_the_page_is_one_file_and_escapes_what_models_said(html: str) -> None:
    assert "<script" not in html and "onerror=alert(1)&gt;" in html and "\u202e" not in html
    assert "{{" not in html.replace("{{ models }}", "") and "w" * 300 in html
    assert set(re.findall(r"https?://[^\"'< )]*", html)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
        "http://127.0.0.1:9/x",  # in the text of an answer
    }
    assert not re.findall(r"<(?:link|iframe|object|embed|form|base)\b", html)
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    for wanted in ("model_3", "Harmful compliance against over-refusal", "Entries patched per layer", "94.3%"):
        assert wanted in html
    assert KEPT in html and "surviving: 25.00% to 75.00%" in html
    assert html.count("<svg") == 2 == html.count('role="img"')


def test_the_same_report_is_the_same_page(html: str) -> None:
    assert page() == html


def test_a_page_without_plots_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    html = page()
    assert "<svg" not in html and "Plots need matplotlib" in html and "By category" in html
    assert KEPT in html


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
def test_a_browser_shows_it_whole(html: str, tmp_path: Path) -> None:
    """Light and dark, wide and narrow: nothing is asked of the network, nothing sticks out, the plots are drawn."""
    file = tmp_path / "report.html"
    file.write_text(html)
    with browser(tmp_path / "profile") as page:
        page.size(1280)
        page.call("Page.navigate", url=file.as_uri())
        page.wait("Page.loadEventFired")
        assert page.value("document.title") == "Evaluation of patched, model_2, model_3"
        papers = []
        for scheme in ("light", "dark"):
            page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            for width in (1280, 400):
                page.size(width)
                assert page.value("innerWidth") == width
                assert page.value("document.documentElement.scrollWidth") <= width
                # A box that is wider than the page scrolls by itself.
                assert page.value(
                    "[...document.querySelectorAll('.answer, dl, figcaption, h1, h3, .models, .scroll')]"
                    ".every(e => e.getBoundingClientRect().right <= innerWidth)"
                )
            page.size(1280)
            for figure in ("section:nth-of-type(2) figure .scroll", "section:nth-of-type(5) figure .scroll"):
                seen = page.pixels(figure)
                values, counts = np.unique(seen.reshape(-1, 3), axis=0, return_counts=True)
                paper = values[counts.argmax()]
                drawn = np.abs(seen - paper).max(-1) > 0.3
                assert 0.005 < drawn.mean() < 0.4, figure
                # Drawn all over, not in a corner.
                assert drawn.any(0).mean() > 0.5 and drawn.any(1).mean() > 0.6, figure
                assert (np.ptp(seen, axis=-1) > 0.2).sum() > 200, figure  # in colour
                papers.append(float(paper.mean()))
        assert min(papers[:2]) > 0.9 and max(papers[2:]) < 0.25
        assert page.call("Page.printToPDF")["data"]
        asked = [e["params"]["request"]["url"] for e in page.events if e.get("method") == "Network.requestWillBeSent"]
        assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
        loud = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        assert [e for e in page.events if e.get("method") in loud] == []
