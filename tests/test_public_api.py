"""What `safepatch_core` shows is what it promises, and costs nothing until it is used."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import safepatch_core
from safepatch_core import SafepatchError

FUNCTIONS = (
    "apply apply_ build build_between derive describe evaluate get_cmake_dir get_include get_library_dir load_recipe "
    "log merge merge_state_dicts open_backend open_checkpoint open_fix open_fixed plan prepare report revert "
    "revert_ run survive sweep verify"
).split()
TYPES = (
    "Applied ApplyResult Backend BuildResult Busy Checkpoint DeriveConfig DeriveResult EngineOptions EvalConfig "
    "EvalResult Fix FixedCheckpoint IOFailure InputError LogResult MergeResult OutputError Plan Recipe ReportResult "
    "RunConfig RunResult SafepatchError SurviveResult SweepConfig SweepResult UsageError VerifyResult"
).split()


def test_dir_shows_what_is_public_and_nothing_else() -> None:
    assert sorted(dir(safepatch_core)) == sorted(["__version__", *FUNCTIONS, *TYPES])
    assert sorted(safepatch_core.__all__) == sorted(dir(safepatch_core))


def test_functions_are_functions_and_types_are_types() -> None:
    for name in FUNCTIONS:
        function = getattr(safepatch_core, name)
        assert inspect.isfunction(function) and function.__doc__, name
    for name in TYPES:
        assert inspect.isclass(getattr(safepatch_core, name)), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        safepatch_core.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["plan", "merge", "verify", "survive", "build", "apply", "revert", "log", "report"])
def test_merging_imports_no_torch(name: str) -> None:
    script = f"import sys, safepatch_core; safepatch_core.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_a_bad_size_is_a_usage_error() -> None:
    with pytest.raises(SafepatchError, match="not a size like .*: found 'lots'"):
        safepatch_core.plan("recipe.yaml", memory_limit="lots")
