"""What a sweep is told, in the words of hyperparameter sweeps elsewhere: method, parameters, values, min, max."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from safepatch_core.settings import Strict

Finite = Annotated[float, Field(allow_inf_nan=False)]
ObjectiveWeight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Parameter(Strict):
    """The values that one key of the recipe may take: a list, or a range to draw from."""

    values: Annotated[list[Any], Field(min_length=1)] | None = None
    min: int | Finite | None = None
    max: int | Finite | None = None
    distribution: Literal["uniform", "log_uniform", "int_uniform"] = "uniform"

    @model_validator(mode="after")
    def _consistent(self) -> Parameter:
        ends = (self.min, self.max)
        if self.values is not None:
            if ends != (None, None) or "distribution" in self.model_fields_set:
                raise ValueError("either values, or min and max with a distribution")
            return self
        if self.min is None or self.max is None:
            raise ValueError("values, or both min and max, are needed")
        if self.min > self.max:
            raise ValueError("min is greater than max")
        if self.distribution == "log_uniform" and self.min <= 0:
            raise ValueError("log_uniform needs a positive min")
        if self.distribution == "int_uniform" and not all(isinstance(end, int) for end in ends):
            raise ValueError("int_uniform needs whole numbers as min and max")
        return self

    def at(self, share: float) -> Any:
        """The value at `share`, in [0, 1), of the way through the list or the range's distribution."""
        if self.values is not None:
            return self.values[int(share * len(self.values))]
        assert self.min is not None and self.max is not None
        if isinstance(self.min, int) and isinstance(self.max, int) and self.distribution == "int_uniform":
            return self.min + int(share * (self.max - self.min + 1))
        if self.distribution == "log_uniform":
            value = math.exp(math.log(self.min) + share * (math.log(self.max) - math.log(self.min)))
        else:
            value = self.min + share * (self.max - self.min)
        # Six digits: a recipe is read by people, and the last bits of exp differ between machines.
        return min(max(float(f"{value:.6g}"), float(self.min)), float(self.max))


class SweepConfig(Strict):
    """A search over a recipe's keys.

    `parameters` maps keys of the recipe to their values: `scope`, `order`, `combine`, `seed`, … or
    `patches.NAME.FIELD`, where `*` as NAME stands for every patch. `objectives` maps metrics of an evaluation to
    weights: the chosen trial has the smallest weighted sum (a metric that should be high counts negatively).
    `constraints` maps metrics to the share of the backbone's value by which a trial may be worse.
    """

    recipe: Annotated[str, Field(min_length=1)]
    method: Literal["grid", "random"]
    parameters: Annotated[dict[str, Parameter], Field(min_length=1)]
    trials: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    objectives: Annotated[dict[str, ObjectiveWeight], Field(min_length=1)] = {
        "harmful_compliance": 1.0,
        "over_refusal": 1.0,
    }
    constraints: dict[str, Share] = {"perplexity": 0.05}
    eval: dict[str, Any] = {}

    @model_validator(mode="after")
    def _finite(self) -> SweepConfig:
        if self.method == "grid":
            ranges = [key for key, parameter in self.parameters.items() if parameter.values is None]
            if ranges:
                raise ValueError(f"a grid needs values for '{ranges[0]}', not a range")
        elif self.trials is None:
            raise ValueError("random search needs trials, or --trials")
        return self
