"""What is shipped: sources from which a wheel is built, and a wheel of real files that merges without torch."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.oracle import Tensor, save_file

ROOT = Path(__file__).parents[1]
pytest.importorskip("build", reason="builds the archives")
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the sources")


def run(*command: object, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, and the wheel that was built from it; quickly, so without optimisation."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", folder]
    run(*command, ROOT, cwd=folder, SAFEPATCH_CXXFLAGS="-O0")
    return folder


@pytest.fixture(scope="module")
def installed(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(built / "site")
    return built / "site"


def test_the_wheel_holds_every_module_and_nothing_beside(installed: Path) -> None:
    def modules(root: Path) -> set[str]:
        suffixes = (".py", ".pyi", ".typed", ".html", ".css", ".h")
        found = {Path(at, f) for at, _, files in os.walk(root / "safepatch_core", followlinks=True) for f in files}
        return {str(path.relative_to(root)) for path in found if path.suffix in suffixes}

    ours = {name for name in modules(ROOT) if not name.startswith("safepatch_core/bench/psa/")}
    assert modules(installed) == ours and "safepatch_core/kernels/apply.py" in ours
    tops = {path.name.split("-")[0] for path in installed.iterdir()}
    assert tops == {"safepatch_core", "safepatch"}  # and its metadata


def test_the_wheel_holds_the_library_and_real_files(installed: Path, built: Path) -> None:
    lib = installed / "safepatch_core/lib"
    assert {p.name for p in lib.rglob("*") if p.is_file() and ".so." not in p.name} == {
        "libsafepatch.a",
        "libsafepatch.so",
        "safepatch.pc",
        "safepatchConfig.cmake",
        "safepatchConfigVersion.cmake",
    }
    assert (installed / "safepatch_core/py.typed").is_file()
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [info for info in archive.infolist() if (info.external_attr >> 28) == 0o12], "symbolic links"
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = [member.name.split("/", 1)[-1] for member in archive]
        assert not [member for member in archive if member.issym() or member.islnk()]
    assert {"csrc/CMakeLists.txt", "csrc/passes.inl", "examples/embed/c/merge.c", "LICENSE"} <= set(names)
    assert not [name for name in names if name.startswith("tests/")]


SCRIPT = """
import sys
sys.modules["torch"] = None                      # importing it fails
import safepatch_core
from pathlib import Path
merged = safepatch_core.merge("recipe.yaml", "out", backend="cpu")
safepatch_core.verify("out", "recipe.yaml")
assert merged.changed > 0
print(safepatch_core.__file__)
"""


def test_the_wheel_merges_without_torch(installed: Path, tmp_path: Path) -> None:
    for name, data in (("base", bytes(4000)), ("tuned", bytes([0, 0, 128, 63]) * 1000)):
        (tmp_path / name).mkdir()
        save_file(tmp_path / name / "model.safetensors", {"a.weight": Tensor("F32", (10, 100), data)})
    recipe = {"base": "base", "patches": [{"name": "p", "source": "tuned", "top": 0.1}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = run(sys.executable, "-c", SCRIPT, cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(found.strip()).is_relative_to(installed)
    told = run(sys.executable, "-m", "safepatch_core", "config", "--cflags", cwd=tmp_path, PYTHONPATH=str(installed))
    assert told.strip() == f"-I{installed}/safepatch_core/include"
