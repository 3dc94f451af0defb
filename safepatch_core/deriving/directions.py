"""The direction of refusal and that of false refusal: read from the residual stream, written as adapters of rank 1.

A direction is the difference of two means of the residual stream at the last token of the prompt, behind one layer,
of length 1. That of refusal is harmful questions less ordinary ones; that of false refusal is harmless questions that
are refused less ordinary ones, made orthogonal to the first. A matrix W that writes to the residual stream becomes
W + s·r·(rᵀW): s times what it writes along r is added (safety, along refusal) or, with the sign turned, taken out
(over-safety, along false refusal). The factors have s = ±1; how much of that is merged is the recipe's `scale`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from safepatch_core.deriving.adapter import PREFIX, short_names
from safepatch_core.deriving.config import DeriveConfig
from safepatch_core.deriving.data import Data
from safepatch_core.deriving.head import keeps_logits
from safepatch_core.deriving.objective import batches
from safepatch_core.deriving.saving import read_tensor
from safepatch_core.errors import UsageError
from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.files.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from safepatch_core.files.reading import TensorEntry
from safepatch_core.language.chat import Example
from safepatch_core.language.rows import slice_rows
from safepatch_core.merging.recipe import of_language
from safepatch_core.progress import Progress

SIGNS = {"safety": 1.0, "over-safety": -1.0}  # what of its direction an adapter adds to a matrix
_LAYER = re.compile(r"(?P<layer>(?:.*?\.)?(?P<number>\d+))\.")
_ROWS = 1 << 12  # of a matrix that are widened together


class Layer(NamedTuple):
    """One of the model's layers, and whether its matrices are stored as [in, out]."""

    number: int
    module: Any
    turned: bool


class Directions(NamedTuple):
    """Behind one layer, both float64 [hidden size] and of length 1.

    Attributes:
        refusal: Harmful less ordinary questions.
        false_refusal: Harmless ones that are refused less ordinary ones, orthogonal to `refusal`.
        cosine: Between the two before that.
    """

    refusal: Tensor
    false_refusal: Tensor
    cosine: float

    def of(self, patch: str) -> Tensor:
        """The one that a patch is made of."""
        return self.refusal if patch == "safety" else self.false_refusal


def layers_of(model: Any, modules: Sequence[str]) -> list[Layer]:
    """The layers that have one of the modules, in order. Raises UsageError if there is none."""
    found: dict[int, Layer] = {}
    for path, module in model.named_modules():
        part = _LAYER.match(path)
        if part and path.rpartition(".")[2] in modules and of_language(path):
            turned = type(module).__name__ == "Conv1D"
            found.setdefault(
                int(part["number"]), Layer(int(part["number"]), model.get_submodule(part["layer"]), turned)
            )
    if not found:
        last = sorted({path.rpartition(".")[2] for path, _ in model.named_modules() if _LAYER.match(path)})
        raise UsageError(
            "no layer of the model has a module of direction_modules",
            found=", ".join(modules),
            expected=f"some of {', '.join(name for name in last if not name.isdigit())}",
        )
    return [found[number] for number in sorted(found)]


@torch.no_grad()
def means(
    model: Any, layers: Sequence[Layer], prompts: Sequence[Example], size: int, progress: Progress
) -> dict[int, Tensor]:
    """Behind each layer the mean residual at the last token of the prompt: float64 [hidden size], on the CPU."""
    model.eval()
    sums: dict[int, Tensor] = {}
    narrow = {"logits_to_keep": 1} if keeps_logits(model) else {}
    for batch in batches(prompts, size):
        width = max(example.answer for example in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(batch):
            ids[row, : example.answer] = torch.tensor(example.ids[: example.answer])
            mask[row, : example.answer] = 1
        last = torch.tensor([example.answer - 1 for example in batch])
        with _seen(layers, partial(_add, sums, last)):
            model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False, **narrow)
        progress.advance(tokens=int(mask.sum()))
    return {number: total / len(prompts) for number, total in sums.items()}


def _add(sums: dict[int, Tensor], last: Tensor, number: int, residual: Tensor) -> None:
    of_rows = residual[torch.arange(len(last)), last.to(residual.device)].double().sum(0).cpu()
    sums[number] = sums[number] + of_rows if number in sums else of_rows


@contextmanager
def _seen(layers: Sequence[Layer], look: Any) -> Iterator[None]:
    """`look` is shown what each layer hands on, while the context lasts."""

    def hook(number: int, module: Any, given: Any, made: Any) -> None:
        look(number, made[0] if isinstance(made, tuple) else made)

    handles = [layer.module.register_forward_hook(partial(hook, layer.number)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_directions(
    model: Any, layers: Sequence[Layer], data: Data, config: DeriveConfig, progress: Progress
) -> dict[int, Directions]:
    """The directions behind each layer. Raises UsageError where the questions give none."""
    harmful, ordinary, refused = (
        means(model, layers, prompts, config.batch_size, progress)
        for prompts in (data.examples, data.utility, data.refused)
    )
    return {layer.number: between(*(of[layer.number] for of in (harmful, ordinary, refused))) for layer in layers}


def between(harmful: Tensor, ordinary: Tensor, refused: Tensor) -> Directions:
    """The directions between the means of three kinds of questions."""
    refusal, other = _unit(harmful - ordinary), _unit(refused - ordinary)
    cosine = float(refusal @ other)
    rest = other - (refusal @ other) * refusal
    # Once more: what rounding leaves of the one in the other is as large as what is left, where they are close.
    return Directions(refusal, _unit(rest - (refusal @ rest) * refusal), cosine)


def _unit(vector: Tensor) -> Tensor:
    length = vector.norm()
    if not torch.isfinite(length) or length < 1e-12:
        raise UsageError(
            "the questions give no direction",
            found=f"a difference of length {float(length):.3g}",
            expected="questions of three kinds",
        )
    unit: Tensor = vector / length
    return unit


def selected(layers: Sequence[Layer], found: Mapping[int, Directions], config: DeriveConfig) -> dict[int, Directions]:
    """The directions of each layer whose matrices are changed."""
    numbers = [layer.number for layer in layers]
    at = numbers[2 * len(numbers) // 3] if config.direction_layer is None else config.direction_layer
    if at not in found:
        raise UsageError("direction_layer", found=at, expected=f"one of {numbers[0]} to {numbers[-1]}")
    changed = slice_rows(Path(config.model), numbers, config.direction_layers)
    return {number: found[number if config.direction_own else at] for number in changed}


def matrices(base: Checkpoint, entries: Iterable[TensorEntry], config: DeriveConfig) -> dict[str, TensorEntry]:
    """By module the matrices that are changed, in all layers."""
    found = {}
    for entry in entries:
        module = entry.name.removesuffix(".weight")
        if module.rpartition(".")[2] not in config.direction_modules or not _LAYER.match(module):
            continue
        if module == entry.name or len(entry.shape) != 2:
            raise UsageError(
                "a direction is taken out of the matrix of a module alone",
                file=base.ref,
                tensor=entry.name,
                found=list(entry.shape),
                expected="other direction_modules",
            )
        found[module] = entry
    return found


def save_directions(
    folder: Path,
    patch: str,
    directions: Mapping[int, Directions],
    matrices: Mapping[str, TensorEntry],
    *,
    turned: bool,
    base: Checkpoint,
    ref: str,
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, as PEFT has them.

    Args:
        folder: Where to write; it exists.
        patch: safety or over-safety.
        directions: Of each layer that is changed.
        matrices: By module, of all layers.
        turned: Whether they are stored as [in, out].
        base: The checkpoint that they are of.
        ref: What the config says that the adapter is of.

    Raises:
        UsageError: A matrix does not write to the residual stream.
    """
    factors: dict[str, Tensor] = {}
    taken = []
    for module, entry in sorted(matrices.items()):
        part = _LAYER.match(module)
        assert part is not None
        if (of := directions.get(int(part["number"]))) is None:
            continue
        taken.append(module)
        direction = of.of(patch)
        factors[f"{PREFIX}{module}.lora_A.weight"] = _written(entry, direction, turned).float()[None, :]
        factors[f"{PREFIX}{module}.lora_B.weight"] = (SIGNS[patch] * direction).float()[:, None].contiguous()
    save_file(factors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    every = {name.removesuffix(".weight") for name, entry in base.tensors.items() if len(entry.shape) > 1}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": ref,
        "r": 1,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": turned,
        "inference_mode": True,
        "target_modules": short_names({*taken}, every - {*taken}),
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _written(entry: TensorEntry, direction: Tensor, turned: bool) -> Tensor:
    """What the matrix writes along the direction, for each of its inputs: float64 [in]."""
    weight = read_tensor(entry)
    if weight.shape[1 if turned else 0] != len(direction):
        raise UsageError(
            "a matrix does not write to the residual stream",
            file=entry.path,
            tensor=entry.name,
            found=list(entry.shape),
            expected=f"{len(direction)} {'columns' if turned else 'rows'} (or other direction_modules)",
        )
    weight = weight.mT if turned else weight
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    for at in range(0, len(direction), _ROWS):
        total += direction[at : at + _ROWS] @ weight[at : at + _ROWS].double()
    return total
