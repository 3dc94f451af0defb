"""What a fix changes, per tensor and layer; and whether the file is what it says, by itself and on its base."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from safepatch_core.errors import InputError, printable
from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.fixes import codec
from safepatch_core.fixes.checking import check
from safepatch_core.fixes.reading import Fix, Proof, Touched, open_fix
from safepatch_core.fixes.reference import Broken

# A layer is what a name tells up to its first number.
_LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True, slots=True)
class Share:
    """How much of a tensor or layer a fix changes."""

    entries: int  # of the touched tensors
    changes: int

    @property
    def share(self) -> float:
        return self.changes / self.entries

    def __add__(self, other: Share) -> Share:
        return Share(self.entries + other.entries, self.changes + other.changes)


@dataclass(frozen=True)
class FixInfo:
    """What a fix file says about itself."""

    id: str
    base: str  # hash of its base's table
    recipe: Any
    size: int  # bytes
    total: Share
    tensors: Mapping[str, Share]
    layers: Mapping[str, Share]  # in order of their numbers


@dataclass
class FixVerdict:
    """What was checked of a fix, and every difference found, one line each."""

    tensors: int = 0
    changes: int = 0
    state: str | None = None  # of the base that it was compared with: carried or not carried
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def info(path: str | os.PathLike[str]) -> FixInfo:
    """What a fix changes.

    Raises:
        InputError: the file breaks a rule.
    """
    with open_fix(path) as fix:
        tensors = {name: Share(touched.entries, touched.changes) for name, touched in fix.tensors.items()}
        total = sum(tensors.values(), Share(0, 0))
        return FixInfo(fix.id, fix.base, fix.recipe, fix.size, total, tensors, added_up(tensors, layer_of))


def added_up(tensors: Mapping[str, Share], by: Callable[[str], str]) -> dict[str, Share]:
    """The shares of all tensors of which `by` says the same, in order of their numbers."""
    found: dict[str, Share] = {}
    for name, share in tensors.items():
        found[by(name)] = found.get(by(name), Share(0, 0)) + share
    return {key: found[key] for key in sorted(found, key=by_number)}


def layer_of(name: str) -> str:
    """What of a tensor's name says which layer it belongs to; the whole name outside of layers."""
    found = _LAYER.match(name)
    return found[1] if found else name


def kind_of(name: str) -> str:
    """What a tensor is in each layer: its name without the layer's part, other numbers, and `.weight`."""
    found = _LAYER.match(name)
    parts = (name[found.end() :] if found else name).removesuffix(".weight").split(".")
    return ".".join("*" if part.isdigit() else part for part in parts)


def by_number(layer: str) -> list[tuple[int, str]]:
    """Sorts names so that layer 10 comes after layer 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in layer.split(".")]


def verify_fix(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> FixVerdict:
    """Check all of a fix file; with a base also that it applies there, or has been applied, and what it promises.

    Args:
        path: the fix file.
        base: a checkpoint.

    Raises:
        InputError: the base is no checkpoint; what is wrong with the fix is in the result.
    """
    verdict = FixVerdict()
    checkpoint = None if base is None else open_checkpoint(base)
    try:
        with open_fix(path) as fix:
            verdict.tensors, verdict.changes = len(fix.tensors), fix.changes
            if checkpoint is None:
                for touched in fix.tensors.values():
                    prove(fix, touched)
            else:
                sides = check(fix, checkpoint)
                verdict.state = "carried" if sides.new else "not carried"
                if sides.mixed:
                    verdict.problems.append(
                        f"{base}: {sides.new} of {fix.changes} touched entries are new, others old"
                    )
    except InputError as error:
        verdict.problems.append(str(error))
    return verdict


def prove(fix: Fix, touched: Touched) -> None:
    """Raises InputError for whatever a fix can be wrong in without its base, whose entries' width it doesn't tell."""
    highest = max(k for k, plane in enumerate(touched.planes) if plane is not None) if any(touched.planes) else 0
    width = 4 if highest > 1 else highest + 1
    proof = Proof(fix, touched)
    for window in touched.windows(width):
        run = fix.run(touched, width, *window)
        nothing = np.zeros(run.entries, f"<u{width}")
        old, new = (np.empty(run.changes, nothing.dtype) for _ in range(2))
        try:
            proof.add(run, codec.settle(run, nothing, codec.KEEP, old, new).codes)
        except Broken as error:
            fix.broken(str(error), touched)
    proof.finish()


def as_svg(found: FixInfo) -> str:
    """The share that changes of each layer, as a picture whose bytes repeat."""
    row, left, room = 18, 260, 420
    most = max(share.share for share in found.layers.values())
    height = row * len(found.layers) + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + room + 80}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<text x="8" y="18" font-size="13">Entries that fix {found.id[:8]} changes, per layer</text>',
    ]
    for i, (layer, share) in enumerate(found.layers.items()):
        y, width = 32 + i * row, room * share.share / most
        name = layer if len(layer) <= 40 else f"…{layer[-39:]}"
        lines += [
            f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{escape(printable(name))}</text>',
            f'<rect x="{left}" y="{y}" width="{width:.2f}" height="{row - 5}" fill="#4477aa"/>',
            f'<text x="{left + width + 5:.2f}" y="{y + 11}">{share.share:.3%}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def fix_card(found: FixInfo, file: str) -> str:
    """A README.md for a repository that holds a fix, with the metadata that model hubs read."""
    import yaml

    base = found.recipe.get("base") if isinstance(found.recipe, dict) else None
    head: dict[str, Any] = {"base_model": base} if isinstance(base, str) else {}
    head |= {"base_model_relation": "adapter", "tags": ["safepatch-fix", "safepatch", "safety"]}
    recipe = "" if found.recipe is None else f"\n## Recipe\n\n```yaml\n{_yaml(found.recipe)}```\n"
    name = Path(file).name
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n"
        f"# Fix {found.id[:8]}\n\n"
        f"Changes {found.total.changes:,d} entries ({found.total.share:.2%}) of {len(found.tensors)} tensors"
        f"{f' of `{base}`' if isinstance(base, str) else ''}, and can be taken out again, to the bit:\n\n"
        f"```\nsafepatch apply {name} --to MODEL --in-place\n"
        f"safepatch revert {found.id} --from MODEL --in-place\n```\n\n"
        f"Id `{found.id}`, base table `{found.base}`.\n{recipe}"
    )


def _yaml(data: Any) -> str:
    import yaml

    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
