"""The last stage of a target that is stored as codes: where its patches act, codes change, and no other bit does.

An engine that takes codes does all of it. The others are float engines: each patch alone is handed to one over a base
of minus zeros, with c = 1 and steps that are added up from +0. What comes back is d at every entry of the patch's T
(or +0, where d is 0) and minus zero elsewhere, in every engine. All that is left is done here for the entries in a T,
in plain numpy, which is also what an engine that takes codes has to equal in every bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from safepatch_core.backends.codes import CodesReport, Kept
from safepatch_core.backends.contract import Bits, Block, Codes, Fault, PatchReport, Report
from safepatch_core.backends.reference import acting, joined, philox, to_float32
from safepatch_core.merging.inputs import Inputs
from safepatch_core.merging.pipeline import room
from safepatch_core.merging.quantised import grids
from safepatch_core.merging.quantised.grids import F32, Grid
from safepatch_core.merging.quantised.layouts.contract import CodedWeight, Places, Scales
from safepatch_core.merging.quantised.survival import exact_sum
from safepatch_core.merging.quantised.values import DTYPES
from safepatch_core.merging.recipe import Quantized
from safepatch_core.merging.sources.contract import PatchTensor
from safepatch_core.spec import Acts, Join, Rule

Mask = NDArray[np.bool_]
Tile = NDArray[np.uint32]

UNTOUCHED = np.uint32(0x8000_0000)  # minus zero
LEAST_SCALE = 2.0**-100
SCAN = 1 << 20  # entries among which those in a T are looked for at once
PIECE = 1 << 16  # of those, worked on together
SCALES = "finite ones of at least 2^-100"
ONE_PATCH = Rule(Acts.ALL, Join.TOTAL)


@dataclass(frozen=True, slots=True)
class Coded:
    """How a target that is stored as codes is merged into."""

    weight: CodedWeight
    original: PatchTensor | None  # the float original's tensor, where the recipe names one
    key: int  # of the random numbers that it is rounded with
    rule: Quantized
    direct: bool  # whether the engine takes codes


@dataclass(slots=True)
class Loaded:
    """A run of such a target in memory; the arrays lie in the ring."""

    first: int  # its first entry
    entries: int
    data: NDArray[np.uint8]  # the bytes of its codes, which are changed in place
    scales: Scales | None  # None, as there are no bytes, where an engine of floats only selects from it
    tiles: Sequence[Tile]  # minus zeros: one for each patch that has something for the tensor, or a single one
    original: Bits | None = None

    def told(self, coded: Coded) -> Codes | None:
        """In the engine's words, if it takes codes."""
        if not coded.direct or self.scales is None:
            return None
        weight, rule = coded.weight, coded.rule
        return Codes(
            weight.grid.name,
            self.data,
            weight.flip,
            self.first,
            self.entries,
            self.scales.table(),
            DTYPES[rule.reference_dtype],
            rule.rounding,
            coded.key,
            self.original,
        )


def load(
    coded: Coded, patches: int, inputs: Inputs, run: tuple[int, int], memory: NDArray[np.uint8], selecting: bool
) -> tuple[Loaded, int]:
    """A run of a target into `memory`, and how many bytes of it that took."""
    lo, hi = run
    weight, n, used = coded.weight, hi - lo, 0

    def take(nbytes: int) -> NDArray[np.uint8]:
        nonlocal used
        used += room(nbytes)
        return memory[used - room(nbytes) : used]

    alone = selecting and not coded.direct
    begin, end = (0, 0) if alone else weight.stored(lo, hi)
    data = take(end - begin)
    if coded.direct:
        tiles = [np.broadcast_to(UNTOUCHED, n)]  # no more than a number of entries
    else:
        tiles = [take(4 * n)[: 4 * n].view(np.uint32) for _ in range(1 if alone else max(patches, 1))]
        for tile in tiles:
            tile.fill(UNTOUCHED)
    if alone:
        return Loaded(lo, n, data[:0], None, tiles), used
    data = inputs.load(weight.codes, begin, end, data)
    return Loaded(lo, n, data, weight.scales(inputs, lo, hi), tiles), used


def apart(block: Block, loaded: Loaded) -> list[tuple[slice, Block]]:
    """Each patch that a block has, alone and over a tile of its own, for an engine to run on in place."""
    spare, found = iter(loaded.tiles), []
    for p, given in enumerate(block.patches):
        if given is not None:
            alone = replace(block, base=Bits(next(spare), "F32"), patches=(replace(given, scale=1.0),))
            found.append((slice(p, p + 1), replace(alone, rule=ONE_PATCH, lambda_=1.0)))
    return found


def rewrite(block: Block, coded: Coded, loaded: Loaded, reports: Sequence[Report]) -> CodesReport:
    """Let the patches of a block act on the codes of a run; `reports` of the engine's runs on them, see `apart`."""
    report = CodesReport([PatchReport() for _ in block.patches], kept=[Kept() for _ in block.patches])
    tiles: list[Tile | None] = [None] * len(block.patches)
    given = [p for p, patch in enumerate(block.patches) if patch is not None]
    for p, tile, found in zip(given, loaded.tiles, reports, strict=False):
        tiles[p], report.patches[p] = tile, replace(found.patches[0], applied=0)
    scales = [0.0 if given is None else given.scale for given in block.patches]
    for lo in range(0, len(block), SCAN):
        held = [tile[lo : lo + SCAN] != UNTOUCHED for tile in tiles if tile is not None]
        places = lo + np.flatnonzero(np.logical_or.reduce(held)) if held else np.zeros(0, np.int64)
        for part in range(0, len(places), PIECE):
            piece = _Piece(block.rule, block.lambda_, scales, tiles, places[part : part + PIECE])
            report += _rewrite_piece(piece, coded, loaded)
    return report


class _Piece:
    """Entries on which a patch acts, and what is done to them. All arrays are [n]."""

    at: Places  # counted from the run's first entry
    acts: list[Mask]  # per patch

    def __init__(
        self, rule: Rule, lambda_: float, scales: Sequence[float], tiles: Sequence[Tile | None], held: Places
    ) -> None:
        """Of the entries `held` by a T, those on which somebody acts."""
        self._rule, self._lambda, self._scales = rule, lambda_, scales
        none = np.full(len(held), UNTOUCHED)
        found = [none if tile is None else tile[held] for tile in tiles]
        with np.errstate(all="ignore"):
            steps = [np.float32(c) * d.view(np.float32) for c, d in zip(scales, found, strict=True)]
            acts = acting(rule.acts, [d != UNTOUCHED for d in found], steps)
        some = np.logical_or.reduce(acts)
        self.at = held[some]
        self.acts, self._steps = [of[some] for of in acts], [step[some] for step in steps]

    def made_of(self, w: F32) -> F32:
        """acc."""
        with np.errstate(all="ignore"):
            return joined(self._rule.join, self.acts, self._steps, self._scales, w, self._lambda)


def _rewrite_piece(piece: _Piece, coded: Coded, loaded: Loaded) -> CodesReport:
    weight, at = coded.weight, piece.at
    assert loaded.scales is not None
    positions = loaded.first + at
    old, s = weight.get(loaded.data, at), loaded.scales.at(positions)
    with np.errstate(all="ignore"):
        v = weight.grid.decode(old) * s
        w = v if loaded.original is None else to_float32(Bits(loaded.original.data[at], loaded.original.dtype))
        acc = piece.made_of(w)
        # As in a float base, an entry that is not finite stays; nor has a code that is no number a neighbour.
        touched = np.isfinite(w) & np.isfinite(v)
        overflow = touched & ~np.isfinite(acc)
        bad_scale = ~(np.isfinite(s) & (s >= LEAST_SCALE))
        written = touched & ~overflow & ~bad_scale
        y = np.where(written, acc / s, np.float32(0))
        new = np.where(written, _rounded(weight.grid, y, coded, positions), old)
        same = weight.grid.decode(new) == weight.grid.decode(old)  # in value: a -0 stays one
        new = np.where(same, old, new)
        after = weight.grid.decode(new) * s
    weight.put(loaded.data, at, new)
    beyond = written & ((y < weight.grid.lowest) | (y > weight.grid.highest))
    told = _Told(written, new != old, beyond, acc, w, v, after)
    return CodesReport(
        [PatchReport(applied=int(np.count_nonzero(act))) for act in piece.acts],
        _fault(overflow, positions),
        acted=len(at),
        changed=int(np.count_nonzero(new != old)),
        kept=_kept(piece.acts, told),
        bad_scale=_fault(bad_scale, positions),
        saturated=_fault(beyond, positions),
    )


def _rounded(grid: Grid, y: F32, coded: Coded, positions: Places) -> grids.Codes:
    if coded.rule.rounding == "nearest":
        return grid.encode(y)
    return grid.stochastic(y, draws(coded.key, positions))


def draws(key: int, positions: Places) -> NDArray[np.uint32]:
    """u at each position of a tensor, ascending; as in retention, lane i mod 4 of the Philox block i div 4."""
    blocks, where = np.unique(positions // 4, return_inverse=True)
    return philox(key, blocks.astype(np.uint64))[where, positions % 4]


@dataclass(frozen=True, slots=True)
class _Told:
    """What was done to the entries of a piece; all arrays are [n]."""

    written: Mask
    changed: Mask
    saturated: Mask
    acc: F32
    w: F32
    v: F32
    after: F32  # v'


def _kept(acts: Sequence[Mask], told: _Told) -> list[Kept]:
    alone = told.written & (np.sum(acts, axis=0) == 1)
    return [_kept_of(act & alone, told) for act in acts]


def _kept_of(mine: Mask, told: _Told) -> Kept:
    moved, asked = (
        a[mine].astype(np.float64) - b[mine].astype(np.float64) for a, b in ((told.after, told.v), (told.acc, told.w))
    )
    return Kept(
        *(int(np.count_nonzero(of & mine)) for of in (told.written, told.changed, told.saturated)),
        *(exact_sum(terms) for terms in (moved * asked, asked * asked, moved * moved)),
    )


def _fault(mask: Mask, positions: Places) -> Fault:
    count = int(np.count_nonzero(mask))
    return Fault(count, int(positions[np.argmax(mask)]) if count else -1)
