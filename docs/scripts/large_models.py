"""The table of docs/large-models.md: what `safepatch plan` says of models of many sizes, on files without contents.

    python -m docs.scripts.large_models FOLDER

FOLDER gets, and loses again, checkpoints that are nothing but a header and a hole: they take next to no disk.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safepatch_core.bench.models import PATCHES, SHAPES, SHARD_BYTES, ModelShape, write_recipe
from safepatch_core.commands.common import human
from safepatch_core.files.header import make_header
from safepatch_core.merging import rates

PAGE = Path(__file__).parents[1] / "large-models.md"
BEGIN, END = "<!-- from docs/scripts/large_models.py -->\n", "<!-- end -->\n"
NAMES = ("1.1B", "Llama-3-8B", "Mixtral-8x7B", "Llama-3-70B", "Llama-3.1-405B")
LIMITS = ("256MiB", "2GiB")
# Assumed, not measured: a good NVMe disk, eight cores. An engine's rates are per thread.
ASSUMED = {
    rates.DISK_READ: 2.5e9,
    rates.DISK_WRITE: 1.5e9,
    rates.READ: 1e10,
    rates.WRITE: 2e9,
    rates.HASH: 1.5e9,
    rates.STARTUP: 0.2,
    rates.CORES: 8,
    rates.STALLS: 1.2,
    rates.engine_rate("merge", "checkpoint"): 4e8,
    rates.engine_rate("histogram", "checkpoint"): 6e8,
    rates.engine_rate("apply", "checkpoint"): 4e8,
}


def write_hollow(folder: Path, shape: ModelShape) -> None:
    """A checkpoint of that shape in bfloat16: shards of headers and holes, an index, a config."""
    folder.mkdir(parents=True)
    weight_map = {}
    shards = list(_shards(shape))
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, ranges = make_header((tensor, "BF16", dims) for tensor, dims in tensors)
        with open(folder / name, "wb") as file:
            file.write(header)
            file.truncate(len(header) + max(hi for _, hi in ranges.values()))
        weight_map |= dict.fromkeys(ranges, name)
    index = {"metadata": {"total_size": shape.nbytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config()))


def _shards(shape: ModelShape) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    tensors: list[tuple[str, tuple[int, ...]]] = []
    size = 0
    for name, dims in shape.tensors():
        nbytes = 2 * dims[0] * (dims[1] if len(dims) > 1 else 1)
        if tensors and size + nbytes > SHARD_BYTES:
            yield sorted(tensors)
            tensors, size = [], 0
        tensors.append((name, dims))
        size += nbytes
    yield sorted(tensors)


def planned(folder: Path, shape: ModelShape, scope: str, limit: str) -> dict[str, Any]:
    """What `safepatch plan --json` says."""
    if not folder.exists():
        for part in ("base", *PATCHES):
            write_hollow(folder / part, shape)
    recipe = write_recipe(folder / f"{scope}.yaml", scope=scope)
    command = [sys.executable, "-m", "safepatch_core", "plan", recipe, "--memory-limit", limit, "--backend", "cpu"]
    command += ["--threads", str(ASSUMED[rates.CORES])]
    cache = folder / "cache"
    (cache / "safepatch").mkdir(parents=True, exist_ok=True)
    (cache / "safepatch" / "rates.json").write_text(json.dumps(ASSUMED))
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run([*map(str, command), "--json"], capture_output=True, text=True, check=True, env=environment)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def table(root: Path) -> str:
    """One row per model, scope and limit."""
    lines = ["| model | scope | limit | buffers | reads | writes | time |", "|---|---|---|---|---|---|---|"]
    for name in NAMES:
        for scope in ("tensor", "model"):
            told = {limit: planned(root / name, SHAPES[name], scope, limit) for limit in LIMITS}
            same = len({of["memory"] for of in told.values()}) == 1
            for limit, of in list(told.items())[: 1 if same else None]:
                minutes = f"{of['seconds'] / 60:.1f} min" if of["seconds"] >= 60 else f"{of['seconds']:.0f} s"
                sizes = (human(of[key]) for key in ("memory", "bytes_read", "bytes_written"))
                lines.append(f"| {' | '.join((name, scope, 'any' if same else limit, *sizes, minutes))} |")
        shutil.rmtree(root / name)
    return "\n".join(lines) + "\n"


def main() -> None:
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table(Path(sys.argv[1]))}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
