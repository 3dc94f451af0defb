"""The house stands: a room imports only from the floors below its own, and no import goes round in a circle."""

from __future__ import annotations

import ast
import os
from graphlib import TopologicalSorter
from pathlib import Path

import safepatch_core

PACKAGE = Path(safepatch_core.__file__).parent
# From the top down; rooms of one floor do not know each other. What is not named is the ground.
FLOORS = (
    "bench",
    "commands",
    "runs",
    "evaluating",
    "deriving",
    "integrations",
    "fixes",
    "merging",
    "files",
    "backends",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; `__main__` and `__init__` of the package itself aside."""
    found = [Path(at, f) for at, _, files in os.walk(PACKAGE, followlinks=True) for f in files if f.endswith(".py")]
    parts = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in found}
    return {
        ".".join(p[:-1] if p[-1] == "__init__" else p): path
        for path, p in parts.items()
        if len(p) > 1 or p[0][0] != "_"
    }


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules of the package that a file names in import statements, wherever they stand in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("safepatch_core"):
            home = (node.module or "").removeprefix("safepatch_core").lstrip(".")
            submodules = {f"{home}.{name.name}".lstrip(".") for name in node.names} & known
            found |= submodules or {home} & known
    return found


ARROWS = {name: imports(path, set(modules())) for name, path in modules().items()}


def test_imports_go_down() -> None:
    def floor(module: str) -> int:
        return FLOOR.get(module.split(".")[0], len(FLOORS))

    wrong = [
        f"{above} imports {below}"
        for above, belows in ARROWS.items()
        for below in belows
        if floor(below) < floor(above)
        or (floor(below) == floor(above) < len(FLOORS) and below.split(".")[0] != above.split(".")[0])
    ]
    assert not wrong
    assert "merging.plan" in ARROWS["merging.stream"] and "backends" in ARROWS["merging.engine"]  # it does see them


def test_no_circles() -> None:
    # A package's own __init__ may import its rooms; whoever imports a room passes through it, which is no circle.
    TopologicalSorter(
        {above: {b for b in belows if not above.startswith(f"{b}.")} for above, belows in ARROWS.items()}
    ).prepare()
