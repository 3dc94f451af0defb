"""Random walks over stacks of fixes that overlap or not: what is done, and what is refused, is what arrays say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safepatch_core.errors import InputError
from safepatch_core.fixes.apply import apply, revert
from safepatch_core.fixes.log import log
from safepatch_core.fixes.reading import open_fix
from tests.fix_cases import BLOCK, changed, random_tensor, write_checkpoint, write_fix
from tests.oracle import Tensor, load_checkpoint

Arrays = dict[str, Any]
SHAPES = {"a.weight": ("BF16", (BLOCK + 40,)), "b.weight": ("F32", (30, 20)), "c.weight": ("U8", ())}


def arrays(tensors: dict[str, Tensor]) -> Arrays:
    widths = {"BF16": "<u2", "F32": "<u4", "U8": "u1"}
    return {n: np.frombuffer(t.data, widths[t.dtype]).copy() for n, t in tensors.items()}


@dataclass
class Known:
    """A fix as arrays have it."""

    path: Path
    id: str
    old: Arrays
    new: Arrays

    def places(self) -> dict[str, Any]:
        return {n: self.old[n] != self.new[n] for n in self.old}

    def is_on(self, side: Arrays, state: Arrays) -> bool:
        return all((state[n][at] == side[n][at]).all() for n, at in self.places().items())

    def put(self, side: Arrays, state: Arrays) -> Arrays:
        return {n: np.where(at, side[n], state[n]) for n, at in self.places().items()}

    def meets(self, other: Known) -> bool:
        return any((at & other.places()[n]).any() for n, at in self.places().items())


def stack(root: Path, rng: np.random.Generator) -> tuple[Path, list[Known]]:
    """A checkpoint, and fixes that were each made on top of the ones before; they overlap now and then."""
    state = {n: random_tensor(rng, dtype, *shape) for n, (dtype, shape) in SHAPES.items()}
    ckpt, known = write_checkpoint(root / "ckpt", state), []
    for i in range(3):
        touched = [n for n in SHAPES if rng.random() < 0.6] or ["b.weight"]
        after = dict(state)
        for n in touched:
            entries = len(arrays(state)[n])
            at = rng.choice(entries, min(entries, int(rng.integers(1, 12))), replace=False)
            low = at[at < 40] if rng.random() < 0.5 else at  # where they are likely to meet
            after[n] = changed(rng, state[n], np.sort(low) if len(low) else np.sort(at))
        path = write_fix(root / f"{i}.safetensors", state, after)
        with open_fix(path) as fix:
            known.append(Known(path, fix.id, arrays(state), arrays(after)))
        state = after
    return ckpt, known


@pytest.mark.parametrize("seed", range(25))
def test_a_random_walk(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ckpt, known = stack(tmp_path, rng)
    base = state = arrays(load_checkpoint(ckpt))
    carried: list[Known] = []
    done = 0
    for step in range(14):
        fix = known[min(step, 2)] if step < 3 else known[rng.integers(3)]
        into = step < 3 or rng.random() < 0.5
        above = carried[carried.index(fix) + 1 :] if fix in carried else []
        allowed = fix.is_on(fix.old if into else fix.new, state)
        allowed &= into or not any(fix.meets(other) for other in above)
        where: Any = {"in_place": True} if rng.random() < 0.7 else {"out": tmp_path / f"copy{step}"}
        command, name = (apply, fix.path) if into else (revert, fix.id if fix in carried else fix.path)
        if not allowed:
            with pytest.raises(InputError):
                command(name, ckpt, **where)
        else:
            ckpt = command(name, ckpt, **where).out
            state, done = fix.put(fix.new if into else fix.old, state), done + 1
            carried = [*carried, fix] if into else [other for other in carried if other is not fix]
        found = arrays(load_checkpoint(ckpt))
        assert all((found[n] == state[n]).all() for n in state), (step, fix.path.name, into)
        assert [entry["id"] for entry in log(ckpt).fixes] == [other.id for other in carried]
        kept = {path.stem for path in ckpt.glob(".safepatch-fixes/*")}
        assert kept == {other.id for other in carried}
    assert done >= 4
    for fix in reversed(carried):
        revert(fix.id, ckpt, in_place=True)
    found = arrays(load_checkpoint(ckpt))
    assert all((found[n] == base[n]).all() for n in base)
    assert not (ckpt / "safepatch-fixes.json").exists() and not (ckpt / ".safepatch-fixes").exists()
