"""Continual rounds that hold on to the ones before them, by EWC or by replay (DER), beside rounds that do not.

All ways rank by Fisher information, which EWC needs, so that nothing else differs between them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from safepatch_core.runs.rounds import COMPLIANCE
from safepatch_core.runs.run import run as run_file

from .data import SIZES
from .measures import replace
from .steps import ROUNDS, Evidence, rounds

WAYS: dict[str, list[str]] = {
    "nothing": [],
    "ewc": ["ewc"],
    "replay": ["replay"],
    "ewc and replay": ["ewc", "replay"],
}


def run(job: Evidence, size: str, seeds: Sequence[int]) -> None:
    """Rounds of every way and seed, and OUT/results/remembering-SIZE.{json,md} after each."""
    found: list[dict[str, Any]] = []
    results = job.out / "results"
    results.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for way, terms in WAYS.items():
            found.append({"way": way, "seed": seed, "size": size, **_rounds(job, size, seed, way, terms)})
            replace(results / f"remembering-{size}.json", json.dumps(found, indent=1) + "\n")
            replace(results / f"remembering-{size}.md", table(found))


def _rounds(job: Evidence, size: str, seed: int, way: str, terms: list[str]) -> dict[str, Any]:
    """Matrix and forgetting of one run, as rounds.json has them."""
    name = f"remembering-{way.replace(' ', '-')}-{seed}-{size}"
    out, file = job.out / name, job.out / f"{name}.yaml"
    if not (out / "rounds.json").exists():
        job.say(f"rounds: {name}")
        section = rounds(job, job.model)
        section["derive"] |= {"importance_kind": "fisher", "seed": seed}
        section["eval"] |= {"harmful_rows": f"1:100:{2 * SIZES[size]}"}
        file.write_text(yaml.safe_dump(section | {"remember": terms}, sort_keys=False))
        run_file(file, out, resume=True)
    told = json.loads((out / "rounds.json").read_bytes())
    return {"matrix": told["matrix"], "forgetting": told["forgetting"]}


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: what each way complies with and refuses after each round, and what it forgot; means over seeds."""
    parts = []
    for way in dict.fromkeys(of["way"] for of in found):
        runs = [of for of in found if of["way"] == way]
        rows = [["after", *ROUNDS, "all", "over-refusal"], ["---"] * (len(ROUNDS) + 3)]
        for at, row in enumerate(runs[0]["matrix"]):
            these = [of["matrix"][at] for of in runs]
            own = [_mean([of[COMPLIANCE][name]["value"] for of in these]) for name in ROUNDS]
            whole = [_mean([of["metrics"][name]["value"] for of in these]) for name in (COMPLIANCE, "over_refusal")]
            rows.append([row["after"], *own, *whole])
        forgot = "; ".join(
            f"{of['round']} {_mean([run['forgetting'][at]['value'] for run in runs], '{:+.1%}')}"
            for at, of in enumerate(runs[0]["forgetting"])
        )
        body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(f"Remembering {way}, seeds {len(runs)}; forgotten: {forgot}.\n\n{body}")
    return "\n\n".join(parts) + "\n"


def _mean(values: Sequence[float], shown: str = "{:.1%}") -> str:
    """With the range, where there are several."""
    text = shown.format(sum(values) / len(values))
    ends = f" ({shown.format(min(values))} to {shown.format(max(values))})" if len(values) > 1 else ""
    return text + ends
