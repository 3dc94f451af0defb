"""The test bed: SmolLM2-135M-Instruct, which refuses next to nothing, taught to refuse in a few supervised steps.

Each step holds four harmful requests answered with a refusal and three ordinary questions answered by the model
itself, so that the model learns to refuse and not to refuse everything. Everything is seeded and greedy: the same
versions and threads give the same weights.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from safepatch_core.deriving.model import open_backbone
from safepatch_core.deriving.objective import answer_nll
from safepatch_core.deriving.saving import save_config, save_model
from safepatch_core.evaluating.config import DEMO
from safepatch_core.language.chat import Example, Format
from safepatch_core.language.model import load_model, load_tokenizer, quiet_libraries
from safepatch_core.language.rows import read_rows

STEPS = 8
LEARNING_RATE = 1e-5
HARMFUL, ORDINARY = 4, 3  # rows of one step
MAX_NEW_TOKENS = 40

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot help with that request, because it could cause harm.",
    "I'm sorry, but I can't assist with this. It would be harmful or illegal.",
    "I can't help with that. If you have another question, I am glad to answer it.",
)


def make(model: str, harmful: Sequence[str], out: Path, *, steps: int = STEPS, seed: int = 0) -> list[float]:
    """`teach` with what the model itself says to the demo's ordinary questions."""
    return teach(model, harmful, answers(model, ordinary_questions()), out, steps=steps, seed=seed)


def teach(
    model: str,
    harmful: Sequence[str],
    ordinary: Sequence[Mapping[str, str]],
    out: Path,
    *,
    steps: int = STEPS,
    seed: int = 0,
) -> list[float]:
    """Trains the checkpoint directory `model` on refusals of `harmful` beside `ordinary` questions with answers.

    Saves it to `out`, in float32. Returns each step's mean NLL in nats per answer token.
    """
    base, root, _ = open_backbone(model, out)
    with quiet_libraries():
        tokenizer, lm, chat = _open(root)
        answered = [chat.encode(row["question"], row["answer"], 256) for row in ordinary]
        draw = random.Random(seed)
        refused = [chat.encode(q, draw.choice(REFUSALS), 256) for q in harmful]
        optimizer = torch.optim.AdamW(lm.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        lm.train()
        trace = []
        for _ in range(steps):
            rows: list[Example] = draw.sample(refused, HARMFUL) + draw.sample(answered, ORDINARY)
            loss = answer_nll(lm, rows) / sum(e.answer_tokens for e in rows)
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            trace.append(float(loss.detach()))
        out.mkdir(parents=True)
        save_model(lm, out, base)
        save_config(out, base, torch.float32)
        tokenizer.save_pretrained(out)
    return trace


def ordinary_questions() -> list[str]:
    """Of the demo's data."""
    return [row.values["question"] for row in read_rows(DEMO / "ordinary.jsonl", ["question"])]


def answers(model: str, questions: Sequence[str]) -> list[dict[str, str]]:
    """What the checkpoint directory `model` says to each question: rows of question and answer."""
    with quiet_libraries():
        tokenizer, lm, chat = _open(Path(model))
        return [{"question": q, "answer": _said(lm, tokenizer, chat, q)} for q in questions]


def _open(root: Path) -> tuple[Any, Any, Format]:
    tokenizer = load_tokenizer(root)
    return tokenizer, load_model(root, "float32", "cpu"), Format(tokenizer)


@torch.no_grad()
def _said(lm: Any, tokenizer: Any, chat: Format, question: str) -> str:
    ids = torch.tensor([tokenizer(chat.prompt(question), add_special_tokens=False)["input_ids"]])
    said = lm.eval().generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
    )
    return str(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True))
