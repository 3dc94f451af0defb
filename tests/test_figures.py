"""Every figure of the README's tables is in a committed result file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
README = (ROOT / "README.md").read_text()


def record(file: str, case: str) -> dict[str, Any]:
    lines = (RESULTS / "epyc-2core" / file).read_text().splitlines()
    (found,) = (of for of in map(json.loads, lines) if of["case"] == case)
    return dict(found)


def ratio(of: dict[str, Any], a: str, b: str) -> tuple[float, float, float]:
    """Median, lowest and highest quotient of paired runs."""
    series = of["series"]
    found = [x / y for x, y in zip(series[a]["wall_s"], series[b]["wall_s"], strict=True)]
    return median(found), min(found), max(found)


def shown(values: tuple[float, float, float], digits: int) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle}× ({low}–{high})"


def test_speed() -> None:
    warm, own = record("main.jsonl", "merge/1.1B/checkpoint-tensor/warm"), "checkpoint-tensor"
    cold = record("torch.jsonl", "merge/1.1B/checkpoint-tensor/cold")
    scopes, sources = record("main.jsonl", "merge/1.1B/scopes/warm"), record("main.jsonl", "merge/1.1B/sources/warm")
    mergekit = record("main.jsonl", "peers/1.1B/mergekit-dare_ties")
    torch = record("torch.jsonl", "peers/1.1B/plain-torch-tensor")
    for row in (
        f"warm | {shown(ratio(warm, own, 'floor'), 2)} |",
        f"cold | {shown(ratio(cold, own, 'floor'), 2)}, five runs |",
        f"warm | {shown(ratio(scopes, 'checkpoint-model', own), 2)} |",
        f"warm | {shown(ratio(sources, 'lora-tensor', own), 2)} |",
        f"warm | {shown(ratio(mergekit, 'mergekit-dare_ties', 'safepatch'), 0)}; peak",
        f"warm | {shown(ratio(torch, 'plain-torch-tensor', 'safepatch'), 0)}; peak",
    ):
        assert row in README, row


def test_memory() -> None:
    mergekit = record("main.jsonl", "peers/1.1B/mergekit-dare_ties")["series"]
    torch = record("torch.jsonl", "peers/1.1B/plain-torch-tensor")["series"]
    large = record("shape.jsonl", "shape/Llama-3-70B")["series"]["merge"]
    small = record("memory.jsonl", "memory/6B/128MiB")["series"]["merge"]

    def peak(of: dict[str, list[float]], unit: float, digits: int = 0) -> str:
        return f"{median(of['peak_bytes']) / unit:.{digits}f}"

    assert (
        f"peak {peak(mergekit['mergekit-dare_ties'], 1e9, 1)} GB against {peak(mergekit['safepatch'], 2**20)} MiB"
        in README
    )
    assert f"; peak {peak(torch['plain-torch-tensor'], 1e9, 1)} GB" in README
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
