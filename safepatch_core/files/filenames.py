"""Names of files that several rooms know."""

from __future__ import annotations

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# As diffusers calls them.
DIFFUSERS = "diffusion_pytorch_model.safetensors"
DIFFUSERS_INDEX = "diffusion_pytorch_model.safetensors.index.json"
MANIFEST = "safepatch.json"
SUMS = "SHA256SUMS"
# Of a checkpoint that fixes were applied to: which, kept copies of them, and its config while one is under way.
LEDGER = "safepatch-fixes.json"
KEPT = ".safepatch-fixes"
CONFIG = "config.json"
BUSY = "config.json.safepatch-busy"
# Of a PEFT adapter.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# The small files that belong to a model, as globs. Scripts, other weights and READMEs are not among them.
COMPANIONS: tuple[str, ...] = (
    *("*.json", "*.txt", "*.jinja", "*.model", "*.model.v*", "*.tiktoken", "*.spm", "*.bpe", "*.vocab"),
    *("*.codes", "*.tokenizer"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*", "License*", "license*", "Notice*", "notice*"),
)
