"""LoRA of a tensor [experts, …, …] (PEFT's `target_parameters`): a pair of factors for every expert.

The engine takes factors of one matrix, so deltas are decoded into the ring, by the same order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.contract import Bits
from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import TensorEntry
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.sources.contract import Range, align
from safepatch_core.merging.sources.decoding import F32Array, as_bits, placed, product, read_matrix, rectangles
from safepatch_core.merging.sources.factors import Factors, require_fit
from safepatch_core.merging.sources.folder import INSTEAD, Entries, Folder, Found, Part, Shape
from safepatch_core.merging.sources.orientation import model_type
from safepatch_core.spec import Kind

# Models whose classes tell PEFT that their experts are stored [experts, in, out]. Llama 4 has them so without a word,
# and PEFT takes them the other way round.
_TRANSPOSED = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})
_MOST = 6  # parameters of one module: their ways to fit are tried one by one
Nested = tuple[str, TensorEntry, TensorEntry]  # module, A, B
Scaled = Callable[[str], tuple[int, float]]  # rank and scale of a module


@dataclass(frozen=True, slots=True)
class ExpertFactors:
    """Factors of all experts of one tensor: row e·rank + r of `a` and column r·experts + e of `b` are expert e's."""

    a: TensorEntry  # [experts · rank, in]
    b: TensorEntry  # [out, rank · experts]
    experts: int
    rank: int
    scale: float  # a float32 value
    transposed: bool  # the base stores [experts, in, out]
    form: Kind = "delta"
    entry_bytes: int = 0
    ring_bytes: int = 4

    @property
    def path(self) -> Path:
        return self.a.path

    @property
    def stored(self) -> str:
        return self.a.name

    @property
    def shape(self) -> tuple[int, int, int]:
        out, into = self.b.shape[0], self.a.shape[1]
        return (self.experts, into, out) if self.transposed else (self.experts, out, into)

    @property
    def once_bytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    @property
    def held_bytes(self) -> int:
        return align(4 * self.a.entries) + align(4 * self.b.entries)

    def fit(self, entry: TensorEntry, cut: bool) -> ExpertFactors:
        require_fit(self.a, self.shape, entry, " (transposed)" if self.transposed else "")
        return self

    def ranges(self, lo: int, hi: int) -> list[Range]:
        return [(factor, 0, factor.nbytes) for factor in (self.a, self.b)] if lo == 0 else []

    def hold(self, inputs: Inputs, memory: NDArray[np.uint8]) -> HeldExperts:
        a = read_matrix(inputs, self.a).reshape(self.experts, self.rank, -1)
        b = read_matrix(inputs, self.b).reshape(-1, self.rank, self.experts).transpose(2, 0, 1)
        left, right = (a.transpose(0, 2, 1), b.transpose(0, 2, 1)) if self.transposed else (b, a)
        left, right = placed([left, right], memory)
        return HeldExperts(left, right, self.scale)


@dataclass(frozen=True, slots=True)
class HeldExperts:
    """Per expert, delta = scale * (left @ right)."""

    left: F32Array  # [experts, rows, rank]
    right: F32Array  # [experts, rank, cols]
    scale: float

    def load(self, inputs: Inputs, lo: int, hi: int, memory: NDArray[np.uint8]) -> Bits:
        out = memory[: 4 * (hi - lo)].view(np.float32)
        height = self.left.shape[1]
        with np.errstate(all="ignore"):
            for piece in rectangles(lo, hi, self.right.shape[2], every=height):
                expert, row = divmod(piece.row, height)
                left = self.left[expert, row : row + piece.rows]
                delta = product(left, self.right[expert][:, piece.slices[1]], self.scale)
                out[piece.at : piece.at + piece.entries] = delta.reshape(-1)
        return as_bits(out)


Pairs = ExpertFactors | Factors


class Parameters:
    """The parameters that an adapter names as such (`target_parameters`), of experts and of plain matrices.

    PEFT wraps a module once for every parameter of it, and saves the wrappers by their depth: module, then
    module.base_layer, and so on. Which parameter a depth belongs to, shapes tell.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._targets = [name.rpartition(".") for name in folder.names("target_parameters")]

    def adapted(self, module: str) -> list[str]:
        """The full names of the parameters of the wrapped module, or nothing where it is none."""
        bare = module.replace(".base_layer", "")
        return [f"{bare}.{leaf}" for tail, _, leaf in self._targets if f".{bare}".endswith(f".{tail}")]

    def read(self, nested: list[Nested], scaled: Scaled) -> Found:
        """What the pairs of these modules change."""
        modules: dict[str, list[Nested]] = {}
        for item in nested:
            modules.setdefault(item[0].replace(".base_layer", ""), []).append(item)
        if self._targets and not modules:
            raise self._folder.fault(
                "target_parameters, but the file has no factors of them",
                self._folder.names("target_parameters"),
                "an adapter as PEFT saves it",
            )
        fits = {
            name: self._shapes(name, items, scaled)
            for module, items in modules.items()
            for name in self.adapted(module)
        }
        taken = frozenset(entry.name for _, *pair in nested for entry in pair)
        return Found(fits, taken, partial(self._parts, modules, scaled))

    def _shapes(self, name: str, items: list[Nested], scaled: Scaled) -> list[Shape]:
        _, a, b = items[0]
        rank, _ = scaled(name)
        nominal = (a.shape[0] // rank, b.shape[0], a.shape[1])
        return self._folder.shapes(nominal, lambda s: any(_fitted(s, a, b, rank, 1.0) for _, a, b in items))

    def _parts(self, modules: Mapping[str, list[Nested]], scaled: Scaled, there: Entries) -> dict[str, Part]:
        parts: dict[str, Pairs] = {}
        for module, items in modules.items():
            names = self.adapted(module)
            if len(names) > _MOST:
                raise self._folder.fault("target_parameters of one module", names, f"at most {_MOST}")
            found = list(_assigned(there, names, items, scaled))
            if len(found) != 1:
                raise self._refuse(there, items[0], names, several=bool(found))
            parts |= found[0]
        return {name: self._turned(part, parts.values()) for name, part in parts.items()}

    def _turned(self, part: Pairs, others: Iterable[Pairs]) -> Part:
        """A square one is transposed as the base's architecture, or else the adapter's other experts, say."""
        if isinstance(part, Factors) or part.shape[1] != part.shape[2]:
            return part
        known = model_type(self._folder.base)
        if known is not None:
            return replace(part, transposed=known in _TRANSPOSED)
        told = {o.transposed for o in others if isinstance(o, ExpertFactors) and o.shape[1] != o.shape[2]}
        if len(told) != 1:
            raise InputError(
                "square experts, which may be stored either way round",
                file=self._folder.file,
                tensor=part.stored,
                expected="the base's config.json beside its weights, whose model_type tells",
            )
        return replace(part, transposed=told.pop())

    def _refuse(self, there: Entries, item: Nested, names: list[str], several: bool) -> InputError:
        _, a, b = item
        known = [f"{name} {list(there[name].shape)}" for name in names if name in there]
        if several:
            what, expected = "it fits several parameters", "parameters of different shapes"
        elif known:
            what, expected = "an adapter of another base", ", ".join(known)
        else:
            what = f"the base has no tensor '{names[0]}'"
            expected = f"a base that keeps all experts in one tensor (else {INSTEAD})"
        found = f"lora_A {list(a.shape)} and lora_B {list(b.shape)}"
        return InputError(what, file=self._folder.file, tensor=a.name, found=found, expected=expected)


def _assigned(there: Entries, names: list[str], items: list[Nested], scaled: Scaled) -> Iterator[dict[str, Pairs]]:
    """The ways in which the pairs of one module fit its parameters."""
    for order in permutations(names, len(items)):
        found: dict[str, Pairs] = {}
        for name, (_, a, b) in zip(order, items, strict=True):
            part = _fitted(there[name].shape, a, b, *scaled(name)) if name in there else None
            if part is not None:
                found[name] = part
        if len(found) == len(items):
            yield found


def _fitted(shape: Shape, a: TensorEntry, b: TensorEntry, rank: int, scale: float) -> Pairs | None:
    """Factors of a parameter of that shape, if these can be its."""
    out, into = b.shape[0], a.shape[1]
    if len(shape) == 2 and shape == (out, into) and a.shape[0] == b.shape[1] == rank:
        return Factors(a, b, rank, scale, False)
    stacked = len(shape) == 3 and a.shape[0] == b.shape[1] == rank * shape[0]
    if stacked and shape[1:] in ((out, into), (into, out)):
        return ExpertFactors(a, b, shape[0], rank, scale, shape[1:] != (out, into))
    return None
