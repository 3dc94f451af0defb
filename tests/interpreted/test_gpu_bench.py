"""`bench gpu` without a GPU: its byte counts, its order and time limit, its gate, its figures and its lanes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from safepatch_core.backends import passes
from safepatch_core.backends.contract import Bits, Cut
from safepatch_core.backends.device import InterpretedDevice
from safepatch_core.backends.reference import ReferenceBackend
from safepatch_core.backends.selftest import make_block
from safepatch_core.backends.triton import TritonBackend
from safepatch_core.bench import gpu
from safepatch_core.bench.command import command
from safepatch_core.bench.lab import HostClock, Lab, TracedDevice
from safepatch_core.bench.measure import Red, Skipped
from safepatch_core.bench.registry import Bench
from safepatch_core.kernels.launch import BLOCK
from safepatch_core.spec import COMBINE
from tests.interpreted.fake_device import FakeDevice
from tests.interpreted.test_triton_pipeline import ROW, SETTING, TABLES

TINY = replace(gpu.SMALL, sizes=(BLOCK,), large=BLOCK, tall=3 * BLOCK, repeats=1)


class Ticks:
    """Time that passes by one with every moment that a fake device really comes to."""

    def __init__(self, device: FakeDevice) -> None:
        self._device, self._now = device, 0

    def mark(self, stream: Any) -> list[int]:
        moment: list[int] = []

        def pass_by() -> None:
            self._now += 1
            moment.append(self._now)

        self._device._add("mark", stream, pass_by, [], [])
        return moment

    def seconds(self, begin: list[int], end: list[int]) -> float:
        return float(end[0] - begin[0])


def session(folder: Path, said: list[str], seconds: float = 600) -> gpu.Session:
    bench = Bench(workdir=folder, threads=1, rounds=1, backend="triton")
    made = gpu.Session(InterpretedDevice(), HostClock(), TINY, bench, time.monotonic() + seconds, said.append)
    made.results["card"] = gpu.card(made.device, None)
    return made


# Bytes and registers


@pytest.mark.parametrize("job", gpu.JOBS[:-1], ids=str)
def test_the_bytes_a_kernel_must_move_are_those_of_the_tensors_it_is_given(job: gpu.Job) -> None:
    """Inputs and outputs of whole blocks, by the sizes of the tensors; what stays in the caches is left out."""
    device = InterpretedDevice()
    block = gpu.block_for(job, BLOCK)
    assert len(block.patches) == job.patches and block.base.dtype == job.dtype and block.rule == COMBINE[job.combine]
    resident = gpu.Resident(device, passes.Streams(None, None, None), block, gpu.cuts_for(job))
    launch = resident.launch(job.kernel)
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=True))
    entries = [given["base"], *(v for v in given["values"] if isinstance(v, torch.Tensor)), *given["scores"]]
    entries += [given[name] for name in ("out", "keys") if name in given]
    entries += [given["counts"]] if job.kernel == "count_equal" else []
    expected = sum(tensor.nbytes for tensor in entries if tensor is not None)
    assert gpu.moved_bytes(job.kernel, block) == (0 if job.kernel == "no faults" else expected)


def test_known_byte_counts() -> None:
    """bfloat16, two checkpoints: 6 bytes in; 2 out of apply, 8 of score."""
    block = gpu.block_for(gpu.Job("apply"), 1 << 16)
    counts = {kernel: gpu.moved_bytes(kernel, block) / len(block) for kernel in ("apply", "histogram", "score")}
    assert counts == {"apply": 8, "histogram": 6, "score": 14}
    assert gpu.moved_bytes("apply", gpu.block_for(gpu.Job("apply", "lora"), 1 << 16)) == 4 << 16
    assert gpu.moved_bytes("apply", gpu.block_for(gpu.Job("apply", "gradients"), 1 << 16)) == 12 << 16


@pytest.mark.parametrize(("registers", "share"), [(32, 1.0), (40, 0.75), (48, 0.625), (64, 0.5), (128, 0.25)])
def test_occupancy_is_what_the_registers_leave(registers: int, share: float) -> None:
    """Programs of four warps; figures as NVIDIA's occupancy calculator has them."""
    assert gpu.occupancy(registers, 1024, 4) == share


def test_the_kernels_that_are_timed_do_the_real_work() -> None:
    """What the timed apply leaves behind is the reference's output of a merge with thresholds that select."""
    job = gpu.JOBS[0]
    block, cuts = gpu.block_for(job, BLOCK + 77), gpu.cuts_for(job)
    resident = gpu.Resident(InterpretedDevice(), passes.Streams(None, None, None), block, cuts)
    resident.launch("apply").run()
    expected = np.empty_like(block.base.data)
    report = ReferenceBackend().apply(block, cuts, expected)
    found = resident._out.numpy()[: len(block)]
    assert np.array_equal(found, expected)
    assert all(0 < p.applied < len(block) / 20 for p in report.patches)
    launch = resident.launch("histogram")
    launch.run()
    counts = dict(zip(launch.kernel.arg_names, launch.args, strict=True))["counts"]
    # Everything is counted coarsely, and something finely.
    assert int(counts.sum()) > sum(p.eligible for p in report.patches)


# The laboratory


def test_every_timed_launch_follows_one_that_empties_the_caches() -> None:
    device = FakeDevice(1 << 20)
    lab = Lab(device, Ticks(device), 1 << 16, repeats=3)
    rates = lab.memory_rates()
    assert set(rates) == {"copy_bytes_per_s", "read_bytes_per_s", "write_bytes_per_s"}
    assert all(low <= median <= high for median, low, high in rates.values())
    copies = device.kinds[: 1 + 3 * 4]
    assert copies == ["_copy", *["_read", "mark", "_copy", "mark"] * 3]
    assert rates["copy_bytes_per_s"][0] == 2 * rates["write_bytes_per_s"][0] == 2 << 16


def test_links_are_measured_alone_and_in_both_directions() -> None:
    device = FakeDevice(1 << 20)
    lab = Lab(device, Ticks(device), 1 << 16, repeats=1)
    rows = lab.link_rates((1 << 14, 1 << 16), 1 << 16)
    names = {f"{way}_{how}_bytes_per_s" for way in ("up", "down") for how in ("alone", "both")}
    assert [set(row) for row in rows] == [names | {"bytes"}] * 2
    assert all(value > 0 for row in rows for value in row.values())
    assert device.kinds.count("upload") == device.kinds.count("download") == 2 * (4 + 1)
    assert device.uploaded == 4 << 16


def test_a_trace_has_a_lane_per_stream_whose_work_follows_its_order() -> None:
    fake = FakeDevice(TABLES + 3 * BLOCK * ROW)
    traced = TracedDevice(fake, Ticks(fake))
    engine = TritonBackend(traced, fake.limit)
    block = make_block(np.random.default_rng(0), SETTING, "tied", 5 * BLOCK)
    out, expected = np.empty_like(block.base.data), np.empty_like(block.base.data)
    cuts = [Cut(0x3B000000, 99), Cut(0, 1 << 60)]
    assert engine.apply(block, cuts, out) == ReferenceBackend().apply(block, cuts, expected)
    assert np.array_equal(out, expected)
    spans = list(traced.spans(time.perf_counter()))
    assert {span.lane for span in spans} == {"H2D", "compute", "D2H"}
    for lane in ("H2D", "compute", "D2H"):
        of = [span for span in spans if span.lane == lane]
        assert all(span.begin < span.end for span in of)
        assert all(a.end < b.begin for a, b in zip(of, of[1:], strict=False))
    kernels = [span for span in spans if span.name == "apply"]
    uploads = [span for span in spans if span.lane == "H2D"]
    downloads = [span for span in spans if span.lane == "D2H"]
    assert len(kernels) == len(downloads) == 5 and len(uploads) == 5 * 4
    for i, kernel in enumerate(kernels):
        assert all(span.end < kernel.begin for span in uploads[4 * i : 4 * i + 4])
        assert kernel.end < downloads[i].begin
    inputs = sum(bits.data.nbytes for bits in (block.base, *_bits(block.patches)))
    assert traced.downloaded >= out.nbytes and traced.uploaded >= inputs


def _bits(patches: Any) -> list[Bits]:
    return [bits for p in patches for bits in (p.values, p.scores) if isinstance(bits, Bits)]


# The run


def step(name: str, found: object = None, *, needs: float = 0, order: list[str] | None = None) -> gpu.Step:
    def run(_: gpu.Session) -> object:
        if order is not None:
            order.append(name)
        if isinstance(found, Exception):
            raise found
        return found

    return gpu.Step(name, run, needs)


def test_nothing_is_measured_while_the_selftest_is_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = TritonBackend.apply

    def wrong(self: TritonBackend, block: Any, cuts: Any, out: Any) -> Any:
        report = right(self, block, cuts, out)
        out[-1:] ^= 1
        return report

    monkeypatch.setattr(TritonBackend, "apply", wrong)
    said: list[str] = []
    bench = Bench(workdir=tmp_path, threads=1, backend="triton")
    with pytest.raises(Red, match="apply"):
        gpu.measure(InterpretedDevice(), None, bench, 600, tmp_path / "gpu.json", said.append)
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert "apply" in kept["red"] and kept["card"]["name"] == "interpreter"
    assert not {s.name for s in gpu.STEPS} & kept.keys()
    assert not any("GB/s" in line or "µs" in line for line in said)


def test_the_selftest_is_first_and_steps_come_in_order() -> None:
    assert [s.name for s in gpu.STEPS] == [
        "selftest", "memory", "links", "kernels", "engine", "merges", "trace", "fixes", "training", "peers",
    ]  # fmt: skip
    assert sum(s.needs for s in gpu.STEPS) < 8 * 60


def test_what_there_is_no_time_for_is_listed_and_results_are_kept_after_every_step(tmp_path: Path) -> None:
    order: list[str] = []
    kept: list[set[str]] = []
    made = session(tmp_path, [], seconds=100)
    steps = [step("a", 1, order=order), step("b", 2, needs=1000, order=order), step("c", 3, order=order)]
    gpu.run_steps(made, lambda s: kept.append({"a", "b", "c"} & s.results.keys()), steps)
    assert order == ["a", "c"] and kept == [{"a"}, {"a", "c"}]
    assert made.results["skipped"]["b"].startswith("takes 1000 s or more, ")
    assert made.results["took_s"].keys() == {"a", "c"}


def test_a_step_that_fails_does_not_cost_the_others(tmp_path: Path) -> None:
    said: list[str] = []
    made = session(tmp_path, said)
    steps = [step("a", ValueError("no luck")), step("b", Skipped("not here")), step("c", 3)]
    gpu.run_steps(made, lambda s: None, steps)
    assert made.results["c"] == 3 and "no luck" in made.results["failed"]["a"]
    assert made.results["skipped"] == {"b": "not here"}
    assert said == ["a: FAILED, ValueError: no luck", "b: skipped, not here"]


def test_wrong_bytes_met_later_take_all_figures_back(tmp_path: Path) -> None:
    made = session(tmp_path, [])
    steps = [step("selftest", {"checks": []}), step("memory", 5), step("merges", Red("other bytes"))]
    with pytest.raises(Red, match="other bytes"):
        gpu.run_steps(made, lambda s: None, steps)
    assert "memory" not in made.results and "selftest" in made.results


SHAPES: dict[str, Callable[[Any], bool]] = {
    "memory": lambda found: all(len(rate) == 3 for rate in found.values()),
    "links": lambda found: len(found) == len(TINY.slots),
    "kernels": lambda found: {row["kernel"] for row in found} >= {"apply", "histogram", "importance", "fold"},
    "engine": lambda found: {row["what"] for row in found} == {"apply", "merge", "apply, resident"},
    "fixes": lambda found: [row["share"] for row in found] == [0.01, 0.02] and found[0]["changes"] == 20972,
    "trace": lambda found: found["file"] == "trace.json" and found["busy_s"]["compute"] > 0,
}


def test_every_figure_is_found_at_a_tiny_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps but the selftest, merges as commands and peers, which take longer and have tests of their own."""
    monkeypatch.setattr(gpu, "JOBS", (gpu.JOBS[0], gpu.Job("histogram", "lora"), gpu.Job("faults")))
    said: list[str] = []
    made = session(tmp_path, said)
    kept: list[str] = []
    steps = [s for s in gpu.STEPS if s.name in SHAPES]
    gpu.run_steps(made, lambda s: kept.append(json.dumps(s.results)), steps)
    assert made.results["failed"] == {} and made.results["skipped"] == {}, made.results
    for name, shape in SHAPES.items():
        assert shape(made.results[name]), made.results[name]
    for row in made.results["kernels"]:
        assert row["of_copy"] == pytest.approx(row["bytes_per_s"] / made.results["memory"]["copy_bytes_per_s"][0])
    streamed = [row for row in made.results["engine"] if row["what"] == "apply"]
    for row in streamed:  # 6 bytes an entry go up, 2 come back, and small tables
        assert 0 <= row["uploaded_bytes"] - 6 * row["entries"] < 16384
        assert 0 <= row["downloaded_bytes"] - 2 * row["entries"] < 16384
    lanes = {e["args"]["name"] for e in json.loads(made.files["trace.json"])["traceEvents"] if e["ph"] == "M"}
    assert lanes == set(gpu.LANES)
    assert len(kept) == len(steps) and any("% of copy" in line for line in said)


def test_the_command_writes_its_file_and_fails_where_a_step_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for found, status in (({"checks": []}, 0), (ValueError("no luck"), 70), (Red("other bytes"), 70)):
        monkeypatch.setattr(gpu, "STEPS", (step("selftest", found),))
        file = tmp_path / str(status) / "gpu.json"
        ended = CliRunner().invoke(command, ["gpu", "-o", str(file), "--seconds", "60"])
        assert ended.exit_code == status and str(file) in ended.output, ended.output
        kept = json.loads(file.read_text())
        assert kept["card"]["name"] == "interpreter" and kept["versions"]["triton"] and kept["command"]
        assert ("selftest" in kept) == (status == 0)


def test_a_card_is_a_folder() -> None:
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
