"""Tiny random language models with a byte-level tokenizer, made on the spot."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from safepatch_core.deriving import DeriveConfig
from safepatch_core.deriving.loop import Outcome, train
from safepatch_core.deriving.objective import Objective
from safepatch_core.language.chat import Example, Format
from safepatch_core.progress import Progress

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(template: str | None = CHATML, merges: tuple[tuple[str, str], ...] = ()) -> Any:
    """One token per byte, plus `merges`; <|im_start|> is the beginning of sequence, <|im_end|> its end."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    core = Tokenizer(models.BPE(vocabulary, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<pad>")])
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


def tiny_llama() -> Any:
    """Two layers, 32 wide, tied embeddings; the same weights each time."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            vocab_size=264,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
    )
    for parameter in model.parameters():  # the default initialisation leaves a model too flat to learn in a few steps
        parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model


def write_lm(folder: Path, dtype: torch.dtype = torch.float32, template: str | None = CHATML) -> Path:
    """A checkpoint directory with its tokenizer."""
    tiny_llama().to(dtype).save_pretrained(folder)
    tiny_tokenizer(template).save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int = 6) -> Path:
    """Short JSONL rows of different lengths."""
    rows = [{"question": f"What is {'x' * (i % 3)}{i}?", "answer": f"Sure, {i * 7} it is."} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples(count: int) -> list[Example]:
    """Rows of different lengths, as the tiny tokenizer reads them."""
    chat = Format(tiny_tokenizer())
    return [chat.encode(f"What is {i}?", f"Sure, {i}{'.' * i}", 256) for i in range(count)]


def train_safety(
    model: Any,
    rows: Sequence[Example],
    config: DeriveConfig,
    objective: Objective,
    *,
    bound: float | None = None,
    **more: Any,
) -> tuple[Outcome, list[Any]]:
    """Trains the model as the run's safety patch; returns the outcome and the trace's records."""
    trace = io.StringIO()
    with Progress("train", config.safety.max_steps or 1, quiet=True, report=None) as progress:
        outcome = train(
            model,
            rows,
            config,
            config.safety,
            objective=objective,
            bound=bound,
            trace=trace,
            progress=progress,
            **more,
        )
    return outcome, [json.loads(line) for line in trace.getvalue().splitlines()]
