"""Checkpoints to measure on: real models' shapes, made-up values, written at the speed of the disk.

Every tensor is a stretch of one pool of numbers that is drawn once, so that a model of any size is written from the
processor's cache. The same shape, part and seed give the same bytes everywhere. Patches look like fine-tuning: most
entries move by nothing or by a few steps of bfloat16, so equal scores are common, as in real checkpoints.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safepatch_core.errors import UsageError
from safepatch_core.files.header import make_header
from safepatch_core.merging.quantised.grids import E4M3
from safepatch_core.spec import Kind

PATCHES = ("safety", "over-safety")
TOP = {"safety": 0.03, "over-safety": 0.02}
RETAIN = 0.3
RANK = 16
SHARD_BYTES = 5_000_000_000
POOL = (1 << 22) - 3  # entries; odd, so that the stretches of equal tensors of several layers do not line up
PAGE = 4096
RUN_BYTES = 256 << 10  # a run of real values in a sparse tensor
TWIN = "base-fp8"  # the FP8 twin's directory in a set
FP8_BLOCK = 128  # rows and columns that share a scale
FP8_SCALE = np.float32(0.07 / 448)  # of every block: no entry of a base is larger than 0.0693

Bits = NDArray[np.uint16]


class Made(NamedTuple):
    """A tensor to write: a stretch of a pool of `POOL` entries, or what repeats a single one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pool: NDArray[Any]

    @property
    def nbytes(self) -> int:
        return self.pool.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """A decoder's dimensions; `experts` > 0 makes its feed-forward layers a mixture (Mixtral's names)."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    experts: int = 0
    tied: bool = False  # no lm_head of its own

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes as Hugging Face's checkpoints have them, in the model's order."""
        head = self.hidden // self.heads
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            yield f"{layer}self_attn.q_proj.weight", (self.heads * head, self.hidden)
            yield f"{layer}self_attn.k_proj.weight", (self.kv_heads * head, self.hidden)
            yield f"{layer}self_attn.v_proj.weight", (self.kv_heads * head, self.hidden)
            yield f"{layer}self_attn.o_proj.weight", (self.hidden, self.heads * head)
            wide, narrow = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
            if self.experts:
                yield f"{layer}block_sparse_moe.gate.weight", (self.experts, self.hidden)
                for e in range(self.experts):
                    expert = f"{layer}block_sparse_moe.experts.{e}."
                    yield f"{expert}w1.weight", wide
                    yield f"{expert}w2.weight", narrow
                    yield f"{expert}w3.weight", wide
            else:
                yield f"{layer}mlp.gate_proj.weight", wide
                yield f"{layer}mlp.up_proj.weight", wide
                yield f"{layer}mlp.down_proj.weight", narrow
            yield f"{layer}input_layernorm.weight", (self.hidden,)
            yield f"{layer}post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, self.hidden)

    def is_quantised(self, name: str) -> bool:
        """Whether its FP8 twin holds codes for a linear layer."""
        return not name.endswith("gate.weight")

    @property
    def entries(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in bfloat16."""
        return 2 * self.entries

    def config(self) -> dict[str, object]:
        """A config.json that transformers loads."""
        data: dict[str, object] = {
            "architectures": ["MixtralForCausalLM" if self.experts else "LlamaForCausalLM"],
            "model_type": "mixtral" if self.experts else "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": self.tied,
            "dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if self.experts:
            data |= {"num_local_experts": self.experts, "num_experts_per_tok": 2}
        return data


@dataclass(frozen=True)
class DeepSeekShape(ModelShape):
    """DeepSeek-V3's names: latent attention, and experts one by one behind a few dense layers."""

    dense: int = 3  # layers without experts
    expert: int = 2048  # their intermediate size
    q_rank: int = 1536
    kv_rank: int = 512
    rope: int = 64  # of a head, beside as many dimensions without positions as values have
    value: int = 128

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            yield from self._attention(f"{layer}self_attn.")
            if i < self.dense:
                yield from _feed_forward(f"{layer}mlp.", self.hidden, self.intermediate)
            else:
                yield f"{layer}mlp.gate.weight", (self.experts, self.hidden)
                yield f"{layer}mlp.gate.e_score_correction_bias", (self.experts,)
                for name in ("shared_experts", *(f"experts.{e}" for e in range(self.experts))):
                    yield from _feed_forward(f"{layer}mlp.{name}.", self.hidden, self.expert)
            yield f"{layer}input_layernorm.weight", (self.hidden,)
            yield f"{layer}post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def _attention(self, stem: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{stem}q_a_proj.weight", (self.q_rank, self.hidden)
        yield f"{stem}q_a_layernorm.weight", (self.q_rank,)
        yield f"{stem}q_b_proj.weight", (self.heads * (self.value + self.rope), self.q_rank)
        yield f"{stem}kv_a_proj_with_mqa.weight", (self.kv_rank + self.rope, self.hidden)
        yield f"{stem}kv_a_layernorm.weight", (self.kv_rank,)
        yield f"{stem}kv_b_proj.weight", (self.heads * 2 * self.value, self.kv_rank)
        yield f"{stem}o_proj.weight", (self.hidden, self.heads * self.value)

    def config(self) -> dict[str, object]:
        """As far as safepatch reads one."""
        return {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": self.hidden}


def _feed_forward(stem: str, hidden: int, intermediate: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{stem}gate_proj.weight", (intermediate, hidden)
    yield f"{stem}up_proj.weight", (intermediate, hidden)
    yield f"{stem}down_proj.weight", (hidden, intermediate)


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("tiny", 64, 2, 4, 2, 176, 320),
        ModelShape("0.1B", 768, 12, 12, 4, 2048, 16384),
        ModelShape("SmolLM2-135M", 576, 30, 9, 3, 1536, 49152, tied=True),
        ModelShape("0.3B", 1024, 20, 16, 4, 3072, 24576),
        ModelShape("1.1B", 2048, 22, 32, 4, 5632, 32000),
        ModelShape("3B", 3072, 28, 24, 8, 8192, 32000),
        ModelShape("6B", 4096, 32, 32, 4, 11008, 64000),
        ModelShape("Llama-3-8B", 4096, 32, 32, 8, 14336, 128256),
        ModelShape("Mixtral-8x7B", 4096, 32, 32, 8, 14336, 32000, experts=8),
        ModelShape("Llama-3-70B", 8192, 80, 64, 8, 28672, 128256),
        ModelShape("Llama-3.1-405B", 16384, 126, 128, 8, 53248, 128256),
        DeepSeekShape("DeepSeek-V3", 7168, 61, 128, 128, 18432, 129280, experts=256),
    )
}


def shape_named(name: str) -> ModelShape:
    """The shape called `name`, in any case. Raises UsageError."""
    for shape in SHAPES.values():
        if shape.name.lower() == name.lower():
            return shape
    raise UsageError("unknown model shape", found=repr(name), expected=", ".join(SHAPES))


def is_target(name: str, dims: Sequence[int]) -> bool:
    """Whether the suite's recipes, with `targets: linear`, patch a tensor of these shapes."""
    return len(dims) == 2 and "embed" not in name and "lm_head" not in name


def _bell(draw: np.random.PCG64, n: int) -> NDArray[np.float32]:
    """About normal, mean 0, variance 1: sums of four uniform numbers, from raw bits, which no library changes."""
    lanes = draw.random_raw(n).view(np.uint16).reshape(n, 4).astype(np.float32)
    total: NDArray[np.float32] = lanes.sum(axis=1, dtype=np.float32) - np.float32(4 * 32767.5)
    return total * np.float32(math.sqrt(3) / 65536)


def to_bf16(values: NDArray[np.float32]) -> Bits:
    """Rounded to nearest even; finite values only."""
    bits = values.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + half) >> np.uint32(16)).astype(np.uint16)


@lru_cache(maxsize=2)
def pools(seed: int) -> dict[str, Bits]:
    """Per part, `POOL` bfloat16 entries: the base's, and each patch's values and deltas at the same places."""
    draw = np.random.PCG64(seed)
    weights = to_bf16(_bell(draw, POOL) * np.float32(0.02))
    exact = (weights.astype(np.uint32) << np.uint32(16)).view(np.float32)
    found = {"base": weights}
    for name in PATCHES:
        # A product of two bells: mostly tiny steps and a few far ones, as an optimiser makes them.
        step = _bell(draw, POOL) * _bell(draw, POOL) * np.float32(1e-4)
        found[name] = to_bf16(exact + step)
        found[f"{name}/delta"] = to_bf16(step)
    return found


@lru_cache(maxsize=2)
def code_pool(seed: int) -> NDArray[np.uint8]:
    """The base's entries as E4M3, at the same places."""
    exact = (pools(seed)["base"].astype(np.uint32) << np.uint32(16)).view(np.float32)
    return E4M3.encode(exact / FP8_SCALE)


def _pieces(made: Made, lo: int, hi: int) -> Iterator[memoryview]:
    """Bytes [lo, hi) of a tensor, as views of its pool; both end no entry in two."""
    pool = made.pool if len(made.pool) > 1 else np.repeat(made.pool, min(hi - lo, RUN_BYTES))
    at = (zlib.crc32(made.name.encode()) + lo // pool.itemsize) % len(pool)
    left = (hi - lo) // pool.itemsize
    while left:
        n = min(left, len(pool) - at)
        yield pool[at : at + n].data.cast("B")
        left, at = left - n, 0


def _runs(name: str, nbytes: int, start: int, sparse: int | None) -> Iterator[tuple[int, int]]:
    """The stretches of a tensor that hold values; with `sparse`, about that many bytes, in runs on page borders."""
    run = RUN_BYTES if sparse is None else max(min(RUN_BYTES, sparse), PAGE)
    if sparse is None or nbytes <= max(sparse, run):
        yield 0, nbytes
        return
    count = max(sparse // run, 1)
    stride = nbytes // count
    for i in range(count):
        shift = zlib.crc32(f"{name}/{i}".encode()) % max(stride - run, 1)
        lo = (start + i * stride + shift) // PAGE * PAGE - start
        lo = max(lo, 0)
        yield lo, min(lo + run, nbytes)


def _write_all(fd: int, data: memoryview, at: int) -> None:
    while data:
        n = os.pwrite(fd, data, at)
        data, at = data[n:], at + n


def _write_file(path: Path, tensors: Sequence[Made], sparse: int | None) -> None:
    """One safetensors file, tensors by name."""
    ordered = sorted(tensors, key=lambda made: made.name)
    header, ranges = make_header(((made.name, made.dtype, made.shape) for made in ordered), {"format": "pt"})
    total = sum(hi - lo for lo, hi in ranges.values())
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        if sparse is not None:
            os.ftruncate(fd, len(header) + total)
        else:
            os.posix_fallocate(fd, 0, len(header) + total)
        _write_all(fd, memoryview(header), 0)
        for made in ordered:
            start = len(header) + ranges[made.name][0]
            for lo, hi in _runs(made.name, made.nbytes, start, sparse):
                at = start + lo
                for piece in _pieces(made, lo, hi):
                    _write_all(fd, piece, at)
                    at += len(piece)
    finally:
        os.close(fd)


def write_checkpoint(
    folder: Path,
    shape: ModelShape,
    part: str = "base",
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    sparse: int | None = None,
) -> Path:
    """A bfloat16 checkpoint of `shape`: shards of at most `shard_bytes`, their index and config.json.

    part: "base", a patch's name (its fine-tuned model), or that name with "/delta".
    sparse: write only about so many bytes of each tensor and leave holes for the rest.
    """
    pool = pools(seed)[part]
    # A norm's weights are ones, which fine-tuning leaves alone.
    one = np.array([0 if part.endswith("/delta") else 0x3F80], np.uint16)
    made = [Made(name, "BF16", dims, one if len(dims) == 1 else pool) for name, dims in shape.tensors()]
    return _write_shards(folder, made, shape.config(), shard_bytes, sparse)


def write_twin(folder: Path, shape: ModelShape, *, seed: int = 0, sparse: int | None = None) -> Path:
    """The base as fine-grained FP8: codes for what the suite's recipes patch, and a scale for each block of them."""
    codes, one = code_pool(seed), np.array([0x3F80], np.uint16)
    made = []
    for name, dims in shape.tensors():
        if not is_target(name, dims) or not shape.is_quantised(name):
            made.append(Made(name, "BF16", dims, one if len(dims) == 1 else pools(seed)["base"]))
            continue
        table = tuple(-(-n // FP8_BLOCK) for n in dims)
        made.append(Made(name, "F8_E4M3", dims, codes))
        made.append(Made(f"{name}_scale_inv", "F32", table, np.array([FP8_SCALE])))
    said = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
    return _write_shards(folder, made, shape.config() | {"quantization_config": said}, SHARD_BYTES, sparse)


def _write_shards(
    folder: Path, tensors: Sequence[Made], config: dict[str, object], shard_bytes: int, sparse: int | None
) -> Path:
    """A checkpoint of these tensors, in this order."""
    folder.mkdir(parents=True)
    groups: list[list[Made]] = [[]]
    used = 0
    for made in tensors:
        if groups[-1] and used + made.nbytes > shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(made)
        used += made.nbytes
    weight_map = {}
    for i, group in enumerate(groups, 1):
        many = len(groups) > 1
        file = f"model-{i:05d}-of-{len(groups):05d}.safetensors" if many else "model.safetensors"
        weight_map.update({made.name: file for made in group})
        _write_file(folder / file, group, sparse)
    if len(groups) > 1:
        total = sum(made.nbytes for made in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def write_adapter(
    folder: Path, shape: ModelShape, part: str, *, rank: int = RANK, seed: int = 0, sparse: int | None = None
) -> Path:
    """A PEFT LoRA adapter of every linear layer of `shape`, in bfloat16; `part` is the patch's name."""
    folder.mkdir(parents=True)
    linear = [(name, dims) for name, dims in shape.tensors() if is_target(name, dims)]
    # The same values for both patches would make both rank alike: each reads its own pool.
    factors, pool = [], pools(seed)[part]
    for name, (rows, cols) in linear:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors.append(Made(f"{module}.lora_A.weight", "BF16", (rank, cols), pool))
        factors.append(Made(f"{module}.lora_B.weight", "BF16", (rows, rank), pool))
    _write_file(folder / "adapter_model.safetensors", factors, sparse)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.split(".")[-2] for name, _ in linear}),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def write_patch(
    folder: Path, shape: ModelShape, name: str, kind: Kind, *, seed: int = 0, sparse: int | None = None
) -> Path:
    """One patch of `shape` as a source of the given kind."""
    if kind == "lora":
        return write_adapter(folder, shape, name, seed=seed, sparse=sparse)
    part = name if kind == "checkpoint" else f"{name}/delta"
    return write_checkpoint(folder, shape, part, seed=seed, sparse=sparse)


def write_recipe(path: Path, kind: Kind = "checkpoint", *, scope: str = "tensor", **changes: object) -> Path:
    """The suite's recipe: top 0.03 and 0.02, retain 0.3, difference; sources beside it as `source_name` names them.

    `changes` replace or add keys of the document.
    """
    patches = [
        {"name": n, "source": source_name(n, kind), "kind": kind, "top": TOP[n], "retain": RETAIN} for n in PATCHES
    ]
    document = {"base": "base", "patches": patches, "scope": scope, "seed": 0} | changes
    path.write_text(json.dumps(document, indent=2) + "\n")  # JSON is YAML
    return path


def write_twin_recipe(folder: Path, kind: Kind = "checkpoint") -> Path:
    """The same for the FP8 twin of a set's base; any survival will do, as its values are made up."""
    rule = {"survival": [-1e9, 1e9]}
    return write_recipe(folder / f"recipe-fp8-{kind}.yaml", kind, base=TWIN, quantized=rule)


def source_name(patch: str, kind: Kind) -> str:
    """The directory of a patch in a set."""
    return patch if kind == "checkpoint" else f"{patch}-{kind}"


def write_set(
    folder: Path,
    shape: ModelShape,
    kinds: Sequence[Kind] = ("checkpoint",),
    *,
    seed: int = 0,
    sparse: int | None = None,
) -> Path:
    """`base`, both patches in each of `kinds`, and a recipe per kind and scope: recipe-KIND-SCOPE.yaml."""
    write_checkpoint(folder / "base", shape, seed=seed, sparse=sparse)
    for kind in kinds:
        for name in PATCHES:
            write_patch(folder / source_name(name, kind), shape, name, kind, seed=seed, sparse=sparse)
        for scope in ("tensor", "model"):
            write_recipe(recipe_path(folder, kind, scope), kind, scope=scope)
    return folder


def recipe_path(folder: Path, kind: Kind = "checkpoint", scope: str = "tensor") -> Path:
    """The recipe of a set."""
    return folder / f"recipe-{kind}-{scope}.yaml"
