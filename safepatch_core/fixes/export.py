"""A fix in the formats of other tools: a whole checkpoint, a server's byte deltas, PEFT's sparse adapter."""

from __future__ import annotations

import json
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from safepatch_core.errors import InputError, UsageError
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint
from safepatch_core.files.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX
from safepatch_core.files.header import make_header
from safepatch_core.files.reading import TensorEntry
from safepatch_core.files.records import RunIdentity
from safepatch_core.files.staging import Staging
from safepatch_core.fixes import codec
from safepatch_core.fixes.apply import apply
from safepatch_core.fixes.checking import check, require, settling, teller_of
from safepatch_core.fixes.reading import Fix, open_fix
from safepatch_core.fixes.reference import Entries
from safepatch_core.merging.inputs import Inputs
from safepatch_core.version import __version__

Format = Literal["dense", "shira", "slime"]
_PIECE = 1 << 20
# Modules that hold a weight of two dimensions and are no torch.nn.Linear, by what their names contain.
_NO_LINEAR = re.compile(r"embed|wte|wpe|shared|conv", re.IGNORECASE)


@dataclass(frozen=True)
class ExportResult:
    """What was written."""

    out: Path
    format: Format
    id: str
    tensors: int


def export(
    fix: str | os.PathLike[str],
    to: Format,
    base: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    version: int = 1,
    force: bool = False,
) -> ExportResult:
    """Write a fix in another tool's format, from which that tool gets the same bits.

    Args:
        fix: the fix file.
        to: `dense`, a checkpoint with the fix applied; `slime`, a directory `weight_vNNNNNN` of compressed byte
            deltas, which servers pull; `shira`, a sparse adapter of PEFT.
        base: the checkpoint that the fix applies to; None is the one that its recipe names, looked for beside the fix
            file, where the recipe mostly lay, before it is taken as it stands.
        out: directory to create; for `slime` the one that versions lie in.
        version: of `slime`; the server must have the one before.
        force: replace an existing output, in one step.

    Raises:
        InputError: the base doesn't fit, or the format can't give the same bits.
        UsageError: a package is missing, or the fix names no base and none is given.
        OutputError, IOFailure, Busy: as for `apply`.
    """
    with open_fix(fix) as opened:
        base = _base_of(opened) if base is None else base
        if to == "dense":
            result = apply(fix, base, out, force=force)
            return ExportResult(result.out, to, result.id, result.tensors)
        checkpoint = open_checkpoint(base)
        require(opened, check(opened, checkpoint), "apply", checkpoint.ref)
        target = Path(out) / f"weight_v{version:06d}" if to == "slime" else Path(out)
        inputs = [shard.path for shard in checkpoint.shards] + [opened.path]
        identity = RunIdentity({"version": __version__, "fix": opened.id, "format": to})
        with (
            Staging(target, inputs, identity, needed=opened.size, force=force) as staging,
            closing(Inputs([checkpoint])) as files,
        ):
            (_slime if to == "slime" else _shira)(_Job(opened, checkpoint, files, staging), version)
            staging.publish()
        return ExportResult(staging.out, to, opened.id, len(opened.tensors))


def _base_of(fix: Fix) -> str | Path:
    """The base that the fix's recipe names."""
    named = fix.recipe.get("base") if isinstance(fix.recipe, dict) else None
    if not isinstance(named, str):
        raise UsageError("the fix does not name its base", file=fix.path, expected="--base")
    beside = fix.path.parent / named
    return beside if beside.exists() else named


@dataclass(frozen=True)
class _Job:
    fix: Fix
    base: Checkpoint
    files: Inputs
    staging: Staging

    def entries(self) -> list[TensorEntry]:
        """The touched tensors, in the fix's order."""
        return [self.base.tensors[name] for name in self.fix.tensors]

    def windows(self, entry: TensorEntry) -> Iterator[tuple[int, Entries, Entries]]:
        """A tensor in windows: the first entry, the old and the new entries."""
        teller = teller_of(self.fix, entry)
        for lo, run in teller.windows():
            old = np.empty(run.entries, f"<u{teller.width}")
            self.files.read(entry, lo * teller.width, old.view(np.uint8))
            new = old.copy()
            teller.settle(run, settling(new, codec.NEW))
            yield lo, old, new
        teller.finish()


class _Spool:
    """Tensors of one safetensors file, whose sizes are known when the last is written."""

    def __init__(self, folder: Path) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)
        self._table: list[tuple[str, str, list[int]]] = []

    def add(self, name: str, dtype: str, shape: list[int], pieces: Iterator[bytes]) -> None:
        """`shape` of one -1 is as long as the pieces, of bytes."""
        size = sum(self._file.write(piece) for piece in pieces)
        self._table.append((name, dtype, [size] if shape == [-1] else shape))

    def publish(self, staging: Staging, name: str, metadata: Mapping[str, str]) -> None:
        header, _ = make_header(self._table, metadata)
        size = self._file.tell()
        with closing(staging.open(name, len(header) + size)) as file:
            file.write(memoryview(header))
            self._file.seek(0)
            while piece := self._file.read(_PIECE):
                file.write(memoryview(piece))
            staging.finish(file)
        self._file.close()


def _slime(job: _Job, version: int) -> None:
    """Per touched tensor the XOR of all its bytes as one zstd frame, and the checksum of the new bytes."""
    compressor = _zstd()
    name, spool, sums = "model-00000-of-00001.safetensors", _Spool(job.staging.stage), {}
    for entry in job.entries():
        frame, adler = compressor(entry.nbytes), 1

        def pieces(entry: TensorEntry = entry, frame: Any = frame) -> Iterator[bytes]:
            nonlocal adler
            for _, old, new in job.windows(entry):
                adler = zlib.adler32(new.tobytes(), adler)
                yield frame.compress((old ^ new).tobytes())
            yield frame.flush()

        spool.add(entry.name, "U8", [-1], pieces())
        sums[entry.name] = f"{adler:08x}"
    spool.publish(job.staging, name, sums)
    about = {
        "version": f"{version:06d}",
        "base_version": f"{version - 1:06d}",
        "delta_encoding": "xor",
        "compression_format": "zstd",
        "checksum_format": "adler32",
    }
    index = {"metadata": about, "weight_map": dict.fromkeys(sums, name)}
    job.staging.add(INDEX, (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode())


def _zstd() -> Callable[[int], Any]:
    """What compresses a tensor of so many bytes; servers need the size in the frame."""
    try:
        import zstandard
    except ImportError:
        raise UsageError("slime's deltas need zstandard", expected="pip install 'safepatch[export]'") from None
    return lambda size: zstandard.ZstdCompressor(level=1).compressobj(size=size)


def _shira(job: _Job, version: int) -> None:
    """Per touched weight the places that change and what PEFT adds there; as many as one rank for all asks for."""
    shapes = {entry.name: _linear(entry) for entry in job.entries()}
    counts = {name: job.fix.tensors[name].changes for name in shapes}
    rank = max(-(-counts[name] // sum(shape)) for name, shape in shapes.items())
    spool = _Spool(job.staging.stage)
    for entry in job.entries():
        rows, cols = shapes[entry.name]
        room = rank * (rows + cols)
        if room > rows * cols:
            raise InputError(
                "is too small for the rank that the adapter needs",
                file=job.fix.path,
                tensor=entry.name,
                found=f"{rows * cols} entries",
                expected=f"at least {room}, for rank {rank}",
            )
        at, steps = _steps(job, entry, room)
        module = f"base_model.model.{entry.name.removesuffix('.weight')}"
        places = np.stack([at // cols, at % cols]).astype("<i4")
        spool.add(f"{module}.shira_indices", "I32", [2, room], iter([places.tobytes()]))
        spool.add(f"{module}.shira_weight", "F32", [room], iter([steps.tobytes()]))
    spool.publish(job.staging, ADAPTER_WEIGHTS, {"format": "pt"})
    config = {
        "base_model_name_or_path": Path(job.base.ref).name if os.path.isabs(job.base.ref) else job.base.ref,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        "mask_type": "random",
        "peft_type": "SHIRA",
        "r": rank,
        "random_seed": 0,
        "target_modules": [name.removesuffix(".weight") for name in shapes],
        "task_type": None,
    }
    job.staging.add(ADAPTER_CONFIG, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def _linear(entry: TensorEntry) -> tuple[int, int]:
    if len(entry.shape) != 2 or not entry.name.endswith(".weight") or _NO_LINEAR.search(entry.name):
        raise InputError(
            "is not the weight of a linear layer, which is all that this adapter can change",
            file=entry.path,
            tensor=entry.name,
            found=f"{entry.dtype} {list(entry.shape)}",
        )
    if entry.dtype not in ("F32", "F16", "BF16"):
        raise InputError("can't take an adapter's steps", file=entry.path, tensor=entry.name, found=entry.dtype)
    return entry.shape[0], entry.shape[1]


def _steps(job: _Job, entry: TensorEntry, room: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """`room` places in order, and what is added there: adding -0 changes nothing.

    Raises:
        InputError: no step of float32 leads to the new entry, to the bit.
    """
    at, steps, free = [], [], []
    spare = room - job.fix.tensors[entry.name].changes
    for lo, old, new in job.windows(entry):
        places = np.flatnonzero(old != new)
        was, becomes = (_floats(side[places], entry.dtype) for side in (old, new))
        with np.errstate(all="ignore"):
            step = becomes - was
            reached = _bits(was + step, entry.dtype) == new[places]
        if not (reached & np.isfinite(step)).all():
            raise InputError(
                "no step of an adapter leads to the same bits",
                file=job.fix.path,
                tensor=entry.name,
                found=f"{int((~reached).sum())} such entries, the first at {lo + int(places[np.argmin(reached)])}",
            )
        at.append(places + lo)
        steps.append(step)
        same = np.flatnonzero(old == new)[:spare]
        spare -= len(same)
        free.append(same + lo)
    filled = np.concatenate([*at, *free])
    added = np.concatenate([*steps, np.full(len(filled) - sum(map(len, steps)), -0.0, np.float32)])
    order = np.argsort(filled, kind="stable")
    return filled[order], added[order].astype("<f4")


def _floats(bits: Entries, dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32) if dtype == "F16" else bits.view(np.float32)


def _bits(values: NDArray[np.float32], dtype: str) -> Entries:
    """Rounded to nearest even, as torch rounds."""
    if dtype == "BF16":
        raw = values.view(np.uint32)
        return ((raw + np.uint32(0x7FFF) + (raw >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return values.astype(np.float16).view(np.uint16) if dtype == "F16" else values.view(np.uint32)
