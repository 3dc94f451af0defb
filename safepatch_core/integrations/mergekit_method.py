"""`merge_method: safepatch` for mergekit: importing this module registers it.

`python -m safepatch_core.integrations.mergekit_method CONFIG OUT` is mergekit-yaml that knows it. mergekit has no
place for scores files, so importance is magnitude; it holds tensors whole, and so does this.
"""

# Not `from __future__ import annotations`: mergekit reads the signature.
import torch
from mergekit.merge_methods import (
    BasePolicy,
    InputContract,
    PerNonBase,
    TensorGroup,
    merge_method,
    register,
    registered_methods,
)

from safepatch_core.integrations.mergekit import patch_names
from safepatch_core.integrations.state_dicts import merge_state_dicts


@merge_method(  # type: ignore[untyped-decorator]
    name="safepatch", uses_accelerator=False, contract=InputContract(base=BasePolicy.REQUIRED)
)
def safepatch(
    group: TensorGroup,
    weight: PerNonBase[float] = 1.0,
    top: PerNonBase[float] = 1.0,
    retain: PerNonBase[float] = 1.0,
    combine: str = "difference",
    seed: int = 0,
) -> torch.Tensor:
    """One output tensor: the patches are the models beside the base, in the order of the configuration."""
    names = patch_names([str(entry.id) for entry in group.non_base])
    patches = {names[str(entry.id)]: {group.metadata.name: entry.tensor} for entry in group.non_base}
    rates = [
        {"name": names[str(e.id)], "scale": weight[e.id], "top": top[e.id], "retain": retain[e.id]}
        for e in group.non_base
    ]
    recipe = {"patches": rates, "combine": combine, "seed": seed, "targets": "all"}
    base = {group.metadata.name: group.base.tensor}
    return merge_state_dicts(base, patches, recipe)[group.metadata.name]


if "safepatch" not in {method.spec.name for method in registered_methods()}:
    register(safepatch)

if __name__ == "__main__":
    from mergekit.scripts.run_yaml import main

    main()
