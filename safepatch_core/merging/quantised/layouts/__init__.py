"""The layouts of quantised weights that can be merged into. A new one is a file beside these, and a row here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safepatch_core.files.reading import TensorEntry
from safepatch_core.merging.quantised.layouts import fp4, fp8, integers
from safepatch_core.merging.quantised.layouts.contract import CodedWeight, Finder, Tensors, Unfit

LAYOUTS: tuple[Finder, ...] = (fp8.find, fp4.find, integers.find)
ACCEPTED = "FP8 E4M3, MXFP4, NVFP4, or symmetric 8-bit and 4-bit integers of compressed-tensors"


def recognise(codes: TensorEntry, tensors: Tensors, config: Mapping[str, Any]) -> CodedWeight | None:
    """The weight whose codes a tensor holds, in the first layout that knows it.

    Args:
        codes: a tensor of a quantised module.
        tensors: all of the checkpoint.
        config: its quantization_config; empty where there is none.

    Raises:
        Unfit: codes of a known layout that a merge can't change.
    """
    for find in LAYOUTS:
        if (weight := find(codes, tensors, config)) is not None:
            return weight
    return None


__all__ = ["ACCEPTED", "LAYOUTS", "CodedWeight", "Unfit", "recognise"]
