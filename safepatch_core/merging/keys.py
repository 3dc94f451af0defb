"""What each key of a recipe says, in one line: for editors (`safepatch schema`) and the reference."""

from __future__ import annotations

from typing import Any

from safepatch_core.merging.recipe import Recipe

KEYS = {
    "Recipe": {
        "base": "The checkpoint that is patched: a directory, a .safetensors file, or a hub id org/name[@revision].",
        "patches": "The patches, in the order in which their steps are added.",
        "combine": "Who acts where several patches hold an entry: difference (nobody), sum (all), ties (as elected).",
        "scope": "The share of top entries is taken of each tensor, or of all targets together.",
        "order": "Random retention before the top entries are taken, or of those that were taken.",
        "targets": "What is patched: linear (matrices but embeddings and head), language (the same without towers "
        "that see or hear), all (every float tensor), or names by globs.",
        "seed": "Of random retention; the same recipe and seed give the same bytes everywhere.",
        "nonfinite": "Whether a delta or score that is NaN or infinite stops the merge or is left out.",
        "missing": "Whether a target that a patch or its importance lacks stops the merge or is left out.",
        "max_shard_size": "Size of new shards, like 5GB; null keeps those of the base.",
        "lambda": "Factor of the sum of steps; with accumulate: deltas or combine: ties.",
        "accumulate": "Steps are added to the base one by one, or summed first and added once.",
        "elect": "How ties elects a sign and divides.",
        "quota": "Whether the number of top entries is rounded half to even, or down to at least one.",
        "quantized": "How a base whose weights are codes beside scales is merged into; else it is refused.",
    },
    "PatchSpec": {
        "name": "Unique; it is part of the random key.",
        "source": "A fine-tuned checkpoint, a checkpoint of deltas, or an adapter in PEFT's layout.",
        "kind": "What the source is. Default: lora where it has an adapter_config.json, else checkpoint.",
        "importance": "What entries are ranked by: the size of the step, a file of scores, or gradients.",
        "top": "Share of the entries of the scope that may act, those that rank highest.",
        "skip": "Share of the entries that rank highest and may not act; top is counted from behind them.",
        "retain": "Share of the entries that random retention keeps.",
        "rescale": "Divide the steps by retain, as DARE does.",
        "scale": "Factor of the steps.",
        "minus": "The checkpoint from which the change is measured, where that is not the base.",
        "rows": "Rows of embeddings and heads: all must be the base's, or those that both have are patched.",
        "agreement": "Entries may only be chosen where the signs of this patch's delta and another's fit.",
        "gate": "The patch has only tensors where the cosine of its delta and another patch's is in a range.",
        "overrides": "Other values for tensors by name; the first that matches counts.",
    },
    "Override": {
        "names": "Globs of tensor names, case-sensitive.",
        "top": "Instead of the patch's top.",
        "skip": "Instead of the patch's skip.",
        "retain": "Instead of the patch's retain.",
        "scale": "Instead of the patch's scale.",
    },
    "Agreement": {
        "patch": "The other patch, by its name.",
        "signs": "same: both move an entry up, or both down; opposite: one up, one down.",
    },
    "Gate": {
        "patch": "The other patch, by its name.",
        "least": "The smallest cosine that opens the gate.",
        "below": "The gate is open below this cosine.",
    },
    "Scores": {"scores": "A checkpoint of scores, at least 0, under the base's names."},
    "Gradients": {
        "gradients": "A checkpoint of gradients g; the score is |x · g|.",
        "weight": "x: the patched value, the base's, or the delta.",
    },
    "Globs": {
        "include": "Globs of names that are patched.",
        "exclude": "Globs of names that are not.",
    },
    "Quantized": {
        "reference": "What deltas are measured from: the dequantised base, or the float original of it, by its path.",
        "reference_dtype": "What a trainer was handed; values of the reference are rounded to it.",
        "rounding": "To a code: stochastic (unbiased), or nearest, which needs a reference file.",
        "saturate": "What a code can't hold becomes the largest it can, or stops the merge.",
        "survival": "What has to be left of each patch after rounding, from and to; else nothing is published.",
    },
    "Elect": {
        "zero": "Where the steps add up to 0: leave the entry, or take the positive ones.",
        "divide": "The elected steps are divided by their number, by their weights, or not at all.",
    },
}


def described_schema() -> dict[str, Any]:
    """The JSON Schema of recipes with a description of every key."""
    schema = Recipe.model_json_schema()
    for title, model in {"Recipe": schema, **schema.get("$defs", {})}.items():
        for key, found in model.get("properties", {}).items():
            if key in KEYS.get(title, {}):
                found["description"] = KEYS[title][key]
    return schema
