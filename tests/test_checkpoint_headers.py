"""Headers and tables of safetensors files: hostile ones are refused by file and tensor, legal ones are read."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safepatch_core.errors import InputError, IOFailure
from safepatch_core.files.parsing import BITS, HEADER_LIMIT, Shard, read_shard
from safepatch_core.files.reading import TensorEntry, read_exact, read_tensor

library: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize


def pack(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    shape = list(shape) if isinstance(shape, tuple) else shape
    offsets = list(offsets) if isinstance(offsets, tuple) else offsets
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
FOUR = bytes(4)


def raw_entry(dtype: bytes = b'"F32"', shape: bytes = b"[1]", offsets: bytes = b"[0,4]") -> bytes:
    return b'{"a":{"dtype":' + dtype + b',"shape":' + shape + b',"data_offsets":' + offsets + b"}}"


# name: (bytes of the file, tensor that the message must name, words that it must hold)
HEADER: dict[str, tuple[bytes, str | None, list[str]]] = {
    "empty": (b"", None, ["empty file"]),
    "seven-bytes": (bytes(7), None, ["found 7 bytes", "expected at least 8"]),
    "length-zero": (bytes(8), None, ["length is zero"]),
    "length-zero-with-data": (bytes(16), None, ["length is zero"]),
    "length-beyond-file": (pack(b"{}", length=3), None, ["truncated header", "10 bytes", "11"]),
    "length-only": (pack(b"", length=2), None, ["truncated header"]),
    "length-2^64-1": (pack(b"{}", length=2**64 - 1), None, ["over the cap", str(2**64 - 1), str(HEADER_LIMIT)]),
    "length-2^63": (pack(b"{}", length=2**63), None, ["over the cap"]),
    "not-json": (pack(b"{nonsense}"), None, ["not JSON"]),
    "text": (pack(b"hello world"), None, ["found 'h'", "expected '{'"]),
    "array": (pack(b"[]"), None, ["expected '{'"]),
    "one-brace": (pack(b"{"), None, ["not JSON"]),
    "unclosed": (pack(b"{" + GOOD, FOUR), None, ["not JSON"]),
    "leading-blank": (pack(b" {" + GOOD + b"}", FOUR), None, ["found ' '"]),
    "leading-newline": (pack(b"\n{" + GOOD + b"}", FOUR), None, ["found '\\n'"]),
    "byte-order-mark": (pack(b"\xef\xbb\xbf{" + GOOD + b"}", FOUR), None, ["byte order mark"]),
    "trailing-junk": (pack(b"{" + GOOD + b"}xyz", FOUR), None, ["bytes after its JSON value", "'xyz'"]),
    "two-objects": (pack(b"{" + GOOD + b"}{}", FOUR), None, ["bytes after its JSON value"]),
    "nul-padding": (pack(b"{" + GOOD + b"}\0\0\0", FOUR), None, ["bytes after its JSON value"]),
    "trailing-newline": (pack(b"{" + GOOD + b"}\n", FOUR), None, ["bytes after its JSON value"]),
    "trailing-comma": (pack(b"{" + GOOD + b",}", FOUR), None, ["not JSON"]),
    "bad-utf8": (pack(b'{"\xff\xfe":1}'), None, ["not UTF-8", "0xff at 2"]),
    "overlong-utf8": (pack(b'{"\xc0\xaf":1}'), None, ["not UTF-8"]),
    "raw-surrogate": (pack(b'{"\xed\xa0\x80":1}'), None, ["not UTF-8"]),
    "raw-control-character": (pack(b'{"a\n":1}'), None, ["not JSON"]),
    "lone-surrogate-name": (
        pack(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
        "\\ud800",
        ["not text"],
    ),
    "lone-surrogate-metadata": (pack(b'{"__metadata__":{"k":"\\udc00"}}'), None, ["lone surrogate"]),
    "nested-list": (pack(b'{"a":' + b"[" * 100_000 + b"}"), None, ["nested too deeply"]),
    "nested-object": (pack(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), None, ["nested too deeply"]),
    "duplicate-tensor": (pack(b"{" + GOOD + b"," + GOOD + b"}", FOUR), "a", ["duplicate key"]),
    "duplicate-tensor-escaped": (
        pack(b"{" + GOOD + b"," + GOOD.replace(b'"a"', b'"\\u0061"') + b"}", FOUR),
        "a",
        ["duplicate key"],
    ),
    "duplicate-field": (
        pack(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
        "a",
        ["duplicate key"],
    ),
    "duplicate-metadata": (pack(b'{"__metadata__":{},"__metadata__":{}}'), None, ["duplicate key", "__metadata__"]),
    "duplicate-metadata-key": (pack(b'{"__metadata__":{"k":"1","k":"1"}}'), None, ["duplicate key 'k'"]),
    "metadata-number": (pack(b'{"__metadata__":{"k":1}}'), None, ["'k'", "found 1", "a string"]),
    "metadata-nested": (pack(b'{"__metadata__":{"k":{"x":"y"}}}'), None, ["'k'", "a string"]),
    "metadata-null-value": (pack(b'{"__metadata__":{"k":null}}'), None, ["'k'", "found null", "a string"]),
    "metadata-list": (pack(b'{"__metadata__":[]}'), None, ["__metadata__ is not an object"]),
    "metadata-string": (pack(b'{"__metadata__":"pt"}'), None, ["__metadata__ is not an object"]),
}

TABLE: dict[str, tuple[bytes, str | None, list[str]]] = {
    "overlap": (
        pack({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6)),
        "b",
        ["overlaps tensor 'a'", "offset 2", "offset 4"],
    ),
    "same-range": (pack({"a": entry(), "b": entry()}, FOUR), "b", ["overlaps tensor 'a'"]),
    "hole-between": (pack({"a": entry(), "b": entry(offsets=(8, 12))}, bytes(12)), "b", ["4 bytes before it"]),
    "hole-at-start": (pack({"a": entry(offsets=(4, 8))}, bytes(8)), "a", ["4 bytes before it"]),
    "zero-size-in-a-tensor": (
        pack({"a": entry(), "b": entry(shape=(0,), offsets=(2, 2))}, FOUR),
        "b",
        ["overlaps tensor 'a'"],
    ),
    "zero-size-past-the-end": (
        pack({"a": entry(), "b": entry(shape=(0,), offsets=(8, 8))}, FOUR),
        "b",
        ["4 bytes before it"],
    ),
    "reversed": (pack({"a": entry(offsets=(4, 0))}, FOUR), "a", ["reversed", "[4, 0]"]),
    "equal-range": (pack({"a": entry(offsets=(0, 0))}), "a", ["found 0 bytes", "4 bytes for F32 [1]"]),
    "range-too-short": (pack({"a": entry(offsets=(0, 3))}, bytes(3)), "a", ["found 3 bytes", "4 bytes"]),
    "range-too-long": (pack({"a": entry(offsets=(0, 8))}, bytes(8)), "a", ["found 8 bytes", "4 bytes"]),
    "data-missing": (pack({"a": entry()}), "a", ["truncated data"]),
    "data-cut": (pack({"a": entry(), "b": entry(offsets=(4, 8))}, bytes(7)), "b", ["truncated data"]),
    "bytes-after": (pack({"a": entry()}, bytes(5)), None, ["bytes after the data"]),
    "bytes-and-no-tensors": (pack(b"{}", b"x"), None, ["bytes after the data"]),
    "overflow": (pack({"a": entry(shape=(2**40, 2**40), offsets=(0, 4))}, FOUR), "a", ["overflows"]),
    "overflow-to-the-range": (pack({"a": entry("U8", (2**61 + 1, 8), (0, 8))}, bytes(8)), "a", ["overflows"]),
    "overflow-before-zero": (pack({"a": entry(shape=(2**40, 2**40, 0), offsets=(0, 0))}), "a", ["overflows"]),
    "overflow-after-zero": (pack({"a": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))}), "a", ["overflows"]),
    "overflow-in-bits": (pack({"a": entry("F64", (2**60,), (0, 0))}), "a", ["overflows"]),
    "many-dimensions": (pack({"a": entry("U8", (2,) * 5000, (0, 1))}, b"x"), "a", ["overflows"]),
    "dimension-2^63": (pack({"a": entry(shape=(2**63,))}, FOUR), "a", ["its shape"]),
    "dimension-2^64": (pack({"a": entry(shape=(2**64,))}, FOUR), "a", ["its shape"]),
    "dimension-5000-digits": (pack(raw_entry(shape=b"[" + b"9" * 5000 + b"]"), FOUR), "a", ["its shape"]),
    "dimension-negative": (pack({"a": entry(shape=(-1,))}, FOUR), "a", ["its shape", "[-1]"]),
    "dimensions-negative-twice": (pack({"a": entry(shape=(-1, -1))}, FOUR), "a", ["its shape"]),
    "dimension-negative-zero": (pack(raw_entry(shape=b"[-0]", offsets=b"[0,0]")), "a", ["its shape"]),
    "dimension-fraction": (pack({"a": entry(shape=(1.5,))}, FOUR), "a", ["its shape", "1.5"]),
    "dimension-1.0": (pack({"a": entry(shape=(1.0,))}, FOUR), "a", ["its shape"]),
    "dimension-1e0": (pack(raw_entry(shape=b"[1e0]"), FOUR), "a", ["its shape"]),
    "dimension-true": (pack({"a": entry(shape=(True,))}, FOUR), "a", ["its shape"]),
    "dimension-string": (pack({"a": entry(shape=("1",))}, FOUR), "a", ["its shape"]),
    "dimension-nan": (pack(raw_entry(shape=b"[NaN]"), FOUR), "a", ["its shape"]),
    "shape-null": (pack({"a": entry(shape=None)}, FOUR), "a", ["its shape"]),
    "shape-number": (pack({"a": entry(shape=1)}, FOUR), "a", ["its shape"]),
    "shape-deep": (pack(raw_entry(shape=b"[" * 900 + b"]" * 900), FOUR), "a", ["its shape"]),
    "offsets-three": (pack({"a": entry(offsets=(0, 4, 4))}, FOUR), "a", ["its data_offsets"]),
    "offsets-one": (pack({"a": entry(offsets=(0,))}, FOUR), "a", ["its data_offsets"]),
    "offsets-negative": (pack({"a": entry(offsets=(-4, 0))}, FOUR), "a", ["its data_offsets"]),
    "offsets-negative-zero": (pack(raw_entry(offsets=b"[-0,4]"), FOUR), "a", ["its data_offsets"]),
    "offsets-2^64": (pack({"a": entry(offsets=(0, 2**64 + 4))}, FOUR), "a", ["its data_offsets"]),
    "offsets-fraction": (pack({"a": entry(offsets=(0.0, 4.0))}, FOUR), "a", ["its data_offsets"]),
    "offsets-null": (pack({"a": entry(offsets=None)}, FOUR), "a", ["its data_offsets"]),
    "dtype-unknown": (pack({"a": entry("F31")}, FOUR), "a", ["unknown dtype", "F31", "BF16"]),
    "dtype-lower-case": (pack({"a": entry("f32")}, FOUR), "a", ["unknown dtype"]),
    "dtype-number": (pack({"a": entry(32)}, FOUR), "a", ["unknown dtype"]),
    "dtype-list": (pack({"a": entry(["F32"])}, FOUR), "a", ["unknown dtype"]),
    "half-byte": (pack({"a": entry("F4", (3,), (0, 2))}, bytes(2)), "a", ["12 bits for F4 [3]"]),
    "six-bit-rest": (pack({"a": entry("F6_E2M3", (3,), (0, 2))}, bytes(2)), "a", ["18 bits"]),
    "entry-null": (pack({"a": None}), "a", ["not an object"]),
    "entry-number": (pack({"a": 7}), "a", ["not an object"]),
    "entry-list": (pack(b'{"a":["F32",[1],[0,4]]}', FOUR), "a", ["not an object"]),
    "field-missing": (pack(b'{"a":{"dtype":"F32","shape":[1]}}'), "a", ["its fields"]),
    "field-unknown": (pack({"a": {**entry(), "device": "cpu"}}, FOUR), "a", ["its fields", "device"]),
}

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4976698672\n"
OTHERS: dict[str, tuple[bytes, str]] = {
    "git-lfs": (LFS, "a Git LFS pointer"),
    "html": (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "an HTML page"),
    "html-blank-first": (b"\n\n<html lang=en>" + bytes(50), "an HTML page"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(64), "a GGUF file"),
    "zip": (b"PK\x03\x04\0\0\x08\x08" + bytes(64), "a zip archive, as PyTorch saves pickles"),
    "pickle-2": (b"\x80\x02}q\0(X\x06\0\0\0weightq\x01K\x01u.", "a pickle"),
    "pickle-4": (b"\x80\x04\x95\x1f\x01\0\0\0\0\0\0" + b"}\x94." * 100, "a pickle"),
    "json": (b'{"metadata": {"total_size": 1}, "weight_map": {}}', "a JSON file"),
}

# The library takes these; the rules here don't.
LENIENT_THERE = {
    "leading-blank",
    "leading-newline",
    "trailing-newline",
    "duplicate-tensor",
    "duplicate-tensor-escaped",
    "duplicate-metadata-key",
    "metadata-null",
    "overflow-after-zero",
    "entry-list",
    "field-unknown",
}


@pytest.fixture
def alarm() -> Iterator[None]:
    signal.alarm(20)
    yield
    signal.alarm(0)


def refuse(path: Path, tensor: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read_shard(path)
    message = str(caught.value)
    assert caught.value.status == 65
    assert str(path) in message and "\n" not in message and len(message) < 1500
    assert (
        ("tensor '" not in message.replace("overlaps tensor", ""))
        if tensor is None
        else f"tensor '{tensor}'" in message
    )
    return message


@pytest.mark.parametrize("name", [*HEADER, *TABLE])
def test_hostile(tmp_path: Path, name: str) -> None:
    blob, tensor, words = (HEADER | TABLE)[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(blob)
    message = refuse(path, tensor)
    for word in words:
        assert word in message
    accepted_there = True
    try:
        library(blob)
    except Exception:
        accepted_there = False
    assert accepted_there == (name in LENIENT_THERE)


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_named(tmp_path: Path, name: str) -> None:
    blob, kind = OTHERS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(blob)
    assert f"found {kind}" in refuse(path)


def test_header_over_the_cap(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(b"{", length=HEADER_LIMIT + 1))
    os.truncate(path, HEADER_LIMIT + 100)
    assert "over the cap" in refuse(path)


def test_95_megabytes_of_header(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(b'{"__metadata__":{"k":"' + b"x" * 95_000_000 + b'"}}'))
    start = time.perf_counter()
    assert len(read_shard(path).metadata["k"]) == 95_000_000
    assert time.perf_counter() - start < 5
    one = b'"model.layers.00.weight":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    path.write_bytes(pack(b"{" + one * (95_000_000 // len(one)) + GOOD + b"}", FOUR))
    start = time.perf_counter()
    assert "too complex" in refuse(path)
    assert time.perf_counter() - start < 5


def test_names_are_escaped_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack({"\x1b[2J\u202eevil\x00" + "n" * 5000: entry("F31")}, FOUR))
    message = refuse(path, "\\x1b[2J\\u202eevil\\x00" + "n" * 190 + "…")
    assert "\x1b" not in message


@pytest.mark.parametrize(
    "kind", ["fifo", "directory", "device", "socket", "dangling", "loop", "missing", "unreadable"]
)
def test_not_regular(tmp_path: Path, alarm: None, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    words = {
        "fifo": "a FIFO",
        "directory": "a directory",
        "device": "a device",
        "socket": "a socket",
        "dangling": "a dangling symlink",
        "loop": "a looping symlink",
        "missing": "no such file",
        "unreadable": "can't open",
    }
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "socket":
        os.chdir(tmp_path)
        socket.socket(socket.AF_UNIX).bind("model.safetensors")
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to("other")
        (tmp_path / "other").symlink_to(path.name)
    elif kind == "unreadable":
        path.write_bytes(pack(b"{}"))
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user reads every file")
    assert words[kind] in refuse(path)


def test_legal_odd_ones(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"

    def read(header: bytes | dict[str, Any], data: bytes = b"") -> Shard:
        path.write_bytes(pack(header, data))
        library(path.read_bytes())
        return read_shard(path)

    assert read(b"{}").tensors == ()
    assert read(b"{}      ").tensors == ()
    assert read(b'{"__metadata__":{"format":"pt","":""}}').metadata == {"format": "pt", "": ""}
    assert read(b'{"__metadata__":null}').metadata == {}
    scalar = read({"s": entry(shape=())}, FOUR).tensors[0]
    assert (scalar.shape, scalar.entries, scalar.nbytes, scalar.file) == ((), 1, 4, "odd.safetensors")
    shard = read(
        {
            "z2": entry(shape=(0, 7), offsets=(5, 5)),
            "odd": entry("U8", (1,), (0, 1)),
            "z1": entry("F64", (3, 0), (1, 1)),
            "unaligned": entry(offsets=(1, 5)),
        },
        bytes(5),
    )
    assert [t.name for t in shard.tensors] == ["odd", "z1", "unaligned", "z2"]
    assert [t.entries for t in shard.tensors] == [1, 0, 1, 0]
    assert shard.tensors[2].start == len(shard.header) + 1
    assert shard.header == path.read_bytes()[: len(shard.header)]
    read({"a": entry("U8", (1,) * 2000, (0, 1))}, b"x")
    read(b'{ "a" :\t{"shape":[ 1 ],\n"data_offsets":[0,4],"dtype":"F32"} }  ', FOUR)
    assert (
        read(b'{"\\ud83d\\ude00\\u0000 ../../x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR)
        .tensors[0]
        .name
        == "😀\0 ../../x"
    )
    read({"": entry()}, FOUR)


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_has_the_size_of_the_library(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "model.safetensors"
    data = bytes(BITS[dtype])  # eight entries
    path.write_bytes(pack({"a": entry(dtype, (8,), (0, len(data)))}, data))
    library(path.read_bytes())
    assert read_shard(path).tensors[0].nbytes == len(data)


def test_symlink_to_a_file_is_followed(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_bytes(pack(b"{" + GOOD + b"}", FOUR))
    (tmp_path / "link.safetensors").symlink_to(real)
    shard = read_shard(tmp_path / "link.safetensors")
    assert shard.path == real and shard.file == "link.safetensors" and shard.tensors[0].path == real


def valid_blobs() -> list[bytes]:
    return [
        pack(b"{" + GOOD + b"}   ", FOUR),
        pack(
            {"__metadata__": {"format": "pt"}, "a": entry("BF16", (2, 3), (0, 12)), "b": entry("I64", (), (12, 20))},
            bytes(20),
        ),
        pack(
            {"z": entry("F16", (0, 4), (0, 0)), "u": entry("U8", (3,), (0, 3)), "f4": entry("F4", (2, 2), (3, 5))},
            bytes(5),
        ),
    ]


TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\",
    b"\\u0061",
    b"\\ud800",
    b"-0",
    b"-",
    b"0",
    b"1e0",
    b".0",
    b" ",
    b"\n",
    b"\0",
]
TOKENS += [
    b"\xef\xbb\xbf",
    b"\xff",
    b"null",
    b"true",
    b"NaN",
    b"F32",
    b"F4",
    b"18446744073709551616",
    b'"a":{},',
    b'"shape":[1],',
    GOOD + b",",
]


@settings(max_examples=700, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_never_accepts_what_the_library_rejects(tmp_path: Path, data: st.DataObject) -> None:
    blob = bytearray(data.draw(st.sampled_from(valid_blobs())))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(blob)))
        cut = data.draw(st.integers(0, 3))
        piece = data.draw(st.one_of(st.sampled_from(TOKENS), st.binary(max_size=2)))
        blob[at : at + cut] = piece
    if data.draw(st.booleans()) and len(blob) > 8:
        # Repair the length so that the mutation reaches the JSON and the table.
        end = blob.rfind(b"}") + 1 or len(blob)
        blob[:8] = max(end - 8, 0).to_bytes(8, "little")
    path = tmp_path / "mutant.safetensors"
    path.write_bytes(blob)
    try:
        shard = read_shard(path)
    except InputError as error:
        assert str(path) in str(error)
        return
    theirs = dict(library(bytes(blob)))
    assert {t.name: (t.dtype, t.shape, t.nbytes) for t in shard.tensors} == {
        name: (info["dtype"], tuple(info["shape"]), len(info["data"])) for name, info in theirs.items()
    }


def test_read_exact_fills_any_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    path = tmp_path / "data"
    path.write_bytes(bytes(range(100)))
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:7]], at))  # short reads
    fd = os.open(path, os.O_RDONLY)
    buffer = np.zeros((4, 5), np.uint32)
    read_exact(fd, buffer, 20, path)
    assert buffer.tobytes() == bytes(range(20, 100))
    read_exact(fd, np.zeros(0, np.uint16), 500, path)
    os.close(fd)


def test_read_exact_names_what_ended(tmp_path: Path) -> None:
    blob = tmp_path / "abc123"
    blob.write_bytes(bytes(10))
    fd = os.open(blob, os.O_RDONLY)
    what = TensorEntry("w", "F32", (4,), blob, "model.safetensors", 0, 16)
    with pytest.raises(IOFailure) as caught:
        read_exact(fd, bytearray(16), 0, what)
    assert caught.value.status == 74
    for word in [str(blob), "model.safetensors", "tensor 'w'", "found 10 bytes", "expected 16"]:
        assert word in str(caught.value)
    os.close(fd)
    with pytest.raises(IOFailure, match="can't read: Bad file descriptor"):
        read_exact(fd, bytearray(16), 0, blob)


@pytest.mark.parametrize("change", ["truncated", "replaced", "touched", "removed", "symlink", "fifo"])
def test_read_tensor_notices_changes(tmp_path: Path, alarm: None, change: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(b"{" + GOOD + b"}", b"data"))
    shard = read_shard(path)
    tensor = shard.tensors[0]
    assert read_tensor(tensor, shard.identity) == b"data"
    assert read_tensor(tensor, shard.identity, 1, 3) == b"at" and read_tensor(tensor, shard.identity, 2, 9) == b"ta"
    if change == "truncated":
        os.truncate(path, 20)
    elif change == "replaced":
        other = tmp_path / "other"
        other.write_bytes(path.read_bytes())
        os.replace(other, path)
    elif change == "touched":
        os.utime(path, ns=(1, 1))
    else:
        path.unlink()
        if change == "symlink":
            path.symlink_to("/dev/zero")
        elif change == "fifo":
            os.mkfifo(path)
    with pytest.raises(IOFailure) as caught:
        read_tensor(tensor, shard.identity)
    assert caught.value.status == 74 and str(path) in str(caught.value) and "tensor 'a'" in str(caught.value)
