"""Weights that one checkpoint keeps joined and another apart: experts in one tensor, gate and up, query, key, value.

Both ways hold the same entries in the same order, row by row, so they are read where they lie. Where experts are
stored transposed as well, or with gate and up interleaved, that is not so, and the patch is refused by its names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safepatch_core.files.checkpoint import Checkpoint, TensorEntry
from safepatch_core.merging.sources.contract import Range
from safepatch_core.merging.sources.orientation import model_type

# Models that store their joined experts as [experts, in, out].
_TRANSPOSED = frozenset({"gpt_oss", "llama4", "llama4_text", "openai_privacy_filter", "aria", "aria_text"})


class Fusion(NamedTuple):
    """A tensor and what it is made of, by what follows in a name after the layer; {e} counts experts."""

    whole: str
    parts: tuple[str, ...]

    @property
    def of_experts(self) -> bool:
        return "{e}" in self.parts[0]

    def names(self, head: str, experts: int) -> list[str]:
        """The parts of the tensor that begins with `head`, in the order of their rows."""
        return [head + part.format(e=e) for e in range(experts) for part in self.parts]


FUSIONS = (
    Fusion("mlp.experts.gate_up_proj", ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight")),
    Fusion("mlp.experts.down_proj", ("mlp.experts.{e}.down_proj.weight",)),
    # Mixtral's, as the hub has them and as transformers has them in memory.
    Fusion(
        "mlp.experts.gate_up_proj",
        ("block_sparse_moe.experts.{e}.w1.weight", "block_sparse_moe.experts.{e}.w3.weight"),
    ),
    Fusion("mlp.experts.down_proj", ("block_sparse_moe.experts.{e}.w2.weight",)),
    Fusion("mlp.gate.weight", ("block_sparse_moe.gate.weight",)),
    Fusion("mlp.gate_up_proj.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    *(
        Fusion(f"self_attn.qkv_proj.{leaf}", tuple(f"self_attn.{part}_proj.{leaf}" for part in "qkv"))
        for leaf in ("weight", "bias")
    ),
)


@dataclass(frozen=True, slots=True)
class Joined:
    """Tensors that lie one after another in a larger one."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorEntry, ...]  # of one dtype

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def path(self) -> Path:
        return self.parts[0].path

    @property
    def file(self) -> str:
        return self.parts[0].file


Stored = TensorEntry | Joined


def runs(stored: Stored, lo: int, hi: int) -> list[Range]:
    """Where its bytes [lo, hi) lie."""
    found, at = [], 0
    for part in stored.parts if isinstance(stored, Joined) else (stored,):
        begin, end = max(lo - at, 0), min(hi - at, part.nbytes)
        if begin < end:
            found.append((part, begin, end))
        at += part.nbytes
    return found


def fused(tensors: Mapping[str, TensorEntry], base: Checkpoint) -> tuple[dict[str, Stored], list[str]]:
    """A checkpoint's tensors, by the base's names, with what the base keeps apart cut up and the reverse joined.

    Returns:
        The tensors, and what was done, for people.
    """
    found: dict[str, Stored] = dict(tensors)
    done: dict[str, None] = {}
    kind = model_type(base)
    for name in [name for name in tensors if name not in base.tensors]:
        for fusion, head in _wholes(name):
            parts = _parts(fusion, head, tensors[name].shape, base.tensors, kind)
            if parts:
                del found[name]
                found |= _cut(tensors[name], {part: base.tensors[part].shape for part in parts})
                done[f"{fusion.whole} cut into {fusion.parts[0]}"] = None
                break
    for name in [name for name in base.tensors if name not in found]:
        for fusion, head in _wholes(name):
            parts = _parts(fusion, head, base.tensors[name].shape, tensors, kind)
            if parts and len({tensors[part].dtype for part in parts}) == 1:
                joined = tuple(tensors[part] for part in parts)
                for part in parts:
                    del found[part]
                found[name] = Joined(joined[0].name, base.tensors[name].shape, joined)
                done[f"{fusion.whole} made of {fusion.parts[0]}"] = None
                break
    return found, list(done)


def apart(name: str, shape: tuple[int, ...], base: Checkpoint) -> list[str]:
    """The base's tensors that make up one of that name and shape which it lacks, or nothing."""
    kind = model_type(base)
    made = (_parts(fusion, head, shape, base.tensors, kind) for fusion, head in _wholes(name))
    return next((parts for parts in made if parts), [])


def fusion_of(name: str, base: Checkpoint) -> str | None:
    """What the base has in place of a tensor that it lacks under that name, if it has it joined or apart."""
    for fusion, head in _wholes(name):
        first = fusion.names(head, 1)[0]
        if first in base.tensors:
            return f"one matrix each, like '{first}', as the base has them"
    for fusion in FUSIONS:
        for part in fusion.parts:
            match = re.fullmatch(r"(.*\.)?" + "[0-9]+".join(map(re.escape, part.split("{e}"))), name)
            whole = f"{match[1] or ''}{fusion.whole}" if match else ""
            if whole in base.tensors:
                return f"all of them joined in '{whole}', as the base has them"
    return None


def _wholes(name: str) -> Iterator[tuple[Fusion, str]]:
    """The fusions that may give a tensor of that name, and what stands before."""
    for fusion in FUSIONS:
        if name == fusion.whole or name.endswith(f".{fusion.whole}"):
            yield fusion, name.removesuffix(fusion.whole)


def _cut(entry: TensorEntry, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorEntry]:
    """The rows of a joined tensor as parts of these shapes, in order."""
    parts, at = {}, entry.start
    for i, (name, shape) in enumerate(shapes.items()):
        nbytes = entry.nbytes * math.prod(shape) // max(entry.entries, 1)
        parts[name] = entry._replace(name=f"{entry.name}[{i}]", shape=shape, start=at, nbytes=nbytes)
        at += nbytes
    return parts


def _parts(
    fusion: Fusion, head: str, shape: tuple[int, ...], known: Mapping[str, TensorEntry], kind: str | None
) -> list[str]:
    """The names of the parts of a joined tensor of that shape; nothing where they don't make it up."""
    experts, each = (shape[0], shape[1:]) if fusion.of_experts and len(shape) == 3 else (1, shape)
    if fusion.of_experts and (len(each) != 2 or kind in _TRANSPOSED or (kind is None and each[0] == each[1])):
        return []  # the other way round, or nothing tells
    names = fusion.names(head, experts) if each else []
    if not names or not all(name in known for name in names):
        return []
    count = len(fusion.parts)
    for at in range(0, len(names), count):
        shapes = [known[name].shape for name in names[at : at + count]]
        if any(not s or s[1:] != each[1:] for s in shapes) or sum(s[0] for s in shapes) != each[0]:
            return []
    return names
