"""What the compilers make of the Triton kernels: registers, memory accesses and instructions, without a GPU.

`python -m safepatch_core.bench.triton_compile [FILE]` writes the table; the tests hold the code to its limits.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from safepatch_core.kernels.apply import apply
from safepatch_core.kernels.decide import SEARCH_FIELDS, cut, narrow, settle, without
from safepatch_core.kernels.faults import faults
from safepatch_core.kernels.fix import KEEP, NEW, OLD, fix
from safepatch_core.kernels.importance import accumulate
from safepatch_core.kernels.launch import BLOCK, COPIES, HISTOGRAMS, INTERPRETED, VECTOR, Launch, options
from safepatch_core.kernels.score import BATCH_FIELDS, COUNTS, ENDING, FIELDS, Form, Piece, Variant, score_keys
from safepatch_core.kernels.select import WINDOW_FIELDS, count_equal, fold, histogram
from safepatch_core.spec import COMBINE

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {"F32": torch.uint32, "F16": torch.uint16, "BF16": torch.uint16}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Code:
    """One kernel for one target. `text` is what the assembler was given, `machine` its instructions."""

    kernel: str
    target: str
    registers: int
    spilled: int  # bytes of stack or scratch per thread; on AMD also spilled registers
    shared: int  # bytes per program
    wide_loads: int  # of 16 bytes
    wide_stores: int
    instructions_per_entry: float
    text: str
    machine: Counter[str]
    types: tuple[str, ...]  # of the arguments


class _Driver:
    """As much of a driver as compiling takes: the target, which is also the device's name in Triton's caches."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _aimed_at(target: GPUTarget) -> Iterator[None]:
    driver = triton.runtime.driver
    before = driver._active  # None where there is no GPU: asking for it would raise
    driver.set_active(_Driver(target))
    try:
        yield
    finally:
        driver.set_active(before)


def compile_launch(launch: Launch, target: str, name: str = "") -> Code:
    """Compile a launch for one of TARGETS, from just the arguments and options that would run it."""
    aim = TARGETS[target]
    with _aimed_at(aim):
        found = launch.kernel.warmup(*launch.args, grid=(1,), **options(aim.warp_size))
    read = _read_amd if aim.backend == "hip" else _read_nvidia
    types = tuple(str(t) for t in found.src.signature.values() if t != "constexpr")
    return read(name or launch.kernel.__name__, target, found, types)


def _per_entry(machine: Counter[str]) -> float:
    """Instructions of a thread by entries of a thread; both sides of branches are counted."""
    per_thread = sum(machine.values()) - machine["NOP"] - machine["s_nop"]
    return round(per_thread / int(VECTOR), 1)


def _read_nvidia(name: str, target: str, found: Any, types: tuple[str, ...]) -> Code:
    text = found.asm["ptx"]
    usage, listing = (_cuobjdump(found.asm["cubin"], flag) for flag in ("-res-usage", "-sass"))
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert match is not None, usage
    registers, stack, shared, local = map(int, match.groups())
    # ptxas writes constants with HFMA2 of zeros where that unit is idle.
    listing = re.sub(r"HFMA2(?:\.MMA)? (R\d+), -RZ, RZ,", r"MOV \1,", listing)
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", listing)
    return Code(
        kernel=name,
        target=target,
        registers=registers,
        spilled=stack + local,
        shared=shared,
        wide_loads=len(re.findall(r"ld\.global[\w.]*\.v(?:4\.[bu]32|2\.[bu]64)", text)),
        wide_stores=len(re.findall(r"st\.global[\w.]*\.v(?:4\.[bu]32|2\.[bu]64)", text)),
        instructions_per_entry=_per_entry(machine := Counter(line.partition(".")[0] for line in lines)),
        text=text,
        machine=machine,
        types=types,
    )


def _cuobjdump(cubin: bytes, flag: str) -> str:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True)
    return run.stdout


def _read_amd(name: str, target: str, found: Any, types: tuple[str, ...]) -> Code:
    text = found.asm["amdgcn"]

    def fact(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", text)
        assert match is not None, key
        return int(match.group(1))

    spilled = sum(map(fact, ("private_segment_fixed_size", "sgpr_spill_count", "vgpr_spill_count")))
    machine = Counter(re.findall(r"^\t([a-z]\w+)\b", text, re.MULTILINE))
    return Code(
        kernel=name,
        target=target,
        registers=fact("vgpr_count"),
        spilled=spilled,
        shared=fact("group_segment_fixed_size"),
        wide_loads=machine["global_load_dwordx4"] + machine["buffer_load_dwordx4"],
        wide_stores=machine["global_store_dwordx4"] + machine["buffer_store_dwordx4"],
        instructions_per_entry=_per_entry(machine),
        text=text,
        machine=machine,
        types=types,
    )


def make_piece(plan: Variant) -> Piece:
    """A piece of one block, for compiling: its contents don't matter."""

    def empty(dtype: str) -> torch.Tensor:
        return torch.empty(BLOCK, dtype=TYPES[dtype])

    def factors() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(16, 1024), torch.empty(1, 16)

    patches = len(plan.patches)
    return Piece(
        plan=plan,
        base=empty(plan.dtype),
        values=tuple(empty(form.values) if form.values else factors() for form in plan.patches),
        scores=tuple(empty(form.scores) if form.scores else None for form in plan.patches),
        table=torch.empty(patches, FIELDS.value, dtype=torch.int64),
        tally=torch.empty(COPIES, patches * COUNTS.value + ENDING.value, dtype=torch.int64),
        first=0,
        head=0,
        count=BLOCK,
        cols=1024,
    )


def plans() -> dict[str, Variant]:
    """The recipes whose code is kept in the table."""
    scored = Form("checkpoint", "BF16", "scores", "BF16", "patched", True)
    wide = Form("checkpoint", "F32", "scores", "F32", "patched", True)
    plain = Form("checkpoint", "BF16", "magnitude", "", "patched", True)
    gradients = Form("delta", "F16", "gradients", "F16", "patched", True)
    lora = Form("lora", "", "magnitude", "", "patched", True)

    def plan(form: Form, patches: int = 2, dtype: str = "BF16", combine: str = "difference") -> Variant:
        acts, join = COMBINE[combine]
        return Variant(dtype, (form,) * patches, int(acts), int(join), "retain-first")

    return {
        "two patches": plan(scored),
        "two patches, magnitude": plan(plain),
        "two patches, sum": plan(scored, combine="sum"),
        "two patches, ties": plan(scored, combine="ties"),
        "two patches, F32": plan(wide, dtype="F32"),
        "two patches, F16 gradients": plan(gradients, dtype="F16"),
        "two patches, LoRA": plan(lora),
        "one patch": plan(scored, 1),
        "four patches": plan(scored, 4),
    }


def make_fix(width: int, gap: int, goal: int, shift: int = 3) -> Launch:
    """A fix on two blocks of entries of `width` bytes, with gap codes of `gap` bytes; its contents don't matter."""
    kinds, changes = {1: torch.uint8, 2: torch.int16, 4: torch.int32}, 500
    planes = tuple(torch.empty(changes, dtype=torch.uint8) if k != 1 else None for k in range(width))
    return fix(
        torch.empty(70000, dtype=kinds[width]),
        torch.empty(600, dtype=kinds[gap]),
        torch.empty((3, 2), dtype=torch.int64),
        torch.empty(100, dtype=torch.uint8),
        planes,
        torch.empty(changes, dtype=kinds[width]),
        torch.empty((2, 2), dtype=torch.int32),
        shift,
        goal,
    )


def decisions(piece: Piece, counts: torch.Tensor) -> dict[str, Launch]:
    """The kernels that decide, of two patches that skip."""
    sums, extents = torch.empty(len(counts) // int(BLOCK), dtype=torch.int64), torch.empty(1, 2, dtype=torch.int64)
    searches = torch.empty(4, SEARCH_FIELDS.value, dtype=torch.int64)
    fine = torch.empty(4, WINDOW_FIELDS.value, dtype=torch.int64)
    cuts = torch.empty(2, 1, 2, FIELDS.value, dtype=torch.int64)
    return {
        "narrow": narrow(counts, sums, searches, fine, 2, 2),
        "settle": settle(counts, sums, searches, fine, cuts),
        "cut, two patches": cut(piece, searches, torch.empty(2, 2, 1, dtype=torch.int32), extents, cuts),
        "without": without(cuts),
    }


def launches() -> dict[str, Launch]:
    """Every kernel, and the passes of the common recipe in all its variants."""
    found: dict[str, Launch] = {}
    for name, plan in plans().items():
        piece = make_piece(plan)
        found[f"apply, {name}"] = apply(piece, torch.empty_like(piece.base))
    piece = make_piece(plans()["two patches"])
    batch = replace(piece, batch=torch.empty(1, BATCH_FIELDS.value, dtype=torch.int64))
    found["apply, two patches, batch"] = apply(batch, torch.empty_like(piece.base))
    long = torch.empty(2, BLOCK, dtype=torch.uint32)
    window = torch.empty(2, WINDOW_FIELDS.value, dtype=torch.int64)
    counts = torch.empty(HISTOGRAMS, 2 << 16, dtype=torch.int64)
    found["score, two patches"] = score_keys(piece, long)
    found["score, two patches, LoRA"] = score_keys(make_piece(plans()["two patches, LoRA"]), long)
    found["histogram, two patches"] = histogram(piece, window, (0, 1), counts)
    found["count_equal, two patches"] = count_equal(piece, torch.empty(2, 1, dtype=torch.int32))
    found["faults, two patches"] = faults(piece)
    total = torch.empty(2 << 16, dtype=torch.int64)
    found["fold"] = fold(counts, total)
    found |= decisions(batch, total)
    added, half = torch.empty(BLOCK), torch.empty(BLOCK, dtype=torch.bfloat16)
    found["importance, BF16"] = accumulate(added, half, half)
    found["importance, F32"] = accumulate(added, added.clone(), added.clone())
    found["fix, 2 bytes, check"] = make_fix(2, 1, KEEP)
    found["fix, 2 bytes, apply"] = make_fix(2, 1, NEW)
    found["fix, 2 bytes, revert"] = make_fix(2, 1, OLD)
    found["fix, 2 bytes, apply, U16 gaps"] = make_fix(2, 2, NEW)
    found["fix, 1 byte, apply"] = make_fix(1, 1, NEW)
    found["fix, 4 bytes, apply"] = make_fix(4, 1, NEW)
    return found


def main(path: Path) -> None:
    assert not INTERPRETED, "TRITON_INTERPRET is set: nothing would be compiled"
    rows = []
    for name, launch in launches().items():
        for target in TARGETS:
            code = asdict(compile_launch(launch, target, name))
            rows.append({key: value for key, value in code.items() if key not in ("text", "machine", "types")})
            print(" ".join(f"{value!s:>8}" if key != "kernel" else f"{value:32}" for key, value in rows[-1].items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    table = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"triton": "{triton.__version__}", "block": {BLOCK}, "rows": [\n{table}\n]}}\n')


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results/triton-compile.json"))
