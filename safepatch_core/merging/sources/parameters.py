"""The parameters that an adapter names as such (PEFT's `target_parameters`): experts, and plain matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import permutations

from safepatch_core.errors import InputError
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.sources.experts import ExpertFactors, ExpertSlice
from safepatch_core.merging.sources.factors import Factors
from safepatch_core.merging.sources.folder import INSTEAD, Entries, Folder, Found, Part, Shape
from safepatch_core.merging.sources.fusions import apart, holders
from safepatch_core.merging.sources.orientation import model_type

# Models whose classes tell PEFT that their experts are stored [experts, in, out], and Qwen3-VL, whose files have them
# so. Llama 4 has them so without a word, and PEFT takes them the other way round.
_TRANSPOSED = frozenset(
    {"gpt_oss", "openai_privacy_filter", "aria", "aria_text", "qwen3_vl_moe", "qwen3_vl_moe_text"}
)
_MOST = 6  # parameters of one module: their ways to fit are tried one by one
Nested = tuple[str, TensorEntry, TensorEntry]  # module, A, B
Scaled = Callable[[str], tuple[int, float]]  # rank and scale of a module
Pairs = ExpertFactors | Factors


class Parameters:
    """Which pairs of factors are for which parameters.

    PEFT wraps a module once for every parameter of it, and saves the wrappers by their depth: module, then
    module.base_layer, and so on. Which parameter a depth belongs to, shapes tell.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._targets = [name.rpartition(".") for name in folder.names("target_parameters")]
        self._holders = {leaf: holders(leaf, folder.base) for tail, _, leaf in self._targets if not tail}

    def adapted(self, module: str) -> list[str]:
        """The full names of the parameters of the wrapped module, or nothing where it is none."""
        if not self._targets:
            return []
        bare = module.replace(".base_layer", "")
        names = (leaf for tail, _, leaf in self._targets if self._is_at(bare, tail, leaf))
        return [f"{bare}.{leaf}" for leaf in dict.fromkeys(names)]

    def _is_at(self, module: str, tail: str, leaf: str) -> bool:
        """Whether a target is the module's. One without a module is that of any module which has such a parameter."""
        return f".{module}".endswith(f".{tail}") if tail else module.rpartition(".")[2] in self._holders[leaf]

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
        fits: dict[str, Sequence[Shape]] = {}
        for module, items in modules.items():
            for name in self.adapted(module):
                fits |= self._fits(name, items, scaled)
        taken = frozenset(entry.name for _, *pair in nested for entry in pair)
        return Found(fits, taken, partial(self._parts, modules, scaled))

    def _fits(self, name: str, items: list[Nested], scaled: Scaled) -> dict[str, Sequence[Shape]]:
        """The parameter, or what it is made of in a base that keeps its experts apart."""
        rank, _ = scaled(name)
        parts: dict[str, Sequence[Shape]] = {
            part: [shape] for _, a, b in items for part, shape in self._apart(name, a, b, rank)[0].items()
        }
        if parts:
            return parts
        _, a, b = items[0]
        nominal = (a.shape[0] // rank, b.shape[0], a.shape[1])
        return {name: self._folder.shapes(nominal, lambda s: any(_fitted(s, a, b, rank, 1.0) for _, a, b in items))}

    def _apart(self, name: str, a: TensorEntry, b: TensorEntry, rank: int) -> tuple[dict[str, Shape], int]:
        if name in self._folder.base.tensors or a.shape[0] != b.shape[1] or a.shape[0] % rank:
            return {}, 1
        return apart(name, (a.shape[0] // rank, b.shape[0], a.shape[1]), self._folder.base)

    def _parts(self, modules: Mapping[str, list[Nested]], scaled: Scaled, there: Entries) -> dict[str, Part]:
        parts: dict[str, Pairs] = {}
        for module, items in modules.items():
            names = self.adapted(module)
            if len(names) > _MOST:
                raise self._folder.fault("target_parameters of one module", names, f"at most {_MOST}")
            found = list(self._assigned(there, names, items, scaled))
            if len(found) != 1:
                raise self._refuse(there, items[0], names, several=bool(found))
            parts |= found[0]
        whole = {name: self._turned(part, parts.values()) for name, part in parts.items() if name in there}
        return whole | {
            name: part
            for of, factors in parts.items()
            if of not in there and isinstance(factors, ExpertFactors)
            for name, part in self._slices(of, factors)
        }

    def _assigned(
        self, there: Entries, names: list[str], items: list[Nested], scaled: Scaled
    ) -> Iterator[dict[str, Pairs]]:
        """The ways in which the pairs of one module fit its parameters."""
        for order in permutations(names, len(items)):
            found: dict[str, Pairs] = {}
            for name, (_, a, b) in zip(order, items, strict=True):
                rank, scale = scaled(name)
                if name in there and (part := _fitted(there[name].shape, a, b, rank, scale)):
                    found[name] = part
                elif self._apart(name, a, b, rank)[0]:
                    found[name] = ExpertFactors(a, b, a.shape[0] // rank, rank, scale, False)
            if len(found) == len(items):
                yield found

    def _slices(self, name: str, factors: ExpertFactors) -> Iterator[tuple[str, ExpertSlice]]:
        """What the base's tensors get of a parameter that they make up, in the order of its rows."""
        row, (_, height, _) = 0, factors.shape
        parts, every = self._apart(name, factors.a, factors.b, factors.rank)
        for part, (rows, cols) in parts.items():
            first = row % height // rows if every > 1 else row % height
            yield part, ExpertSlice(factors, row // height, first, every, (rows, cols))
            row += rows

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


def _fitted(shape: Shape, a: TensorEntry, b: TensorEntry, rank: int, scale: float) -> Pairs | None:
    """Factors of a parameter of that shape, if these can be its."""
    out, into = b.shape[0], a.shape[1]
    if len(shape) == 2 and shape == (out, into) and a.shape[0] == b.shape[1] == rank:
        return Factors(a, b, rank, scale, False)
    stacked = len(shape) == 3 and a.shape[0] == b.shape[1] == rank * shape[0]
    if stacked and shape[1:] in ((out, into), (into, out)):
        return ExpertFactors(a, b, shape[0], rank, scale, shape[1:] != (out, into))
    return None
