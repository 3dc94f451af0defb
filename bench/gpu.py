"""`safepatch bench gpu`: all there is to know about one card, in one go and within a time limit.

The selftest comes first: while it is red nothing is measured. Then, in order of worth: memory and links; kernels on
resident data against the measured copy bandwidth; the engine against the links; whole merges against the storage and
the CPU engine; a trace; peers. The results are written after every step, and what there was no time for is listed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safepatch_core.backends import open_backend
from safepatch_core.backends import passes as engine_passes
from safepatch_core.backends.contract import Backend, Bits, Block, Cut
from safepatch_core.backends.device import Device, TorchDevice
from safepatch_core.backends.reference import to_float32
from safepatch_core.backends.select import COARSE, FINE, LOW_BITS
from safepatch_core.backends.selftest import examine, to_bits
from safepatch_core.backends.triton import TritonBackend
from safepatch_core.kernels.apply import apply
from safepatch_core.kernels.faults import faults
from safepatch_core.kernels.importance import accumulate
from safepatch_core.kernels.launch import BLOCK, HISTOGRAMS, INTERPRETED, VECTOR, Launch, padded
from safepatch_core.kernels.score import Piece, score_keys
from safepatch_core.kernels.select import count_equal, fold, histogram
from safepatch_core.merging.api import merge
from safepatch_core.sizes import parse_size
from safepatch_core.spec import COMBINE, EVERY, Combine, Dtype

from . import derive, gpu_fix, models, peers, results
from .kernels import Source, block_bytes, make_block, quotas
from .lab import Clock, HostClock, Lab, TracedDevice, clock_of
from .measure import Failed, Red, Skipped, alternate, drop, prepared, remove, run
from .merges import copy_subject, inputs, merge_subject, output_bytes
from .models import SHAPES, is_target
from .quantised import twin_recipe
from .registry import Bench
from .tracing import Recorder, chrome_trace

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LANES = ("reader", "engine", "H2D", "compute", "D2H", "writer")


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    buffer: int  # bytes, beyond any cache
    repeats: int
    slots: tuple[int, ...]  # bytes of single copies between host and device; the engine's are 4 MiB of 16-bit entries
    link: int  # bytes copied with each
    large: int  # entries of the kernels' usual size
    sizes: tuple[int, ...]  # entries of the most important kernel
    model: str
    tall: int  # entries of a tensor that is larger than a small VRAM limit
    vram: str  # what a merge is given
    tight: str  # and where tensors are to be sent in pieces
    selftest_s: float
    entries: int  # of the selftest's blocks
    windows: int  # of 4 MiB that a fix is applied to
    trained: tuple[str, ...]  # shapes of models


FULL = Scale(
    buffer=1 << 30, repeats=20, slots=(64 << 10, 1 << 20, 4 << 20, 8 << 20, 64 << 20), link=512 << 20,
    large=1 << 26, sizes=(1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 27), model="1.1B", tall=8192 * 28672,
    vram="2GiB", tight="64MiB", selftest_s=15.0, entries=20_000,
    windows=32, trained=("SmolLM2-135M", "1.1B"),
)  # fmt: skip
# Shows that everything runs, where the interpreter stands for a card.
SMALL = Scale(
    buffer=1 << 18, repeats=2, slots=(4 << 10, 64 << 10), link=1 << 18, large=3000, sizes=(1000, 3000),
    model="tiny", tall=200_000, vram="64MiB", tight="48MiB", selftest_s=0.0, entries=300,
    windows=1, trained=("tiny",),
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One kernel on one kind of block."""

    kernel: str
    source: Source = "checkpoint"
    dtype: Dtype = "BF16"
    combine: Combine = "difference"
    patches: int = 2


# The most important first; the first one in all sizes.
JOBS = (
    Job("apply"),
    Job("histogram"),
    Job("count_equal"),
    Job("apply", "lora"),
    Job("apply", dtype="F16"),
    Job("apply", dtype="F32"),
    Job("histogram", "lora"),
    Job("histogram", dtype="F16"),
    Job("histogram", dtype="F32"),
    Job("apply", "gradients"),
    Job("histogram", "gradients"),
    Job("apply", "delta"),
    Job("apply", patches=1),
    Job("apply", patches=4),
    Job("apply", combine="sum"),
    Job("apply", combine="ties"),
    Job("score"),
    Job("score", "lora"),
    Job("faults"),
    Job("no faults"),
    Job("count_equal", dtype="F32"),
)


def moved_bytes(kernel: str, block: Block) -> int:
    """What a kernel must move through the device's memory.

    Every entry of base, values and scores comes in once, however often the code loads it (again from the cache), and
    what the kernel is for goes out once: the new entries of `apply`, 4 bytes per entry and patch of `score`, 4 per
    BLOCK entries and patch of `count_equal`. Tables, tallies, histograms and LoRA factors stay in the caches and
    count nothing. `no faults` reads one flag: what a merge without faults pays for its last kernel.
    """
    inputs = block_bytes(block, "histogram")
    per_patch = {"score": 4 * len(block), "count_equal": 4 * -(-len(block) // int(BLOCK))}.get(kernel, 0)
    if kernel == "no faults":
        return 0
    return inputs + (block.base.data.nbytes if kernel == "apply" else 0) + len(block.patches) * per_patch


def occupancy(registers: int, shared: int, warps: int) -> float:
    """The share of a multiprocessor's 64 warps that can live at once, on sm_80 and sm_90.

    registers: of a thread; shared: bytes of a program of so many `warps`. A warp's registers are handed out in units
    of 256, of 65536; 1 KiB of shared memory is the system's own for each of at most 32 programs.
    """
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps if registers else 32
    by_shared = 164 * 1024 // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps, 32) * warps / 64


def block_for(job: Job, entries: int) -> Block:
    """A block of the suite's values in the job's dtype, with as many patches."""
    block = make_block(job.source, entries)

    def cast(bits: Bits) -> Bits:
        return bits if bits.dtype == job.dtype else to_bits(to_float32(bits), job.dtype)

    patches = [
        p
        and replace(
            p,
            values=cast(p.values) if isinstance(p.values, Bits) else p.values,
            scores=p.scores and cast(p.scores),
        )
        for p in block.patches
    ]
    chosen = tuple((patches * job.patches)[: job.patches])
    return replace(block, base=cast(block.base), patches=chosen, rule=COMBINE[job.combine])


def cuts_for(job: Job) -> list[Cut]:
    """The thresholds that the suite's recipe has on such a block, found by the CPU engine on a part of it."""
    block = block_for(job, 1 << 20 if not INTERPRETED else 2000)
    wanted = (quotas(block) * job.patches)[: job.patches]
    cuts, _ = open_backend("cpu", threads=1).merge(block, wanted, np.empty_like(block.base.data))
    return [Cut(cut.key, EVERY) for cut in cuts]


class Resident:
    """A block that lies on the device in one piece, and the kernels' launches on it."""

    def __init__(self, device: Device, streams: engine_passes.Streams, block: Block, cuts: Sequence[Cut]) -> None:
        self._device, self._streams, self._cuts = device, streams, cuts
        self._patches = len(block.patches)
        bins = self._patches * (COARSE + FINE)
        room = padded(len(block)) * (block_bytes(block, "apply") // max(len(block), 1) + 1)
        tables = (HISTOGRAMS + 1) * 8 * bins + (8 << 20)
        factors = sum(x.nbytes for p in block.patches if p and not isinstance(p.values, Bits) for x in p.values[:2])
        arena = engine_passes.Arena(device.allocate(room + tables + factors))
        call = engine_passes.Call(
            device, arena, streams, block, 2 * self._patches, bins, True, piece=padded(len(block))
        )
        call.prepare(cuts)
        self._found: list[tuple[Piece, torch.Tensor]] = []
        call.sweep(self._take)
        device.synchronize()
        ((self.piece, self._out),) = self._found

    def _take(self, piece: Piece, out: torch.Tensor) -> tuple[Launch, ...]:
        self._found.append((piece, out))
        return ()

    def _room(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        nbytes = int(np.prod(shape)) * dtype.itemsize
        return self._device.allocate(max(nbytes, 1))[:nbytes].view(dtype).view(shape)

    def launch(self, kernel: str) -> Launch:
        piece = self.piece
        if kernel == "apply":
            return apply(piece, self._out)
        if kernel == "histogram":
            bins, rows, at = (COARSE, FINE), [], 0
            for cut in self._cuts:
                lows = (0, LOW_BITS), (cut.key >> LOW_BITS << LOW_BITS, 0)
                for (lo, shift), n in zip(lows, bins, strict=True):
                    rows.append((lo, shift, n, at))
                    at += n
            windows, copies = self._room(torch.int64, len(rows), 4), self._room(torch.int64, HISTOGRAMS, at)
            table = np.array(rows, dtype=np.int64)
            self._device.upload(self._streams.work, windows.view(-1).view(torch.uint8), table)
            self._device.clear(self._streams.work, copies)
            self._device.synchronize()
            return histogram(piece, windows, tuple(p for p in range(self._patches) for _ in bins), copies)
        if kernel == "count_equal":
            return count_equal(piece, self._room(torch.int32, self._patches, piece.programs))
        if kernel == "score":
            return score_keys(piece, self._room(torch.uint32, self._patches, padded(piece.count)))
        piece.tally[0, -1] = int(kernel == "faults")  # whether a pass before has met one
        self._device.synchronize()
        return faults(piece)


@dataclass
class Session:
    """One run: a device, what is asked of it, and the results so far."""

    device: Device
    clock: Clock
    scale: Scale
    bench: Bench
    deadline: float  # of time.monotonic
    say: Callable[[str], object]
    results: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str | None:
        """The device's name for other processes; None where they are to use the CPU."""
        return None if INTERPRETED else str(self.results["card"]["device"])

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def streams(self) -> engine_passes.Streams:
        return engine_passes.Streams(self.device.stream(), self.device.stream(), self.device.stream())

    def engine(self, vram: str) -> TritonBackend:
        return TritonBackend(self.device, parse_size(vram))

    def link(self, name: str) -> float:
        """A rate of copies of the engine's size."""
        rows = self.results["links"]
        size = min((row["bytes"] for row in rows), key=lambda size: abs(size - 2 * engine_passes.PIECE))
        return float(next(row for row in rows if row["bytes"] == size)[f"{name}_bytes_per_s"])


def selftest(session: Session) -> dict[str, Any]:
    """Every pass and source against the reference, bit for bit. Raises Red at the first difference."""
    engine = session.engine("256MiB" if not INTERPRETED else "64MiB")
    checks = examine(engine, session.scale.selftest_s, session.scale.entries, say=session.say)
    failed = [f"{check.name}: {check.failure}" for check in checks if check.failure]
    if failed:
        raise Red(failed[0])
    return {"engine": engine.describe(), "checks": [asdict(check) for check in checks]}


def memory(session: Session) -> dict[str, list[float]]:
    """The device's memory by itself."""
    rates = lab_of(session).memory_rates()
    session.say("  ".join(f"{name.removesuffix('_bytes_per_s')} {r[0] / 1e9:,.0f} GB/s" for name, r in rates.items()))
    return rates


def links(session: Session) -> list[dict[str, float]]:
    """Pinned copies to and from the device, alone and at once."""
    rows = lab_of(session).link_rates(session.scale.slots, session.scale.link)
    for row in rows:
        text = "  ".join(f"{k.removesuffix('_bytes_per_s')} {v / 1e9:.1f}" for k, v in row.items() if k != "bytes")
        session.say(f"{row['bytes'] / (1 << 20):8.2f} MiB pieces, GB/s: {text}")
    return rows


def lab_of(session: Session) -> Lab:
    return Lab(session.device, session.clock, session.scale.buffer, session.scale.repeats)


def kernels(session: Session) -> list[dict[str, Any]]:
    """Each kernel on resident data: bytes it must move ÷ time ÷ copy bandwidth, for half of the time that is left."""
    lab, streams, scale = lab_of(session), session.streams(), session.scale
    copy = session.results["memory"]["copy_bytes_per_s"][0]
    until = session.left() / 2
    rows: list[dict[str, Any]] = []

    def add(launch: Launch, entries: int, nbytes: int, **what: Any) -> None:
        took = lab.time(launch)
        row = {**what, "entries": entries, "moved_bytes": nbytes, "seconds": list(took)}
        row |= {"bytes_per_s": nbytes / took.median, "of_copy": nbytes / took.median / copy} | code_of(launch)
        rows.append(row)
        name = " ".join(str(value) for value in what.values())
        rate = f"{nbytes / took.median / 1e9:8,.0f} GB/s  {row['of_copy']:6.1%} of copy" if nbytes else ""
        used = f"  {row['registers']} registers" if "registers" in row else ""
        session.say(f"{name:44} {entries:12,d}  {1e6 * took.median:10,.1f} µs  {rate}{used}")

    for job in JOBS:
        cuts = cuts_for(job)
        for entries in scale.sizes if job == JOBS[0] else (scale.large,):
            if session.left() < until:
                break
            block = block_for(job, entries)
            resident = Resident(session.device, streams, block, cuts)
            add(resident.launch(job.kernel), entries, moved_bytes(job.kernel, block), **asdict(job))
    for dtype in ("BF16", "F32"):
        total = session.device.allocate(4 * scale.large).view(torch.float32)
        size = FLOATS[dtype].itemsize
        pair = [session.device.allocate(size * scale.large).view(FLOATS[dtype]) for _ in range(2)]
        session.device.synchronize()
        add(accumulate(total, *pair), scale.large, (2 * size + 8) * scale.large, kernel="importance", dtype=dtype)
    bins = 2 * (COARSE + FINE)
    copies = session.device.allocate(8 * HISTOGRAMS * bins).view(torch.int64).view(HISTOGRAMS, bins)
    sums = session.device.allocate(8 * bins).view(torch.int64)
    add(fold(copies, sums), bins, 8 * bins * (HISTOGRAMS + 1), kernel="fold")
    return rows


def code_of(launch: Launch) -> dict[str, Any]:
    """Registers, shared memory, occupancy and instructions of a launch's code, where the target is in the table."""
    if INTERPRETED:
        return {}
    from . import triton_compile

    target = target_name()
    if target not in triton_compile.TARGETS:
        return {}
    code = triton_compile.compile_launch(launch, target)
    facts: dict[str, Any] = {
        "registers": code.registers,
        "spilled": code.spilled,
        "instructions_per_entry": code.instructions_per_entry,
    }
    if target.startswith("sm_"):
        facts["occupancy"] = occupancy(code.registers, code.shared, int(BLOCK) // int(VECTOR) // 32)
    return facts


def target_name() -> str:
    """What the compile table calls this device's instruction set."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(0).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def engine(session: Session) -> list[dict[str, Any]]:
    """The engine on pinned host memory, against the links; and on data that lies in its slots."""
    scale, rows = session.scale, []
    widest = max(np.prod(dims) for name, dims in SHAPES[scale.model].tensors() if is_target(name, dims))
    for entries, vram in ((int(widest), scale.vram), (scale.tall, scale.tight)):
        block = make_block("checkpoint", entries)
        block = _pinned(session.device, block)
        cuts = cuts_for(JOBS[0])
        for name in ("apply", "merge"):
            counted = TracedDevice(session.device, HostClock())
            _call(TritonBackend(counted, parse_size(vram)), name, block, cuts)
            session.device.synchronize()
            subject = partial(_call, session.engine(vram), name, block, cuts)
            subject()
            walls = [_wall(subject) for _ in range(3)]
            up, down = counted.uploaded, counted.downloaded
            floor = max(up / session.link("up_both"), down / session.link("down_both"))
            row: dict[str, Any] = {
                "what": name,
                "entries": entries,
                "vram": vram,
                "wall_s": walls,
                "uploaded_bytes": up,
            }
            row |= {"downloaded_bytes": down, "floor_s": floor, "of_slowest_link": floor / sorted(walls)[1]}
            rows.append(row)
            session.say(
                f"{name} of {entries:,d} entries, {vram}: {sorted(walls)[1]:.4f} s, "
                f"{row['of_slowest_link']:.0%} of the slowest link"
            )
        if entries == widest:
            rows.append(_resident_sweep(session, block, cuts))
    return rows


def _pinned(device: Device, block: Block) -> Block:
    """A block whose entries lie in memory that copies reach directly."""

    def move(bits: Bits) -> Bits:
        memory = device.pinned(bits.data.nbytes).view(bits.data.dtype)
        memory[:] = bits.data
        return Bits(memory, bits.dtype)

    patches = tuple(
        p and replace(p, values=move(p.values) if isinstance(p.values, Bits) else p.values) for p in block.patches
    )
    return replace(block, base=move(block.base), patches=patches)


def _call(backend: Backend, name: str, block: Block, cuts: Sequence[Cut]) -> None:
    """One pass; the output goes over the base, whose values don't matter for the time."""
    if name == "apply":
        backend.apply(block, cuts, block.base.data)
    else:
        backend.merge(block, quotas(block), block.base.data)


def _wall(subject: Callable[[], object]) -> float:
    begin = time.perf_counter()
    subject()
    return time.perf_counter() - begin


def _resident_sweep(session: Session, block: Block, cuts: Sequence[Cut]) -> dict[str, Any]:
    """An apply over slots that hold their inputs already and whose output stays: what kernels and launches take."""
    device = session.device
    arena = engine_passes.Arena(device.allocate(parse_size(session.scale.vram)))
    call = engine_passes.Call(device, arena, session.streams(), block, 0, 0, False)
    call.prepare(cuts)

    def sweep() -> None:
        call.sweep(lambda piece, out: (apply(piece, out), faults(piece)))
        device.synchronize()

    sweep()
    walls = sorted(_wall(sweep) for _ in range(3))
    rate = moved_bytes("apply", block) / walls[1]
    of_copy = rate / session.results["memory"]["copy_bytes_per_s"][0]
    session.say(f"apply of {len(block):,d} resident entries: {walls[1]:.4f} s, {of_copy:.0%} of copy")
    return {
        "what": "apply, resident",
        "entries": len(block),
        "wall_s": walls,
        "bytes_per_s": rate,
        "of_copy": of_copy,
    }


def merges(session: Session) -> dict[str, Any]:
    """Merges of a generated model: in this process and as commands, beside the CPU engine and a plain copy."""
    scale, bench = session.scale, session.bench
    folder = bench.models(SHAPES[scale.model], twin=True)
    recipes = {scope: models.recipe_path(folder, scope=scope) for scope in ("tensor", "model")}
    recipes["codes"] = twin_recipe(folder, "checkpoint")
    files, written = inputs(folder, "checkpoint"), output_bytes(folder)
    found: dict[str, Any] = {"model": scale.model, "read_bytes": sum(f.stat().st_size for f in files)}
    found["written_bytes"] = written
    digests: dict[str, dict[str, Any]] = {}
    with bench.scratch() as scratch:
        drop(files)
        found["cold_read"] = copy_subject(bench, files, scratch / "copy", 0, False, "cold")()
    with bench.scratch() as scratch, prepared(files, "warm", 2 * written) as before:
        subjects: dict[str, Callable[[], Mapping[str, float]]] = {}
        for scope, recipe in recipes.items():
            for name, backend in {
                f"triton, {scale.vram}": session.engine(scale.vram),
                f"triton, {scale.tight}": session.engine(scale.tight),
                "cpu": open_backend("cpu", threads=bench.threads),
            }.items():
                if scope == "codes" and name.endswith(scale.tight):
                    continue  # the host rewrites codes, which takes its time
                facts = digests[f"{name}, {scope}"] = {"scope": scope}
                subjects[f"{name}, {scope}"] = _in_process(backend, recipe, scratch / "out", facts, bench)
        for backend_name in ("triton", "cpu"):
            command = replace(bench, backend=backend_name)
            if backend_name == "triton":
                command = replace(command, device=session.place, vram_limit=scale.vram)
            facts = digests[f"{backend_name} command"] = {"scope": "tensor"}
            recipe = models.recipe_path(folder)
            subjects[f"{backend_name} command"] = merge_subject(command, recipe, scratch / "out", facts)
        subjects["copy, synced"] = copy_subject(bench, files, scratch / "copy", written, True)
        subjects["copy"] = copy_subject(bench, files, scratch / "copy", written, False)
        subjects["read"] = copy_subject(bench, files, scratch / "copy", 0, False)
        subjects["write, synced"] = copy_subject(bench, [], scratch / "copy", written, True)
        began, rounds = session.left(), 0
        series: dict[str, dict[str, list[float]]] = {}
        while rounds < 3 and (rounds == 0 or session.left() > 1.5 * (began - session.left()) / rounds):
            for name, quantities in alternate(subjects, 1, before).items():
                for quantity, values in quantities.items():
                    series.setdefault(name, {}).setdefault(quantity, []).extend(values)
            rounds += 1
    for scope in recipes:
        if len({facts["output"] for facts in digests.values() if facts["scope"] == scope}) != 1:
            raise Red(f"merges of scope {scope} wrote different bytes: {digests}")
    floor = sorted(series["copy, synced"]["wall_s"])[rounds // 2]
    for name, quantities in series.items():
        took = sorted(quantities["wall_s"])[rounds // 2]
        session.say(f"{name:28} {took:8.3f} s  {floor / took:5.2f} of a plain synced copy's speed")
    return found | {"rounds": rounds, "series": series}


def _in_process(
    backend: Backend, recipe: Path, out: Path, facts: dict[str, Any], bench: Bench
) -> Callable[[], Mapping[str, float]]:
    """A merge without the start of a process, which takes seconds where torch is imported."""

    def subject() -> dict[str, float]:
        begin = time.perf_counter()
        result = merge(recipe, out, backend=backend, memory_limit=bench.memory_limit)
        wall = time.perf_counter() - begin
        digest = hashlib.sha256((out / "SHA256SUMS").read_bytes()).hexdigest()
        remove(out)
        if facts.setdefault("output", digest) != digest:
            raise Red(f"{recipe.name}: two runs wrote different bytes")
        return {"wall_s": wall, "moved_bytes_per_s": (result.bytes_read + result.bytes_written) / wall}

    return subject


def trace(session: Session) -> dict[str, Any]:
    """Four layers of the model merged with a lane per stream and thread; and the device memory that it took."""
    shape = SHAPES[session.scale.model]
    cut = replace(shape, name=f"{shape.name}-{min(shape.layers, 4)}-layers", layers=min(shape.layers, 4))
    folder = session.bench.models(cut)
    limit = parse_size(session.scale.vram)
    observed = TracedDevice(session.device, session.clock)
    gpu = isinstance(session.device, TorchDevice)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if gpu else 0
    backend = TritonBackend(observed, limit)
    with session.bench.scratch() as scratch:
        recorder = Recorder()
        begin = time.perf_counter()
        merge(models.recipe_path(folder), scratch / "out", backend=backend, trace=recorder)
        wall = time.perf_counter() - begin
    session.device.synchronize()
    spans = sorted([*recorder.spans, *observed.spans(begin)], key=lambda span: LANES.index(span.lane))
    session.files["trace.json"] = chrome_trace(spans, wall)
    busy = {lane: sum(s.end - s.begin for s in spans if s.lane == lane) for lane in LANES}
    session.say("busy: " + ", ".join(f"{lane} {seconds / wall:.0%}" for lane, seconds in busy.items()))
    peak = torch.cuda.max_memory_allocated() - before if gpu else None
    if peak is not None and peak > limit:
        raise Red(f"a merge took {peak} bytes of device memory, the limit is {limit}")
    facts = {"file": "trace.json", "wall_s": wall, "busy_s": busy}
    return facts | {"vram_limit_bytes": limit, "vram_peak_bytes": peak}


def others(session: Session) -> dict[str, Any]:
    """Plain torch on the card and mergekit with --cuda, on the same files."""
    bench, found = session.bench, {}
    folder = bench.models(SHAPES[session.scale.model])
    place = [] if session.place is None else [session.place]
    commands: dict[str, Callable[[Path], list[str]]] = {
        "plain torch": lambda out: [*peers.plain_torch("tensor", bench, folder, out), *place],
        "mergekit dare_ties": lambda out: [
            *peers.mergekit("dare_ties", bench, folder, out),
            *(["--cuda"] if place else []),
        ],
    }
    files = inputs(folder, "checkpoint")
    with bench.scratch() as scratch, prepared(files, "warm", 2 * output_bytes(folder)) as before:
        for name, command in commands.items():
            out = scratch / "peer"
            try:
                words = command(out)
                before()
                cost, _ = run(words, timeout=max(session.left() - 5, 1), env=peers.OFFLINE)
                peers.check_output(folder / "base", out)
                found[name] = cost._asdict()
                session.say(f"{name:28} {cost.wall_s:8.3f} s")
            except (Skipped, Failed) as reason:
                found[name] = {"skipped": str(reason)}
                session.say(f"{name}: {reason}")
            remove(out)
    return found


def fixes(session: Session) -> list[dict[str, Any]]:
    """The kernel that applies fixes, on a resident tensor."""
    scale = session.scale
    with session.bench.scratch() as scratch:
        rows = gpu_fix.rates(lab_of(session), scale.windows, scratch)
    for row in rows:
        session.say(f"fix of {row['share']:.0%}: {row['model_bytes_per_s'] / 1e9:8,.0f} GB of model per second")
    return rows


def training(session: Session) -> list[dict[str, Any]]:
    """Steps of `derive`'s training beside transformers.Trainer, all weights in float32."""
    rows: list[dict[str, Any]] = []
    for name in session.scale.trained:
        base = session.bench.models(SHAPES[name]) / "base"
        for recompute in (False, True):
            for who in derive.WHO:
                found = derive.steps_of(session.bench, who, base, "all", 10, recompute, session.place or "cpu")
                rows.append({"model": name, "recomputed": recompute, "who": who} | found)
                rate = found["tokens"] / found["wall_s"]
                need = found["weight_bytes"] + found["state_bytes"]
                session.say(
                    f"{name} {'recomputed' if recompute else 'kept':10} {who:10} {rate:10,.0f} tokens/s, peak "
                    f"{found['peak_bytes'] / need:.2f} of weights and state, last loss {found['losses'][-1]:.4f}"
                )
    return rows


@dataclass(frozen=True)
class Step:
    """Part of a run. `needs`: seconds without which it isn't begun."""

    name: str
    run: Callable[[Session], Any]
    needs: float


STEPS = (
    Step("selftest", selftest, 0),
    Step("memory", memory, 5),
    Step("links", links, 5),
    Step("kernels", kernels, 30),
    Step("engine", engine, 20),
    Step("merges", merges, 60),
    Step("trace", trace, 20),
    Step("fixes", fixes, 15),
    Step("training", training, 60),
    Step("peers", others, 30),
)


def run_steps(session: Session, keep: Callable[[Session], None], steps: Sequence[Step]) -> None:
    """All steps for which there is time, `keep` after each. Raises Red where wrong results were met."""
    skipped = session.results.setdefault("skipped", {})
    failed = session.results.setdefault("failed", {})
    took = session.results.setdefault("took_s", {})
    for step in steps:
        if session.left() < step.needs:
            skipped[step.name] = f"takes {step.needs:.0f} s or more, {max(session.left(), 0):.0f} s are left"
            session.say(f"{step.name}: skipped, {skipped[step.name]}")
            continue
        begin = time.monotonic()
        try:
            session.results[step.name] = step.run(session)
        except Red:
            # No figure may be shown beside wrong results.
            for name in [s.name for s in steps if s.name != "selftest"]:
                session.results.pop(name, None)
            raise
        except Skipped as reason:
            skipped[step.name] = str(reason)
            session.say(f"{step.name}: skipped, {reason}")
        except Exception as error:
            # Time on a card is short: what one step fails at must not cost the others.
            failed[step.name] = traceback.format_exc()
            session.say(f"{step.name}: FAILED, {type(error).__name__}: {error}")
        took[step.name] = time.monotonic() - begin
        keep(session)


def card(device: Device, name: str | None) -> dict[str, Any]:
    """What the device is."""
    facts: dict[str, Any] = {"name": device.name, "device": name or "cuda:0", "warp": device.warp}
    if isinstance(device, TorchDevice):
        properties = torch.cuda.get_device_properties(torch.device(name or "cuda:0"))
        facts |= {
            "target": target_name(),
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": _driver(),
            "runtime": torch.version.cuda or torch.version.hip,
        }
    return facts


def _driver() -> str | None:
    """The version of NVIDIA's driver, as its tool says it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return said.stdout.split("\n")[0].strip() or None


def slug(name: str) -> str:
    """A card's name as a directory's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def measure(
    device: Device, name: str | None, bench: Bench, seconds: float, output: Path, say: Callable[[str], object]
) -> None:
    """Everything, into the file `output` and the trace beside it. Raises Red, after keeping what the gate said."""
    scale = SMALL if INTERPRETED else FULL
    session = Session(device, clock_of(device), scale, bench, time.monotonic() + seconds, say)
    session.results |= {
        "card": card(device, name),
        "machine": results.machine(),
        "versions": results.versions(),
        "commit": results.commit(),
        "command": results.command_line(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "scale": asdict(scale),
    }

    def keep(session: Session) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(session.results, indent=1) + "\n")
        for file, text in session.files.items():
            (output.parent / file).write_text(text)

    try:
        run_steps(session, keep, STEPS)
    except Red as reason:
        session.results["red"] = str(reason)
        keep(session)
        raise
    if failed := session.results["failed"]:
        raise Red(f"failed: {', '.join(failed)}; the rest is kept")
