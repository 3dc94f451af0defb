"""The backbone on disk and in memory: load it, adapt it, and save what became of it under the backbone's names."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from safepatch_core.checkpoint import FLOATS, INDEX, SINGLE, Checkpoint, TensorEntry, open_checkpoint, read_json
from safepatch_core.derive.config import DeriveConfig
from safepatch_core.errors import InputError, UsageError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Target = Callable[[str, int], bool]  # (tensor name, dimensions) -> whether the recipe patches it


def open_backbone(ref: str) -> tuple[Checkpoint, Path]:
    """The checkpoint to train and its directory, checked but not loaded.

    Raises InputError if it isn't a directory with a config, or its weights are quantised.
    """
    base = open_checkpoint(ref)
    if base.root is None:
        raise InputError("training needs a directory with config and tokenizer", file=ref, found="a single file")
    config = read_json(base.root / "config.json", within=base.root)
    if isinstance(config, dict) and config.get("quantization_config"):
        raise InputError("quantised weights can't be trained", file=base.root / "config.json")
    return base, base.root


def read_tensor(entry: TensorEntry) -> Tensor:
    """One tensor of a checkpoint, on the CPU."""
    with safe_open(entry.path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(entry.name)
    return tensor


def targets(base: Checkpoint, is_target: Target) -> list[TensorEntry]:
    """The tensors that the recipe will patch. Raises InputError if there is none, or a merge wouldn't take one."""
    found = [e for e in base.tensors.values() if e.dtype in FLOATS and is_target(e.name, len(e.shape))]
    for entry in found:
        if entry.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise InputError("dtype", file=entry.path, tensor=entry.name, found=entry.dtype, expected=known)
    if not found:
        raise InputError("no float tensor with two dimensions or more to patch", file=base.ref)
    return found


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences the progress bars and remarks of transformers while this project shows its own."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer. Raises InputError if there is none that opens without running code."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken tokenizer file makes the library raise
        raise InputError(f"tokenizer can't be opened ({_first_line(error)})", file=folder) from error


class Limits(NamedTuple):
    """What a model can be fed: the longest sequence, where there is a limit, and how many token ids it knows."""

    positions: int | None
    vocabulary: int


def limits(folder: Path) -> Limits:
    """The limits in the checkpoint's config. Raises InputError if transformers doesn't know the model."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        text: Any = config.get_text_config()
        return Limits(getattr(text, "max_position_embeddings", None), int(text.vocab_size))
    except Exception as error:  # as above
        raise InputError(f"config can't be opened ({_first_line(error)})", file=folder) from error


def load_model(folder: Path, config: DeriveConfig) -> Any:
    """A causal LM from a local checkpoint, in the run's dtype, on its device.

    Raises InputError if transformers can't open it from safetensors alone, or if weights are missing.
    """
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # as above
        raise InputError(f"model can't be opened ({_first_line(error)})", file=folder) from error
    if info["missing_keys"]:
        raise InputError(
            f"{len(info['missing_keys'])} tensors of the model are missing",
            file=folder,
            tensor=min(info["missing_keys"]),
        )
    return model.to(device(config))


def device(config: DeriveConfig) -> torch.device:
    """Where to train. Raises UsageError for a device that isn't there."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(config.device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device '{config.device}' can't be used ({_first_line(error)})") from None
    return where


def add_adapter(model: Any, config: DeriveConfig) -> Any:
    """The model with a fresh LoRA adapter, which alone is trainable. Raises UsageError if it fits no module."""
    import peft

    modules = config.target_modules
    try:
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=config.lora_r,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                target_modules=list(modules) if isinstance(modules, list) else modules,
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise UsageError(f"LoRA doesn't fit the model ({_first_line(error)})") from error


def merge_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapter in `folder` added to its weights."""
    import peft

    return peft.PeftModel.from_pretrained(model, folder, torch_device=str(model.device)).merge_and_unload()


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, the same bytes in every process."""
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # an empty form
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["base_model_name_or_path"] = base
    # peft keeps these as sets, whose order changes from process to process
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def save_model(model: Any, folder: Path, base: Checkpoint) -> None:
    """Writes the model's weights in safetensors, under exactly the base's names; with its config.

    transformers undoes the renamings and fusions of its own loading; what it leaves is settled here: a prefix that
    the base's names lack, tied tensors that the base repeats, and tensors that the model doesn't use (taken from the
    base). Raises InputError if a trained tensor has no counterpart in the base.
    """
    model.save_pretrained(folder)
    _name_as_base(model, folder, base, {name: partial(read_tensor, entry) for name, entry in base.tensors.items()})


def save_scores(
    model: Any, folder: Path, base: Checkpoint, scores: dict[str, Tensor], entries: Sequence[TensorEntry]
) -> None:
    """Writes scores, named and shaped as the model's parameters, for exactly the base's tensors `entries`.

    A tensor that the model doesn't use has score 0. Naming and errors as in `save_model`.
    """
    model.save_pretrained(folder, state_dict=scores)
    for path in folder.glob("*config.json"):
        path.unlink()
    _name_as_base(model, folder, base, {entry.name: partial(torch.zeros, entry.shape) for entry in entries})


class Changed(NamedTuple):
    """Entries in which a patch differs from the base: as trained, and once rounded to the base's dtype."""

    exact: int
    rounded: int


def changed_entries(pairs: Iterable[tuple[Tensor, Tensor]]) -> Changed:
    """Counts over (base tensor in its own dtype, patched tensor) pairs."""
    exact = rounded = 0
    for old, new in pairs:
        exact += int(torch.count_nonzero(new.float() != old.float()))
        rounded += int(torch.count_nonzero(new.to(old.dtype) != old))
    return Changed(exact, rounded)


def trained(folder: Path, entries: Sequence[TensorEntry]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each target tensor of the base with what a fully trained checkpoint made of it."""
    saved = open_checkpoint(folder).tensors
    return ((read_tensor(entry), read_tensor(saved[entry.name])) for entry in entries)


def adapted(model: Any, entries: Sequence[TensorEntry], is_target: Target) -> Iterator[tuple[Tensor, Tensor]]:
    """Each target weight under the model's adapter, in the dtype of most target entries, with the sum of both."""
    from peft.tuners.lora import LoraLayer

    by_dtype = Counter[str]()
    for entry in entries:
        by_dtype[entry.dtype] += entry.entries
    dtype = DTYPES[by_dtype.most_common(1)[0][0]]
    layers: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in layers:
        weight = layer.get_base_layer().weight.detach()
        if not is_target(f"{name}.weight", weight.ndim):
            continue
        yield weight.to(dtype), weight.float() + layer.get_delta_weight("default").detach().float()


def _name_as_base(model: Any, folder: Path, base: Checkpoint, unused: Mapping[str, Callable[[], Tensor]]) -> None:
    """Gives the tensors in `folder` the base's names: those of `unused`, whose values are for what wasn't saved."""
    saved = open_checkpoint(folder)
    tied = _tied_names(model)
    origins = {name: _origin(name, saved, model.base_model_prefix, tied) for name in unused}
    lost = saved.tensors.keys() - origins.values()
    if lost:
        raise InputError("trained tensor has no counterpart in the base", file=base.ref, tensor=min(lost))
    if all(name == origin for name, origin in origins.items()):
        return
    layout: dict[str, list[str]] = {}
    for name in sorted(origins):
        layout.setdefault(base.tensors[name].file, []).append(name)
    weight_map: dict[str, str] = {}
    total = 0
    for number, file in enumerate(sorted(layout), 1):
        target = SINGLE if len(layout) == 1 else f"model-{number:05}-of-{len(layout):05}.safetensors"
        tensors = {}
        for name in layout[file]:
            origin = origins[name]
            tensors[name] = unused[name]() if origin is None else read_tensor(saved.tensors[origin])
        save_file(tensors, folder / f"{target}.part", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, target)
        total += sum(tensor.nbytes for tensor in tensors.values())
    for shard in saved.shards:
        shard.path.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    for target in set(weight_map.values()):
        os.replace(folder / f"{target}.part", folder / target)
    if len(layout) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _origin(name: str, saved: Checkpoint, prefix: str, tied: dict[str, str]) -> str | None:
    """Under which name transformers saved the base's tensor `name`."""
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        for alias in (candidate, tied.get(candidate)):
            if alias in saved.tensors:
                return alias
    return None


def _tied_names(model: Any) -> dict[str, str]:
    """Other names of shared parameters -> the name that comes first."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if name != first[id(parameter)]}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
