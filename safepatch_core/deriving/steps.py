"""The steps of a derive run: two trainings, their importance, a recipe."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from safepatch_core.deriving.adapter import add_adapter, save_adapter
from safepatch_core.deriving.checkpoints import TrainingCheckpoints
from safepatch_core.deriving.config import DeriveConfig, PatchConfig, SafetyPatch, libraries
from safepatch_core.deriving.curves import Curves, draw
from safepatch_core.deriving.data import read_data, read_prompts, read_replay
from safepatch_core.deriving.directions import (
    Directions,
    layers_of,
    matrices,
    read_directions,
    save_directions,
    selected,
)
from safepatch_core.deriving.importance import highest, take_importance
from safepatch_core.deriving.loop import Mask, planned_steps, train
from safepatch_core.deriving.model import Changed, changed_entries, load_frozen, load_model, open_backbone, targets
from safepatch_core.deriving.names import BaseNames
from safepatch_core.deriving.objective import (
    Likelihood,
    NegativePreference,
    Objective,
    Preference,
    chosen,
    mean_nll,
    reference_nlls,
)
from safepatch_core.deriving.remembering import Remembering, Term, anchored, replayed
from safepatch_core.deriving.rundir import RunDirectory
from safepatch_core.deriving.saving import (
    applied,
    patched_tensors,
    save_config,
    save_delta,
    save_model,
    save_scores,
)
from safepatch_core.deriving.sharding import ranks_of_derive, shard_model, shard_rows
from safepatch_core.deriving.twin import DTYPE as HANDED
from safepatch_core.deriving.twin import is_quantised
from safepatch_core.errors import InputError, IOFailure, UsageError
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint
from safepatch_core.files.disk import hash_file
from safepatch_core.language.chat import Example
from safepatch_core.language.model import (
    at_work,
    find_device,
    limits,
    load_tokenizer,
    quiet_libraries,
    save_tokenizer,
    try_out,
)
from safepatch_core.merging.recipe import Recipe, of_language, parse_recipe
from safepatch_core.merging.sources import open_source
from safepatch_core.pictures import can_draw, picture
from safepatch_core.progress import Listener, Progress, warn
from safepatch_core.ranks import Ranks, first, together

RECIPE, CURVES = "recipe.yaml", "curves.png"
BACKBONE = "backbone"


def run(config: DeriveConfig, *, resume: bool, quiet: bool, report: Listener | None) -> dict[str, Any]:
    """Does every step that is not done yet; returns the record, as RUN/derive.json holds it."""
    with ranks_of_derive(config) as ranks, _environment(config):
        first(ranks, lambda: open_backbone(config.model, Path(config.out)))  # a quantised one is copied once
        job = together(ranks, lambda: Steps(config, quiet, report, ranks))
        with RunDirectory(Path(config.out), config.settings(), job.inputs, resume=resume, ranks=ranks) as out:
            for name in config.trained:
                out.step(name, partial(job.direct if config.method == "direction" else job.train, out, name))
                TrainingCheckpoints(out, name).clear()
            for name in _ranked(config):
                out.step(f"importance/{name}", partial(job.rank, out, name))
            if config.method != "direction" and first(ranks, can_draw):
                out.step(CURVES, partial(job.draw_curves, out))
            out.step(RECIPE, partial(job.write_recipe, out))
            return out.record


def _ranked(config: DeriveConfig) -> tuple[str, ...]:
    """The models at which importance is taken."""
    return {"patched": tuple(config.trained), "backbone": (BACKBONE,), "none": ()}[config.ranked_at]


@contextlib.contextmanager
def _environment(config: DeriveConfig) -> Iterator[None]:
    """The run's threads and random state, given back at the end; what the libraries raise becomes one line."""
    where = find_device(config.device)
    devices = [where] if where.type == "cuda" else []
    hint = "lower batch_size or max_length, or take method lora"
    try:
        with at_work(config.threads, hint), quiet_libraries(), torch.random.fork_rng(devices=devices):
            yield
    except SafetensorError as error:
        raise IOFailure(f"writing failed: {error}", file=config.out) from error


class _Read(NamedTuple):
    """The directions behind each layer, those that each layer's matrices get, and whether these are [in, out]."""

    read: dict[int, Directions]
    of: dict[int, Directions]
    turned: bool


class Steps:
    """The checked inputs of a run, and its steps.

    Raises InputError for a bad model, tokenizer or data file, before anything is written.
    """

    def __init__(self, config: DeriveConfig, quiet: bool, report: Listener | None, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        if ranks.rank > 0:
            quiet, report = True, None
        self._progress = partial(Progress, quiet=quiet, report=report)
        if config.method != "direction" and not can_draw():
            warn(f"matplotlib is not installed: no {CURVES}", quiet, report)
        if config.dtype == "bfloat16" and config.rounding == "nearest":
            warn("rounding to nearest bfloat16: an update below half a step of its weight vanishes", quiet, report)
        self._base, self._root, named = open_backbone(config.model, Path(config.out))
        self._recipe = make_recipe(config, named)
        self._targets = targets(self._base, self._recipe.is_target)
        self._tokenizer = load_tokenizer(self._root)
        read = read_prompts if config.method == "direction" else read_data
        tell = partial(warn, quiet=quiet, report=report)
        data = read(config, self._tokenizer, limits(self._root), tell)
        self._data = data
        self._replay, replay = read_replay(config, self._tokenizer, limits(self._root), lambda line: None)
        self._before = [open_checkpoint(path) for path in config.ewc_fisher]
        if ranks.size > 1 and (self._replay or self._before):
            raise UsageError("EWC and replay are of one process", found=f"{ranks.size} ranks")
        self._examples, self._utility, self._probe = data.examples, data.utility, data.probe
        self._names = BaseNames(load_model(self._root, config, "meta"), self._base)
        self.inputs: dict[str, Any] = {
            **data.inputs,
            **replay,
            **({"ewc_fisher": _digest(self._before)} if self._before else {}),
            "model": _fingerprint(self._base, self._root) if ranks.rank == 0 else {},
            "libraries": {name: version(name) for name in libraries(config)},
            **({} if ranks.size == 1 else {"ranks": ranks.size}),
        }

    def train(self, out: RunDirectory, name: str) -> None:
        """RUN/NAME, a trained checkpoint or adapter, and RUN/trace-NAME.jsonl."""
        config, unlearned = self._config, name == "safety"
        patch = config.trained[name]
        torch.manual_seed(config.seed)
        model = self._sharded(lambda device: self._trainable(load_frozen(self._root, config, device)))
        with out.scratch_folder(name) as folder:
            self._prove(model, folder)
        if self._ranks.rank > 0:
            torch.manual_seed(config.seed + self._ranks.rank)  # dropout of other rows
        if BACKBONE not in out.record["nll"]:
            out.record["nll"][BACKBONE] = self._nll(model, BACKBONE)
        if unlearned:
            self._check_room(out.record["nll"][BACKBONE])
        objective = self._remembering(model, name, self._objective(model, name, patch))
        steps = planned_steps(len(self._examples), config, patch)
        with out.new_file(f"trace-{name}.jsonl") as trace, self._progress(name, steps) as progress:
            outcome = train(
                model,
                self._examples,
                config,
                patch,
                objective=objective,
                bound=config.ascent_bound if unlearned else None,
                trace=trace,
                progress=progress,
                utility=self._utility if config.weight(patch) else (),
                checkpoints=TrainingCheckpoints(out, name),
                mask=self._mask(out, model, name, patch),
                ranks=self._ranks,
            )
        with out.new_folder(name) as folder:
            changed = self._save(model, folder)
        if config.ranked_at != "patched":
            out.record["nll"][name] = self._nll(model, name)
        entries = sum(e.entries for e in self._targets)
        out.record["patches"][name] = {
            "objective": patch.objective if isinstance(patch, SafetyPatch) else "descent",
            "optim": outcome.optim,
            "steps": outcome.steps,
            "stopped_by": "ascent_bound" if outcome.bounded else "steps",
            "entries": entries,
            "changed_share": changed.exact / entries,
            "changed_share_in_base_dtype": changed.rounded / entries,
            "kept_l1_in_base_dtype": changed.kept_l1,
            "error_l2_in_base_dtype": changed.error_l2,
        }
        if outcome.below_half_step is not None:
            out.record["patches"][name]["updates_below_half_step"] = outcome.below_half_step

    def _objective(self, model: Any, name: str, patch: PatchConfig) -> Objective:
        """What the patch's training minimises; `model` still answers as the backbone does."""
        if not isinstance(patch, SafetyPatch):
            return Likelihood(1.0)
        if patch.objective == "ascent":
            return Likelihood(-1.0)
        if patch.objective == "npo":
            return NegativePreference(patch.npo_beta, self._row_nlls(model, self._examples, f"reference {name}"))
        answers = [*self._examples, *chosen(self._examples)]
        return Preference(patch.beta, patch.loss_type, self._row_nlls(model, answers, f"reference {name}"))

    def _mask(self, out: RunDirectory, model: Any, name: str, patch: PatchConfig) -> Mask | None:
        """By SNIP on the answers to learn from, as Q-resafe (arXiv 2506.20251) finds what matters to them."""
        top, samples = patch.mask_top, chosen(self._probe)
        if top is None:
            return None

        def choose() -> Mapping[str, Tensor]:
            with (
                out.scratch_folder(f"mask-{name}") as folder,
                self._progress(f"mask {name}", len(samples)) as progress,
            ):
                taken = take_importance(
                    model,
                    samples,
                    self._recipe.is_target,
                    progress,
                    memory=self._config.importance_memory,
                    folder=folder,
                    ranks=self._ranks,
                )
                return highest(taken, top)

        return Mask(patch.mask_steps, choose)

    def _remembering(self, model: Any, name: str, objective: Objective) -> Objective:
        """The objective with what keeps earlier rounds; `model` still is and answers as the backbone."""
        config, rows, terms = self._config, self._replay, list[Term]()
        if self._before:
            terms.append(anchored(model, self._names, self._before, config.ewc_weight))
        if rows:
            with self._progress(f"replay {name}", -(-len(rows) // config.batch_size)) as progress:
                terms.append(replayed(model, rows, config.replay_weight, config.batch_size, progress))
        return Remembering(objective, terms) if terms else objective

    def _prove(self, model: Any, folder: Path) -> None:
        """Tries before a step is taken, in `folder`, how the patch will be saved and read, all but its weights."""
        config = self._config
        try_out(model, self._root, None if config.method == "full" else "other target_modules")
        if self._ranks.rank == 0:
            self._save_companions(folder)
        if config.method == "lora":
            save_adapter(model, folder, self._names, config.model, self._ranks)
            first(self._ranks, lambda: self._open_adapter(folder))

    def _open_adapter(self, folder: Path) -> None:
        try:
            adapted = open_source("adapter", folder, "lora", self._base, relative_to=None).shapes
        except InputError as error:
            raise UsageError(
                f"LoRA would give an adapter that can't be merged: {error.what}",
                tensor=error.tensor,
                found=error.found,
                expected=error.expected,
            ) from error
        if not any(entry.name in adapted for entry in self._targets):
            raise UsageError(
                "the adapter changes nothing that a merge patches",
                found=f"target_modules {self._config.target_modules}",
                expected=f"some like '{self._targets[0].name.removesuffix('.weight')}'",
            )

    def _save_companions(self, folder: Path) -> None:
        """Config and tokenizer, where the patch has them."""
        config = self._config
        if config.kind == "checkpoint":
            save_config(folder, self._base, getattr(torch, config.dtype))
        if config.kind != "delta":
            save_tokenizer(self._tokenizer, folder)

    def _save(self, model: Any, folder: Path) -> Changed:
        """The trained patch in its form: an adapter, a checkpoint, both with the tokenizer, or a delta."""
        config, ranks = self._config, self._ranks
        if config.kind == "lora":
            save_adapter(model, folder, self._names, config.model, ranks)
        elif config.kind == "delta":
            save_delta(model, folder, self._base, self._targets, getattr(torch, config.delta_dtype), ranks)
        else:
            save_model(model, folder, self._base, ranks)
        if ranks.rank == 0:
            self._save_companions(folder)
        patched = partial(patched_tensors, folder, config.kind, self._base, self._targets)
        return first(ranks, lambda: changed_entries(patched()))

    def direct(self, out: RunDirectory, name: str) -> None:
        """RUN/NAME, an adapter that adds or takes out a direction."""
        config, found = self._config, self._directions
        own = matrices(self._base, self._targets, config)
        with out.new_folder(name) as folder:
            if self._ranks.rank == 0:
                save_directions(folder, name, found.of, own, turned=found.turned, base=self._base, ref=config.model)
                self._save_companions(folder)
            first(self._ranks, lambda: self._open_adapter(folder))
        out.record["patches"][name] = {
            "objective": "direction",
            "layers": sorted(found.of),
            "cosine_of_refusals": {str(number): of.cosine for number, of in sorted(found.read.items())},
        }

    @cached_property
    def _directions(self) -> _Read:
        config, data, size = self._config, self._data, self._config.batch_size
        model = self._sharded(lambda device: load_model(self._root, config, device))
        try_out(model, self._root)
        layers = layers_of(model, config.direction_modules)
        steps = sum(-(-len(of) // size) for of in (data.examples, data.utility, data.refused))
        with self._progress("directions", steps) as progress:
            read = read_directions(model, layers, data, config, progress)
        return _Read(read, selected(layers, read, config), any(layer.turned for layer in layers))

    def rank(self, out: RunDirectory, name: str) -> None:
        """RUN/importance/NAME: importance at that patched model, or at the backbone."""
        config = self._config
        assert config.importance_kind != "magnitude"
        with out.new_folder(f"importance/{name}") as folder:
            model = self._sharded(lambda device: self._patched(out, name, folder, device))
            with self._progress(f"importance {name}", len(self._probe)) as progress:
                taken = take_importance(
                    model,
                    self._probe,
                    self._recipe.is_target,
                    progress,
                    kind=config.importance_kind,
                    memory=config.importance_memory,
                    folder=folder,
                    ranks=self._ranks,
                )
            scored = taken.parameters, taken.layers
            save_scores(model, folder, self._base, self._targets, *scored, self._ranks)
        out.record["nll"][name] = taken.nll
        out.record["importance"][name] = {"samples": len(self._probe), "tensors": len(self._targets)}

    def _patched(self, out: RunDirectory, name: str, scratch: Path, device: str) -> Any:
        """The backbone, or that patched model: what was trained, or base + the delta or adapter that was saved."""
        config = self._config
        if name == BACKBONE or device == "meta":
            return load_model(self._root, config, device)
        if config.kind == "checkpoint":
            return load_model(out.path / name, config, device)
        with applied(out.path / name, config.kind, self._base, self._targets, scratch / "patched") as checkpoint:
            return load_model(checkpoint, config, device)

    def _sharded(self, load: Callable[[str], Any]) -> Any:
        """The model that `load` makes on a device; of several ranks the first alone reads its weights."""
        ranks, device = self._ranks, self._config.device
        if ranks.size == 1:
            return load(device)
        model = together(ranks, lambda: load("cpu" if ranks.rank == 0 else "meta"))
        return shard_model(model, ranks, find_device(device))

    def draw_curves(self, out: RunDirectory) -> None:
        """RUN/curves.png."""
        if self._ranks.rank > 0:
            return
        traces = {name: out.path / f"trace-{name}.jsonl" for name in self._config.trained}
        levels = {"backbone": out.record["nll"][BACKBONE], "ascent bound": self._config.ascent_bound}
        drawn = picture(draw, Curves(traces, levels))
        assert drawn is not None
        with out.new_file(CURVES, "wb") as file:
            file.write(drawn)

    def write_recipe(self, out: RunDirectory) -> None:
        """RUN/recipe.yaml."""
        with out.new_file(RECIPE) as file:
            file.write("# The patches of this run. Merge them with: safepatch merge recipe.yaml -o OUT\n")
            yaml.safe_dump(self._recipe.written(), file, sort_keys=False)

    def _nll(self, model: Any, name: str) -> float:
        size, probe = self._config.batch_size, self._probe
        if self._ranks.size > 1:
            found = self._row_nlls(model, probe, f"NLL {name}")
            return sum(found[e] for e in probe) / sum(e.answer_tokens for e in probe)
        with self._progress(f"NLL {name}", -(-len(probe) // size)) as progress:
            return mean_nll(model, probe, size, progress)

    def _row_nlls(self, model: Any, examples: Sequence[Example], name: str) -> dict[Example, float]:
        """Each row's answer NLL in nats; each rank takes its share of the rows, and all as many."""
        ranks, size = self._ranks, self._config.batch_size
        mine = [*shard_rows(examples, ranks), examples[0]][: -(-len(examples) // ranks.size)]
        with self._progress(name, -(-len(mine) // size)) as progress:
            found = reference_nlls(model, mine, size, progress)
        return {example: nll for part in ranks.gather(found) for example, nll in part.items()}

    def _check_room(self, nll: float) -> None:
        bound = self._config.ascent_bound
        if bound is not None and nll >= bound:
            raise UsageError(
                "ascent has no room: the backbone's answer NLL is at ascent_bound already",
                found=f"{nll:.3f} nats per token",
                expected=f"less than {bound:g}; set a higher bound",
            )

    def _trainable(self, model: Any) -> Any:
        """The model with exactly those parameters trainable that the method trains."""
        if self._config.method == "lora":
            return add_adapter(model, self._config)
        everything = self._config.trainable == "all"
        for name, parameter in model.named_parameters():
            trained = (everything and of_language(name)) or self._recipe.is_target(name, parameter.ndim)
            parameter.requires_grad_(trained)
        return model


def make_recipe(config: DeriveConfig, backbone: Checkpoint) -> Recipe:
    """The recipe of the run's patches. A relative path of the base becomes relative to RUN.

    A hub id is pinned to the commit that was trained: against any other, the patches would be other deltas. Of a
    model that sees or hears, only the language model is trained and merged. Patches of a quantised backbone, trained
    on its floats, are merged into its codes.
    """
    base = config.model
    if backbone.revision is not None:
        base = f"{base.partition('@')[0]}@{backbone.revision}"
    elif not os.path.isabs(base):
        base = os.path.relpath(os.path.abspath(base), os.path.realpath(config.out))
    patches = []
    for name, patch in config.trained.items():
        ranked = name if config.ranked_at == "patched" else BACKBONE
        patches.append(
            {
                "name": name,
                "source": name,
                "kind": config.kind,
                "importance": "magnitude" if config.ranked_at == "none" else {"scores": f"importance/{ranked}"},
                **config.in_recipe(patch),
            }
        )
    targets = "linear" if all(map(of_language, backbone.tensors)) else "language"
    recipe = {"base": base, "patches": patches, "targets": targets, "seed": config.seed}
    if config.method == "direction":
        recipe["combine"] = "sum"  # directions act in every entry of a matrix
    codes = {"quantized": {"reference_dtype": HANDED}} if is_quantised(backbone) else {}
    return parse_recipe(recipe | codes)


def _digest(checkpoints: Sequence[Checkpoint]) -> str:
    """Of every byte of their weights."""
    digest = hashlib.sha256()
    for shard in (shard for checkpoint in checkpoints for shard in checkpoint.shards):
        digest.update(bytes.fromhex(hash_file(shard.path)))
    return digest.hexdigest()


def _fingerprint(base: Checkpoint, root: Path) -> dict[str, Any]:
    """What tells one backbone from another: its config and every byte of its weights."""
    digest = hashlib.sha256((root / "config.json").read_bytes())
    for shard in base.shards:
        digest.update(bytes.fromhex(hash_file(shard.path)))
    entries = sum(entry.entries for entry in base.tensors.values())
    return {"sha256": digest.hexdigest(), "tensors": len(base.tensors), "entries": entries}
