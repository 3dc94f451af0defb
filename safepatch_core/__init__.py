"""safepatch: safety patches for language models, merged bit for bit without loading the model.

The names below are the public API. They are imported on first use, so that the command line starts at once and a
merge needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from safepatch_core.version import __version__

if TYPE_CHECKING:
    from safepatch_core.backends import open_backend as open_backend
    from safepatch_core.backends.contract import Backend as Backend
    from safepatch_core.deriving import DeriveConfig as DeriveConfig
    from safepatch_core.deriving import DeriveResult as DeriveResult
    from safepatch_core.deriving import derive as derive
    from safepatch_core.errors import Busy as Busy
    from safepatch_core.errors import InputError as InputError
    from safepatch_core.errors import IOFailure as IOFailure
    from safepatch_core.errors import OutputError as OutputError
    from safepatch_core.errors import SafepatchError as SafepatchError
    from safepatch_core.errors import UsageError as UsageError
    from safepatch_core.evaluating import EvalConfig as EvalConfig
    from safepatch_core.evaluating import EvalResult as EvalResult
    from safepatch_core.evaluating import evaluate as evaluate
    from safepatch_core.files.checkpoint import Checkpoint as Checkpoint
    from safepatch_core.files.checkpoint import open_checkpoint as open_checkpoint
    from safepatch_core.fixes.apply import ApplyResult as ApplyResult
    from safepatch_core.fixes.apply import apply as apply
    from safepatch_core.fixes.apply import revert as revert
    from safepatch_core.fixes.build import BuildResult as BuildResult
    from safepatch_core.fixes.build import build as build
    from safepatch_core.fixes.build import build_between as build_between
    from safepatch_core.fixes.comparing import ReportResult as ReportResult
    from safepatch_core.fixes.log import LogResult as LogResult
    from safepatch_core.fixes.log import log as log
    from safepatch_core.fixes.memory import Applied as Applied
    from safepatch_core.fixes.memory import apply_ as apply_
    from safepatch_core.fixes.memory import revert_ as revert_
    from safepatch_core.fixes.reading import Fix as Fix
    from safepatch_core.fixes.reading import open_fix as open_fix
    from safepatch_core.fixes.report import report as report
    from safepatch_core.fixes.stack import FixedCheckpoint as FixedCheckpoint
    from safepatch_core.fixes.stack import open_fixed as open_fixed
    from safepatch_core.integrations.state_dicts import merge_state_dicts as merge_state_dicts
    from safepatch_core.library import get_cmake_dir as get_cmake_dir
    from safepatch_core.library import get_include as get_include
    from safepatch_core.library import get_library_dir as get_library_dir
    from safepatch_core.merging.api import MergeResult as MergeResult
    from safepatch_core.merging.api import describe as describe
    from safepatch_core.merging.api import merge as merge
    from safepatch_core.merging.api import plan as plan
    from safepatch_core.merging.api import prepare as prepare
    from safepatch_core.merging.engine import EngineOptions as EngineOptions
    from safepatch_core.merging.plan import Plan as Plan
    from safepatch_core.merging.quantised.comparison import SurviveResult as SurviveResult
    from safepatch_core.merging.recipe import Recipe as Recipe
    from safepatch_core.merging.recipe import load_recipe as load_recipe
    from safepatch_core.merging.survive import survive as survive
    from safepatch_core.merging.verification import VerifyResult as VerifyResult
    from safepatch_core.merging.verification import verify as verify
    from safepatch_core.runs.run import RunConfig as RunConfig
    from safepatch_core.runs.run import RunResult as RunResult
    from safepatch_core.runs.run import run as run
    from safepatch_core.runs.sweep import SweepConfig as SweepConfig
    from safepatch_core.runs.sweep import SweepResult as SweepResult
    from safepatch_core.runs.sweep import sweep as sweep

_HOMES = {
    "backends": ("open_backend",),
    "backends.contract": ("Backend",),
    "deriving": ("DeriveConfig", "DeriveResult", "derive"),
    "errors": ("Busy", "IOFailure", "InputError", "OutputError", "SafepatchError", "UsageError"),
    "evaluating": ("EvalConfig", "EvalResult", "evaluate"),
    "files.checkpoint": ("Checkpoint", "open_checkpoint"),
    "integrations.state_dicts": ("merge_state_dicts",),
    "library": ("get_cmake_dir", "get_include", "get_library_dir"),
    "fixes.apply": ("ApplyResult", "apply", "revert"),
    "fixes.build": ("BuildResult", "build", "build_between"),
    "fixes.comparing": ("ReportResult",),
    "fixes.log": ("LogResult", "log"),
    "fixes.memory": ("Applied", "apply_", "revert_"),
    "fixes.reading": ("Fix", "open_fix"),
    "fixes.report": ("report",),
    "fixes.stack": ("FixedCheckpoint", "open_fixed"),
    "merging.api": ("MergeResult", "describe", "merge", "plan", "prepare"),
    "merging.engine": ("EngineOptions",),
    "merging.plan": ("Plan",),
    "merging.quantised.comparison": ("SurviveResult",),
    "merging.recipe": ("Recipe", "load_recipe"),
    "merging.survive": ("survive",),
    "merging.verification": ("VerifyResult", "verify"),
    "runs.run": ("RunConfig", "RunResult", "run"),
    "runs.sweep": ("SweepConfig", "SweepResult", "sweep"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
