"""Weights that one checkpoint keeps joined and another apart: experts in one tensor, gate and up, query, key, value.

Mostly both ways hold the same entries in the same order, row by row, and are read where they lie. Some families
store joined experts as [experts, in, out], gpt-oss also with the columns of gate and up in turn: these are turned as
they are read. Where nothing tells which it is, the patch is refused by its names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.sources.contract import Range
from safepatch_core.merging.sources.orientation import model_type
from safepatch_core.merging.sources.turned import Tile, Turned

Shape = tuple[int, ...]
Entries = Mapping[str, TensorEntry]

# Models that store their joined experts as [experts, in, out]: gate before up, or their columns in turn.
_TURNED = frozenset({"llama4", "llama4_text", "aria", "aria_text", "qwen3_vl_moe", "qwen3_vl_moe_text"})
_IN_TURN = frozenset({"gpt_oss", "openai_privacy_filter"})
# PEFT adapts these as if they were stored [experts, out, in]: its factors of them are no factors of single experts.
_BACKWARDS = frozenset({"llama4", "llama4_text"})


@dataclass(frozen=True)
class Fusion:
    """A tensor and what it is made of, by how their names end; {e} counts experts."""

    whole: str
    parts: tuple[str, ...]

    @property
    def of_experts(self) -> bool:
        return "{e}" in self.parts[0]

    @cached_property
    def patterns(self) -> list[re.Pattern[str]]:
        """What the parts' names match, with a group of what stands before."""
        return [re.compile(r"(.*\.|)" + "[0-9]+".join(map(re.escape, part.split("{e}")))) for part in self.parts]

    def names(self, head: str, experts: int) -> list[str]:
        """The parts of the tensor that begins with `head`, in the order of their rows."""
        return [head + part.format(e=e) for e in range(experts) for part in self.parts]


def _experts(whole: str, part: str, *names: str, block: str = "") -> Fusion:
    return Fusion(whole, tuple(f"{block}experts.{{e}}.{name}.{part}" for name in names))


FUSIONS = (
    _experts("experts.gate_up_proj", "weight", "gate_proj", "up_proj"),
    _experts("experts.down_proj", "weight", "down_proj"),
    _experts("experts.gate_up_proj_bias", "bias", "gate_proj", "up_proj"),
    _experts("experts.down_proj_bias", "bias", "down_proj"),
    # Experts that have no gate.
    _experts("experts.up_proj", "weight", "up_proj"),
    # Mixtral's and its descendants', as the hub has them; transformers renames the block in memory.
    _experts("experts.gate_up_proj", "weight", "w1", "w3"),
    _experts("experts.down_proj", "weight", "w2"),
    _experts("mlp.experts.gate_up_proj", "weight", "w1", "w3", block="block_sparse_moe."),
    _experts("mlp.experts.down_proj", "weight", "w2", block="block_sparse_moe."),
    Fusion("mlp.gate.weight", ("block_sparse_moe.gate.weight",)),
    Fusion("mlp.router.weight", ("block_sparse_moe.gate.weight",)),
    # Granite's are joined on the hub too, under other names.
    Fusion("block_sparse_moe.experts.gate_up_proj", ("block_sparse_moe.input_linear.weight",)),
    Fusion("block_sparse_moe.experts.down_proj", ("block_sparse_moe.output_linear.weight",)),
    Fusion("block_sparse_moe.router.weight", ("block_sparse_moe.router.layer.weight",)),
    # gpt-oss with a linear layer for each expert.
    Fusion("experts.gate_up_proj", ("experts.gate_up_projs.{e}.weight",)),
    Fusion("experts.down_proj", ("experts.down_projs.{e}.weight",)),
    Fusion("experts.gate_up_proj_bias", ("experts.gate_up_projs.{e}.bias",)),
    Fusion("experts.down_proj_bias", ("experts.down_projs.{e}.bias",)),
    Fusion("gate_up_proj.weight", ("gate_proj.weight", "up_proj.weight")),
    *(
        Fusion(f"self_attn.{whole}.{leaf}", tuple(f"self_attn.{part}_proj.{leaf}" for part in "qkv"))
        for whole in ("qkv_proj", "W_pack")
        for leaf in ("weight", "bias")
    ),
)
_JOINED_EXPERTS = tuple({f".{fusion.whole}" for fusion in FUSIONS if fusion.whole.startswith("experts.")})


@dataclass(frozen=True, slots=True)
class Joined:
    """Tensors that lie one after another in a larger one."""

    name: str
    shape: Shape
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


Stored = TensorEntry | Joined | Turned


class Made(NamedTuple):
    """What a joined tensor is made of, and how: rows one after another, or `every` so many columns of the same."""

    parts: list[str]
    turned: bool = False
    every: int = 1  # 1: the columns of one part after those of another; else in turn

    @property
    def told(self) -> str:
        return f"{' (transposed)' if self.turned else ''}{' (in turn)' if self.every > 1 else ''}"


def runs(stored: TensorEntry | Joined, lo: int, hi: int) -> list[Range]:
    """Where its bytes [lo, hi) lie."""
    found, at = [], 0
    for part in stored.parts if isinstance(stored, Joined) else (stored,):
        begin, end = max(lo - at, 0), min(hi - at, part.nbytes)
        if begin < end:
            found.append((part, begin, end))
        at += part.nbytes
    return found


def fused(tensors: Entries, base: Checkpoint) -> tuple[dict[str, Stored], list[str]]:
    """A checkpoint's tensors, by the base's names, with what the base keeps apart cut up and the reverse joined.

    Returns:
        The tensors, and what was done, for people.
    """
    found: dict[str, Stored] = dict(tensors)
    done: dict[str, None] = {}
    kind = model_type(base)
    for name, entry in tensors.items():
        if name in base.tensors:
            if turned_shape(name, entry.shape) == base.tensors[name].shape != entry.shape:
                found[name] = _transposed(entry, base.tensors[name].shape)
                done["experts transposed"] = None
            continue
        for fusion, head in _wholes(name):
            if made := _made(fusion, head, entry.shape, base.tensors, kind):
                del found[name]
                found |= _cut(entry, made, {part: base.tensors[part].shape for part in made.parts})
                done[f"{fusion.whole} cut into {fusion.parts[0]}{made.told}"] = None
                break
    for name in [name for name in base.tensors if name not in found]:
        for fusion, head in _wholes(name):
            shape = base.tensors[name].shape
            made = _made(fusion, head, shape, tensors, kind)
            if made and len({tensors[part].dtype for part in made.parts}) == 1:
                parts = [tensors[part] for part in made.parts]
                for part in made.parts:
                    del found[part]
                found[name] = _join(parts, made, shape)
                done[f"{fusion.whole} made of {fusion.parts[0]}{made.told}"] = None
                break
    return found, list(done)


def turned_shape(name: str, shape: Shape) -> Shape:
    """The shape that a tensor of joined experts has where they are stored the other way round."""
    experts = len(shape) == 3 and f".{name}".endswith(_JOINED_EXPERTS)
    return (shape[0], shape[2], shape[1]) if experts else shape


def apart(name: str, shape: Shape, base: Checkpoint) -> tuple[dict[str, Shape], int]:
    """The base's tensors whose rows make up one of that name and shape [experts, out, in] that it lacks, if any.

    They are named as `name` begins, where the base may have another prefix. With them comes by how much the next row
    of a part is further on in the whole.
    """
    kind = model_type(base)
    turned = kind in _TURNED | _IN_TURN
    if kind in _BACKWARDS:
        return {}, 1
    for fusion, head in _wholes(name):
        for other in _heads(fusion, head, base):
            made = _made(fusion, other, shape[:1] + shape[:0:-1] if turned else shape, base.tensors, kind)
            if made and made.turned == turned:
                return {head + part.removeprefix(other): base.tensors[part].shape for part in made.parts}, made.every
    return {}, 1


def _heads(fusion: Fusion, head: str, base: Checkpoint) -> list[str]:
    """What stands before such parts in the base: `head`, or what ends as it does from the layer on."""
    first, parts = fusion.names("", 1)[0], head.split(".")
    layer = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    if head + first in base.tensors or not layer:
        return [head]
    end = ".".join(parts[layer - 1 :]) + first
    return [other.removesuffix(first) for other in base.tensors if f".{other}".endswith(f".{end}")]


def holders(leaf: str, base: Checkpoint) -> set[str]:
    """The last names of the base's modules that have a parameter `leaf`, also where the base keeps it apart."""
    modules = {name.rpartition(".")[0] for name in base.tensors if name.endswith(f".{leaf}")}
    for fusion in FUSIONS:
        whole, _, parameter = fusion.whole.rpartition(".")
        if parameter == leaf and any(fusion.patterns[0].fullmatch(name) for name in base.tensors):
            modules.add(whole)
    return {module.rpartition(".")[2] for module in modules}


def fusion_of(name: str, base: Checkpoint) -> str | None:
    """What the base has in place of a tensor that it lacks under that name, if it has it joined or apart."""
    for fusion, head in _wholes(name):
        first = fusion.names(head, 1)[0]
        if first in base.tensors:
            return f"one matrix each, like '{first}', as the base has them"
    for fusion in FUSIONS:
        for pattern in fusion.patterns:
            match = pattern.fullmatch(name)
            whole = f"{match[1]}{fusion.whole}" if match else ""
            if whole in base.tensors:
                return f"all of them joined in '{whole}', as the base has them"
    return None


def _wholes(name: str) -> Iterator[tuple[Fusion, str]]:
    """The fusions that may give a tensor of that name, and what stands before."""
    for fusion in FUSIONS:
        if name == fusion.whole or name.endswith(f".{fusion.whole}"):
            yield fusion, name.removesuffix(fusion.whole)


def _made(fusion: Fusion, head: str, shape: Shape, known: Entries, kind: str | None) -> Made | None:
    """How the tensors of `known` make up a joined tensor of that shape; None where they don't, or nothing tells."""
    experts, each = (shape[0], shape[1:]) if fusion.of_experts and len(shape) > 1 else (1, shape)
    names = fusion.names(head, experts) if each else []
    if not names or not all(name in known for name in names):
        return None
    shapes, count = [known[name].shape for name in names], len(fusion.parts)
    groups = [shapes[at : at + count] for at in range(0, len(shapes), count)]
    if fusion.of_experts and count > 1 and kind in _IN_TURN:
        equal = all(len({shape[0] for shape in group}) == 1 for group in groups if () not in group)
        return Made(names, True, count) if equal and _sums(groups, each[::-1]) else None
    straight, turned = _sums(groups, each), fusion.of_experts and _sums(groups, each[::-1])
    if straight and turned:
        turned = len(each) > 1 and kind in _TURNED | _IN_TURN
        straight = not turned and (kind is not None or (len(each), count) == (1, 1))
    if straight:
        return Made(names)
    # The order of gate and up among the columns is the family's.
    return Made(names, True) if turned and (count == 1 or kind in _TURNED) else None


def _sums(groups: list[list[Shape]], each: Shape) -> bool:
    """Whether the rows of each group are those of a matrix of the shape `each`."""
    return all(
        all(shape and shape[1:] == each[1:] for shape in group) and sum(shape[0] for shape in group) == each[0]
        for group in groups
    )


def _cut(entry: TensorEntry, made: Made, shapes: Mapping[str, Shape]) -> dict[str, Stored]:
    """A joined tensor as parts of these shapes, in order."""
    if made.turned:
        return _columns(entry, made, shapes)
    parts: dict[str, Stored] = {}
    at = 0
    for i, (name, shape) in enumerate(shapes.items()):
        parts[name] = _piece(entry, at, shape, f"{entry.name}[{i}]")
        at += math.prod(shape)
    return parts


def _columns(entry: TensorEntry, made: Made, shapes: Mapping[str, Shape]) -> dict[str, Stored]:
    parts: dict[str, Stored] = {}
    wide = entry.shape[-1]
    tall = entry.shape[1] if len(entry.shape) == 3 else 1
    at = begin = 0
    for i, (name, shape) in enumerate(shapes.items()):
        block = _piece(entry, begin * tall * wide, (tall, wide), entry.name)
        tile = Tile(block, at // shape[0] if made.every > 1 else at, made.every)
        parts[name] = Turned(f"{entry.name}[{i}]", shape, shape[0], tall, ((tile,),))
        at += shape[0]
        if at == wide:
            at, begin = 0, begin + 1
    return parts


def _join(parts: list[TensorEntry], made: Made, shape: Shape) -> Joined | Turned:
    if not made.turned:
        return Joined(parts[0].name, shape, tuple(parts))
    wide = shape[-1]
    tall = shape[1] if len(shape) == 3 else 1
    blocks: list[tuple[Tile, ...]] = []
    tiles: list[Tile] = []
    at = 0
    for part in parts:
        columns = part.shape[0]
        source = part._replace(shape=(columns, tall))
        tiles.append(Tile(source, at=at // columns if made.every > 1 else at, step=made.every))
        at += columns
        if at == wide:
            blocks.append(tuple(tiles))
            tiles, at = [], 0
    return Turned(parts[0].name, shape, tall, wide, tuple(blocks))


def _transposed(entry: TensorEntry, shape: Shape) -> Turned:
    """Every matrix of a tensor [experts, …, …] the other way round."""
    experts, rows, cols = shape
    blocks = (_piece(entry, e * rows * cols, (cols, rows), entry.name) for e in range(experts))
    return Turned(entry.name, shape, rows, cols, tuple((Tile(block),) for block in blocks))


def _piece(entry: TensorEntry, at: int, shape: Shape, name: str) -> TensorEntry:
    """Consecutive entries of a tensor."""
    begin, nbytes = (entry.nbytes * n // max(entry.entries, 1) for n in (at, math.prod(shape)))
    return entry._replace(name=name, shape=shape, start=entry.start + begin, nbytes=nbytes)
