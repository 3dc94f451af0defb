"""Fix files beside merges, the floor and what else one would use: made, applied to a copy and in place, decoded."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.files.header import make_header
from safepatch_core.files.parsing import Shard
from safepatch_core.fixes import codec, reference
from safepatch_core.fixes.build import build, build_between
from safepatch_core.fixes.checking import teller_of
from safepatch_core.fixes.reading import WINDOW, Fix, open_fix
from safepatch_core.fixes.reference import NEW, OLD, Entries, Run

from . import models
from .floor import memcpy_subject
from .measure import ISOLATED, Cache, Red, Skipped, alternate, prepared, remove, run, safepatch
from .merges import CACHES, copy_subject, equals_reference, inputs, merge_command, output_bytes
from .models import SHAPES
from .peers import HERE, PYTHON, needs
from .registry import Bench, Case, Measured

SIZES = ("0.1B", "0.3B", "1.1B")
SHARES = (0.01, 0.02)  # of the entries of a window that is decoded
SECONDS = 0.2  # at least, per round
PIECE = 4 << 20  # bytes that the floor reads at once
IN_PLACE = HERE / "plain_in_place.py"
TORCH = HERE / "torch_sparse.py"
ZSTD_BYTES = 1 << 31  # the longest file that `zstd --patch-from` takes

Subject = Callable[[], dict[str, float]]
Commands = tuple[list[str], list[str]]  # make a patch; apply it


def shards(folder: Path) -> dict[str, Path]:
    """The weight files of a checkpoint by name."""
    return {path.name: path for path in sorted(folder.glob("*.safetensors"))}


def same_shards(expected: Path, found: Path) -> None:
    """Raises Red unless two checkpoints have the same weight files, byte for byte."""
    if shards(expected).keys() != shards(found).keys():
        raise Red(f"{found.name}: other weight files than {expected.name}")
    for name, path in shards(expected).items():
        with open(path, "rb") as a, open(found / name, "rb") as b:
            while piece := a.read(PIECE):
                if piece != b.read(PIECE):
                    raise Red(f"{name} of {found.name} differs from {expected.name}'s")
            if b.read(1):
                raise Red(f"{name} of {found.name} is longer than {expected.name}'s")


def copied(source: Path, target: Path) -> Path:
    """A copy of a checkpoint to be changed in place."""
    return Path(shutil.copytree(source, target))


def applies(bench: Bench) -> None:
    """The gate of fix files: a small model's give the merge's bytes and the base's again, copied or in place."""
    equals_reference(bench, [("checkpoint", "tensor")])
    folder = bench.models(SHAPES["tiny"])
    with bench.scratch() as scratch:
        fix, merged, out, back = (scratch / name for name in ("fix.safetensors", "merged", "out", "back"))
        run(merge_command(bench, models.recipe_path(folder), merged), timeout=bench.timeout)
        run(build_command(bench, models.recipe_path(folder), fix), timeout=bench.timeout)
        run(safepatch("apply", fix, "--to", folder / "base", "-o", out), timeout=bench.timeout)
        same_shards(merged, out)
        run(safepatch("revert", fix, "--from", out, "-o", back), timeout=bench.timeout)
        same_shards(folder / "base", back)
        model = copied(folder / "base", scratch / "model")
        run(safepatch("apply", fix, "--to", model, "--in-place"), timeout=bench.timeout)
        same_shards(merged, model)
        run(safepatch("revert", fix, "--from", model, "--in-place"), timeout=bench.timeout)
        same_shards(folder / "base", model)


def build_command(bench: Bench, recipe: Path, out: Path) -> list[str]:
    """`safepatch build` with the options that a merge of the run has."""
    words = merge_command(bench, recipe, out)
    words[words.index("merge")] = "build"
    return words


def timed(bench: Bench, words: list[str], check: Callable[[str], None] = lambda text: None) -> Subject:
    """What runs a command; `check` is given its standard output, and clears away what it wrote."""

    def subject() -> dict[str, float]:
        cost, text = run(words, timeout=bench.timeout)
        check(text)
        return cost._asdict()

    return subject


def always(facts: dict[str, Any], found: Mapping[str, Any]) -> None:
    """Keep what a run found. Raises Red if another one found something else."""
    for name, value in found.items():
        if facts.setdefault(name, value) != value:
            raise Red(f"two runs found another {name}")


def build_subject(bench: Bench, words: list[str], fix: Path, facts: dict[str, Any]) -> Subject:
    """What builds a fix and removes it; `facts` learns of it."""

    def check(text: str) -> None:
        made = json.loads(text)
        size, changes = made["size"], made["changes"]
        always(facts, {"fix": made["id"], "changes": changes, "fix_bytes": size, "bytes_per_change": size / changes})
        remove(fix)

    return timed(bench, words, check)


def output_subject(bench: Bench, words: list[str], out: Path, facts: dict[str, Any]) -> Subject:
    """What writes a checkpoint and removes it. Raises Red unless all of a case list the same SHA-256."""

    def check(text: str) -> None:
        sums = [line for line in (out / "SHA256SUMS").read_text().splitlines() if line.endswith(".safetensors")]
        always(facts, {"output": sums})
        remove(out)

    return timed(bench, words, check)


def _measure_build(size: str, cache: Cache, bench: Bench) -> Measured:
    folder = bench.models(SHAPES[size])
    recipe, files, written = models.recipe_path(folder), inputs(folder, "checkpoint"), output_bytes(folder)
    facts: dict[str, Any] = {"entries": SHAPES[size].entries}
    with bench.scratch() as scratch, prepared(files, cache, 2 * written) as before:
        fix, out = scratch / "fix.safetensors", scratch / "out"
        subjects = {
            "build": build_subject(bench, build_command(bench, recipe, fix), fix, facts),
            "merge": output_subject(bench, merge_command(bench, recipe, out), out, facts),
        }
        return Measured(alternate(subjects, bench.rounds, before), [("build", "merge")], facts)


def _measure_apply(size: str, cache: Cache, bench: Bench) -> Measured:
    """The floor reads the base and writes as many bytes durably; the fix is a few percent of that and not counted."""
    folder = bench.models(SHAPES[size])
    recipe, base, written = models.recipe_path(folder), folder / "base", output_bytes(folder)
    facts: dict[str, Any] = {"entries": SHAPES[size].entries}
    with bench.scratch() as scratch:
        fix, out = scratch / "fix.safetensors", scratch / "out"
        facts["fix_bytes"] = build(recipe, fix, backend=bench.backend, threads=bench.threads).size
        words = safepatch("apply", fix, "--to", base, "-o", out)
        subjects = {
            "apply": output_subject(bench, words, out, facts),
            "merge": output_subject(bench, merge_command(bench, recipe, out), out, facts),
            "floor": copy_subject(bench, list(shards(base).values()), scratch / "copy", written, True, cache),
        }
        with prepared([*inputs(folder, "checkpoint"), fix], cache, 2 * written) as before:
            series = alternate(subjects, bench.rounds, before)
    return Measured(series, [("apply", "floor"), ("apply", "merge")], facts)


def pieces(shard: Shard, fix: Fix) -> list[tuple[int, int, bool]]:
    """All bytes of a shard in order: first byte, length, and whether a window of the fix with changes lies there."""
    found: list[tuple[int, int, bool]] = []
    done = 0

    def upto(end: int) -> None:
        nonlocal done
        found.extend((at, min(PIECE, end - at), False) for at in range(done, end, PIECE))
        done = end

    for entry in sorted(shard.tensors, key=lambda entry: entry.start):
        for lo, window in teller_of(fix, entry).windows() if entry.name in fix.tensors else ():
            if window.changes:
                begin, nbytes = entry.start + lo * window.width, window.entries * window.width
                upto(begin)
                found.append((begin, nbytes, True))
                done = begin + nbytes
    upto(shard.size)
    return found


def _measure_in_place(size: str, cache: Cache, bench: Bench) -> Measured:
    """The floor reads every byte of every shard once, writes each window in which the fix changes something back to
    where it lay, unchanged, and syncs each shard. It neither looks at the bytes nor reads the fix.
    """
    folder = bench.models(SHAPES[size])
    facts: dict[str, Any] = {"entries": SHAPES[size].entries}
    with bench.scratch() as scratch:
        fix, model, plan = scratch / "fix.safetensors", scratch / "model", scratch / "plan.json"
        built = build(models.recipe_path(folder), fix, backend=bench.backend, threads=bench.threads)
        copied(folder / "base", model)
        with open_fix(fix) as opened:
            work = {str(shard.path): pieces(shard, opened) for shard in open_checkpoint(model).shards}
        plan.write_text(json.dumps(work))
        written = sum(nbytes for of in work.values() for _, nbytes, changes in of if changes)
        facts |= {"fix_bytes": built.size, "changes": built.changes, "floor_written_bytes": written}
        subjects = {
            "apply": timed(bench, safepatch("apply", fix, "--to", model, "--in-place")),
            "revert": timed(bench, safepatch("revert", fix, "--from", model, "--in-place")),
            "floor": timed(bench, [*ISOLATED, str(IN_PLACE), str(bench.threads), str(plan)]),
        }
        with prepared([*shards(model).values(), fix], cache, built.size) as before:
            subjects["floor"]()  # what copying left to be written goes to the disk
            series = alternate(subjects, bench.rounds, before)
        same_shards(folder / "base", model)
    return Measured(series, [("apply", "floor"), ("revert", "floor")], facts)


def changed(share: float) -> tuple[Entries, Entries]:
    """A window of the base, and the same with a share of its entries as a patch has them."""
    pools, n = models.pools(0), WINDOW // 2
    old: Entries = pools["base"][:n].copy()
    new, patched = old.copy(), pools["safety"][:n]
    draw = np.random.Generator(np.random.PCG64(0))
    at = draw.choice(np.flatnonzero(old != patched), round(share * n), replace=False)
    new[at] = patched[at]
    return old, new


def encoded(old: Entries, new: Entries, scratch: Path) -> Run:
    """What the fix file from one window to another says."""
    header, _ = make_header([("weight", "BF16", (len(old),))])
    paths = [scratch / f"{name}.safetensors" for name in ("old", "new")]
    for path, entries in zip(paths, (old, new), strict=True):
        path.write_bytes(header + entries.tobytes())
    build_between(paths[0], paths[1], scratch / "fix.safetensors", force=True)
    with open_fix(scratch / "fix.safetensors") as fix:
        touched = fix.tensors["weight"]
        return fix.run(touched, 2, *next(touched.windows(2)))


def _decodes(bench: Bench) -> None:
    """Both codecs lead from the old window to the new one and back."""
    if codec._engine is None:
        raise Skipped("the C++ codec is not built")
    for share in SHARES:
        old, new = changed(share)
        with bench.scratch() as scratch:
            found = encoded(old, new, scratch)
        for name, settle in (("C++", codec.settle), ("numpy", reference.settle)):
            entries = old.copy()
            for goal, expected in ((NEW, new), (OLD, old)):
                settle(found, entries, goal, *np.empty((2, found.changes), old.dtype))
                if not np.array_equal(entries, expected):
                    raise Red(f"{name} decodes another window at {share:.0%}")


def decode_subject(settle: Callable[..., object], found: Run, entries: Entries) -> Subject:
    """One thread that brings a window, which stays in the cache, to its new side and back, again and again."""
    room = np.empty((2, found.changes), entries.dtype)

    def subject() -> dict[str, float]:
        repeats, begin = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < SECONDS:
            for goal in (NEW, OLD):
                settle(found, entries, goal, *room)
            repeats += 2
        return {"bytes_per_s": repeats * entries.nbytes / elapsed}

    return subject


def _measure_decode(bench: Bench) -> Measured:
    subjects: dict[str, Subject] = {}
    for share in SHARES:
        old, new = changed(share)
        with bench.scratch() as scratch:
            found = encoded(old, new, scratch)
        subjects[f"{share:.0%}"] = decode_subject(codec.settle, found, old)
        subjects[f"{share:.0%} numpy"] = decode_subject(reference.settle, found, old)
    series = alternate(subjects | {"memcpy": memcpy_subject()}, max(bench.rounds, 3))
    return Measured(series, [], {"window_bytes": WINDOW})


def zstd(bench: Bench, base: Path, merged: Path, patch: Path, out: Path) -> Commands:
    """One weight file against another, with a window that spans it; level and search are zstd's own choice."""
    program, (name, old), *more = shutil.which("zstd"), *shards(base).items()
    if program is None:
        raise Skipped("zstd is not on the PATH")
    if more or old.stat().st_size > ZSTD_BYTES:
        raise Skipped("zstd --patch-from takes one file of at most 2 GiB")
    words = [program, "-q", "--long=31", f"--patch-from={old}"]
    return (
        [*words, f"-T{bench.threads}", str(merged / name), "-o", str(patch)],
        ["sh", "-c", 'mkdir "$0" && exec "$@"', str(out), *words, "-d", str(patch), "-o", str(out / name)],
    )


def torch_sparse(bench: Bench, base: Path, merged: Path, patch: Path, out: Path) -> Commands:
    """Places and values of what differs, and index_put_."""
    needs("torch", "safetensors")
    words = [*PYTHON, str(TORCH)]
    return [*words, "make", str(base), str(merged), str(patch)], [*words, "apply", str(base), str(patch), str(out)]


PEERS = {"zstd": zstd, "torch": torch_sparse}


def _measure_peer(size: str, peer: str, bench: Bench) -> Measured:
    """From two checkpoints to a patch, and from that to the second one. The peers' outputs are not synced."""
    folder = bench.models(SHAPES[size])
    base = folder / "base"
    facts: dict[str, Any] = {"entries": SHAPES[size].entries}
    with bench.scratch() as scratch:
        merged, out, fix, patch = (scratch / name for name in ("merged", "out", "fix.safetensors", "patch"))
        make, use = PEERS[peer](bench, base, merged, patch, out)
        run(merge_command(bench, models.recipe_path(folder), merged), timeout=bench.timeout)

        def made(name: str, path: Path) -> None:
            always(facts, {name: path.stat().st_size})

        def used(path: Path) -> None:
            same_shards(merged, out)
            remove(out)
            remove(path)

        ours = safepatch("build", "--from", base, "--to", merged, "-o", fix)
        subjects = {
            "safepatch-build": timed(bench, ours, lambda _: made("fix_bytes", fix)),
            "safepatch-apply": timed(bench, safepatch("apply", fix, "--to", base, "-o", out), lambda _: used(fix)),
            f"{peer}-build": timed(bench, make, lambda _: made(f"{peer}_bytes", patch)),
            f"{peer}-apply": timed(bench, use, lambda _: used(patch)),
        }
        files = [*shards(base).values(), *shards(merged).values()]
        with prepared(files, "warm", 2 * output_bytes(folder)) as before:
            series = alternate(subjects, bench.rounds, before)
    return Measured(series, [(f"{peer}-{what}", f"safepatch-{what}") for what in ("build", "apply")], facts)


def _peer_gate(peer: str, bench: Bench) -> None:
    """The peer gives the merged weights of a small model, as every run of the measure must."""
    applies(bench)
    _measure_peer("tiny", peer, bench)


def cases() -> list[Case]:
    """Cases of the group `fixes`."""
    found = [
        Case("fixes/decode", "decoding of a fix by one core, in memory", {}, _decodes, _measure_decode, short=True)
    ]
    described = {
        "build": (_measure_build, "a fix built from a recipe, beside the merge"),
        "apply": (_measure_apply, "a fix applied to a copy, beside the merge and the floor"),
        "in-place": (_measure_in_place, "a fix applied and taken out in place, beside the floor"),
    }
    for size in SIZES:
        params = {"size": size, "entries": SHAPES[size].entries}
        for what, (measure, text) in described.items():
            for cache in CACHES:
                found.append(
                    Case(
                        f"fixes/{size}/{what}/{cache}",
                        f"{text}, {size} parameters, {cache} inputs",
                        params | {"what": what, "cache": cache},
                        applies,
                        partial(measure, size, cache),
                        short=(size, cache) == ("0.1B", "warm"),
                    )
                )
        for peer in PEERS:
            found.append(
                Case(
                    f"fixes/{size}/{peer}",
                    f"patches by {peer} and by safepatch between the same {size} checkpoints, warm, alternating",
                    params | {"peer": peer},
                    partial(_peer_gate, peer),
                    partial(_measure_peer, size, peer),
                )
            )
    return found
