"""`derive` with the fused importance kernel takes the importance of the plain path, bit for bit."""

from __future__ import annotations

import pytest
import torch

from safepatch_core.deriving import importance
from safepatch_core.progress import Progress
from tests.tiny_lm import examples, tiny_llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernel_gives_the_plain_importance(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    rows, found = examples(3), []
    for fused in (True, False):
        monkeypatch.setattr(importance, "interpreted", lambda fused=fused: fused)
        with Progress("importance", len(rows), quiet=True, report=None) as progress:
            taken = importance.take_importance(tiny_llama().to(dtype), rows, lambda name, n: n >= 2, progress)
            found.append({name: scores for layer in taken.layers for name, scores in layer.items()})
    assert found[0].keys() == found[1].keys()
    for name, scores in found[0].items():
        assert scores.any(), name
        if dtype == torch.float32:
            assert torch.equal(scores.view(torch.int32), found[1][name].view(torch.int32)), name
        else:  # the plain path rounds nothing anew either, but multiplies in another order of widening
            torch.testing.assert_close(scores, found[1][name], rtol=1e-6, atol=0)
