"""Streaming selection equals the definition by sorting, whatever the cut into blocks and however bad the guess."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from safepatch_core.backends.contract import Bits, Block, Cut, PatchData, PatchReport
from safepatch_core.backends.reference import ReferenceBackend, Scored, cut_of
from safepatch_core.backends.select import Selection, TieCounter
from safepatch_core.spec import COMBINE, KEEP_ALL, quota

ENGINE = ReferenceBackend()


def block_of(rng: np.random.Generator, n: int, spread: str, patches: int = 2) -> Block:
    """One tensor of `n` entries whose deltas tie heavily, mildly, or never."""

    def deltas() -> np.ndarray:
        if spread == "ties":
            return rng.choice(np.array([0, 1, -1, 2, 3e-40, -7], np.float32), n)
        if spread == "steps":
            return np.round(rng.standard_normal(n).astype(np.float32), 2)
        return rng.standard_normal(n).astype(np.float32)

    return Block(
        base=Bits(np.zeros(n, dtype=np.uint32), "F32"),
        start=0,
        cols=max(n, 1),
        patches=tuple(
            PatchData(
                kind="delta",
                values=Bits(deltas().astype(np.float32).view(np.uint32), "F32"),
                importance="magnitude",
                scores=None,
                weight="patched",
                random_key=int(rng.integers(2**63)),
                keep=KEEP_ALL if rng.random() < 0.5 else int(0.4 * 2**32),
                scale=1.0,
            )
            for _ in range(patches)
        ),
        rule=COMBINE["sum"],
        order="retain-first",
    )


def expected(blocks: Sequence[Block], quotas: Sequence[int], skips: Sequence[int] = ()) -> list[np.ndarray]:
    """Per patch, the selected positions over all tensors, by sorting."""
    if skips:
        return [np.setdiff1d(*both) for both in zip(expected(blocks, quotas), expected(blocks, skips), strict=True)]
    result = []
    for p, k in enumerate(quotas):
        keys, eligible = [], []
        for block in blocks:
            patch = block.patches[p]
            assert patch is not None
            scored = Scored(block, patch, np.zeros(len(block), np.float32), PatchReport())
            keys.append(scored.key)
            eligible.append(scored.eligible)
        key, ok = np.concatenate(keys), np.concatenate(eligible)
        cut = cut_of(key, ok, k, 0)
        position = np.arange(len(key))
        k64 = key.astype(np.int64)
        result.append(np.flatnonzero(ok & ((k64 > cut.key) | ((k64 == cut.key) & (position < cut.before)))))
    return result


def streamed(
    blocks: Sequence[Block], quotas: Sequence[int], chunk: int, sample: Sequence[Block], skips: Sequence[int] = ()
) -> list[np.ndarray]:
    names = [f"t{i:03d}" for i in range(len(blocks))]
    selection = Selection(names, quotas, sum(map(len, blocks)), skips)
    selection.guess(ENGINE, sample)
    sweeps = 0
    while selection.pending:
        for name, block in zip(names, blocks, strict=True):
            for lo in range(0, len(block), chunk):
                ENGINE.histogram(block.slice(lo, min(lo + chunk, len(block))), selection.windows(name))
        selection.advance()
        sweeps += 1
    assert sweeps <= 3
    chosen: list[list[int]] = [[] for _ in quotas]
    offset = 0
    for name, block in zip(names, blocks, strict=True):
        ties = TieCounter(selection.tallies()[name])
        for lo in range(0, len(block), chunk):
            part = block.slice(lo, min(lo + chunk, len(block)))
            cuts = ties.cuts(ENGINE, part)
            for p, cut in enumerate(cuts):
                chosen[p] += [offset + i for i in members(part, p, cut)]
        offset += len(block)
    return [np.array(c, dtype=np.int64) for c in chosen]


def members(block: Block, p: int, cut: Cut) -> list[int]:
    patch = block.patches[p]
    assert patch is not None
    scored = Scored(block, patch, np.zeros(len(block), np.float32), PatchReport())
    return list(block.start + np.flatnonzero(scored.selected(block, cut)))


@pytest.mark.parametrize("spread", ["ties", "steps", "smooth"])
@pytest.mark.parametrize("sizes", [[1], [7], [4096], [0, 5, 1000, 1], [300, 300, 300]])
@pytest.mark.parametrize("chunk", [4, 257, 10_000])
def test_equals_sorting(spread: str, sizes: list[int], chunk: int) -> None:
    rng = np.random.default_rng(len(sizes) * 1000 + chunk + len(spread))
    if chunk == 4 and max(sizes) > 1000:
        sizes = [100]
    for top in (0.0, 1e-4, 0.03, 0.31, 0.999, 1.0):
        blocks = [block_of(rng, n, spread) for n in sizes]
        quotas = [quota(top, sum(sizes)), quota(top / 2, sum(sizes))]
        wanted = expected(blocks, quotas)
        for sample in ([], [b.slice(0, max(len(b) // 3, 1)) for b in blocks if len(b)], blocks):
            found = streamed(blocks, quotas, chunk, sample)
            for a, b in zip(wanted, found, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("spread", ["ties", "steps", "smooth"])
@pytest.mark.parametrize("sizes", [[1], [900], [0, 5, 1000, 1], [300, 300, 300]])
def test_what_is_skipped_is_found_in_the_same_sweeps(spread: str, sizes: list[int]) -> None:
    rng = np.random.default_rng(len(sizes) + len(spread))
    n = sum(sizes)
    blocks = [block_of(rng, size, spread) for size in sizes]
    for quotas, skips in (([n, n // 3], [n // 9, 1]), ([n // 2, n // 2], [n // 2, 0]), ([n, n], [n, n // 2])):
        for sample in ([], blocks):
            found = streamed(blocks, quotas, 257, sample, skips)
            for a, b in zip(expected(blocks, quotas, skips), found, strict=True):
                np.testing.assert_array_equal(a, b)


def test_a_guess_that_misleads_changes_nothing() -> None:
    rng = np.random.default_rng(7)
    blocks = [block_of(rng, 2000, "steps") for _ in range(3)]
    liar = [block_of(rng, 500, "ties")]
    quotas = [quota(0.05, 6000), 17]
    for a, b in zip(expected(blocks, quotas), streamed(blocks, quotas, 999, liar), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_good_guess_needs_one_sweep() -> None:
    rng = np.random.default_rng(3)
    blocks = [block_of(rng, 20_000, "steps") for _ in range(4)]
    selection = Selection(["a", "b", "c", "d"], [4000, 100], 80_000)
    selection.guess(ENGINE, blocks)
    for name, block in zip("abcd", blocks, strict=True):
        ENGINE.histogram(block, selection.windows(name))
    selection.advance()
    assert not selection.pending
