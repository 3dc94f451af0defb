"""Fuzz one target for a while: `python tests/fuzz/fuzz.py TARGET SECONDS`. Coverage-guided, by atheris.

An input that breaks a rule is kept as `crash-…` in the folder of `FUZZ_FINDINGS` (default: here), and the exit status
is not 0. The corpus in tests/corpus is read; what is found beyond it goes to build/fuzz.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

# Installed by `make fuzz`; nothing else needs it.
atheris: Any = import_module("atheris")
ROOT = Path(__file__).resolve().parents[2]
DICTIONARY = Path(__file__).with_name("tokens.dict")

with atheris.instrument_imports(include=["safepatch_core", "json", "yaml"]):
    sys.path.insert(0, str(ROOT))
    from tests.fuzz.targets import TARGETS


def main() -> None:
    name, seconds = sys.argv[1:]
    found, seeds = ROOT / "build" / "fuzz" / name, ROOT / "tests" / "corpus" / name
    found.mkdir(parents=True, exist_ok=True)
    findings = os.environ.get("FUZZ_FINDINGS", ".")
    options = [
        f"-max_total_time={seconds}",
        f"-dict={DICTIONARY}",
        "-max_len=4096",
        "-timeout=10",
        "-rss_limit_mb=2048",
    ]
    options += [f"-artifact_prefix={findings}/", "-print_final_stats=1", "-verbosity=0"]
    # libFuzzer ends its process without any clean-up, so that is a child; the scratch directory is ours to remove.
    child = os.fork()
    if child == 0:
        atheris.Setup([sys.argv[0], *options, str(found), str(seeds)], TARGETS[name])
        atheris.Fuzz()
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
