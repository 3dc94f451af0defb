"""Two LoRA adapters merged by PEFT: `python peft_merge.py METHOD BASE FIRST SECOND OUT`.

A peer to measure against: load the base, combine the adapters with `add_weighted_adapter`, merge, save.
"""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

DENSITY = 0.3


def main() -> None:
    method, base, first, second, out = sys.argv[1:]
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), first, "first"
    )
    model.load_adapter(second, "second")
    density = None if method in ("linear", "cat") else DENSITY
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "both", combination_type=method, density=density)
    model.set_adapter("both")
    model.merge_and_unload().save_pretrained(out)


if __name__ == "__main__":
    main()
