"""derive on several ranks: what one process gives, from parts that no rank has the whole of."""

from __future__ import annotations

import fcntl
import json
import math
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from safepatch_core.commands import cli
from safepatch_core.deriving import DeriveConfig, derive
from safepatch_core.deriving.checkpoints import TrainingCheckpoints
from safepatch_core.deriving.importance import Kind, take_importance
from safepatch_core.deriving.objective import Likelihood
from safepatch_core.deriving.optimizer import AdamW
from safepatch_core.deriving.sharding import full_tensor, shard_model, to_local
from safepatch_core.errors import InputError
from safepatch_core.progress import Progress
from safepatch_core.ranks import Alone, Ranks, TorchRanks
from tests.tiny_lm import examples, tiny_llama, train_safety, write_lm, write_rows

# Ranks add up the same numbers in another order. After a few steps that has moved losses by less than 3e-7 of
# themselves, and patches by less than 1e-6 of their norm; both bounds leave room for other processors.
LOSS, PATCH = 1e-5, 1e-4

# Seven rows, three at a time, once: the last step has a row for the first rank alone.
STEPS: dict[str, Any] = {
    "safety": {"num_train_epochs": 1.0},
    "over_safety": {"num_train_epochs": 1.0},
    "batch_size": 3,
    "learning_rate": 1e-3,
    "ascent_bound": 50.0,
    "threads": 1,
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_lm(folder / "base")
    rows = write_rows(folder / "rows.jsonl", 7).read_text().splitlines()
    pairs = [json.loads(row) | {"chosen": f"No, {'!' * i}"} for i, row in enumerate(rows)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


def settings(where: Path, run: str, **changes: Any) -> DeriveConfig:
    places = {"model": where / "base", "data": where / "rows.jsonl", "out": where / run}
    return DeriveConfig.model_validate({**places, **STEPS, **changes})


def options(config: DeriveConfig) -> list[str]:
    """The command line that says what the configuration does."""
    changed = config.model_dump(mode="json", exclude_unset=True)
    flat = {key: value for key, value in changed.items() if not isinstance(value, dict)}
    flat |= {f"{outer}_{key}": v for outer, of in changed.items() if isinstance(of, dict) for key, v in of.items()}
    out = flat.pop("out")
    given = [text for key, value in flat.items() for text in ("--" + key.replace("_", "-"), json.dumps(value))]
    return ["derive", *(text.strip('"') for text in given), "-o", out]


def fork(ranks: int, folder: Path, work: Callable[[], None]) -> tuple[list[int | None], list[str]]:
    """Ranks in the environment that torchrun and accelerate launch give them; exit statuses and stderr of each.

    They are forked: torch is imported once.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def one(rank: int) -> None:
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {key: str(value) for key, value in given.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.stderr = open(folder / f"stderr-{rank}", "w", buffering=1)
        work()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=one, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=200)
        process.kill()
        process.join()
    return [p.exitcode for p in processes], [(folder / f"stderr-{rank}").read_text() for rank in range(ranks)]


def several(ranks: int, config: DeriveConfig, *more: str) -> tuple[list[int | None], list[str]]:
    def work() -> None:
        sys.argv = ["safepatch", *options(config), "--quiet", *more]
        cli.main()

    return fork(ranks, Path(config.out).parent, work)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def trace(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"trace-{name}.jsonl").read_text().splitlines()]


def header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def distance(found: Path, expected: Path, zero: Path | None) -> float:
    """The norm of found - expected over all tensors, as a share of that of expected - zero."""
    a, b = load_file(found), load_file(expected)
    origin = load_file(zero) if zero else {name: torch.zeros_like(tensor) for name, tensor in b.items()}
    apart = sum(float((a[name] - b[name]).double().square().sum()) for name in b)
    size = sum(float((b[name] - origin[name]).double().square().sum()) for name in b)
    return float((apart / size) ** 0.5)


def agrees(many: Path, one: Path, base: Path | None, weights: str = "model.safetensors") -> None:
    """The runs differ by the order of sums, and not in their files. Patches are changes of `base`, if it is given."""
    assert content(many).keys() == content(one).keys()
    told, known = (json.loads((run / "derive.json").read_text()) for run in (many, one))
    for name in known["patches"]:
        found, expected = trace(many, name), trace(one, name)
        assert [r.keys() for r in found] == [r.keys() for r in expected]
        for a, b in zip(found, expected, strict=True):
            assert a == {key: pytest.approx(value, rel=LOSS) for key, value in b.items()}
        file = f"{name}/{weights}"
        assert header(many / file) == header(one / file)
        assert distance(many / file, one / file, base and base / "model.safetensors") < PATCH
    for scores in one.glob("importance/*/*"):
        assert header(many / scores.relative_to(one)) == header(scores)
        assert distance(many / scores.relative_to(one), scores, None) < PATCH
    assert "ranks" not in known["inputs"]
    assert told["inputs"] == known["inputs"] | {"ranks": told["inputs"]["ranks"]}
    assert told["nll"] == {key: pytest.approx(value, rel=LOSS) for key, value in known["nll"].items()}
    for name, patch in known["patches"].items():
        # Entries whose gradient is nearly nothing change in one run and not in the other.
        close = {key: pytest.approx(v, rel=1e-3, abs=1e-3) if isinstance(v, float) else v for key, v in patch.items()}
        assert told["patches"][name] == close


@pytest.fixture(scope="module")
def two(where: Path) -> Path:
    """A run of two ranks, by torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "safepatch_core", *options(settings(where, "two", save_steps=1))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"next: safepatch merge {where / 'two' / 'recipe.yaml'} -o OUT\n"
    assert len(re.findall(r"^over-safety: 3/3", found.stderr, re.MULTILINE)) == 1
    return where / "two"


def test_two_ranks_train_the_patches_of_one_process_and_merge_takes_them(where: Path, two: Path) -> None:
    derive(settings(where, "one", save_steps=1), quiet=True)
    agrees(two, where / "one", where / "base")

    from safepatch_core.merging.api import merge

    merge(two / "recipe.yaml", where / "merged", backend="reference")
    base, merged = (load_file(where / name / "model.safetensors") for name in ("base", "merged"))
    assert any(not torch.equal(merged[n], base[n]) for n in base)


KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "everything, inside the backward pass": (
        3,
        {"optim": "adamw_in_backward", "trainable": "all", "gradient_checkpointing": True, "importance": "backbone"},
    ),
    "npo beside utility rows": (
        3,
        {"optim": "adamw_in_backward", "safety": {"objective": "npo"}, "utility_data": "rows.jsonl"},
    ),
    "a delta, of accumulated gradients": (
        2,
        {"save_as": "delta", "gradient_accumulation_steps": 2, "batch_size": 2, "importance_memory": "disk"},
    ),
    "lora": (2, {"method": "lora", "lora_r": 4}),
    "pairs, masked": (
        2,
        {
            "data": "pairs.jsonl",
            "patches": "safety",
            "safety": {"objective": "dpo", "mask_top": 0.5, "mask_steps": 2},
        },
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_a_run_is_that_of_one_process(where: Path, kind: str) -> None:
    ranks, given = KINDS[kind]
    given = given | {key: str(where / given[key]) for key in ("data", "utility_data") if key in given}
    many, one = (settings(where, f"{kind} {name}", **given) for name in ("many", "one"))
    derive(one, quiet=True)  # first: what it imports needs no import in the ranks
    statuses, told = several(ranks, many)
    assert statuses == [0] * ranks, told
    lora, delta = many.method == "lora", many.save_as == "delta"
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    agrees(Path(many.out), Path(one.out), None if lora or delta else where / "base", weights)


def test_ranks_that_were_killed_after_a_checkpoint_go_on_to_the_same_bytes(
    where: Path, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, save = settings(where, "killed", save_steps=1), TrainingCheckpoints.save

    def last(self: TrainingCheckpoints, step: int, *of: Any) -> None:
        save(self, step, *of)
        if step == 2 and os.environ["RANK"] == "1":
            os._exit(9)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingCheckpoints, "save", last)
        statuses, told = several(2, config)
    assert statuses == [74, 9]
    assert re.fullmatch(r"safepatch: rank 0: another rank is gone \(.*\); --resume goes on\n", told[0])
    parts = sorted(p.name for p in (where / "killed/checkpoint-safety/2").iterdir())
    assert parts == ["training-0.safetensors", "training-1.safetensors", "training.json"]

    with pytest.raises(InputError, match=r"the interrupted run had another inputs\.ranks: expected 2"):
        derive(config, resume=True, quiet=True)
    statuses, told = several(3, config, "--resume")
    assert statuses == [65, 65, 65] and told[1:] == ["", ""]
    assert re.fullmatch(r".*the interrupted run had another inputs\.ranks: found 3, expected 2\n", told[0])

    statuses, told = several(2, config, "--resume")
    assert statuses == [0, 0], told
    assert content(where / "killed") == content(two)


def sharded_llama(ranks: Ranks) -> Any:
    return shard_model(tiny_llama(), ranks, torch.device("cpu"))


def test_a_rank_holds_its_part_and_drops_gradients_inside_the_backward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = dict(tiny_llama().named_parameters())
    step = AdamW._step

    def work() -> None:
        with closing(TorchRanks()) as ranks:
            model = sharded_llama(ranks)
            parts: dict[str, Tensor] = dict(model.named_parameters())
            assert parts.keys() == full.keys()
            for name, parameter in parts.items():
                assert torch.equal(to_local(parameter), full[name].chunk(2)[ranks.rank]), name
                assert torch.equal(full_tensor(parameter), full[name])
                assert 2 * to_local(parameter).untyped_storage().nbytes() == full[name].untyped_storage().nbytes()

            alive: list[int] = []

            def counted(self: AdamW, name: str, parameter: Tensor, factor: Tensor | None) -> None:
                assert parameter.grad is not None
                moment = self.state()[0][f"{name}/exp_avg"]
                assert moment.shape == to_local(parameter).shape == to_local(parameter.grad).shape
                alive.append(sum(p.grad is not None for p in parts.values()))
                step(self, name, parameter, factor)

            monkeypatch.setattr(AdamW, "_step", counted)
            for optim, first in (("adamw_in_backward", 1), ("adamw", len(parts))):
                alive.clear()
                given = {"model": "m", "data": "d", "out": "o", "safety": {"max_steps": 1}, "optim": optim}
                config = DeriveConfig.model_validate(given)
                train_safety(model, examples(4), config, Likelihood(1.0), ranks=ranks)
                assert len(alive) == len(parts) and max(alive) == first, alive
            for name, parameter in model.named_parameters():
                assert isinstance(parameter, DTensor) and parameter is parts[name], "left whole"

    statuses, told = fork(2, tmp_path, work)
    assert statuses == [0, 0], told


def test_norms_and_shares_are_of_whole_tensors_and_each_part_rounds_with_bits_of_its_own(tmp_path: Path) -> None:
    def work() -> None:
        with closing(TorchRanks()) as ranks:
            mesh = init_device_mesh("cpu", (2,))
            weight = torch.nn.Parameter(distribute_tensor(torch.ones(8192, dtype=torch.bfloat16), mesh, [Shard(0)]))
            given: dict[str, Any] = {"learning_rate": 1e-4, "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 0}
            given |= {"rounding": "stochastic", "state_dtype": torch.float32, "ranks": ranks}
            with AdamW({"w": weight}, "adamw", **given) as optimizer:
                weight.grad = torch.ones_like(weight)
                step = optimizer.step()
                moment = optimizer.state()[0]["w/exp_avg"]
            assert step.grad_norm == pytest.approx(math.sqrt(8192)) and step.below_half_step == 1.0
            assert moment.tolist() == pytest.approx([0.1 / math.sqrt(8192)] * 4096, rel=1e-3)
            first, second = ranks.gather(to_local(weight.detach()))
            assert (first != 1).any() and (second != 1).any() and not torch.equal(first, second)

    statuses, told = fork(2, tmp_path, work)
    assert statuses == [0, 0], told


@pytest.mark.parametrize("kind", ["snip", "fisher"])
def test_importance_on_two_ranks_has_the_bits_of_one_process(tmp_path: Path, kind: Kind) -> None:
    def scores(model: Any, ranks: Ranks) -> dict[str, Tensor]:
        with Progress("importance", 5, quiet=True, report=None) as progress:
            taken = take_importance(model, examples(5), lambda _, n: n > 1, progress, kind=kind, ranks=ranks)
        return {name: full_tensor(mean) for layer in taken.layers for name, mean in layer.items()}

    def work() -> None:
        with closing(TorchRanks()) as ranks:
            save_file(scores(sharded_llama(ranks), ranks), tmp_path / f"scores-{ranks.rank}")

    statuses, told = fork(2, tmp_path, work)
    assert statuses == [0, 0], told
    expected = scores(tiny_llama(), Alone())
    for rank in range(2):
        found = load_file(tmp_path / f"scores-{rank}")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].view(torch.int32), expected[name].view(torch.int32)) for name in found)


def test_a_refusal_is_told_once_and_ends_every_rank_alike(where: Path) -> None:
    run = where / "taken"
    run.mkdir()
    handle = os.open(run, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    config = settings(where, "taken")
    assert several(2, config) == ([75, 75], [f"safepatch: {run}: another run is writing this directory\n", ""])
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)
    (run / "mine.txt").touch()
    assert several(2, config) == ([65, 65], [f"safepatch: {run}: the run directory exists and is not empty\n", ""])
    assert [p.name for p in run.iterdir()] == ["mine.txt"]

    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"method": "lora", "quantization": "nf4"}, "a quantised backbone can't be sharded over ranks: "),
        ({"learning_rate": 1e30}, "training diverged at step 2: "),
    )
    for changes, line in cases:
        statuses, told = several(2, settings(where, "other", **changes))
        assert statuses == [64, 64] and told[1] == ""
        assert told[0].startswith(f"safepatch: {line}") and told[0].count("\n") == 1
        assert not (where / "other").exists()
