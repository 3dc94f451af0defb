"""Which modules of a checkpoint hold the codes of a quantised weight. Nothing in such a module is a weight to merge.

A module is quantised where its table says so: packed or integer codes, or floats of eight bits and fewer, with scales
or whatever else beside them. Which method wrote them only serves the message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.files.parsing import BITS, FLOATS, read_json
from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.recipe import Recipe

# Positions and counters are I64, masks BOOL: neither is ever a code.
_PACKED = frozenset({"U8", "I8", "U16", "I16", "U32", "I32"})
_TINY = frozenset(name for name in FLOATS if BITS[name] <= 8 and name != "F8_E8M0")  # E8M0 holds scales
# The name and dtype of codes, and the method that writes them so; the first row that fits.
_LAYOUTS: tuple[tuple[str, frozenset[str], str], ...] = (
    (r".*\.quant_state\..*", _PACKED, "bitsandbytes 4-bit"),
    (r"(.*\.)?qweight", _PACKED, "GPTQ or AWQ"),
    (r".*weight_packed", _PACKED, "compressed-tensors"),
    (r".*[._]blocks", _PACKED, "MXFP4"),
    (r"(.*[._])?weight", frozenset({"U32"}), "mlx"),
    (r"(.*[._])?weight", frozenset({"I8"}), "8-bit integers"),
    (r"(.*[._])?weight", _PACKED, "packed integers"),
    (r"(.*\.)?W_q", _PACKED, "HQQ"),
    (r"(.*\.)?q_weight", _PACKED, "EXL2"),
    (r"(.*\.)?trellis", _PACKED, "EXL3"),
    (r"(.*\.)?(codes|Qidxs\w*)", _PACKED, "vector quantisation"),
    (r".*[._](data|qdata|_data|packed)", _PACKED, "quanto or torchao"),
    (r".*", frozenset(name for name in _TINY if name.startswith("F8")), "FP8"),
    (r".*", _TINY, "FP4 or FP6"),
    (r"", _PACKED, "packed integers"),  # of any name, see `_row_of`
)
_CODES = frozenset().union(*(dtypes for _, dtypes, _ in _LAYOUTS))
CONFIG_KEYS = ("quantization_config", "quantization", "compression_config")  # under which a config tells of codes
_ADVICE = "a float base, with the merge quantised afterwards (or targets that leave quantised modules out)"


def module_of(name: str) -> str:
    """The module that a tensor belongs to; what lies below a weight (`X.weight.absmax`) is of its module too."""
    head = name.partition(".weight.")[0] if ".weight." in name else name.rpartition(".")[0]
    return head or re.sub(r"_(blocks|packed|scales?|bias)$", "", name)


@dataclass(frozen=True, slots=True)
class Quantised:
    """The quantised modules of one checkpoint."""

    method: str
    codes: Mapping[str, TensorEntry]  # by module

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of that name would be of a quantised module."""
        return module_of(name) in self.codes

    def never_weights(self, name: str) -> bool:
        """Whether the tensor of that name is no target by any rule; scales of caches lie in modules of their own."""
        return name in self or re.fullmatch(r".*_(scale|zero_point)", name) is not None

    def targeted(self, recipe: Recipe, name: str) -> bool:
        """Whether `name` is of a quantised module that the recipe would patch, were it not quantised."""
        return name in self and any(recipe.is_target(n, 2) for n in (name, f"{module_of(name)}.weight"))


def quantised(checkpoint: Checkpoint) -> Quantised | None:
    """The quantised modules of a checkpoint; None where it has none."""
    if not any(entry.dtype in _CODES for entry in checkpoint.tensors.values()):
        return None
    config = _method(checkpoint)
    modules: dict[str, list[TensorEntry]] = {}
    for entry in checkpoint.tensors.values():
        modules.setdefault(module_of(entry.name), []).append(entry)
    codes: dict[str, TensorEntry] = {}
    layouts: list[str] = []
    for module, members in sorted(modules.items()):
        found = [(row, entry) for entry in members if (row := _row_of(entry, config is not None)) is not None]
        # A lone integer tensor has no scales: it is a table of some other kind.
        if found and len(members) > 1:
            row, codes[module] = min(found, key=lambda pair: pair[0])
            layouts.append(_LAYOUTS[row][2])
    return Quantised(config or layouts[0], codes) if codes else None


def _row_of(entry: TensorEntry, announced: bool) -> int | None:
    """The row of `_LAYOUTS` that a name and dtype fit; with a quantization_config any small integers are codes."""
    if entry.dtype not in _CODES:
        return None
    for row, (pattern, dtypes, _) in enumerate(_LAYOUTS):
        if entry.dtype in dtypes and re.fullmatch(pattern, entry.name):
            return row
    return len(_LAYOUTS) - 1 if announced and entry.dtype in _PACKED else None


def quantisation_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What config.json says about the codes, if it can be read and says something."""
    folder = checkpoint.folder
    if folder is None:
        return {}
    try:
        config = read_json(folder / "config.json", within=folder)
    except InputError:
        return {}
    for key in CONFIG_KEYS:
        of: Any = config.get(key) if isinstance(config, dict) else None
        if isinstance(of, dict) and of:
            return of
    return {}


def _method(checkpoint: Checkpoint) -> str | None:
    """The method that config.json names, if any."""
    of = quantisation_config(checkpoint)
    method = of.get("quant_method") or of.get("quant_algo")
    return method if isinstance(method, str) else "mlx" if of else None


def refuse_base(base: Checkpoint, held: Quantised, also: str = "") -> InputError:
    """All that the recipe's rule would patch is quantised; `also` is what may be done beside the usual."""
    entry = next(iter(held.codes.values()))
    return InputError(
        f"the base is quantised ({held.method}): its scales and packed codes are no weights to merge",
        file=entry.path if base.root is None else base.root / entry.file,
        tensor=entry.name,
        found=f"{len(held.codes)} quantised modules",
        expected=_ADVICE + also,
    )


def refuse_patch(what: str, patch: Checkpoint, tensor: str, held: Quantised, also: str = "") -> InputError:
    """The patch says something about a module that the base (or the patch itself) holds quantised."""
    entry = patch.tensors.get(tensor)
    file = patch.root or patch.shards[0].path
    return InputError(
        f"{what} is quantised ({held.method}): scales and packed codes are no weights to merge",
        file=file if entry is None or patch.root is None else patch.root / entry.file,
        tensor=tensor,
        expected=_ADVICE + also,
    )
