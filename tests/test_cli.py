"""What every command promises: quick help, lean imports, one line and the right status for each failure."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from safepatch_core.errors import InputError
from safepatch_core.merging import rates

HEAVY = ("torch", "transformers", "triton", "peft", "safetensors")


def safepatch(*args: str | Path, chunk: int | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    module = ["safepatch_core"] if chunk is None else ["tests.chunked", str(chunk)]
    command = [sys.executable, "-m", *module, *map(str, args)]
    root, given = Path(__file__).parents[1], {**os.environ, **env}
    return subprocess.run(command, capture_output=True, text=True, env=given, timeout=120, cwd=root)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    table, offset = {}, 0
    for name, array in tensors.items():
        table[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    header = json.dumps(table).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"".join(a.tobytes() for a in tensors.values()))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    base = {"layer.weight": rng.standard_normal((8, 16), dtype=np.float32), "norm": np.ones(8, dtype=np.float32)}
    for name in ("base", "safety", "over-safety"):
        change = 0 if name == "base" else rng.standard_normal((8, 16), dtype=np.float32)
        tensors = {**base, "layer.weight": base["layer.weight"] + np.float32(0.1) * change}
        write_safetensors(tmp_path / name / "model.safetensors", tensors)
    (tmp_path / "base" / "config.json").write_text("{}")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "base: base\npatches:\n"
        "  - {name: safety, source: safety, top: 0.3, retain: 0.5}\n"
        "  - {name: over-safety, source: over-safety, top: 0.2, retain: 0.5}\n"
    )
    return path


def imported(*args: str | Path) -> set[str]:
    """Modules that a command has imported when it ends."""
    code = (
        "import sys\nfrom safepatch_core.commands.cli import main\nsys.argv[1:] = sys.argv[1:]\n"
        "try:\n    main()\nfinally:\n    print(*sys.modules, file=open(sys.argv[0] + '.modules', 'w'))\n"
    )
    script = Path(str(args[-1])).parent / "probe.py" if len(args) > 1 else Path(os.environ["PROBE_DIR"]) / "probe.py"
    script.write_text(code)
    subprocess.run([sys.executable, script, *map(str, args)], check=True, capture_output=True, timeout=120)
    return set(Path(f"{script}.modules").read_text().split())


def test_help_imports_next_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBE_DIR", str(tmp_path))
    modules = imported("--help")
    assert not modules & {*HEAVY, "numpy", "pydantic", "yaml"}


def test_plan_and_merge_never_import_torch(recipe: Path, tmp_path: Path) -> None:
    modules = imported("plan", recipe)
    assert not modules & {*HEAVY, "safepatch_core.merging.sources.adapter", "safepatch_core.fixes.reading"}
    assert not imported("merge", recipe, "--backend", "cpu", "-o", tmp_path / "out") & set(HEAVY)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_every_command_has_help() -> None:
    listing = safepatch("--help")
    assert listing.returncode == 0
    commands = re.findall(r"^  ([a-z]+)  ", listing.stdout.split("Commands:")[1], re.MULTILINE)
    assert {"merge", "plan", "verify", "derive", "eval", "run", "bench", "selftest"} <= set(commands)
    for command in commands:
        assert safepatch(command, "--help").returncode == 0, command


def test_merge_verify_and_plan_agree(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merged = safepatch("merge", recipe, "-o", out, "--backend", "cpu", "--json")
    assert merged.returncode == 0, merged.stderr
    result = json.loads(merged.stdout)
    assert result["counts"]["safety"]["selected"] == round(0.3 * 128)
    planned = json.loads(safepatch("plan", recipe, "--backend", "cpu", "--json").stdout)
    assert planned["bytes_read"] == result["bytes_read"]
    assert planned["bytes_written"] == result["bytes_written"] == (out / "model.safetensors").stat().st_size
    assert safepatch("verify", out).returncode == 0
    assert safepatch("verify", out, "--recipe", recipe, "--backend", "reference").returncode == 0
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=out, check=True)


def test_verify_finds_every_kind_of_damage(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert safepatch("merge", recipe, "-o", out, "--quiet").returncode == 0
    for name in ("model.safetensors", "config.json", "README.md", "safepatch.json", "SHA256SUMS"):
        whole = (out / name).read_bytes()
        for at in {0, len(whole) // 2, len(whole) - 1}:
            damaged = bytearray(whole)
            damaged[at] ^= 1
            (out / name).write_bytes(damaged)
            assert safepatch("verify", out).returncode == 65, (name, at)
        (out / name).write_bytes(whole)
    (out / "stray").touch()
    assert "stray" in safepatch("verify", out).stderr
    (out / "stray").unlink()
    (out / "config.json").unlink()
    assert "config.json: missing" in safepatch("verify", out).stderr


def test_verify_never_hangs_nor_guesses(recipe: Path, tmp_path: Path) -> None:
    """A pipe in the place of any file, and a file that is listed twice."""
    out = tmp_path / "out"
    assert safepatch("merge", recipe, "-o", out, "--quiet").returncode == 0
    for name in sorted(os.listdir(out)):
        whole = (out / name).read_bytes()
        (out / name).unlink()
        os.mkfifo(out / name)
        found = safepatch("verify", out, "--json")
        assert found.returncode == 65 and name in found.stdout + found.stderr, (name, found.stderr)
        (out / name).unlink()
        (out / name).write_bytes(whole)
    sums = (out / "SHA256SUMS").read_text()
    (out / "SHA256SUMS").write_text(sums + f"{'0' * 64}  config.json\n")
    assert "names a file again" in safepatch("verify", out).stderr
    (out / "SHA256SUMS").write_text(sums)
    assert json.loads(safepatch("verify", out, "--json").stdout)["ok"] is True


def test_verify_with_another_recipe_says_where_it_differs(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert safepatch("merge", recipe, "-o", out, "--quiet").returncode == 0
    recipe.write_text(recipe.read_text() + "seed: 1\n")
    found = safepatch("verify", out, "--recipe", recipe)
    assert found.returncode == 65 and "model.safetensors: differs from the recipe" in found.stderr


@pytest.mark.parametrize(
    ("args", "status", "text"),
    [
        (["merge"], 64, "Missing argument"),
        (["merge", "no.yaml", "-o", "out"], 64, "no.yaml"),
        (["merge", "RECIPE", "-o", "OUT", "--memory-limit", "lots"], 64, "not a size"),
        (["merge", "RECIPE", "-o", "OUT", "--memory-limit", "1KiB"], 64, "16MiB"),
        (["merge", "RECIPE", "-o", "OUT", "--threads", "0"], 64, "--threads"),
        (["merge", "RECIPE", "-o", "BASE"], 65, "overlaps an input"),
        (["merge", "RECIPE", "-o", "/proc/none/out"], 73, "cannot create"),
        (["frobnicate"], 64, "No such command"),
        (["verify", "BASE"], 65, "SHA256SUMS"),
    ],
)
def test_failures_are_one_line_with_their_status(
    recipe: Path, tmp_path: Path, args: list[str], status: int, text: str
) -> None:
    places = {"RECIPE": recipe, "OUT": tmp_path / "out", "BASE": tmp_path / "base"}
    result = safepatch(*(places.get(a, a) for a in args))
    assert result.returncode == status, result.stderr
    assert text in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == "" and not (tmp_path / "out").exists()


def test_an_engine_that_cannot_run_is_an_error(recipe: Path, tmp_path: Path) -> None:
    result = safepatch("merge", recipe, "-o", tmp_path / "out", "--backend", "triton", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 64 and "triton" in result.stderr


def test_merge_is_the_same_for_any_way_of_doing_it(recipe: Path, tmp_path: Path) -> None:
    digests = set()
    for i, (options, chunk) in enumerate(
        [
            (["--backend", "reference"], None),
            (["--backend", "cpu", "--threads", "1"], None),
            (["--backend", "cpu", "--threads", "3", "--memory-limit", "16MiB"], 4),
            (["--backend", "reference"], 7),
        ]
    ):
        out = tmp_path / f"out{i}"
        assert safepatch("merge", recipe, "-o", out, *options, chunk=chunk).returncode == 0
        digests.add((out / "SHA256SUMS").read_bytes())
    assert len(digests) == 1


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("chunk", [None, 40])
def test_the_plan_foretells_every_byte(recipe: Path, tmp_path: Path, scope: str, chunk: int | None) -> None:
    recipe.write_text(recipe.read_text() + f"scope: {scope}\n")
    planned = json.loads(safepatch("plan", recipe, "--json", chunk=chunk).stdout)
    merged = json.loads(safepatch("merge", recipe, "-o", tmp_path / "out", "--json", chunk=chunk).stdout)
    assert planned["passes"] == (2 if chunk or scope == "model" else 1)
    assert planned["bytes_read_at_most"] is (scope == "model")
    assert merged["bytes_read"] == planned["bytes_read"]  # the only target shares out its ties, so that no list does
    assert merged["bytes_written"] == planned["bytes_written"]


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_the_time_is_at_most_where_the_bytes_are(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    """Lists of the first look at a whole model may spare the second one, which the time has in full as well."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rates.save_rates(dict.fromkeys(rates.NAMES, 1.0))
    recipe.write_text(recipe.read_text() + f"scope: {scope}\n")
    lines = dict(
        line.split(": ", 1) for line in safepatch("plan", recipe, "--backend", "cpu").stdout.splitlines()[:12]
    )
    for row in ("read", "time"):
        assert lines[row].strip().startswith("at most ") is (scope == "model"), lines[row]


@pytest.mark.parametrize("mark", ["\x1b[2J", "\u200b", "\u200f", "\u061c", "\ufeff", "\u202e", "\n"])
def test_names_cannot_drive_a_terminal(mark: str) -> None:
    line = str(InputError("refused", file=f"a{mark}b", tensor=f"c{mark}d"))
    assert line.isprintable() and mark not in line and "\\" in line


@pytest.mark.parametrize("words", [[], ["bench"]])
def test_bare_commands_print_their_help_as_help(words: list[str]) -> None:
    done = safepatch(*words)
    assert done.returncode == 64 and not done.stdout
    lines = done.stderr.splitlines()
    assert lines[0].startswith("Usage: ") and "Commands:" in lines and "\\n" not in done.stderr


def test_a_reader_that_goes_away_is_an_io_failure_and_no_bug(recipe: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "safepatch_core", "plan", str(recipe), "--tensors"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 74 and not done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_failure(recipe: Path, tmp_path: Path, closed: str) -> None:
    command = [sys.executable, "-m", "safepatch_core", "merge", str(recipe), "-o", str(tmp_path / "out")]
    done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *command], capture_output=True, text=True)
    assert done.returncode == 0 and "bug" not in done.stderr and (tmp_path / "out" / "safepatch.json").is_file()


@pytest.mark.parametrize("command", ["merge", "build"])
def test_an_empty_output_is_not_this_directory(recipe: Path, command: str) -> None:
    done = safepatch(command, recipe, "-o", "")
    assert done.returncode == 64 and done.stderr == "safepatch: Invalid value for '-o' / '--output': it is empty.\n"


@pytest.mark.parametrize("command", ["verify", "log"])
def test_a_checkpoint_that_is_not_there(tmp_path: Path, command: str) -> None:
    done = safepatch(command, tmp_path / "nope")
    assert done.returncode == 65 and done.stderr == f"safepatch: {tmp_path / 'nope'}: no such file or directory\n"


def test_a_misspelt_command_is_told_its_neighbours() -> None:
    done = safepatch("merg")
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr == "safepatch: No such command 'merg'. Did you mean merge?\n"


def test_what_could_not_be_created_leaves_nothing_to_resume(recipe: Path) -> None:
    done = safepatch("merge", recipe, "-o", recipe / "out")
    assert done.returncode == 73 and "cannot create the output" in done.stderr and "--resume" not in done.stderr


def test_nothing_is_said_of_steps_lost_in_rounding_where_none_are(recipe: Path, tmp_path: Path) -> None:
    done = safepatch("merge", recipe, "-o", tmp_path / "out")
    assert "(100.0%)\n" in done.stdout and "lost" not in done.stdout
