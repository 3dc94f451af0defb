"""What is kept of a run: a line of JSON per case, complete in itself, and how two runs are compared."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safepatch_core.errors import InputError
from safepatch_core.version import __version__

from .measure import Spread, ratio
from .registry import Case, Measured

Record = dict[str, Any]
FILE = "results.jsonl"
PACKAGES = ("numpy", "torch", "triton", "safetensors", "transformers", "peft", "mergekit")
LOWER_IS_BETTER = ("_s", "_bytes", "ns_per_entry")


def machine() -> dict[str, Any]:
    """What the figures depend on; no name of the host."""
    model = re.search(r"^model name\s*: (.*)$", _text("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+)", _text("/proc/meminfo"), re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(memory[1]) << 10 if memory else None,
        "kernel": platform.release(),
        "system": platform.system(),
    }


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def versions() -> dict[str, str]:
    """safepatch, Python, and those of the packages that are installed here."""
    found = {"safepatch": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit that this suite is checked out from, with a + where files differ; None outside of a checkout."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def make_record(case: Case, measured: Measured, rounds: int, options: dict[str, Any]) -> Record:
    """Everything about one green case."""
    return {
        "case": case.name,
        "params": case.params,
        "series": measured.series,
        "ratios": [list(pair) for pair in measured.ratios],
        "facts": measured.facts,
        "rounds": rounds,
        "options": options,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def append(folder: Path, record: Record) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def load(path: Path) -> list[Record]:
    """The records of a results directory or file, the last of each case. Raises InputError."""
    file = path / FILE if path.is_dir() else path
    found: dict[str, Record] = {}
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read results: {error}", file=file) from None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
            found[record["case"]] = record
        except (ValueError, KeyError, TypeError):
            raise InputError(f"line {number} is not a result", file=file) from None
    return list(found.values())


def shown(quantity: str, value: float) -> str:
    """A value with the unit that its name tells."""
    if quantity.endswith("entries_per_s"):
        return f"{value / 1e6:,.1f} M entries/s"
    if quantity.endswith("bytes_per_s"):
        return f"{value / 1e9:.2f} GB/s"
    if quantity.endswith("_bytes"):
        return f"{value / 2**20:,.1f} MiB"
    if quantity.endswith("_s"):
        return f"{value:.3f} s"
    if quantity == "ns_per_entry":
        return f"{value:.3f} ns"
    return f"{value:g}"


# What a terminal shows of each subject; the file has everything.
HEADLINES = ("wall_s", "cpu_s", "peak_bytes", "moved_bytes_per_s", "entries_per_s", "bytes_per_s", "ns_per_entry")


def lines(record: Record) -> list[str]:
    """A case in words: medians with their spreads, and paired ratios."""
    found = [record["case"]]
    width = max(len(name) for name in record["series"])
    for name, quantities in record["series"].items():
        parts = []
        for quantity in [*HEADLINES, *(q for q in quantities if "/" in q)]:
            if quantity in quantities:
                of = Spread.of(quantities[quantity])
                label = "" if "per_" in quantity else f"{quantity.removesuffix('_s').removesuffix('_bytes')} "
                parts.append(
                    f"{label}{shown(quantity, of.median)} [{of.low / of.median:.2f}–{of.high / of.median:.2f}]"
                )
        found.append(f"  {name:{width}}  " + "  ".join(parts))
        if predicted := record["facts"].get("predicted_s", {}).get(name):
            took = Spread.of(quantities["wall_s"]).median / predicted
            found.append(f"  {'':{width}}  predicted {predicted:.3f} s, took {took:.2f} times that")
    for a, b in record["ratios"]:
        of = ratio(record["series"][a]["wall_s"], record["series"][b]["wall_s"])
        found.append(f"  {a} / {b}: {of.median:.2f}× [{of.low:.2f}–{of.high:.2f}]")
    return found


def compare(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    """Case by case, the medians that both runs have, and how they changed. Changes within the spreads say so."""
    old = {record["case"]: record for record in before}
    found = []
    for record in after:
        if record["case"] not in old:
            continue
        found.append(record["case"])
        other = old[record["case"]]
        if other["machine"] != record["machine"]:
            found.append("  measured on different machines")
        for name, quantities in record["series"].items():
            for quantity in HEADLINES:
                values = quantities.get(quantity)
                known = other["series"].get(name, {}).get(quantity)
                if values and known:
                    a, b = Spread.of(known), Spread.of(values)
                    found.append(f"  {name:20} {quantity:18} " + _change(quantity, a, b))
    return found


def _change(quantity: str, a: Spread, b: Spread) -> str:
    quotient = b.median / a.median if a.median else float("nan")
    if a.low <= b.high and b.low <= a.high:
        verdict = "within the spread"
    else:
        verdict = "better" if (quotient < 1) == quantity.endswith(LOWER_IS_BETTER) else "worse"
        if quantity.endswith("per_s"):
            verdict = "better" if quotient > 1 else "worse"
    return f"{shown(quantity, a.median):>18} → {shown(quantity, b.median):>18}  {quotient:6.2f}×  {verdict}"


def command_line() -> str:
    """The command that was given, without paths of this machine."""
    return " ".join(["safepatch", *(Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:])])


def by_group(records: Iterable[Record], group: str) -> list[Record]:
    return [record for record in records if record["case"].startswith(f"{group}/")]
