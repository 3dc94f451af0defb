"""Pages for people: one HTML file each, without a script and without a request; the look that they share."""

from __future__ import annotations

from html import escape
from pathlib import Path

from safepatch_core.errors import printable

STYLE = Path(__file__).with_name("page.css")
SHOWN = 4000  # characters of one text


def document(title: str, body: str) -> str:
    """A whole page, from markup of which every text has gone through `shown` and `escape`."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(shown(title))}</title>\n<style>\n{STYLE.read_text('utf-8')}</style>\n</head>\n"
        f"<body>\n{body}</body>\n</html>\n"
    )


def shown(said: str) -> str:
    """Text of a model or a file: lines kept, controls visible, not endless."""
    kept = said if len(said) <= SHOWN else said[:SHOWN] + "… [cut]"
    return "\n".join(map(printable, kept.splitlines()))
