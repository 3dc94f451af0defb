"""Checkpoints as directories, indexes, links and hub ids: what is opened, what is refused, what is copied along."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from safepatch_core import plan
from safepatch_core.errors import InputError, SafepatchError, UsageError
from safepatch_core.files import checkpoint
from safepatch_core.files.checkpoint import open_checkpoint
from safepatch_core.files.companions import COMPANION_LIMIT, companions, lacking, left_out
from safepatch_core.files.filenames import INDEX
from safepatch_core.files.parsing import read_json

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def save(path: Path, *names: str) -> None:
    """Each tensor is F32 [2]."""
    table = {name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, name in enumerate(names)}
    raw = json.dumps(table).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8 * len(names)))


def save_index(root: Path, weight_map: Any, **metadata: Any) -> None:
    (root / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


def sharded(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    save(root / ONE, "a", "b")
    save(root / TWO, "c")
    save_index(root, {"a": ONE, "b": ONE, "c": TWO}, total_size=24)
    return root


def refuse(ref: str | Path, *words: object, relative_to: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(ref, relative_to=relative_to)
    message = str(caught.value)
    assert caught.value.status == 65 and "\n" not in message
    for word in words:
        assert str(word) in message
    return message


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    signal.alarm(30)
    yield
    signal.alarm(0)


def test_sharded_directory(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    opened = open_checkpoint("m", relative_to=tmp_path)
    assert (opened.ref, opened.root, opened.revision) == ("m", root, None)
    assert [s.file for s in opened.shards] == [ONE, TWO]
    assert list(opened.tensors) == ["a", "b", "c"]
    assert opened.tensors["c"].file == TWO and opened.tensors["c"].path == root / TWO
    assert opened.index is not None and opened.index["metadata"] == {"total_size": 24}
    status = (root / ONE).stat()
    assert opened.shards[0].identity == (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def test_wrong_total_size_and_files_outside_the_index_are_common(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    save_index(root, {"a": ONE, "b": ONE, "c": TWO}, total_size=7.5)
    save(root / "consolidated.safetensors", "a")
    assert len(open_checkpoint(root).tensors) == 3


def test_single_file_directory_and_single_file(tmp_path: Path) -> None:
    root = tmp_path / "m"
    root.mkdir()
    save(root / "anything.safetensors", "a")
    save(root / "._anything.safetensors")
    assert open_checkpoint(root).shards[0].file == "anything.safetensors"
    alone = open_checkpoint(root / "anything.safetensors")
    assert alone.root is None and list(alone.tensors) == ["a"] and companions(alone) == []
    save(root / "model.safetensors", "b")
    assert list(open_checkpoint(root).tensors) == ["b"]


def test_directory_may_be_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(sharded(tmp_path / "m"))
    opened = open_checkpoint(tmp_path / "link")
    assert opened.root == tmp_path / "link" and opened.shards[0].path == tmp_path / "m" / ONE


def test_existing_path_wins_over_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    sharded(tmp_path / "org" / "name@main")
    assert len(open_checkpoint("org/name@main", relative_to=tmp_path).tensors) == 3


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", ".", "", "a\\b", "a\nb"]
)
def test_index_with_paths(tmp_path: Path, file: str) -> None:
    root = sharded(tmp_path / "m")
    save(tmp_path / "x.safetensors", "c")
    save_index(root, {"a": ONE, "b": ONE, "c": file})
    refuse(root, INDEX, "tensor 'c'", "a file name without a path")


@pytest.mark.parametrize("file", [None, 1, ["x"], {"x": 1}, True])
def test_index_with_other_values(tmp_path: Path, file: Any) -> None:
    root = sharded(tmp_path / "m")
    save_index(root, {"a": ONE, "b": ONE, "c": file})
    refuse(root, INDEX, "tensor 'c'", "a file name without a path")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not JSON"),
        (b"[]", "no weight_map"),
        (b"{}", "no weight_map"),
        (b'{"weight_map":{}}', "no weight_map"),
        (b'{"weight_map":[]}', "no weight_map"),
        (b'{"weight_map":null}', "no weight_map"),
        (b'{"weight_map":{"a":"x"}}}', "bytes after its JSON value"),
        (b'{"weight_map":{"a":"x","a":"y"}}', "duplicate key 'a'"),
        (b'{"weight_map":{"a":"x"},"weight_map":{}}', "duplicate key 'weight_map'"),
        (b'{"metadata":{"x":[{"k":1,"k":2}]},"weight_map":{"a":"x"}}', "duplicate key 'k'"),
        (b'\xef\xbb\xbf{"weight_map":{"a":"x"}}', "not JSON"),
        (b'{"weight_map":{"\xff":"x"}}', "not UTF-8"),
        (b'{"weight_map":' + b"[" * 100_000, "nested too deeply"),
        (b'{"weight_map":{"a":"\\ud800"}}', "a file name without a path"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "not JSON"),
    ],
)
def test_broken_index(tmp_path: Path, text: bytes, words: str) -> None:
    root = sharded(tmp_path / "m")
    (root / INDEX).write_bytes(text)
    refuse(root, root / INDEX, words)


def test_huge_index(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    os.truncate(root / INDEX, 100_000_001)
    refuse(root, INDEX, "too large")


def test_missing_shard(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    (root / TWO).unlink()
    refuse(root, INDEX, "tensor 'c'", "missing shard", TWO)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    save(root / TWO, "c", "b")
    refuse(root, root / TWO, "tensor 'b'", "in two shards", ONE)
    save_index(root, {"a": ONE, "b": TWO, "c": TWO})
    refuse(root, root / TWO, "tensor 'b'", "in two shards", ONE)


def test_tensor_in_the_index_but_not_in_the_shard(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    save_index(root, {"a": ONE, "b": ONE, "c": TWO, "d": TWO})
    refuse(root, root / TWO, "tensor 'd'", "not in the shard")


def test_tensors_beyond_the_index_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    """Layers for multi-token prediction, for example: loaders of the model skip them."""
    root = sharded(tmp_path / "m")
    save_index(root, {"a": ONE, "c": TWO})
    opened = open_checkpoint(root)
    assert list(opened.tensors) == ["a", "b", "c"] and opened.beyond == frozenset("b")
    assert opened.warnings == (
        f"1 tensors of the shards are not in {INDEX}, the first 'b': copied, and never a target",
    )


def test_tensor_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    save_index(root, {"a": ONE, "b": TWO, "c": TWO})
    refuse(root, root / ONE, "tensor 'b'", f"found {TWO}", f"expected {ONE}")


def test_index_and_single_file(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    save(root / "model.safetensors", "a", "b", "c")
    refuse(root, root, "model.safetensors", INDEX, "delete the one that is out of date")


def test_an_index_of_the_single_file(tmp_path: Path) -> None:
    root = tmp_path / "m"
    root.mkdir()
    save(root / "model.safetensors", "a", "b")
    save(root / "projector.safetensors", "x")
    save_index(root, dict.fromkeys("ab", "model.safetensors"))
    opened = open_checkpoint(root)
    assert [s.file for s in opened.shards] == ["model.safetensors"] and opened.index is not None
    assert opened.warnings == ()


def test_a_stale_index_beside_a_single_file(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    (root / TWO).unlink()
    save(root / "model.safetensors", "a", "b")
    refuse(root, INDEX, "tensor 'c'", "names a missing shard")
    save(root / "model.safetensors", "a", "b", "c")
    opened = open_checkpoint(root)
    assert [s.file for s in opened.shards] == ["model.safetensors"] and opened.index is None
    assert opened.warnings == (f"{INDEX} names shards that are not there: model.safetensors is taken instead",)


def test_a_stale_index_beside_newer_shards(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    save_index(root, {"a": "model-00001-of-00004.safetensors", "c": "model-00004-of-00004.safetensors"})
    refuse(root, root / INDEX, "names a missing shard", ONE, TWO, "it is stale", "save_pretrained")


@pytest.mark.parametrize("inner", ["checkpoint-500", "unet", "snapshots/0123"])
def test_a_folder_of_models_names_one(tmp_path: Path, inner: str) -> None:
    (tmp_path / "m" / inner).mkdir(parents=True)
    save(tmp_path / "m" / inner / "model.safetensors", "a")
    refuse(tmp_path / "m", f"found {inner}/model.safetensors", f"such as {tmp_path / 'm' / inner}")


def test_one_shard_of_several_says_so(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    opened = open_checkpoint(root / ONE)
    assert opened.warnings == (f"{ONE} is one shard of several, without the others",)
    save_recipe = json.dumps({"base": "m", "patches": [{"name": "p", "source": f"m/{TWO}"}], "targets": "all"})
    (tmp_path / "recipe.yaml").write_text(save_recipe)
    with pytest.raises(InputError, match=f"missing from patch 'p': expected the folder of {TWO}"):
        plan(tmp_path / "recipe.yaml", backend="reference")


def test_a_byte_order_mark_is_named(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    (root / INDEX).write_bytes(b"\xef\xbb\xbf" + (root / INDEX).read_bytes())
    refuse(root, root / INDEX, "a byte order mark at 0")


@pytest.mark.parametrize(
    "index",
    [
        *("model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"),
        *("diffusion_pytorch_model.safetensors.index.json", "anything.safetensors.index.json"),
    ],
)
def test_the_only_index_is_taken_by_any_name(tmp_path: Path, index: str) -> None:
    root = sharded(tmp_path / "m")
    (root / INDEX).rename(root / index)
    save(root / "consolidated.safetensors", "a")
    (root / "consolidated.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "consolidated.safetensors"}})
    )
    opened = open_checkpoint(root)
    assert (list(opened.tensors), opened.index_name) == (["a", "b", "c"], index)


def test_several_indexes(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    (root / INDEX).rename(root / "model.fp16.safetensors.index.json")
    (root / "model.fp8.safetensors.index.json").write_text("{}")
    refuse(root, "several indexes", "fp16", "fp8")
    sharded(root)
    assert open_checkpoint(root).index_name == INDEX


@pytest.mark.parametrize("single", ["model.safetensors", "diffusion_pytorch_model.safetensors"])
def test_variants_and_second_copies_beside_the_default(tmp_path: Path, single: str) -> None:
    save(tmp_path / single, "a", "b")
    save(tmp_path / single.replace(".safetensors", ".fp16.safetensors"), "a", "b")
    save(tmp_path / "consolidated.safetensors", "layers.a")
    save(tmp_path / "mtp.safetensors", "x")
    (tmp_path / "model.fp16.safetensors.index.json").write_text("{}")
    assert [s.file for s in open_checkpoint(tmp_path).shards] == [single]


def test_a_second_copy_alone(tmp_path: Path) -> None:
    save(tmp_path / "weights.safetensors", "a")
    save(tmp_path / "consolidated.00.safetensors", "layers.a")
    assert [s.file for s in open_checkpoint(tmp_path).shards] == ["weights.safetensors"]
    (tmp_path / "weights.safetensors").unlink()
    assert [s.file for s in open_checkpoint(tmp_path).shards] == ["consolidated.00.safetensors"]


@pytest.mark.parametrize(
    ("file", "kind", "expected"),
    [
        ("__0_0.distcp", "a distributed checkpoint of PyTorch", "accelerate merge-weights"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "a distributed checkpoint of PyTorch", "accelerate merge-weights"),
        ("global_step10/mp_rank_00_model_states.pt", "a checkpoint of DeepSpeed", "zero_to_fp32.py"),
        ("pytorch_model.bin", "a pickle, which is never loaded", "save_pretrained"),
        ("iter_0001000/x", "a checkpoint of Megatron", "Megatron Bridge"),
        ("model.gguf", "a GGUF file", "the float model"),
        ("adapters.npz", "an adapter of mlx-lm", "mlx_lm.fuse"),
        ("flax_model.msgpack", "weights of Flax", "from_flax"),
    ],
)
def test_checkpoints_of_other_programs(tmp_path: Path, file: str, kind: str, expected: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"PK")
    (tmp_path / "config.json").write_text("{}")
    refuse(tmp_path, file.split("/")[0], kind, expected)


def test_several_files_and_no_index(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    (root / INDEX).unlink()
    refuse(root, root, ONE, TWO, INDEX)
    save(root / "model.safetensors", "a")
    refuse(root, ONE)


def test_bad_shard_is_named(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    os.truncate(root / TWO, (root / TWO).stat().st_size - 1)
    refuse(root, root / TWO, "tensor 'c'", "truncated data")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.gguf"])
def test_directory_with_other_weights(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(b"PK\x03\x04" + bytes(100))
    refuse(tmp_path, tmp_path, file, "gguf" if "gguf" in file else "pickle")
    refuse(tmp_path / file, tmp_path / file, "not a checkpoint", "zip archive")


def test_empty_directory_and_missing_paths(tmp_path: Path) -> None:
    refuse(tmp_path, tmp_path, "no safetensors file", "expected model.safetensors")
    for ref in [
        "nowhere",
        "./a/b",
        "../a/b",
        "a/b/c",
        "/a/b",
        "org/x.safetensors",
        "x" * 5000,
        "-/x",
        "a/..",
        "a b/c",
    ]:
        refuse(ref, "no such file or directory", relative_to=tmp_path)
    refuse("", "not a path")
    refuse("a\0b", "not a path", "\\x00")


@pytest.mark.parametrize("name", ["model", "model.safetensors"])
def test_files_that_are_no_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    refuse(path, path, "a FIFO")
    path.unlink()
    path.symlink_to("nowhere")
    refuse(path, path, "a dangling symlink")
    path.unlink()
    path.symlink_to(name)
    refuse(path, path, "a looping symlink")
    refuse("/dev/null", "a device")


@pytest.mark.parametrize("what", [TWO, INDEX])
def test_fifo_in_a_directory(tmp_path: Path, what: str) -> None:
    root = sharded(tmp_path / "m")
    (root / what).unlink()
    os.mkfifo(root / what)
    refuse(root, root / what, "a FIFO")


@pytest.mark.parametrize("what", [TWO, INDEX])
def test_symlink_out_of_the_directory(tmp_path: Path, what: str) -> None:
    root = sharded(tmp_path / "m")
    (root / what).rename(tmp_path / what)
    (root / what).symlink_to(f"../{what}")
    refuse(root, root / what, "leads out of the checkpoint")
    (root / what).unlink()
    (root / what).symlink_to("gone")
    refuse(root, root / what, "a dangling symlink")
    (root / what).unlink()
    (tmp_path / what).rename(root / "inside")
    (root / what).symlink_to("inside")
    assert len(open_checkpoint(root).tensors) == 3


def hub_cache(cache: Path, *, blobs: str = "blobs") -> Path:
    """A snapshot as huggingface_hub lays it out."""
    repo = cache / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / blobs).resolve().mkdir(exist_ok=True)
    sharded(cache / "made")
    for name in (ONE, TWO, INDEX):
        (cache / "made" / name).rename(repo / blobs / f"hash-{name}")
        if blobs != "blobs":
            (repo / "blobs" / f"hash-{name}").symlink_to(f"../{blobs}/hash-{name}")
        (snapshot / name).symlink_to(f"../../blobs/hash-{name}")
    (repo / "blobs" / "config").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/config")
    return snapshot


def test_hugging_face_cache(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    opened = open_checkpoint(snapshot)
    assert [s.file for s in opened.shards] == [ONE, TWO]
    assert opened.shards[0].path == tmp_path / "models--org--name" / "blobs" / f"hash-{ONE}"
    assert companions(opened) == [snapshot / "config.json"]
    save(tmp_path / "models--org--name" / "secret", "c")
    (snapshot / TWO).unlink()
    (snapshot / TWO).symlink_to("../../secret")
    refuse(snapshot, snapshot / TWO, "leads out of the checkpoint")


def test_a_download_into_a_folder_links_to_the_cache(tmp_path: Path) -> None:
    """As `huggingface-cli download --local-dir` made them; links elsewhere are refused."""
    snapshot, root = hub_cache(tmp_path / "cache"), tmp_path / "mine"
    root.mkdir()
    for name in (ONE, TWO, INDEX, "config.json"):
        (root / name).symlink_to((snapshot / name).resolve())
    opened = open_checkpoint(root)
    assert len(opened.tensors) == 3 and companions(opened) == [root / "config.json"]
    (tmp_path / "blobs").mkdir()
    (snapshot / TWO).resolve().rename(tmp_path / "blobs" / "hash")
    (root / TWO).unlink()
    (root / TWO).symlink_to(tmp_path / "blobs" / "hash")
    refuse(root, root / TWO, "leads out of the checkpoint")


def test_home_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    sharded(tmp_path / "m")
    assert open_checkpoint("~/m", relative_to=tmp_path / "elsewhere").root == tmp_path / "m"
    sharded_here = tmp_path / "here" / "~"
    sharded_here.mkdir(parents=True)
    sharded(sharded_here / "m")
    assert open_checkpoint("~/m", relative_to=tmp_path / "here").root == sharded_here / "m"
    refuse("~/nowhere", tmp_path / "nowhere", "no such file or directory")


def test_hugging_face_cache_with_shared_blobs(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, blobs="../blobs")
    refuse(snapshot, "leads out of the checkpoint")
    (tmp_path / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    assert len(open_checkpoint(snapshot).tensors) == 3


def test_companions(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    taken = [
        *("LICENSE", "LICENSE.md", "NOTICE.txt", "USE_POLICY.md", "chat_template.jinja", "config.json"),
        *("generation_config.json", "merges.txt", "preprocessor_config.json", "special_tokens_map.json"),
        *("tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json", "vocab.json"),
    ]
    left = [
        *(
            "README.md",
            "SHA256SUMS",
            "safepatch.json",
            "adapter_config.json",
            "modeling_x.py",
            "LICENSE.py",
            ".hidden.json",
        ),
        *("pytorch_model.bin", "optimizer.pt", "x.pth", "x.ckpt", "x.gguf", "x.onnx", "x.msgpack", "x.h5", "run.sh"),
        *("pytorch_model.bin.index.json", "other.safetensors", "training_args.bin"),
    ]
    for name in taken + left:
        (root / name).write_text("{}")
    (root / "huge.json").touch()
    os.truncate(root / "huge.json", COMPANION_LIMIT + 1)
    (root / "largest.json").touch()
    os.truncate(root / "largest.json", COMPANION_LIMIT)
    (root / "dir.json").mkdir()
    os.mkfifo(root / "fifo.json")
    (tmp_path / "out.json").write_text("{}")
    (root / "out.json").symlink_to("../out.json")
    (root / "inside.json").symlink_to("config.json")
    (root / "dangling.json").symlink_to("nowhere")
    assert [p.name for p in companions(open_checkpoint(root))] == sorted([*taken, "inside.json", "largest.json"])


def test_a_file_takes_the_small_files_of_its_folder(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    (root / "tokenizer.json").write_text("{}")
    alone = open_checkpoint(root / ONE)
    assert companions(alone) == [] and left_out(alone) == [
        "the output has no config.json: there is none beside the base"
    ]
    (root / "config.json").write_text("{}")
    assert [path.name for path in companions(open_checkpoint(root / ONE))] == ["config.json", "tokenizer.json"]


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    (root / "config.json").write_text("{}")
    assert left_out(open_checkpoint(root)) == []
    for name in ("README.md", "SHA256SUMS", "safepatch.json", ".gitattributes", "tokenizer.json"):
        (root / name).write_text("{}")
    assert left_out(open_checkpoint(root)) == []
    (root / "1_Pooling").mkdir()
    (root / "assets").mkdir()
    save(root / "consolidated.safetensors", "a")
    (root / "voice.npz").write_bytes(b"")
    (tmp_path / "secret.txt").write_text("x")
    (root / "notes.txt").symlink_to("../secret.txt")
    assert left_out(open_checkpoint(root)) == [
        "notes.txt is not carried along: it is a link out of the folder",
        "folders are not carried along: 1_Pooling, assets",
        "files that are not carried along: consolidated.safetensors, voice.npz",
    ]
    (root / "config.json").rename(tmp_path / "config.json")
    (root / "config.json").symlink_to("../config.json")
    lines = left_out(open_checkpoint(root))
    assert lines[0] == "config.json is not carried along: it is a link out of the folder"
    assert lines[-1] == "there is no config.json, which loaders ask for"


def test_code_that_configs_name(tmp_path: Path) -> None:
    classes: dict[str, Any] = {
        "AutoConfig": "configuration_x.X",
        "AutoModelForCausalLM": "modeling_x.XForCausalLM",
        "AutoModel": "org/other--modeling_y.Y",
    }
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": classes}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}})
    )
    (tmp_path / "processor_config.json").write_text("{broken")
    present = {"config.json", "tokenizer_config.json", "processor_config.json", "configuration_x.py"}
    assert lacking(tmp_path, present) == [
        "config.json names code that is not there, to be copied from its origin: modeling_x.py",
        "tokenizer_config.json names code that is not there, to be copied from its origin: tokenization_x.py",
    ]
    assert lacking(tmp_path, present | {"modeling_x.py", "tokenization_x.py"}) == []


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(' \n{"a": [1, 2.5, -3, null, true], "b": "é"}\n\n')
    assert read_json(path) == {"a": [1, 2.5, -3, None, True], "b": "é"}


class FakeHub:
    def __init__(self, result: Path | Exception) -> None:
        self.result, self.calls = result, list[tuple[str, Any]]()

    def __call__(self, repo: str, **options: Any) -> str:
        self.calls.append((repo, options))
        if isinstance(self.result, Exception):
            raise self.result
        return str(self.result)


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    fake = FakeHub(hub_cache(tmp_path))
    monkeypatch.setattr(hub, "snapshot_download", fake)
    opened = open_checkpoint("org/name@refs/pr/1", relative_to=tmp_path)
    assert opened.ref == "org/name@refs/pr/1" and opened.revision == "0" * 40 and len(opened.tensors) == 3
    repo, options = fake.calls[0]
    assert repo == "org/name" and options["revision"] == "refs/pr/1"
    files = ["a.safetensors", INDEX, "config.json", "tokenizer.model", "merges.txt", "LICENSE", "chat_template.jinja"]
    unwanted = [
        "pytorch_model.bin",
        "x.pt",
        "modeling.py",
        "LICENSE.py",
        "original/x.safetensors",
        "x.gguf",
        "README.md",
    ]
    chosen = [
        name
        for name in files + unwanted
        if any(fnmatch(name, glob) for glob in options["allow_patterns"])
        and not any(fnmatch(name, glob) for glob in options["ignore_patterns"])
    ]
    assert chosen == files
    open_checkpoint("org/name")
    assert fake.calls[1][1]["revision"] is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("RepositoryNotFoundError", "no such repository, or it is private"),
        ("GatedRepoError", "gated"),
        ("RevisionNotFoundError", "no such revision"),
        ("LocalEntryNotFoundError", "can't be reached"),
        ("HFValidationError", "two\\x1b"),
        (ConnectionError("refused\nsecond line"), "refused"),
        (ConnectionError(), "ConnectionError"),
    ],
)
def test_hub_refusals_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, words: str) -> None:
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import errors

    if isinstance(error, str):
        kind = getattr(errors, error)
        error = kind.__new__(kind)  # their constructors want an HTTP response, of another library in each version
        error.args = ("two\x1b",)
    monkeypatch.setattr(hub, "snapshot_download", FakeHub(error))
    message = refuse("org/name", "org/name", "no such path", words, relative_to=tmp_path)
    assert "second line" not in message


HUB = "https://huggingface.co/org/name"


@pytest.mark.parametrize(
    ("address", "name"),
    [
        *((HUB, "org/name"), (f"{HUB}/", "org/name"), (f"{HUB}.git", "org/name"), (f"{HUB}/tree/main", "org/name")),
        *((f"{HUB}/tree/v1.2", "org/name@v1.2"), (f"{HUB}/tree/refs%2Fpr%2F1", "org/name@refs/pr/1")),
        *((f"{HUB}/blob/v2/model.safetensors?download=true", "org/name@v2"), ("hf.co/org/name", "org/name")),
        *(("hf://org/name@v1", "org/name@v1"), ("https://hf.co/datasets/org/name", "a path, or")),
        *(("s3://bucket/model", "a path, or"), ("https://example.com/org/name", "a path, or")),
    ],
)
def test_an_address_is_answered_with_a_name(tmp_path: Path, address: str, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_checkpoint(address, relative_to=tmp_path)
    assert f"found {address}, expected {name}" in str(caught.value)
    assert name.startswith("a path") or str(caught.value).endswith(f" {name}")


def test_hub_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"org/name: no such path.*pip install safepatch\[hub\]") as caught:
        open_checkpoint("org/name", relative_to=tmp_path)
    assert caught.value.status == 64


def test_offline(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    code = "from safepatch_core.files.checkpoint import open_checkpoint; open_checkpoint('org/name')"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stderr.splitlines()[-1].startswith(
        "safepatch_core.errors.InputError: org/name: no such path, and can't be"
    )


def test_imports_stay_light() -> None:
    code = "import sys, safepatch_core.files.checkpoint; print(*sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[1])}
    loaded = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "safetensors", "pydantic", "huggingface_hub"} & set(loaded)


def test_errors_are_of_one_family() -> None:
    assert issubclass(InputError, SafepatchError) and InputError.status == 65 and UsageError.status == 64
