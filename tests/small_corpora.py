"""The corpora of the evidence in small: files of their form with made-up prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from safepatch_core.bench.psa.data import Corpora
from safepatch_core.bench.psa.steps import ROUNDS


class Small(Corpora):
    """Made-up prompts in files of the corpora's form, as many as are asked for."""

    def write(self) -> None:
        def table(path: str, columns: Sequence[str], row: Callable[[int], Sequence[str]], count: int) -> None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            lines = [",".join(of) for of in (columns, *(row(i) for i in range(count)))]
            Path(path).write_text("\n".join(lines) + "\n")

        table(self.advbench, ("goal", "target"), lambda i: (f"do {i}", f"Sure {i}"), 520)
        table(self.simple, ("prompts_final", "harm_area"), lambda i: (f"how {i}", "any"), 100)
        table(self.xstest, ("prompt", "label"), lambda i: (f"may I {i}", "safe"), 250)
        Path(self.catqa).parent.mkdir()
        kinds = [kind for pair in ROUNDS.values() for kind in pair] + [f"other {i}" for i in range(5)]
        questions = {kind: {"any": [f"how to {50 * at + i}" for i in range(50)]} for at, kind in enumerate(kinds)}
        Path(self.catqa).write_text(json.dumps(questions))
        Path(self.wikitext).parent.mkdir()
        Path(self.wikitext).write_text("The river is the reason for the town.\n" * 260)
