"""Fix files against an oracle written from the contract alone: encoded bytes, decoded changes, refused files."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safepatch_core.errors import InputError
from safepatch_core.files.reading import TensorEntry
from safepatch_core.fixes import codec, format, reference
from safepatch_core.fixes.reading import Proof, Sparse, open_fix
from safepatch_core.fixes.writing import Writer
from tests import fix_oracle
from tests.fix_cases import BLOCK, changed, random_tensor, unsigned, write_fix
from tests.oracle import Tensor

Table = dict[str, Tensor]


def written(folder: Path, base: Table, merged: Table, cut: int | None = None) -> bytes:
    """The fix file that the product gives, its tensors told in pieces of `cut` entries."""
    file = io.BytesIO()
    entries = {n: TensorEntry(n, t.dtype, t.shape, folder, "", 0, len(t.data)) for n, t in base.items()}
    with Writer(folder) as writer:
        for name in reversed([n for n, t in base.items() if t.dtype in format.WIDTH]):
            old, new = unsigned(base[name]), unsigned(merged[name])
            encoder = writer.encoder(len(old), old.itemsize)
            for lo in range(0, len(old), cut or max(len(old), 1)):
                hi = lo + (cut or len(old))
                encoder.add(old[lo:hi], new[lo:hi], lo)
            writer.add(name, encoder)
        writer.write(file, format.metadata(format.table_hash(entries), writer.facts, {"seed": 1, "base": "\u00e9"}))
    return file.getvalue()


def prove(path: Path, widths: Mapping[str, int]) -> None:
    """Read all of a fix file."""
    with open_fix(path) as fix:
        for name, touched in fix.tensors.items():
            proof = Proof(fix, touched)
            for first, last in touched.windows(widths[name]):
                run = fix.run(touched, widths[name], first, last)
                n = run.changes
                scratch = np.zeros(run.entries, f"u{run.width}")
                old, new = (np.empty(n, scratch.dtype) for _ in range(2))
                try:
                    tally = codec.settle(run, scratch, codec.KEEP, old, new)
                except codec.Broken as error:
                    fix.broken(str(error), touched)
                proof.add(run, tally.codes)
            proof.finish()


def compare(folder: Path, base: Table, merged: Table, cut: int | None = None) -> None:
    expected = fix_oracle.encode(base, merged, {"base": "\u00e9", "seed": 1})
    assert written(folder, base, merged, cut) == expected
    path = folder / "oracle.safetensors"
    path.write_bytes(expected)
    parts = fix_oracle.decode(expected)
    with open_fix(path) as fix:
        assert list(fix.tensors) == sorted(parts, key=str.encode)
        for name, touched in fix.tensors.items():
            found = fix.changes_in(touched, unsigned(base[name]).itemsize, 0, touched.entries)
            at, xor, side = (x.tolist() for x in found)
            assert [fix_oracle.Change(*c) for c in zip(at, xor, side, strict=True)] == parts[name].changes
    prove(path, {name: unsigned(t).itemsize for name, t in base.items()})


DENSITIES = [0.0, 0.00002, 0.003, 0.02, 0.3, 1.0]
SIZES = [0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 4321]


@pytest.mark.parametrize("dtype", ["U8", "BF16", "F32"])
@pytest.mark.parametrize("style", ["any", "small", "high"])
def test_the_bytes_are_the_oracles(tmp_path: Path, dtype: str, style: str) -> None:
    rng = np.random.default_rng(len(dtype) + 10 * len(style))
    sizes = dict(zip(rng.permutation(DENSITIES), rng.permutation(SIZES), strict=False))
    base = {f"{i}.weight": random_tensor(rng, dtype, int(n)) for i, n in enumerate(sizes.values())}
    merged = {n: changed(rng, t, float(p), style) for (n, t), p in zip(base.items(), sizes, strict=True)}
    # A tensor that no draw leaves alone.
    base["x"] = random_tensor(rng, dtype, 3)
    merged["x"] = changed(rng, base["x"], [1])
    compare(tmp_path, base, merged)


def test_every_dtype_and_hard_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    names = ["a", "a.b", "a::block", "Z", "\u00e9t\u00e9", "\U0001f600", "\uffee", 'q"\\uote\n']
    base = {n: random_tensor(rng, d, 40, 50) for n, d in zip(names, fix_oracle.BITS, strict=False)}
    base["scalar"] = random_tensor(rng, "F32")
    base["wide"] = random_tensor(rng, "F64", 4)
    merged = {n: t if n == "wide" else changed(rng, t, 0.5) for n, t in base.items()}
    merged["scalar"] = changed(rng, base["scalar"], [0])
    compare(tmp_path, base, merged)


@pytest.mark.parametrize("cut", [1, 7, 1000, BLOCK, BLOCK + 3])
def test_the_cut_does_not_show(tmp_path: Path, cut: int) -> None:
    rng = np.random.default_rng(cut)
    n = 5000 if cut < 1000 else 2 * BLOCK + 100
    base = {"w": random_tensor(rng, "BF16", n)}
    compare(tmp_path, base, {"w": changed(rng, base["w"], 0.03, "small")}, cut)


@pytest.mark.parametrize(
    ("N", "at", "gap"),
    [
        (BLOCK, [65535], "U16"),  # one skip of 65535, against 257 bytes
        (BLOCK, [254], "U8"),
        (BLOCK, [255], "U8"),  # U8 takes two bytes, and so does U16
        (BLOCK, [510], "U16"),
        (BLOCK, [254, 65535], "U16"),
        (3 * BLOCK, [0, 2 * BLOCK + 509], "U8"),
        (3 * BLOCK, [BLOCK, 3 * BLOCK - 1], "U16"),
        (2 * BLOCK, list(range(0, 2 * BLOCK, 2)), "U8"),
    ],
)
def test_gaps_of_either_type(tmp_path: Path, N: int, at: list[int], gap: str) -> None:
    rng = np.random.default_rng(0)
    base = {"w": random_tensor(rng, "F16", N)}
    merged = {"w": changed(rng, base["w"], at)}
    compare(tmp_path, base, merged)
    with open_fix(write_fix(tmp_path / "fix.safetensors", base, merged)) as fix:
        assert fix.tensors["w"].gap.dtype == gap


FORMS = [(0, None), (1, "sparse"), (19, "sparse"), (20, "dense"), (100, "dense")]


@pytest.mark.parametrize(("nonzero", "form"), FORMS)
def test_planes_of_every_form(tmp_path: Path, nonzero: int, form: str | None) -> None:
    """Of 100 changes, `nonzero` have a high byte: sparse below a fifth."""
    base = {"w": Tensor("BF16", (500,), bytes(1000))}
    entries = unsigned(base["w"]).copy()
    entries[::5] = 1
    entries[: 5 * nonzero : 5] |= 0x4200
    merged = {"w": Tensor("BF16", (500,), entries.tobytes())}
    compare(tmp_path, base, merged)
    with open_fix(write_fix(tmp_path / "fix.safetensors", base, merged)) as fix:
        plane = fix.tensors["w"].planes[1]
        assert form == (None if plane is None else "sparse" if isinstance(plane, Sparse) else "dense")


def test_windows_read_what_they_need(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    base = {"w": random_tensor(rng, "BF16", 5 * BLOCK + 99)}
    merged = {"w": changed(rng, base["w"], 0.01, "small")}
    with open_fix(write_fix(tmp_path / "fix.safetensors", base, merged)) as fix:
        touched = fix.tensors["w"]
        whole = fix.changes_in(touched, 2, 0, touched.entries)
        for _ in range(50):
            lo, hi = sorted(rng.integers(0, touched.entries + 1, 2).tolist())
            part = fix.changes_in(touched, 2, lo, hi)
            inside = (whole.at >= lo) & (whole.at < hi)
            same: list[Any] = [a == b[inside] for a, b in zip(part, [*whole], strict=True)]
            assert all(s.all() for s in same)


# Broken files


def base_and_merged() -> tuple[Table, Table]:
    rng = np.random.default_rng(5)
    base = {"a.weight": random_tensor(rng, "BF16", 3, BLOCK), "b.weight": random_tensor(rng, "F32", 1000)}
    merged = {n: changed(rng, t, 0.02, "small") for n, t in base.items()}
    return base, merged


Arrays = dict[str, tuple[str, list[int], bytes]]
Spoil = Callable[[dict[str, str], Arrays], None]


def rebuilt(blob: bytes, spoil: Spoil) -> bytes:
    """A fix file after `spoil` has changed its metadata or arrays; ids are made to fit again."""
    about, arrays = fix_oracle.read(blob)
    known = about["id"]
    spoil(about, arrays)
    if about.get("id") == known:
        about["id"] = fix_oracle.digest(f"{about['base']}\n{about['tensors']}".encode(), 16)
    header: dict[str, Any] = {"__metadata__": about}
    data = b""
    for name, (dtype, shape, content) in arrays.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def edit(array: str, change: Callable[[np.ndarray[Any, Any]], Any]) -> Spoil:
    """An array replaced by what `change` makes of it, or changed in place."""

    def spoil(about: dict[str, str], arrays: Arrays) -> None:
        dtype, shape, data = arrays[array]
        kind = {"U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8"}[dtype]
        items = np.frombuffer(data, kind).reshape(shape).copy()
        result = change(items)
        items = items if result is None else result
        arrays[array] = (dtype, list(items.shape), items.astype(kind).tobytes())

    return spoil


def put(at: Any, value: int) -> Callable[[np.ndarray[Any, Any]], None]:
    def change(items: np.ndarray[Any, Any]) -> None:
        items[at] = value

    return change


def told(**facts: Any) -> Spoil:
    """Facts of a.weight replaced."""

    def spoil(about: dict[str, str], arrays: Arrays) -> None:
        table = json.loads(about["tensors"])
        table["a.weight"].update(facts)
        about["tensors"] = fix_oracle.compact(table)

    return spoil


def said(key: str, value: str | None) -> Spoil:
    def spoil(about: dict[str, str], arrays: Arrays) -> None:
        if value is None:
            del about[key]
        else:
            about[key] = value

    return spoil


def dense_high_plane(about: dict[str, str], arrays: Arrays) -> None:
    n = json.loads(about["tensors"])["a.weight"]["changes"]
    plane = np.zeros(n, np.uint8)
    plane[np.frombuffer(arrays["a.weight::xor1.at"][2], "<u4")] = np.frombuffer(arrays["a.weight::xor1.val"][2], "u1")
    found = {k: v for k, v in arrays.items() if not k.startswith("a.weight::xor1")}
    arrays.clear()
    for name, array in found.items():
        arrays[name] = array
        if name == "a.weight::xor0":
            arrays["a.weight::xor1"] = ("U8", [n], plane.tobytes())


def wide_gaps(about: dict[str, str], arrays: Arrays) -> None:
    """The same changes with U16 gaps, which take more bytes."""
    table = json.loads(about["tensors"])
    positions = [c.p for c in fix_oracle.decode(BLOB)["a.weight"].changes]
    codes, rows = fix_oracle.gap_codes(table["a.weight"]["entries"], positions, 65535)
    arrays["a.weight::gap"] = ("U16", [len(codes)], np.array(codes, "<u2").tobytes())
    arrays["a.weight::block"] = ("U64", [len(rows), 2], np.array(rows, "<u8").tobytes())


def swapped(about: dict[str, str], arrays: Arrays) -> None:
    items = list(arrays.items())
    items[0], items[1] = items[1], items[0]
    arrays.clear()
    arrays.update(items)


def zero_xor(about: dict[str, str], arrays: Arrays) -> None:
    """The XOR of a change whose high byte is zero becomes zero."""
    at = set(np.frombuffer(arrays["a.weight::xor1.at"][2], "<u4").tolist())
    i = next(i for i in range(100) if i not in at)
    edit("a.weight::xor0", put(i, 0))(about, arrays)


def trailing_code(items: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([items, [255]])


def trailing(about: dict[str, str], arrays: Arrays) -> None:
    """A skip after the last change of the last block."""
    edit("a.weight::gap", trailing_code)(about, arrays)
    edit("a.weight::block", put((-1, 0), arrays["a.weight::gap"][1][0]))(about, arrays)


def only_a(about: dict[str, str], arrays: Arrays) -> None:
    for name in [name for name in arrays if name.startswith("b")]:
        del arrays[name]


BASE, MERGED = base_and_merged()
BLOB = fix_oracle.encode(BASE, MERGED)

SPOILS: dict[str, Spoil] = {
    "another format": said("format", "safepatch-fox"),
    "another version": said("version", "2"),
    "no version": said("version", None),
    "no recipe": said("recipe", None),
    "a key too many": said("note", "hello"),
    "recipe that is no JSON": said("recipe", "{"),
    "base that is no hash": said("base", "0" * 63 + "G"),
    "another id": said("id", "0" * 32),
    "tensors that are no JSON": said("tensors", "["),
    "tensors that are a list": said("tensors", "[]"),
    "no tensors": said("tensors", "{}"),
    "tensors with blanks": lambda about, _: about.update(tensors=about["tensors"].replace(",", ", ")),
    "no changes": told(changes=0),
    "more changes than entries": told(entries=5),
    "changes that are no number": told(changes="1"),
    "changes that are true": told(changes=True),
    "entries of another block table": told(entries=4 * BLOCK),
    "entries that end before a change": told(entries=2 * BLOCK + 5),
    "one change less": told(changes=3),
    "old that is no hash": told(old="x" * 32),
    "a fact too many": told(more=1),
    "block table starts elsewhere": edit("a.weight::block", put((0, 0), 1)),
    "block table starts with changes": edit("a.weight::block", put((0, 1), 1)),
    "block table ends elsewhere": edit("a.weight::block", put((-1, 0), 7)),
    "block table reversed": edit("a.weight::block", lambda rows: rows[::-1]),
    "block table out of order": edit("a.weight::block", put((1, 0), 2**63)),
    "ranks disagree": edit("a.weight::block", lambda rows: rows + np.array([[0, 0], [0, 1], [0, 0], [0, 0]], "u8")),
    "codes of another block": edit("a.weight::block", lambda r: r + np.array([[0, 0], [1, 0], [0, 0], [0, 0]], "u8")),
    "all codes in the first block": edit("a.weight::block", lambda r: np.vstack([r[:1], r[3:], r[3:], r[3:]])),
    "gap past the end of its block": edit("a.weight::gap", lambda gap: np.full_like(gap, 254)),
    "only skips": edit("a.weight::gap", lambda gap: np.full_like(gap, 255)),
    "a skip more": edit("a.weight::gap", put(5, 255)),
    "a code after the last change": trailing,
    "gaps too short": edit("a.weight::gap", lambda gap: gap[:-1]),
    "gaps of the longer type": wide_gaps,
    "gaps of another type": lambda _, arrays: arrays.update({"a.weight::gap": ("I8", *arrays["a.weight::gap"][1:])}),
    "sides too short": edit("a.weight::side", lambda side: side[:-1]),
    "sides too long": edit("a.weight::side", lambda side: np.append(side, 0)),
    "plane too short": edit("a.weight::xor0", lambda plane: plane[:-1]),
    "an XOR of 0": zero_xor,
    "dense plane that should be sparse": dense_high_plane,
    "places out of order": edit("a.weight::xor1.at", lambda at: at[::-1]),
    "a place twice": edit("a.weight::xor1.at", lambda at: np.sort(np.append(at[1:], at[1]))),
    "a place past the end": edit("a.weight::xor1.at", put(-1, 2**31)),
    "a value of 0": edit("a.weight::xor1.val", put(3, 0)),
    "more places than values": edit("a.weight::xor1.at", lambda at: at[:-1]),
    "arrays out of order": swapped,
    "no gaps": lambda _, arrays: (arrays.pop("a.weight::gap"), None)[1],
    "an array too many": lambda _, arrays: arrays.update({"c::gap": ("U8", [1], b"\0")}),
    "no arrays of a tensor": only_a,
}


@pytest.mark.parametrize("how", SPOILS)
def test_broken_files_are_refused(tmp_path: Path, how: str) -> None:
    path = tmp_path / "fix.safetensors"
    path.write_bytes(rebuilt(BLOB, lambda about, arrays: None))
    widths = {"a.weight": 2, "b.weight": 4}
    prove(path, widths)
    path.write_bytes(rebuilt(BLOB, SPOILS[how]))
    with pytest.raises(InputError) as refused:
        prove(path, widths)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_spare_side_bits_are_refused(tmp_path: Path) -> None:
    table = json.loads(fix_oracle.read(BLOB)[0]["tensors"])
    name = next(n for n in table if table[n]["changes"] % 8)
    path = tmp_path / "fix.safetensors"
    path.write_bytes(rebuilt(BLOB, edit(f"{name}::side", lambda side: np.append(side[:-1], side[-1] | 128))))
    with pytest.raises(InputError, match="spare side bits"):
        prove(path, {"a.weight": 2, "b.weight": 4})


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_byte_never_leads_out_of_bounds(tmp_path: Path, seed: int) -> None:
    """Any byte of the file changed: it is refused, or it gives changes that another file could give."""
    rng = np.random.default_rng(seed)
    blob = bytearray(BLOB)
    data = 8 + struct.unpack("<Q", BLOB[:8])[0]
    blob[rng.integers(data if seed % 4 else 0, len(blob))] ^= 1 << rng.integers(8)
    path = tmp_path / "fix.safetensors"
    path.write_bytes(blob)
    try:
        prove(path, {"a.weight": 2, "b.weight": 4})
    except InputError:
        return


def test_settle_tells_sides_and_leaves_the_goal() -> None:
    rng = np.random.default_rng(1)
    old = rng.integers(0, 2**16, 1000, dtype=np.uint16)
    new = old.copy()
    new[::7] ^= rng.integers(1, 2**16, len(new[::7]), dtype=np.uint16)
    found = reference.find(old, new, 0)
    codes, lengths = reference.gaps(found.at, found.counts, 255)
    rows = np.array([[0, 0], [lengths[0], found.counts[0]]], np.uint64)
    run = reference.Run(1000, rows, codes, np.packbits(found.side, bitorder="little"), tuple(found.planes))
    mixed = np.where(rng.random(1000) < 0.5, old, new)
    for goal, expected in ((codec.KEEP, mixed), (codec.OLD, old), (codec.NEW, new)):
        entries, a, b = mixed.copy(), np.empty(run.changes, np.uint16), np.empty(run.changes, np.uint16)
        tally = codec.settle(run, entries, goal, a, b)
        assert (entries == expected).all() and (a == old[::7]).all() and (b == new[::7]).all()
        assert tally.old == (mixed[::7] == old[::7]).sum() and tally.old + tally.new == len(a)
