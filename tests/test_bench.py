"""The benchmark suite: names, gates, models, measuring and reporting. Nothing here asserts a time."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from safepatch_core.backends.reference import ReferenceBackend
from safepatch_core.bench import (
    fixes,
    kernels,
    measure,
    merges,
    models,
    quantised,
    registry,
    report,
    results,
    series,
    shape,
    simulate,
    tracing,
)
from safepatch_core.bench.command import command
from safepatch_core.bench.measure import Failed, Red, Skipped
from safepatch_core.errors import InputError, UsageError
from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.fixes import codec
from safepatch_core.merging import rates
from safepatch_core.merging.api import describe, plan
from safepatch_core.merging.quantised.grids import E4M3
from safepatch_core.spec import Kind
from tests.browser import BROWSER, browser

TINY = models.SHAPES["tiny"]


@pytest.fixture
def bench(tmp_path: Path) -> registry.Bench:
    return registry.Bench(workdir=tmp_path, threads=1, rounds=1, backend="reference")


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


# The registry and its gates


def test_every_case_has_its_own_name_and_every_group_a_short_one() -> None:
    cases = registry.cases()
    assert all(case.name == name and case.description for name, case in cases.items())
    groups = {name.partition("/")[0] for name in cases}
    assert groups == {
        "kernels",
        "merge",
        "memory",
        "floor",
        "peers",
        "fixes",
        "derive",
        "shape",
        "profile",
        "sweep",
        "simulate",
    }
    assert {case.name.partition("/")[0] for case in cases.values() if case.short} == groups


def test_a_name_used_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MODULES", ("floor", "floor"))
    with pytest.raises(RuntimeError, match="two cases"):
        registry.cases()


def test_cases_are_selected_by_group_glob_and_name() -> None:
    assert {case.name.partition("/")[0] for case in registry.select(["kernels"])} == {"kernels"}
    assert [case.name for case in registry.select(["merge/0.1B/lora-model/*"])] == [
        "merge/0.1B/lora-model/warm",
        "merge/0.1B/lora-model/cold",
    ]
    with pytest.raises(UsageError, match="no such case.*'speed'"):
        registry.select(["speed"])


def case(name: str, *, gate: Exception | None = None, measured: Exception | None = None) -> registry.Case:
    """A case whose speed is 12.345 s, if its gate and its measure let it be seen."""

    def pass_or_raise(_: registry.Bench) -> None:
        if gate is not None:
            raise gate

    def measure_or_raise(_: registry.Bench) -> registry.Measured:
        if measured is not None:
            raise measured
        return registry.Measured({"merge": {"wall_s": [12.345, 12.345, 12.345]}})

    return registry.Case(f"fake/{name}", "a case of the test", {}, pass_or_raise, measure_or_raise)


def run_cases(monkeypatch: pytest.MonkeyPatch, folder: Path, *chosen: registry.Case) -> tuple[int, str, list[str]]:
    """Exit status, everything printed, and the cases in the results."""
    monkeypatch.setattr(registry, "cases", lambda: {c.name: c for c in chosen})
    found = CliRunner().invoke(command, ["run", "fake", "-o", str(folder), "--rounds", "3"])
    stored = [r["case"] for r in results.load(folder)] if (folder / results.FILE).exists() else []
    return found.exit_code, found.output, stored


def test_a_green_case_shows_and_stores_its_speed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, text, stored = run_cases(monkeypatch, tmp_path / "out", case("green"))
    assert status == 0 and "12.345" in text and stored == ["fake/green"]


@pytest.mark.parametrize(
    "red",
    [
        case("red", gate=Red("other bytes")),
        case("red", measured=Red("other bytes")),
        case("red", gate=Failed(["safepatch"], 70, "other bytes", False)),
        case("red", gate=InputError("other bytes")),
    ],
)
def test_a_red_case_shows_no_speed_and_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, red: registry.Case
) -> None:
    status, text, stored = run_cases(monkeypatch, tmp_path / "out", red)
    assert status == 70 and "RED fake/red" in text and "other bytes" in text
    assert "12.345" not in text and stored == []


def test_a_red_case_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, text, stored = run_cases(monkeypatch, tmp_path / "out", case("red", gate=Red("wrong")), case("green"))
    assert status == 70 and stored == ["fake/green"] and text.count("12.345") == 1


def test_what_cannot_run_here_says_why_and_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, text, stored = run_cases(monkeypatch, tmp_path / "out", case("peer", gate=Skipped("not installed")))
    assert status == 0 and "skipped fake/peer: not installed" in text and stored == []


def test_the_gate_of_merges_sees_one_wrong_byte(monkeypatch: pytest.MonkeyPatch, bench: registry.Bench) -> None:
    merges.equals_reference(bench, [("checkpoint", "tensor"), ("lora", "model")])
    right = ReferenceBackend.apply
    calls = 0

    def wrong(self: ReferenceBackend, block: Any, cuts: Any, out: Any) -> Any:
        nonlocal calls
        found = right(self, block, cuts, out)
        calls += 1
        if calls == 20:
            out[-1] ^= 1
        return found

    monkeypatch.setattr(ReferenceBackend, "apply", wrong)
    with pytest.raises(Red, match="differs"):
        merges.equals_reference(bench, [("checkpoint", "tensor")])


@pytest.mark.parametrize("source", kernels.SOURCES)
@pytest.mark.parametrize("pass_", kernels.PASSES)
def test_the_gate_of_the_passes_is_green_for_the_cpu_engine(pass_: str, source: Any, bench: registry.Bench) -> None:
    kernels._gate("cpu-scalar", pass_, source, bench)


@pytest.mark.parametrize("pass_", kernels.PASSES)
def test_the_gate_of_the_passes_sees_a_wrong_engine(
    pass_: str, monkeypatch: pytest.MonkeyPatch, bench: registry.Bench
) -> None:
    class Wrong(ReferenceBackend):
        @staticmethod
        def _score(block: Any) -> Any:
            w, scored, found = ReferenceBackend._score(block)
            last = scored[-1]
            assert last is not None
            last.eligible[np.argmax(last.key * last.eligible)] = False
            return w, scored, found

        def count_equal(self, block: Any, keys: Any) -> list[int]:
            return [count + 1 for count in super().count_equal(block, keys)]

    monkeypatch.setattr(kernels, "open_engine", lambda name, threads: Wrong())
    with pytest.raises(Red, match=f"disagree on {pass_}"):
        kernels._gate("wrong", pass_, "checkpoint", bench)


# Models


def test_the_same_model_is_the_same_bytes_everywhere(tmp_path: Path) -> None:
    for name in ("one", "two"):
        models.write_set(tmp_path / name, TINY, ("checkpoint", "delta", "lora"))
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert digest(tmp_path / "one" / "base")[:16] == "d7f79f39dc597f54"
    assert digest(tmp_path / "one" / "safety")[:16] == "272f8dc80b3e06a1"
    models.write_set(tmp_path / "other", TINY, seed=1)
    assert digest(tmp_path / "other" / "base") != digest(tmp_path / "one" / "base")


def values(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a bfloat16 checkpoint as float32."""
    found = {}
    for name, entry in open_checkpoint(folder).tensors.items():
        with open(entry.path, "rb") as file:
            file.seek(entry.start)
            bits = np.frombuffer(file.read(entry.nbytes), np.uint16)
        found[name] = (bits.astype(np.uint32) << 16).view(np.float32).reshape(entry.shape)
    return found


@pytest.mark.parametrize("shard_bytes", [models.SHARD_BYTES, 60_000])
def test_models_open_with_the_tensors_of_their_shape(tmp_path: Path, shard_bytes: int) -> None:
    folder = models.write_checkpoint(tmp_path / "model", TINY, shard_bytes=shard_bytes)
    opened = open_checkpoint(folder)
    assert {name: entry.shape for name, entry in opened.tensors.items()} == dict(TINY.tensors())
    assert (opened.index is None) == (len(opened.shards) == 1)
    assert all(sum(t.nbytes for t in shard.tensors) <= shard_bytes for shard in opened.shards)
    assert {entry.dtype for entry in opened.tensors.values()} == {"BF16"}


def test_patches_look_like_fine_tuning(tmp_path: Path) -> None:
    models.write_set(tmp_path / "set", TINY, ("checkpoint", "delta"))
    base, safety = values(tmp_path / "set" / "base"), values(tmp_path / "set" / "safety")
    name = "model.layers.0.mlp.up_proj.weight"
    moved = safety[name] - base[name]
    assert 0.3 < np.mean(moved == 0) < 0.7  # most steps are lost in bfloat16
    assert len(np.unique(np.abs(moved))) < moved.size / 20  # and the others are few distinct values
    assert np.abs(moved).max() < 0.2 * np.abs(base[name]).max()
    assert (safety["model.norm.weight"] == 1).all()
    delta = values(tmp_path / "set" / "safety-delta")[name]
    assert np.abs(delta - moved).max() <= np.abs(base[name]).max() * 2**-8
    assert (values(tmp_path / "set" / "over-safety")[name] != safety[name]).any()


def test_a_sparse_model_has_holes_and_values_in_every_tensor(tmp_path: Path) -> None:
    wide = models.ModelShape("wide", 2048, 1, 8, 2, 4096, 512)
    folder = models.write_checkpoint(tmp_path / "model", wide, sparse=models.RUN_BYTES)
    stat = (folder / "model.safetensors").stat()
    assert stat.st_size > wide.nbytes
    assert 512 * stat.st_blocks < 0.4 * stat.st_size
    for name, tensor in values(folder).items():
        assert tensor.any(), name


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Llama-3-8B", 8.030261248),
        ("Llama-3-70B", 70.553706496),
        ("Llama-3.1-405B", 405.853388800),
        ("Mixtral-8x7B", 46.702792704),
        ("SmolLM2-135M", 0.134515008),
        ("DeepSeek-V3", 671.026419200),
        ("1.1B", 1.100048384),
    ],
)
def test_named_shapes_have_the_real_models_sizes(name: str, billions: float) -> None:
    assert models.shape_named(name.lower()).entries == round(billions * 1e9)


def test_an_fp8_twin_stands_for_the_base(tmp_path: Path) -> None:
    models.write_checkpoint(tmp_path / "base", TINY)
    twin = open_checkpoint(models.write_twin(tmp_path / models.TWIN, TINY))
    base = values(tmp_path / "base")
    name = "model.layers.1.mlp.down_proj.weight"
    codes = np.fromfile(twin.tensors[name].path, np.uint8)[twin.tensors[name].start :][: TINY.hidden * 176]
    apart = np.abs(E4M3.decode(codes) * models.FP8_SCALE - base[name].ravel())
    assert apart.max() < 0.07 / 28 and apart.mean() < 0.05 * np.abs(base[name]).mean()
    assert twin.tensors[f"{name}_scale_inv"].shape == (1, 2)
    assert twin.tensors["lm_head.weight"].dtype == "BF16" and "lm_head.weight_scale_inv" not in twin.tensors


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown model shape.*Llama-3-70B"):
        models.shape_named("llama-9")


def test_the_models_of_other_cases_make_room(tmp_path: Path) -> None:
    small = models.SHAPES["tiny"]
    bench = registry.Bench(workdir=tmp_path, threads=1, disk=5 * small.nbytes)
    folder = bench.models(small)
    with pytest.raises(Skipped, match="disk"):
        bench.models(small, ("checkpoint", "delta"))
    assert (folder / "base").exists()
    bench.models(small, ("delta",))
    assert not (folder / "safety").exists() and (folder / "safety-delta").exists()


def test_models_that_the_user_linked_to_are_left_alone(tmp_path: Path) -> None:
    models.write_set(tmp_path / "mine", models.SHAPES["0.1B"], sparse=1)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "0.1B").symlink_to(tmp_path / "mine")
    bench = registry.Bench(workdir=tmp_path, threads=1, disk=4 * TINY.nbytes + 40_000)
    bench.models(TINY)
    assert (tmp_path / "mine" / "safety").exists()


def test_a_sample_of_a_model_is_recomputed(tmp_path: Path, bench: registry.Bench) -> None:
    from safepatch_core.merging.api import merge

    folder = bench.models(TINY, sparse=merges.SPARSE)
    merge(models.recipe_path(folder), tmp_path / "out", backend="reference")
    names = shape.sample(TINY)
    assert len({name.split(".")[-2] for name in names}) == 7
    shape.check_sample(folder, tmp_path / "out", names, tmp_path)
    entry = open_checkpoint(tmp_path / "out").tensors[names[0]]
    with open(entry.path, "r+b") as file:
        file.seek(entry.start + entry.nbytes - 2)
        file.write(b"\x01\x02")
    with pytest.raises(Red, match=names[0]):
        shape.check_sample(folder, tmp_path / "out", names, tmp_path)


# Measuring


def test_a_process_is_measured_by_itself() -> None:
    code = "import sys; x = bytearray(96 << 20); x[::4096] = b'x' * len(x[::4096]); print('done')"
    large, text = measure.run([sys.executable, "-I", "-S", "-c", code])
    small, _ = measure.run([sys.executable, "-I", "-S", "-c", "pass"])
    assert text == "done\n"
    assert 96 << 20 < large.peak_bytes < 160 << 20
    assert small.peak_bytes < 40 << 20  # less than this very process


def test_a_process_that_fails_or_hangs_says_so() -> None:
    with pytest.raises(Failed, match="ended with 3: no luck"):
        measure.run([sys.executable, "-c", "import sys; print('no luck', file=sys.stderr); sys.exit(3)"])
    with pytest.raises(Failed, match="ran out of time"):
        measure.run(["sleep", "30"], timeout=0.05)


def test_subjects_alternate() -> None:
    order: list[str] = []

    def subject(name: str) -> Callable[[], dict[str, float]]:
        return lambda: order.append(name) or {"wall_s": float(len(order))}  # type: ignore[func-returns-value]

    series = measure.alternate({"a": subject("a"), "b": subject("b")}, 2, lambda: order.append("-"))
    assert "".join(order) == "-a-b-a-b"
    assert series == {"a": {"wall_s": [2.0, 6.0]}, "b": {"wall_s": [4.0, 8.0]}}
    assert measure.ratio([2.0, 6.0, 9.0], [1.0, 2.0, 3.0]) == (3.0, 2.0, 3.0)


@pytest.mark.parametrize("cold", ["0", "1"])
def test_the_copy_reads_everything_and_writes_as_much_as_told(
    tmp_path: Path, bench: registry.Bench, cold: str
) -> None:
    (tmp_path / "in").write_bytes(b"x" * 5_000_001)
    out = tmp_path / "out"
    cost, _ = measure.run([*measure.ISOLATED, merges.COPY, out, "3000000", "1", cold, "2", tmp_path / "in"])
    assert out.stat().st_size == 3_000_000
    assert cost.read_bytes >= 5_000_001 and cost.written_bytes >= 3_000_000


# Results, comparison and pictures


def record(
    name: str, params: dict[str, Any], series: dict[str, dict[str, list[float]]], **more: Any
) -> results.Record:
    made = results.make_record(
        registry.Case(name, "", params, lambda _: None, lambda _: registry.Measured({})),
        registry.Measured(series, more.get("ratios", []), more.get("facts", {})),
        3,
        {"command": "safepatch bench run"},
    )
    loaded: results.Record = json.loads(json.dumps(made))
    return loaded


def run_costs(seconds: float) -> dict[str, list[float]]:
    return {
        "wall_s": [seconds, 1.1 * seconds, 1.2 * seconds],
        "peak_bytes": [9e7, 9e7, 9e7],
        "moved_bytes_per_s": [3e9 / seconds] * 3,
    }


def some_records() -> list[results.Record]:
    found = []
    for size, entries in (("0.1B", 1e8), ("0.3B", 3e8)):
        params = {"size": size, "entries": entries}
        merge_params = {**params, "variant": "scopes", "cache": "warm"}
        pair = {"checkpoint-tensor": run_costs(1.0), "floor": run_costs(0.5)}
        ratios = [("checkpoint-tensor", "floor")]
        found.append(record(f"merge/{size}/scopes/warm", merge_params, pair, ratios=ratios))
        limit = {**params, "limit_bytes": 1 << 27}
        found.append(record(f"memory/{size}/128MiB", limit, {"merge": run_costs(1.0)}))
        both = {"safepatch": run_costs(1.0), "<peer>": run_costs(20.0)}
        found.append(record(f"peers/{size}/<peer>", params, both, ratios=[("<peer>", "safepatch")]))
    stages = {"wall_s": [1.0], "reader/read_s": [0.5], "reader/waiting_s": [0.5], "ends/before_s": [0.1]}
    found.append(record("profile/0.1B/checkpoint-tensor/warm", {}, {"merge": stages}))
    passes = {"1 thread": {"entries_per_s": [1e9], "bytes_per_s": [8e9]}, "memcpy": {"bytes_per_s": [1e10]}}
    engine = {"engine": "cpu-avx2", "pass": "apply", "source": "delta"}
    found.append(record("kernels/cpu-avx2/apply/delta", engine, passes, facts={"bytes_per_entry": 8.0}))
    return found


def test_a_record_is_complete_in_itself(tmp_path: Path) -> None:
    for made in some_records():
        results.append(tmp_path, made)
    loaded = results.load(tmp_path)
    assert [r["case"] for r in loaded] == [r["case"] for r in some_records()]
    assert all(r["machine"]["cores"] >= 1 and r["versions"]["numpy"] and "commit" in r for r in loaded)
    text = "\n".join(results.lines(loaded[0]))
    assert "checkpoint-tensor / floor: 2.00×" in text and "1.100 s" in text


def test_a_damaged_result_names_its_line(tmp_path: Path) -> None:
    (tmp_path / results.FILE).write_text('{"case": "a"}\n{"case": \n')
    with pytest.raises(InputError, match="line 2"):
        results.load(tmp_path)
    with pytest.raises(InputError, match="cannot read results"):
        results.load(tmp_path / "nothing")


def test_compare_tells_better_from_worse_and_from_noise() -> None:
    def of(seconds: float, rate: float) -> list[results.Record]:
        return [record("merge/x", {}, {"m": {"wall_s": [seconds] * 3, "moved_bytes_per_s": [rate] * 3}})]

    better = "\n".join(results.compare(of(2.0, 1e9), of(1.0, 2e9)))
    worse = "\n".join(results.compare(of(1.0, 2e9), of(2.0, 1e9)))
    assert better.count("better") == 2 and "0.50×" in better and "2.00×" in better
    assert worse.count("worse") == 2
    noisy = [record("merge/x", {}, {"m": {"wall_s": [0.9, 1.0, 1.3]}})]
    assert "within the spread" in "\n".join(results.compare(of(1.2, 1e9), noisy))
    assert results.compare(of(1.0, 1e9), [record("merge/y", {}, {})]) == []


def test_pictures_and_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = {path.name: path for path in report.write(tmp_path, some_records())}
    assert set(written) == {*(f"{name}.png" for name in report.PLOTS), "report.html"}
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for name, path in written.items() if ".png" in name)
    page = written["report.html"].read_text()
    assert page.count("data:image/png;base64,") == len(report.PLOTS)
    assert re.search("https?:", page) is None and "<peer>" not in page and "&lt;peer&gt;" in page
    assert "2.00" in page and "merge/0.3B/scopes/warm" in page


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
def test_the_page_fits_a_phone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.write(tmp_path, some_records())
    with browser(tmp_path / "profile") as page:
        page.size(390)
        page.call("Page.navigate", url=(tmp_path / "report.html").as_uri())
        page.wait("Page.loadEventFired")
        assert page.value("innerWidth") == 390 and page.value("document.documentElement.scrollWidth") <= 390


def test_a_page_of_nothing_to_draw(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert [path.name for path in report.write(tmp_path, some_records()[:0])] == ["report.html"]


# Profile and rates


def test_a_trace_has_a_lane_per_thread(bench: registry.Bench) -> None:
    measured = tracing._measure("tiny", "checkpoint", "tensor", "warm", bench)
    (name, text), *_ = measured.files.items()
    assert name == measured.facts["trace"] == "trace-tiny-checkpoint-tensor-warm.json"
    events = json.loads(text)["traceEvents"]
    lanes = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert {"reader", "engine", "writer"} <= lanes
    spans = [e for e in events if e["ph"] == "X"]
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in spans)
    assert sum("q_proj" in e["name"] for e in spans if e.get("cat") == "work") == 2
    assert {"reader/read_s", "engine/work_s", "writer/write_s", "ends/after_s"} <= measured.series["merge"].keys()


def test_a_summary_adds_up() -> None:
    spans = [tracing.Span("a", "read", "x", 1.0, 2.0), tracing.Span("b", "work", "x", 2.0, 4.0)]
    assert tracing.summary(spans, 5.0) == {
        "a": {"read": 1.0, "waiting": 2.0},
        "b": {"work": 2.0, "waiting": 1.0},
        "ends": {"before": 1.0, "after": 1.0},
    }


def test_rates_are_kept_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert rates.load_rates() is None
    given = {name: float(i) for i, name in enumerate(rates.NAMES, 1)}
    path = rates.save_rates(given)
    assert path == tmp_path / "safepatch" / "rates.json" and rates.load_rates() == given
    for damage in ("", "[]", "{}", json.dumps(given | {rates.READ: 0}), json.dumps(given | {rates.READ: "fast"})):
        path.write_text(damage)
        assert rates.load_rates() is None


def test_rates_of_other_versions_serve(
    bench: registry.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of a later version are ignored; for a form that an older one didn't know the slowest of its pass holds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given = {name: float(i) for i, name in enumerate(rates.NAMES, 1)}
    path = rates.save_rates(given)
    path.write_text(json.dumps(given | {"merge_of_the_future_entries_per_s": 1.0}))
    assert rates.load_rates() == given
    older = {name: rate for name, rate in given.items() if "lora" not in name}
    path.write_text(json.dumps(older))
    assert rates.load_rates() == older
    made = plan(models.recipe_path(bench.models(TINY, ("checkpoint", "lora")), "lora"), backend="reference")
    described = describe(made)
    slowest = older | {rates.engine_rate("merge", "lora"): older[rates.engine_rate("merge", "checkpoint")]}
    assert rates.predict(described, older) == rates.predict(described, slowest)
    assert rates.predict(described, {}) == 0.0


def test_predictions_follow_the_plan(bench: registry.Bench) -> None:
    folder = bench.models(TINY, ("checkpoint", "lora"))
    known = dict.fromkeys(rates.NAMES, 1e6) | {rates.STARTUP: 1.0, rates.CORES: 2.0, rates.STALLS: 1.0}

    def seconds(kind: Kind, scope: str, cached: float, **changed: float) -> float:
        made = plan(models.recipe_path(folder, kind, scope), backend="reference")
        return rates.predict(describe(made), known | changed, cached=cached)

    warm = seconds("checkpoint", "tensor", 1.0)
    assert 1.0 < warm < seconds("checkpoint", "tensor", 0.0) < seconds("checkpoint", "model", 0.0)
    stalled = seconds("checkpoint", "tensor", 1.0, **{rates.STALLS: 2.0})
    assert stalled == pytest.approx(1.0 + 2.0 * (warm - 1.0))
    # A disk ten times slower is all that counts, and takes what its bytes take.
    made = plan(models.recipe_path(folder), backend="reference")
    slow = seconds("checkpoint", "tensor", 0.0, **{rates.DISK_READ: 1e4, rates.DISK_WRITE: 1e9})
    assert slow == pytest.approx(1.0 + made.bytes_to_read / 1e4, rel=1e-3)


# Quantised bases

SMALL = models.DeepSeekShape("small-deepseek", 128, 3, 2, 2, 192, 320, experts=2, dense=1, expert=160, q_rank=32)


def test_both_bases_are_merged_in_turn(bench: registry.Bench) -> None:
    quantised.equals_reference(bench)
    measured = quantised._measure("tiny", bench)
    assert measured.ratios == [("fp8-lora", "bf16-lora"), ("fp8-delta", "bf16-delta")]
    assert all(len(measured.series[name]["wall_s"]) == bench.rounds for pair in measured.ratios for name in pair)
    assert measured.facts["moved_share-lora"] < measured.facts["moved_share-delta"] < 1


def test_the_gate_of_twins_sees_one_wrong_byte(monkeypatch: pytest.MonkeyPatch, bench: registry.Bench) -> None:
    def wrong(a: Path, b: Path) -> None:
        raise Red(f"{b.name} differs from {a.name}")

    monkeypatch.setattr(quantised, "same_bytes", wrong)
    with pytest.raises(Red, match="engine differs from reference"):
        quantised.equals_reference(bench)


def test_a_mixture_with_latent_attention_is_planned_and_a_sample_recomputed(
    bench: registry.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.SHAPES, SMALL.name, SMALL)
    bench.backend = "cpu"
    measured = quantised._plan(SMALL.name, bench)
    assert measured.facts["targets"] == sum(models.is_target(*of) for of in SMALL.tensors())
    assert any("experts.1.gate_proj" in name for name in measured.facts["sample"])
    assert len(measured.series["plan"]["peak_bytes"]) == bench.rounds
    unchanged = lambda recipe, out, **engine: shutil.copytree(recipe.parent / models.TWIN, out)  # noqa: E731
    monkeypatch.setattr(quantised, "merge", unchanged)
    with bench.scratch() as scratch, pytest.raises(Red, match="changed no code"):
        folder = bench.workdir / "models" / f"{SMALL.name}-sparse"
        quantised.check_sample(folder, measured.facts["sample"], scratch, bench)


# Simulated machines


def test_the_slowest_part_bounds_a_machine(bench: registry.Bench) -> None:
    """A processor that is shared, then one reader or hash, then the disk; shards at once take their lanes' bound."""
    known = dict.fromkeys(rates.NAMES, 1e9) | {
        rates.STARTUP: 1.0,
        rates.STALLS: 1.5,
        rates.READ: 1e8,
        rates.HASH: 1e7,
    }
    description = simulate.described(bench, TINY)
    read, written = description["bytes_read"], description["bytes_written"]

    def found(cores: int, disk: float, streams: int) -> simulate.Prediction:
        return next(simulate.predictions(description, known, [cores], [disk], [streams]))

    one = found(64, 1e9, 1)
    assert one.bound == "hash" and one.seconds == pytest.approx(1 + 1.5 * written / 1e7)
    assert found(64, 1e9, 4).seconds == pytest.approx(1 + 1.5 * written / 4e7)
    assert found(1, 1e9, 4).bound == "processor"
    slow = found(64, 1e6, 4)
    assert slow.bound == "disk" and slow.seconds == pytest.approx(1 + 1.5 * (read + written) / 1e6)
    every = list(simulate.predictions(description, known, (4, 8), (3e9, 7e9), (1, 4)))
    lines = simulate.table(every)
    assert len(every) == 8 and len(lines) == 5 and lines[0].split() == ["disk", "shards", "4", "cores", "8", "cores"]
    assert all(of.seconds <= other.seconds for of, other in zip(every[1::2], every[::2], strict=True))


def test_simulate_tells_people_and_asks_for_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = CliRunner().invoke(command, ["simulate", "tiny"])
    assert isinstance(found.exception, UsageError) and "floor --save" in str(found.exception)
    found = CliRunner().invoke(command, ["simulate", "tiny", "--rate", "speed=3"])
    assert isinstance(found.exception, UsageError) and "unknown rate 'speed'" in str(found.exception)
    rates.save_rates({name: 1e9 for name in rates.NAMES} | {rates.STALLS: 1.0})
    found = CliRunner().invoke(command, ["simulate", "tiny", "--cores", "4", "--disk", "7GB", "--rate", "stalls=2"])
    assert found.exit_code == 0 and "7 GB/s" in found.output and len(found.output.splitlines()) == 3


def test_a_machine_here_is_checked_on_one_core_and_on_two(
    bench: registry.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = dict.fromkeys(rates.NAMES, 1e9) | {rates.STARTUP: 1.0, rates.STALLS: 1.0}
    monkeypatch.setattr(simulate, "measure_rates", lambda bench, log: known)
    measured = simulate._check("tiny", "warm", bench)
    assert measured.series.keys() == measured.facts["predicted_s"].keys()
    assert measured.facts["rates"] == known


# Candidates of a sweep


def test_candidates_are_measured_in_one_process_and_equal_their_merges(bench: registry.Bench) -> None:
    series.equals_merges(bench)
    measured = series._measure("tiny", bench)
    assert all(len(measured.series[name][q]) == bench.rounds for name in series.SUBJECTS for q in ("wall_s", "cpu_s"))
    assert {pair[1] for pair in measured.ratios} == {"first", "merge"}


def test_the_gate_of_candidates_sees_one_wrong_byte(monkeypatch: pytest.MonkeyPatch, bench: registry.Bench) -> None:
    monkeypatch.setattr(series, "files_digest", lambda folder: "another")
    with pytest.raises(Red, match="differs from its merge alone"):
        series.equals_merges(bench)


# Fix files


@pytest.mark.parametrize("measure_", [fixes._measure_build, fixes._measure_apply, fixes._measure_in_place])
def test_fixes_are_measured_beside_what_they_do(measure_: Any, bench: registry.Bench) -> None:
    measured = measure_("tiny", "warm", bench)
    assert all(measured.series[name]["wall_s"] for pair in measured.ratios for name in pair)
    assert 5 * measured.facts["fix_bytes"] < TINY.nbytes


def test_the_floor_in_place_reads_all_and_writes_where_a_fix_changes_something(
    tmp_path: Path, bench: registry.Bench
) -> None:
    from safepatch_core.fixes.build import build
    from safepatch_core.fixes.reading import open_fix

    folder = bench.models(TINY)
    made = build(models.recipe_path(folder), tmp_path / "fix", backend="reference")
    (shard,) = open_checkpoint(folder / "base").shards
    with open_fix(made.out) as fix:
        pieces = fixes.pieces(shard, fix)
        touched = [entry for entry in shard.tensors if entry.name in fix.tensors]
    assert [at for at, _, _ in pieces] == [0, *np.cumsum([n for _, n, _ in pieces])[:-1]]
    assert sum(n for _, n, _ in pieces) == shard.size
    assert sum(n for _, n, back in pieces if back) == sum(entry.nbytes for entry in touched) > 0
    before = digest(folder / "base")
    (tmp_path / "plan").write_text(json.dumps({str(shard.path): pieces}))
    cost, _ = measure.run([*measure.ISOLATED, fixes.IN_PLACE, "2", tmp_path / "plan"])
    assert cost.read_bytes >= shard.size and cost.written_bytes >= sum(n for _, n, back in pieces if back)
    assert digest(folder / "base") == before


def test_the_gate_of_fixes_sees_one_wrong_byte(monkeypatch: pytest.MonkeyPatch, bench: registry.Bench) -> None:
    def wrong(source: Path, target: Path) -> Path:
        path = fixes.shards(shutil.copytree(source, target))["model.safetensors"]
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        return target

    monkeypatch.setattr(fixes, "copied", wrong)
    with pytest.raises(Red, match="model.safetensors of model differs from merged's"):
        fixes.applies(bench)


def test_the_gate_of_decoding_sees_a_wrong_codec(monkeypatch: pytest.MonkeyPatch, bench: registry.Bench) -> None:
    fixes._decodes(bench)
    monkeypatch.setattr(codec, "settle", lambda *_: None)
    with pytest.raises(Red, match=r"C\+\+ decodes another window at 1%"):
        fixes._decodes(bench)


@pytest.mark.parametrize("peer", fixes.PEERS)
def test_patches_of_others_lead_to_the_same_weights(peer: str, bench: registry.Bench) -> None:
    try:
        measured = fixes._measure_peer("tiny", peer, bench)
    except Skipped as reason:
        pytest.skip(str(reason))
    assert measured.facts[f"{peer}_bytes"] > 0 < measured.facts["fix_bytes"]


# Peers


def test_plain_torch_computes_the_recipe() -> None:
    """Where nothing is random and no scores are equal, the peer's bits are the reference's."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    from dataclasses import replace

    from safepatch_core.backends.contract import Bits
    from safepatch_core.bench import plain_torch
    from safepatch_core.spec import KEEP_ALL

    draw = np.random.default_rng(0)
    base, *patched = (draw.standard_normal(5000, dtype=np.float32) for _ in range(3))
    block = kernels.make_block("checkpoint", 5000)
    patches = tuple(
        replace(p, values=Bits(x.view(np.uint32), "F32"), keep=KEEP_ALL)
        for p, x in zip(block.patches, patched, strict=True)
        if p is not None
    )
    block = replace(block, base=Bits(base.view(np.uint32), "F32"), patches=patches)
    out = np.zeros(5000, np.uint32)
    ReferenceBackend().merge(block, kernels.quotas(block), out)
    settings = [{"top": models.TOP[name], "retain": 1.0} for name in models.PATCHES]
    merged = plain_torch.merge_tensor(torch.from_numpy(base), [torch.from_numpy(x) for x in patched], settings)
    assert (merged.numpy().view(np.uint32) == out).all()
