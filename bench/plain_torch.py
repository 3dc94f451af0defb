"""The suite's recipe as one would write it with torch: whole tensors, torch.topk, Bernoulli draws.

`python plain_torch.py RECIPE OUT [DEVICE]` takes the recipes that the suite writes (JSON, magnitude importance,
`difference`, checkpoint sources). It is a peer to measure against and shares no code with safepatch.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NOT_LINEAR = ("embed", "lm_head")


def load(folder: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path, device=device)
    return tensors


def top_mask(score: torch.Tensor, top: float) -> torch.Tensor:
    """True at the round(top * N) largest entries of `score`."""
    flat = score.flatten()
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    mask[torch.topk(flat, round(top * flat.numel()), sorted=False).indices] = True
    return mask.view(score.shape)


def score_of(delta: torch.Tensor, retain: float) -> torch.Tensor:
    return delta.abs() * torch.bernoulli(torch.full_like(delta, retain))


def merge_tensor(base: torch.Tensor, patched: list[torch.Tensor], patches: list[dict[str, float]]) -> torch.Tensor:
    """One tensor, selected by itself."""
    deltas = [p.float() - base.float() for p in patched]
    masks = [top_mask(score_of(d, p["retain"]), p["top"]) for d, p in zip(deltas, patches, strict=True)]
    return combine(base, deltas, masks)


def combine(base: torch.Tensor, deltas: list[torch.Tensor], masks: list[torch.Tensor]) -> torch.Tensor:
    """Each delta where its mask alone is set."""
    alone = torch.stack(masks).sum(dim=0) == 1
    total = base.float()
    for delta, mask in zip(deltas, masks, strict=True):
        total += torch.where(mask & alone, delta, 0)
    return total.to(base.dtype)


def model_masks(
    base: dict[str, torch.Tensor], patched: dict[str, torch.Tensor], names: list[str], patch: dict[str, float]
) -> dict[str, torch.Tensor]:
    """One patch's selection over all target tensors together."""
    scores = torch.cat([score_of(patched[n].float() - base[n].float(), patch["retain"]).flatten() for n in names])
    parts = torch.split(top_mask(scores, patch["top"]), [base[n].numel() for n in names])
    return {n: part.view(base[n].shape) for n, part in zip(names, parts, strict=True)}


def main() -> None:
    recipe_path, out = Path(sys.argv[1]), Path(sys.argv[2])
    recipe = json.loads(recipe_path.read_text())
    home, patches = recipe_path.parent, recipe["patches"]
    device = sys.argv[3] if len(sys.argv) > 3 else "cpu"
    base = load(home / recipe["base"], device)
    patched = [load(home / p["source"], device) for p in patches]
    names = [n for n, t in base.items() if t.dim() >= 2 and not any(part in n for part in NOT_LINEAR)]
    torch.manual_seed(recipe["seed"])
    merged = dict(base)
    if recipe["scope"] == "tensor":
        for n in names:
            merged[n] = merge_tensor(base[n], [p[n] for p in patched], patches)
    else:
        masks = [model_masks(base, p, names, patch) for p, patch in zip(patched, patches, strict=True)]
        for n in names:
            deltas = [p[n].float() - base[n].float() for p in patched]
            merged[n] = combine(base[n], deltas, [mask[n] for mask in masks])
    out.mkdir()
    for path in sorted((home / recipe["base"]).glob("*.safetensors")):
        tensors = load_file(path)
        save_file({n: merged[n].cpu() for n in tensors}, out / path.name, metadata={"format": "pt"})
    for path in (home / recipe["base"]).glob("*.json"):
        shutil.copy(path, out)


if __name__ == "__main__":
    main()
