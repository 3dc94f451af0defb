"""mergekit's YAML as a recipe, with what it promises; what has no equal here is refused by key.

Written from mergekit's documented behaviour (0.1.5): its parameters, filters and gradients become numbers per tensor.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from safepatch_core.errors import UsageError
from safepatch_core.files.checkpoint import Checkpoint, open_checkpoint
from safepatch_core.settings import read_yaml
from safepatch_core.spec import quota

BIT_EQUAL = "bit-equal to mergekit, but for the sign of zeros, which are kept here"
EQUAL_BUT_TIES = "equal to mergekit up to equal magnitudes at the cut, of which the first are taken here"
SAME_RULE = "the same rule as mergekit's with other random numbers, and rescaled by the rate instead of by the norm"

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Of all settings the one that holds here.
TOKENIZERS = ({"tokenizer_source": "base"}, {"tokenizer": {"source": "base"}})
METHODS = (
    *("passthrough", "task_arithmetic", "ties", "dare_linear", "dare_ties"),
    *("breadcrumbs", "breadcrumbs_ties"),
)
# Why a method is not taken.
OTHERS = {
    "della": "it draws by rank within rows",
    "della_linear": "it draws by rank within rows",
    "linear": "it averages whole models: every entry changes, and no patch is left to apply or revert",
    "slerp": "it needs norms and angles of whole tensors, whose last bits depend on the order of sums",
    "nuslerp": "it needs norms and angles of whole tensors, whose last bits depend on the order of sums",
    "multislerp": "it needs norms and angles of whole tensors, whose last bits depend on the order of sums",
    "karcher": "it iterates on whole tensors",
    "model_stock": "it needs norms of whole tensors, whose last bits depend on the order of sums",
    "sce": "it needs sums over whole tensors, whose last bits depend on their order",
    "arcee_fusion": "it samples its quantiles at random",
}


class Imported(NamedTuple):
    """A recipe as plain data, and what holds between its merge and mergekit's."""

    recipe: dict[str, Any]
    promise: str


def is_mergekit(data: Any) -> bool:
    """Whether a YAML document is mergekit's."""
    return isinstance(data, dict) and "merge_method" in data


def read_mergekit(path: str | os.PathLike[str]) -> Imported:
    """Translate a mergekit configuration. Its relative paths are relative to the working directory, as there.

    Raises UsageError naming the key that has no equal here, InputError where a model can't be opened.
    """
    data = read_yaml(path, "mergekit configuration")
    if not is_mergekit(data):
        raise UsageError("not a mergekit configuration: no key merge_method", file=path)
    return _Reader(Path(path), data).imported()


@dataclass(frozen=True)
class _Model:
    """One input: its reference and the settings of its own parameters."""

    reference: str
    parameters: Mapping[str, Any]


class _Reader:
    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self._path, self._data = path, data
        self._method = data["merge_method"]

    def refuse(self, key: str, why: str) -> NoReturn:
        raise UsageError(f"{key}: {why}", file=self._path)

    def imported(self) -> Imported:
        self._check_keys()
        models, shared = self._models()
        if self._method == "passthrough":
            return self._passthrough(models, shared)
        if not isinstance(self._data.get("base_model"), str):
            self.refuse("base_model", f"{self._method} needs one")
        base = self._reference(self._data["base_model"], "base_model")
        models = [model for model in models if model.reference != base]
        if not models:
            self.refuse("models", "none beside the base")
        opened = open_checkpoint(_located(base))
        self._check_dtypes(opened)
        settings = _Settings(self, opened, [*shared, self._data.get("parameters") or {}])
        return self._arithmetic(base, models, settings)

    def _check_keys(self) -> None:
        if self._method in OTHERS:
            self.refuse("merge_method", f"{self._method} has no equal here: {OTHERS[self._method]}")
        if self._method not in METHODS:
            self.refuse("merge_method", f"unknown: {self._method!r}, expected one of {', '.join(METHODS)}")
        known = {"merge_method", "models", "slices", "base_model", "dtype", "out_dtype", "parameters"}
        for key, value in self._data.items():
            if key in known or value is None or {key: value} in TOKENIZERS:
                continue
            why = {"modules": "models of several modules are merged one by one"}
            self.refuse(key, why.get(key, "not carried over: the output has the base's tokenizer and template"))

    def _models(self) -> tuple[list[_Model], list[Mapping[str, Any]]]:
        """The inputs, and parameters that stand between theirs and the top's."""
        if ("models" in self._data) == ("slices" in self._data):
            self.refuse("models", "expected either models or slices")
        if "models" in self._data:
            return [self._model(of, "models") for of in self._data["models"]], []
        slices = self._data["slices"]
        if len(slices) != 1:
            self.refuse("slices", "layers are not put together anew: expected one slice over all layers")
        sources = slices[0]["sources"]
        for of in sources:
            layers = _layers(open_checkpoint(_located(self._reference(of.get("model"), "slices"))))
            if layers is None or list(of.get("layer_range", ())) != [0, layers]:
                self.refuse("slices", f"layer_range {of.get('layer_range')}: expected all layers, [0, {layers}]")
        return [self._model(of, "slices") for of in sources], [slices[0].get("parameters") or {}]

    def _model(self, of: Any, key: str) -> _Model:
        if not isinstance(of, dict) or not set(of) <= {"model", "parameters", "layer_range"}:
            self.refuse(key, "expected model and parameters of each")
        return _Model(self._reference(of.get("model"), key), of.get("parameters") or {})

    def _reference(self, model: Any, key: str) -> str:
        if not isinstance(model, str):
            self.refuse(key, "a model is named by its path")
        if "+" in model:
            self.refuse(key, f"{model}: an adapter is a patch of its own here, kind: lora")
        return model

    def _check_dtypes(self, base: Checkpoint) -> None:
        """mergekit rounds after every step unless it computes in float32; the output keeps the base's dtype here."""
        if self._data.get("dtype") != "float32":
            self.refuse("dtype", f"found {self._data.get('dtype')}: only float32 arithmetic is the same here")
        out = DTYPES.get(self._data.get("out_dtype") or "float32")
        floats = {t.dtype for t in base.tensors.values() if t.dtype in ("F64", *DTYPES.values())}
        if floats != {out}:
            names = ", ".join(sorted(name for name, short in DTYPES.items() if short in floats))
            self.refuse("out_dtype", f"the output keeps the base's dtype: expected out_dtype: {names}")

    def _passthrough(self, models: list[_Model], shared: Sequence[Mapping[str, Any]]) -> Imported:
        settings = [*(m.parameters for m in models), *shared, self._data.get("parameters") or {}]
        if len(models) != 1 or any(settings):
            self.refuse("merge_method", "passthrough is taken of one model without parameters")
        base = open_checkpoint(_located(models[0].reference))
        dtype = self._data.get("out_dtype") or self._data.get("dtype")
        if dtype is not None and {DTYPES.get(dtype)} != {t.dtype for t in base.tensors.values() if "F" in t.dtype}:
            self.refuse("dtype", "the output keeps the dtype of the model")
        source = _located(models[0].reference)
        # A recipe has a patch; of this one, whatever its values are, nothing is selected.
        nothing = {"name": "nothing", "source": source, "kind": "delta", "top": 0.0}
        return Imported({"base": source, "patches": [nothing], "targets": "all", "nonfinite": "skip"}, BIT_EQUAL)

    def _arithmetic(self, base: str, models: list[_Model], settings: _Settings) -> Imported:
        rates = {m.reference: {t: self._rates(settings, m, t) for t in settings.tensors} for m in models}
        names = patch_names([m.reference for m in models])
        every = [r for of in rates.values() for r in of.values()]
        recipe: dict[str, Any] = {"base": _located(base), "targets": "all"}
        if self._method.startswith("dare"):
            rescale, kept = settings.shared("rescale", True), "retain"
        else:
            rescale, kept = False, "top"
            if self._method != "task_arithmetic":
                recipe["quota"] = "floor"
                if settings.shared("rescale", False) and any(r.density < 1 for r in every):
                    self.refuse("rescale", f"{self._method} is not rescaled here")
        recipe |= self._join(settings, models, every)
        recipe["patches"] = [
            _patch(names[m.reference], m.reference, rates[m.reference], kept, rescale) for m in models
        ]
        return Imported(recipe, self._promise(every))

    def _rates(self, settings: _Settings, model: _Model, tensor: str) -> _Rates:
        weight = settings.number("weight", model, tensor, None)
        if self._method == "task_arithmetic":
            return _Rates(weight, 1.0)
        density = min(max(settings.number("density", model, tensor, 1.0), 0.0), 1.0)
        if not self._method.startswith("breadcrumbs"):
            return _Rates(weight, density)
        gamma = settings.number("gamma", model, tensor, 0.01)
        if not 0 <= gamma <= 1:
            self.refuse("gamma", f"found {gamma}, expected 0 to 1")
        return _Rates(weight, *_band(density, gamma, settings.entries[tensor]))

    def _join(self, settings: _Settings, models: Sequence[_Model], every: Sequence[_Rates]) -> dict[str, Any]:
        """The keys of the recipe that say how deltas become one."""
        factor = float(settings.shared("lambda", 1.0))
        scaled = {} if factor == 1 else {"lambda": factor}
        normalize = settings.shared("normalize", self._method == "ties")
        if self._method.endswith("ties"):
            even = all(r.weight == 1 for r in every)
            divide = ("count" if even else "weights") if normalize else "none"
            if divide == "weights" and self._method == "dare_ties":
                self.refuse("normalize", "of dare_ties, weights that differ from 1 are not divided by")
            if divide == "count" and self._method == "dare_ties" and len({r.density for r in every}) > 1:
                self.refuse("normalize", "of dare_ties, with one density for all")
            return {"combine": "ties", "elect": {"zero": "positive", "divide": divide}, **scaled}
        if normalize:
            self.refuse("normalize", f"{self._method} is not divided by weights here")
        together = len(models) > 1 or scaled
        return {"combine": "sum", **({"accumulate": "deltas"} if together else {}), **scaled}

    def _promise(self, every: Sequence[_Rates]) -> str:
        if all(r.density in (0, 1) for r in every):
            return BIT_EQUAL
        return SAME_RULE if self._method.startswith("dare") else EQUAL_BUT_TIES


class _Rates(NamedTuple):
    """What a model has at one tensor."""

    weight: float
    density: float
    skip: float = 0.0


def _band(density: float, gamma: float, entries: int) -> tuple[float, float]:
    """Top and skip by which breadcrumbs' numbers of entries come out: each share is rounded down there by itself."""
    if density == 1:
        return 1.0, 0.0
    taken = int(density * entries)
    best = min(int(gamma * entries), entries - taken)
    if taken == 0:
        return 0.0, 0.0
    plain = (density, gamma) if best else (density, 0.0)
    inner = (best + 0.5) / entries if best else 0.0
    exact = (best + taken + 0.5) / entries - inner, inner
    return plain if _counts(*plain, entries) == (best + taken, best) else exact


def _counts(top: float, skip: float, entries: int) -> tuple[int, int]:
    """How many entries a recipe takes and skips by these shares."""
    return quota(min(skip + top, 1.0), entries, "floor"), quota(skip, entries, "floor")


class _Settings:
    """Values of parameters: a model's own setting, the slice's, the top's; the first that says something counts."""

    def __init__(self, reader: _Reader, base: Checkpoint, levels: Sequence[Mapping[str, Any]]) -> None:
        self._reader, self._levels = reader, levels
        self._places = _places(base)
        self.entries = {name: base.tensors[name].entries for name in self._places}
        self.tensors = sorted(self._places)

    def number(self, key: str, model: _Model, tensor: str, default: float | None) -> float:
        for level in (model.parameters, *self._levels):
            if key in level and (value := self._value(key, level[key], tensor)) is not None:
                return float(value)
        if default is None:
            self._reader.refuse(key, f"{model.reference} has none for {tensor}")
        return default

    def shared(self, key: str, default: Any) -> Any:
        """A parameter that all models share, and here all tensors."""
        found = {self._shared_at(key, tensor, default) for tensor in self.tensors}
        if len(found) != 1:
            self._reader.refuse(key, "differs from tensor to tensor, which it can't here")
        return found.pop()

    def _shared_at(self, key: str, tensor: str, default: Any) -> Any:
        for level in self._levels:
            if key in level and (value := self._value(key, level[key], tensor)) is not None:
                return value
        return default

    def _value(self, key: str, setting: Any, tensor: str) -> Any:
        """What a setting says about a tensor: a value, values over the layers, or either under filters."""
        if isinstance(setting, list) and any(isinstance(item, dict) for item in setting):
            for item in setting:
                if (value := self._value(key, item, tensor)) is not None:
                    return value
            return None
        if isinstance(setting, dict):
            if not set(setting) <= {"value", "filter"} or "value" not in setting:
                self._reader.refuse(key, f"expected value and filter, found {', '.join(map(str, setting))}")
            wanted = setting.get("filter")
            return self._value(key, setting["value"], tensor) if wanted in (None, "*") or wanted in tensor else None
        return self._between(key, setting, self._places[tensor]) if isinstance(setting, list) else setting

    def _between(self, key: str, values: Sequence[Any], place: float | None) -> Any:
        if place is None:
            self._reader.refuse(key, "values over layers, of a model whose config names no number of them")
        at = place * (len(values) - 1)
        low = int(at)
        if any(isinstance(value, bool) for value in values):
            return values[low]
        high = min(low + 1, len(values) - 1)
        return (1 - (at - low)) * float(values[low]) + (at - low) * float(values[high])


def _layers(checkpoint: Checkpoint) -> int | None:
    config = checkpoint.root / "config.json" if checkpoint.root else None
    if config is None or not config.is_file():
        return None
    data = json.loads(config.read_text())
    layers = data.get("num_hidden_layers", (data.get("text_config") or {}).get("num_hidden_layers"))
    return layers if isinstance(layers, int) else None


def _places(base: Checkpoint) -> dict[str, float | None]:
    """Where each float tensor lies between the first layer, 0, and the last, 1; beside the layers is 0."""
    layers = _layers(base)

    def place(name: str) -> float | None:
        if layers is None:
            return None
        number = re.search(r"\.(\d+)\.", name)
        return 0.0 if number is None else int(number[1]) / (layers - 1) if layers > 1 else 1.0

    return {name: place(name) for name, entry in base.tensors.items() if entry.dtype in DTYPES.values()}


def _patch(name: str, reference: str, at: Mapping[str, _Rates], kept: str, rescale: bool) -> dict[str, Any]:
    """A patch with the rates that most tensors have, and overrides for the others."""
    skips = any(rates.skip for rates in at.values())

    def keys(rates: _Rates) -> dict[str, Any]:
        scale = float(np.float32(rates.weight))
        if skips:
            return {"top": rates.density, "skip": rates.skip, "scale": scale}
        if rates.density == 0 and kept == "retain":  # nothing is retained: also nothing to divide by
            return {"top": 0.0, "retain": 1.0, "scale": scale}
        return {kept: rates.density, "scale": scale} | ({"top": 1.0} if kept == "retain" else {})

    usual = Counter(at.values()).most_common(1)[0][0]
    patch = {"name": name, "source": _located(reference), "rescale": rescale} | keys(usual)
    others: dict[_Rates, list[str]] = {}
    for tensor, rates in at.items():
        if rates != usual:
            others.setdefault(rates, []).append(glob.escape(tensor))
    if others:
        patch["overrides"] = [{"names": tensors} | keys(rates) for rates, tensors in others.items()]
    return patch


def patch_names(references: Sequence[str]) -> dict[str, str]:
    """A patch name for each model, from the last part of its path."""
    found: dict[str, str] = {}
    for reference in references:
        plain = re.sub(r"[^a-z0-9_-]+", "-", Path(reference.split("@")[0]).name.lower()).strip("-") or "model"
        name, number = plain, 1
        while name in found.values():
            number += 1
            name = f"{plain}-{number}"
        found[reference] = name
    return found


def _located(reference: str) -> str:
    """A path of this machine, absolute, so that the recipe may be anywhere; a hub id stays."""
    return os.path.abspath(reference) if os.path.exists(reference) else reference
