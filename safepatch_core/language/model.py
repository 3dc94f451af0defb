"""Models and tokenizers from a local checkpoint, to be trained or measured: safetensors only, no code of theirs."""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from safepatch_core.errors import InputError, IOFailure, SafepatchError, UsageError
from safepatch_core.language.lazy import LazyWeights

ADAPTER_CONFIG = "adapter_config.json"
M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE = 4 << 20  # bytes of a block that is given back as soon as it is free
GROWTH = 1.03  # of a process's memory, until its heap's holes are given back
_STATM = Path("/proc/self/statm")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences the progress bars and remarks of transformers while this project shows its own."""
    from transformers.utils import logging as untyped

    transformers: Any = untyped
    verbosity, bars = transformers.get_verbosity(), transformers.is_progress_bar_enabled()
    transformers.set_verbosity_error()
    transformers.disable_progress_bar()
    quantiser = logging.getLogger("bitsandbytes")  # a line for every layer
    level = quantiser.level
    quantiser.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        quantiser.setLevel(level)
        transformers.set_verbosity(verbosity)
        if bars:
            transformers.enable_progress_bar()


@contextmanager
def at_work(threads: int | None, hint: str) -> Iterator[None]:
    """torch with so many threads (None: as it is), given back at the end. Raises IOFailure, which ends in `hint`,
    for what a full memory makes the libraries raise."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise IOFailure(f"out of memory: {hint}") from error
        raise
    finally:
        torch.set_num_threads(before)


@contextmanager
def freed_memory_returned(model: Any, *, recomputed: bool) -> Iterator[None]:
    """Keeps what the C library holds of freed activations small while the context lasts.

    glibc keeps blocks in a heap, where one of torch's, being aligned, seldom fits the hole that another has left: of
    SmolLM2-135M the heap grows by 5 MB with every layer, and training peaks at 1.22 times weights and optimiser
    state. Were all blocks mapped and given back at once, fresh pages would cost a fifth to a third of the step. So
    layers work in a heap of warm pages, and where their activations are `recomputed`, its holes are given back
    whenever the process has grown by the factor GROWTH. What the environment says (MALLOC_MMAP_THRESHOLD_) stands.
    """
    hooks: list[Any] = []
    if recomputed:
        # What a layer is made of runs when it is recomputed, too; the layer itself is not called then.
        look = _holes_returned()
        hooks = [m.register_forward_pre_hook(look) for m in model.modules() if _is_trained(m)]
    _keep_blocks_below(LARGE)
    try:
        yield
    finally:
        _keep_blocks_below(32 << 20)  # as far as glibc goes by itself
        for hook in hooks:
            hook.remove()


def _holes_returned() -> Callable[..., None]:
    """What to call now and then."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:  # not glibc
        return lambda *_: None
    lowest = 0

    def look(*_: Any) -> None:
        nonlocal lowest
        now = _resident()
        if now > GROWTH * lowest:
            trim(0)
            lowest = _resident()
        lowest = min(lowest, now)

    return look


def _is_trained(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _resident() -> int:
    """Bytes of the process that are in memory."""
    return int(_STATM.read_text("ascii").split()[1]) * mmap.PAGESIZE


def _keep_blocks_below(size: int) -> None:
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, size)


# What holds the tokens, of whatever kind.
_TOKENIZERS = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "*.spm", "*.bpe")


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer. Raises InputError if there is none that opens without running code.

    Models that also see may keep their chat template apart, in chat_template.json for their processor.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        apart = folder / "chat_template.json"
        if not tokenizer.chat_template and apart.is_file():
            tokenizer.chat_template = json.loads(apart.read_text("utf-8"))["chat_template"]
        return tokenizer
    except Exception as error:  # whatever a broken tokenizer file makes the library raise
        if not any(path.match(glob) for path in folder.iterdir() for glob in _TOKENIZERS):
            expected = "tokenizer.json, as the model that this one was made from has it"
            raise InputError(
                "tokenizer can't be opened: no file has its tokens", file=folder, expected=expected
            ) from error
        raise InputError(f"tokenizer can't be opened ({first_line(error)})", file=folder) from error


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes the tokenizer's files. Raises InputError where the library can't save what it has opened."""
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # whatever settings that contradict themselves make the library raise
        raise InputError(f"tokenizer can't be saved ({first_line(error)})", file=tokenizer.name_or_path) from error


class Limits(NamedTuple):
    """What a model can be fed: the longest sequence, where there is a limit, and how many token ids it knows."""

    positions: int | None
    vocabulary: int


def limits(folder: Path) -> Limits:
    """The limits in the checkpoint's config. Raises InputError if it is no language model that transformers knows."""
    config = _config(folder)
    _class_of(config, folder)
    text: Any = config.get_text_config()
    return Limits(getattr(text, "max_position_embeddings", None), int(text.vocab_size))


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken config makes the library raise
        raise InputError(f"config can't be opened ({first_line(error)})", file=folder) from error


def _class_of(config: Any, folder: Path) -> str:
    """The auto class that makes a decoder-only language model of the config; with towers for what else it reads.

    Raises InputError if it makes something else.
    """
    if getattr(config, "is_encoder_decoder", False):
        found, expected = f"{config.model_type}, an encoder-decoder", "a decoder-only model"
        raise InputError("not a language model of one stack", file=folder, found=found, expected=expected)
    known = next((kind for kind, mapping in _classes().items() if type(config) in mapping), None)
    if known is None:
        raise InputError("not a language model", file=folder, found=f"model_type {config.model_type}")
    return known


def _classes() -> dict[str, Any]:
    """The auto classes of language models, and which class each of them makes of a config's type."""
    from transformers.models.auto import modeling_auto as auto

    return {
        "AutoModelForCausalLM": auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        "AutoModelForImageTextToText": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        "AutoModelForMultimodalLM": auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    }


def load_model(
    folder: Path,
    dtype: str,
    device: str,
    *,
    kind: str | None = None,
    quantization_config: Any = None,
    weights: LazyWeights | None = None,
) -> Any:
    """A model as transformers loads it, from safetensors alone and without code or an adapter of the checkpoint's.

    Args:
        folder: The checkpoint.
        dtype: Named as torch's; auto is float32 on the CPU, where halves are slow, else the checkpoint's own.
        device: Where it will be. On `meta` it has shapes alone, and no weight is read.
        kind: One of transformers' auto classes; None for that of a language model.
        quantization_config: One of transformers', by which linear layers are quantised; None for that of the folder.
        weights: Floats in place of the folder's tensors, which are quantised.

    Raises:
        InputError: transformers can't open it so, it is no decoder-only language model, or weights are missing.
        UsageError: The device isn't there.
    """
    import transformers

    where = find_device(device)
    settings = _config(folder)
    kind = kind or _class_of(settings, folder)
    if dtype == "auto" and where.type == "cpu":
        dtype = "float32"
    # A quantised model can't be moved: it is made where it will be. So is one without weights.
    coded = quantization_config is not None or (weights is None and hasattr(settings, "quantization_config"))
    placed: dict[str, Any] = {"device_map": {"": where}} if coded or where.type == "meta" else {}
    if quantization_config is not None:  # a None would stand for itself, and codes would be loaded as weights
        placed["quantization_config"] = quantization_config
    given: dict[str, Any] = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "use_safetensors": True,
        "local_files_only": True,
        "trust_remote_code": False,
        "output_loading_info": True,
        **placed,
    }
    try:
        if weights is not None:
            given |= _settings_of_floats(settings, folder)
            # An auto class asks for a folder.
            made = _classes()[kind][type(settings)]
            model, info = weights.loaded_by(lambda: made.from_pretrained(None, state_dict=weights, **given))
        else:
            with _without_adapter(folder) as plain:
                model, info = getattr(transformers, kind).from_pretrained(plain, **given)
    except (MemoryError, torch.OutOfMemoryError, SafepatchError):
        raise
    except Exception as error:  # as above
        raise InputError(f"model can't be opened ({first_line(error)})", file=folder) from error
    if info["missing_keys"]:
        missing = info["missing_keys"]
        raise InputError(f"{len(missing)} tensors of the model are missing", file=folder, tensor=min(missing))
    return model if placed else model.to(where)


def _settings_of_floats(config: Any, folder: Path) -> dict[str, Any]:
    """What from_pretrained would read from the folder of a quantised model, as the model of its floats has it."""
    from transformers import GenerationConfig

    if hasattr(config, "quantization_config"):
        del config.quantization_config
    given = {"config": config}
    if (folder / "generation_config.json").is_file():
        given["generation_config"] = GenerationConfig.from_pretrained(folder)
    return given


@torch.no_grad()
def try_out(model: Any, folder: Path, hint: str | None = None) -> None:
    """Lets a model that was loaded from `folder` read one token, in eval mode.

    Raises InputError, which expects `hint`, for what transformers (or an adapter) can't do with it after all.
    """
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    try:
        model.eval()(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)
    except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        raise InputError(f"model can't be run ({first_line(error)})", file=folder, expected=hint) from error


@contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """The folder, or links to all that is in it but an adapter beside the weights.

    transformers adds such an adapter to the weights that it loads, or loads those of the base that it names instead;
    a merge reads the weights alone.
    """
    if not os.path.lexists(folder / ADAPTER_CONFIG):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="safepatch-") as links:
        for path in folder.iterdir():
            if path.name != ADAPTER_CONFIG:
                (Path(links) / path.name).symlink_to(path.absolute())
        yield Path(links)


def find_device(name: str) -> torch.device:
    """The device of that name; auto is cuda where there is one. Raises UsageError if it isn't there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(name)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device '{name}' can't be used ({first_line(error)})") from None
    return where


def first_line(error: Exception) -> str:
    """What an error of a library says, without the pages that may follow."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
