"""What development installs is pinned by hash, complete, and within the ranges that users get."""

from __future__ import annotations

import re
import tomllib
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest

requirements = pytest.importorskip("packaging.requirements", reason="packaging reads the requirements")
utils = pytest.importorskip("packaging.utils", reason="packaging compares the names")

ROOT = Path(__file__).parent.parent
PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s\\]+)")


def pins(name: str) -> dict[str, str]:
    """Name → version of a file in which every requirement is exact and has hashes."""
    found: dict[str, str] = {}
    text = re.sub(r"\\\n", " ", (ROOT / name).read_text())
    for line in filter(None, (line.split("#")[0].strip() for line in text.splitlines())):
        pin = PIN.match(line)
        assert pin and re.fullmatch(r"(\s+--hash=sha256:[0-9a-f]{64})+", line[pin.end() :]), line[:100]
        found[utils.canonicalize_name(pin[1])] = pin[2]
    return found


def test_everything_is_pinned_by_hash() -> None:
    for name in ("requirements/dev.txt", "requirements/docs.txt", "requirements/fuzz.txt", "requirements/demo.txt"):
        assert pins(name), name
    assert "torch" not in pins("requirements/dev.txt")


def test_the_pins_hold_all_that_the_project_and_its_pins_need() -> None:
    """Nothing is resolved at installation, so that a package left out would only be missed when it is used."""
    pinned = pins("requirements/dev.txt")
    torch = PIN.search((ROOT / "requirements/torch.txt").read_text())
    assert torch is not None
    pinned["torch"] = torch[2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    extras = project["project"]["optional-dependencies"]
    needed += [line for name, extra in extras.items() if name != "docs" for line in extra]
    for name, version in pinned.items():
        with suppress(metadata.PackageNotFoundError):
            installed = metadata.distribution(name)
            if installed.version.split("+")[0] == version:  # else this is not an environment of `make develop`
                needed += installed.requires or []
    for requirement in map(requirements.Requirement, needed):
        name = utils.canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        assert name in pinned, f"{requirement} is needed and not pinned: make pins"
        assert requirement.specifier.contains(pinned[name], prereleases=True), f"{requirement}, pinned {pinned[name]}"


def test_the_site_is_built_with_what_development_has() -> None:
    pinned, docs = pins("requirements/dev.txt"), pins("requirements/docs.txt")
    assert {name: version for name, version in docs.items() if pinned.get(name, version) != version} == {}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["docs"]]:
        requirement = requirements.Requirement(line)
        assert requirement.specifier.contains(docs[utils.canonicalize_name(requirement.name)])


def test_make_pins_resolves_every_extra() -> None:
    extras = re.search(r"^EXTRAS = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras is not None and {*extras[1].split(), "docs"} == set(project["optional-dependencies"])
