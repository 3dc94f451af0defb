"""Utility in lm-eval's form, without a hub: general knowledge, and the right continuation of a paragraph."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from safepatch_core.language.rows import read_text

NAMES = ("psa_knowledge", "psa_continuation")
HOME = Path(__file__).parent
CONTEXT, CHOICE, DOCUMENTS = 32, 12, 40  # words, words, paragraphs


def write(folder: Path, text: str) -> Path:
    """The task files with their data, for lm-eval's include_path: `text` gives the paragraphs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(HOME / "knowledge.jsonl", folder)
    documents = continuations(read_text(text).splitlines())
    (folder / "continuation.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    for file in HOME.glob("*.yaml"):
        task = yaml.safe_load(file.read_text())
        # datasets reads relative paths from where it is called.
        task["dataset_kwargs"]["data_files"] = str(folder.resolve() / task["dataset_kwargs"]["data_files"])
        (folder / file.name).write_text(yaml.safe_dump(task, sort_keys=False))
    return folder


def continuations(lines: Sequence[str]) -> list[dict[str, object]]:
    """The beginning of a paragraph and four ways on: its own, which comes first, and those of three others."""
    words = [re.sub(r" @(.)@ ", r"\1", line).split() for line in lines]
    long = [line for line in words if len(line) >= CONTEXT + CHOICE and line[0] != "="]
    draw = random.Random(0)
    chosen = draw.sample(long, min(DOCUMENTS, len(long)))
    own = [" " + " ".join(line[CONTEXT : CONTEXT + CHOICE]) for line in chosen]
    found: list[dict[str, object]] = []
    for at, line in enumerate(chosen):
        others = draw.sample([choice for other, choice in enumerate(own) if other != at], 3)
        found.append({"context": " ".join(line[:CONTEXT]), "choices": [own[at], *others]})
    return found
