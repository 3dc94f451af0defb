"""A quantised model under test: the floats that its codes stand for.

Transformers would need a library for most formats, or a GPU; and of what its config doesn't tell it loads codes as if
they were weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from safepatch_core import open_fixed
from safepatch_core.backends.contract import Bits
from safepatch_core.errors import InputError
from safepatch_core.language.lazy import LazyWeights
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.quantised.modules import quantisation_config, quantised
from safepatch_core.merging.quantised.twin import recognised
from safepatch_core.merging.quantised.values import Dequantised
from safepatch_core.merging.sources.contract import load_alone


@contextmanager
def floats_of(folder: Path) -> Iterator[LazyWeights | None]:
    """The float model of a quantised checkpoint, to be read while the context lasts: codes in float32.

    None for a model of floats, and for one whose config names a format that only transformers reads.

    Raises InputError for codes that neither can read.
    """
    with open_fixed(folder, ()) as stored:
        held = quantised(stored.base)
        if held is None:
            yield None
            return
        twin = recognised(stored.base, held)
        if twin.closed:
            codes = next(iter(twin.closed.values()))
            if not quantisation_config(stored.base):
                why = twin.reasons.get(codes.name, held.method)
                raise InputError("codes of an unknown format", file=codes.path, tensor=codes.name, found=why)
            yield None
            return
        with closing(Inputs((stored.base,))) as inputs:
            lock = Lock()

            def read(name: str) -> Any:
                weight = twin.weights.get(name)
                if weight is None:
                    return stored.read(name)
                entry = twin.base.tensors[name]
                with lock:  # the loader has threads of its own
                    found = load_alone(Dequantised(weight), inputs, 0, entry.entries)
                assert isinstance(found, Bits)
                return torch.from_numpy(found.data.view(np.float32)).view(entry.shape)

            yield LazyWeights(
                twin.base.tensors, lambda name: torch.float32 if name in twin.weights else stored.dtype(name), read
            )
            inputs.check_unchanged()
