"""Every figure of the README's tables is in a committed result file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from safepatch_core.evaluating.config import DEMO_TO_CHOOSE

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
README = (ROOT / "README.md").read_text()


def record(file: str, case: str, machine: str = "epyc-2core") -> dict[str, Any]:
    lines = (RESULTS / machine / file).read_text().splitlines()
    (found,) = (of for of in map(json.loads, lines) if of["case"] == case)
    return dict(found)


def ratio(of: dict[str, Any], a: str, b: str) -> tuple[float, float, float]:
    """Median, lowest and highest quotient of paired runs."""
    series = of["series"]
    found = [x / y for x, y in zip(series[a]["wall_s"], series[b]["wall_s"], strict=True)]
    return median(found), min(found), max(found)


def shown(values: tuple[float, float, float], digits: int) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle}× ({low}–{high})" if low < high else f"{middle}×"  # one run has no range


def test_speed() -> None:
    own = "checkpoint-tensor"
    for label, file, case, a, b, digits in (
        ("warm", "main.jsonl", "merge/1.1B/checkpoint-tensor/warm", own, "floor", 2),
        ("cold", "torch.jsonl", "merge/1.1B/checkpoint-tensor/cold", own, "floor", 2),
        ("warm", "main.jsonl", "merge/1.1B/scopes/warm", "checkpoint-model", own, 2),
        ("warm", "main.jsonl", "merge/1.1B/sources/warm", "lora-tensor", own, 2),
        ("warm", "main.jsonl", "peers/1.1B/mergekit-dare_ties", "mergekit-dare_ties", "safepatch", 0),
        ("warm", "torch.jsonl", "peers/1.1B/plain-torch-tensor", "plain-torch-tensor", "safepatch", 0),
    ):
        xeon, epyc = record("main.jsonl", case, "xeon-2core"), record(file, case)
        row = f"| {label} | {shown(ratio(xeon, a, b), digits)} | {shown(ratio(epyc, a, b), digits)} |"
        assert row in README, row


def test_memory() -> None:
    mergekit = record("main.jsonl", "peers/1.1B/mergekit-dare_ties")["series"]
    torch = record("torch.jsonl", "peers/1.1B/plain-torch-tensor")["series"]
    large = record("shape.jsonl", "shape/Llama-3-70B")["series"]["merge"]
    small = record("memory.jsonl", "memory/6B/128MiB")["series"]["merge"]

    def peak(of: dict[str, list[float]], unit: float, digits: int = 0) -> str:
        return f"{median(of['peak_bytes']) / unit:.{digits}f}"

    theirs = peak(mergekit["mergekit-dare_ties"], 1e9, 1), peak(torch["plain-torch-tensor"], 1e9, 1)
    assert f"{peak(mergekit['safepatch'], 2**20)} MiB, mergekit {theirs[0]} GB, plain torch {theirs[1]} GB" in README
    assert f"took {large['wall_s'][0]:.0f} s and {peak(large, 2**20)} MiB" in README
    assert f"under 128 MiB took {peak(small, 2**20)} MiB" in README


def test_mergekits_own_files() -> None:
    page = (ROOT / "docs" / "coming-from-mergekit.md").read_text()
    for method in ("task_arithmetic", "ties", "dare_ties", "breadcrumbs"):
        series = record("yaml.jsonl", f"peers/1.1B/yaml-{method}")["series"]
        ours, theirs = (
            (median(series[name]["wall_s"]), median(series[name]["peak_bytes"]) / 1e9)
            for name in ("safepatch", f"mergekit-{method}")
        )
        quotient = theirs[0] / ours[0]
        assert (
            f"| `{method}` | {ours[0]:.1f} s, {ours[1]:.1f} GB | {theirs[0]:.0f} s, {theirs[1]:.1f} GB "
            f"| {quotient:.{0 if quotient > 10 else 1}f}× |"
        ) in page


def test_whether_it_helps() -> None:
    """The README's rows are the means of those in the table that `bench psa` wrote."""
    table = (RESULTS / "psa" / "table.md").read_text().partition("### With a utility term")[2]
    rows = {line.split(" | ")[0].lstrip("| "): line.split(" | ") for line in table.splitlines() if " | " in line}
    for readme, method in (
        ("backbone", "backbone"),
        ("with `utility_data`, defaults", "SafePatching, defaults"),
        ("with `utility_data`, scale 4", "SafePatching, scale 4"),
    ):
        advbench, simple, refusal, _, perplexity = (re.split(r"[ |]", cell.strip())[0] for cell in rows[method][1:6])
        assert f"| {readme} | {advbench} | {refusal} | {simple} | {perplexity} |" in README


def test_what_the_demo_shows() -> None:
    """The README and the quickstart say what `make demo` showed, for its seed."""
    held_out = json.loads((RESULTS / "demo" / "held-out.json").read_text())
    of = {metric["name"]: metric for metric in held_out["seeds"]["0"]["metrics"]}
    harmful, refused = (
        " to ".join(f"{100 * of[name][key]['value']:.1f}%" for key in ("baseline", "model"))
        for name in ("harmful_compliance", "over_refusal")
    )
    for page in ("README.md", "docs/quickstart.md"):
        text = " ".join((ROOT / page).read_text().split())
        assert f"harmful compliance from {harmful} and over-refusal from {refused}" in text, page


def test_how_the_recipe_of_the_demo_was_chosen() -> None:
    """It has the smallest sum of both rates among those tried, on rows that the demo measures nothing on."""
    search = json.loads((RESULTS / "demo" / "search.json").read_text())
    assert search["prompts"] == {f"{name}.jsonl": rows for name, rows in DEMO_TO_CHOOSE.items()}
    backbone, *tried = search["tried"]
    assert backbone["backbone"]
    best = min(tried, key=lambda of: sum(of[rate]["count"] for rate in ("harmful_compliance", "over_refusal")))
    derive = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text())["derive"]
    assert best["learning_rate"] == derive["learning_rate"] and "of the data" in best["answers"]
    for patch in ("safety", "over-safety"):
        assert best[patch].items() <= derive[patch.replace("-", "_")].items()
