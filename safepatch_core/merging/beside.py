"""What a patch brings beside the targets: told in one line, or refused where its change would be lost unnoticed."""

from __future__ import annotations

import filecmp
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safepatch_core.errors import InputError
from safepatch_core.files.checkpoint import Checkpoint
from safepatch_core.merging.recipe import Recipe
from safepatch_core.merging.sources.contract import Source
from safepatch_core.merging.sources.fusions import fusion_of

# What decides how text becomes tokens: a patch trained with others may not fit the base's.
_TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "*.tiktoken")


@dataclass(frozen=True, slots=True)
class Beside:
    """What of a patch the output does not take."""

    tensors: tuple[str, ...]  # float tensors that are no targets, by the base's names, sorted
    grown: str | None  # one of them that has another shape than the base's: a vocabulary that grew
    files: tuple[str, ...]  # of the tokenizer, that differ from the base's
    sure: bool  # that it differs from the base: a table alone can't tell whether equal shapes hold equal values

    def line(self, patch: str) -> str:
        """All of it, for people."""
        parts = []
        if self.tensors:
            parts.append(f"{_count(self.tensors, 'tensor')} beside the targets, the first '{self.tensors[0]}'")
        if self.grown:
            parts.append(f"another shape of '{self.grown}'")
        if self.files:
            parts.append(f"{_count(self.files, 'other tokenizer file')}, the first {self.files[0]}")
        return f"patch {patch} also brings {'; '.join(parts)}: the output keeps what the base has"

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "tensors": len(self.tensors),
            "first": self.tensors[0] if self.tensors else None,
            "files": list(self.files),
        }


def _count(things: Collection[str], what: str) -> str:
    return f"{len(things)} {what}{'' if len(things) == 1 else 's'}"


def beside(recipe: Recipe, base: Checkpoint, source: Source, targets: Collection[str]) -> Beside:
    """What `source` brings beside the targets.

    Raises:
        InputError: nothing of the patch is a target; or the base lacks a tensor that the recipe's rule would take
            (unless `missing` skips it).
    """
    shapes = source.shapes
    others = sorted(name for name in shapes if name not in targets)
    lost = [name for name in others if name not in base.tensors and recipe.is_target(name, len(shapes[name]))]
    if len(others) == len(shapes):
        raise _lands_nowhere(base, source, others, targets)
    if lost and recipe.missing == "error":
        raise InputError(
            "the base has no such tensor, so the patch's change would be lost",
            file=source.checkpoints[0].ref,
            tensor=lost[0],
            found=f"{len(lost)} such tensors" if len(lost) > 1 else None,
            expected=base.of_several
            or fusion_of(lost[0], base)
            or source.exchange.closest
            or "a patch of this base (or missing: skip)",
        )
    grown = [name for name in others if name in base.tensors and shapes[name] != base.tensors[name].shape]
    files = _other_files(base, source.checkpoints[0])
    new = any(name not in base.tensors for name in others)
    sure = bool(grown or files or new or (others and source.kind == "lora"))
    return Beside(tuple(others), grown[0] if grown else None, files, sure)


def _lands_nowhere(base: Checkpoint, source: Source, names: list[str], targets: Collection[str]) -> InputError:
    known = [name for name in names if name in base.tensors]
    found = f"{_count(names, 'tensor')} beside them" if names else "no float tensors"
    if not targets:
        what, expected = "the rule of `targets` takes no tensor of the base", "targets that the base has"
    elif known or not names:
        what, expected = "no tensor of the patch is a target", "a patch of what `targets` takes (or other targets)"
    else:
        what, found = "no tensor of the patch is in the base", _count(names, "other name")
        expected = (
            base.of_several or fusion_of(names[0], base) or source.exchange.closest or f"names like '{min(targets)}'"
        )
    first = next(iter(known or names), None)
    return InputError(what, file=source.checkpoints[0].ref, tensor=first, found=found, expected=expected)


def _other_files(base: Checkpoint, patch: Checkpoint) -> tuple[str, ...]:
    """Tokenizer files that both have, with other contents."""
    if base.root is None or patch.root is None:
        return ()
    return tuple(
        sorted(
            path.name
            for path in base.root.iterdir()
            if any(fnmatchcase(path.name, glob) for glob in _TOKENIZER) and _differ(path, patch.root / path.name)
        )
    )


def _differ(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and not filecmp.cmp(one, other, shallow=False)
