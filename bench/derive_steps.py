"""Some steps of full-parameter training.

`python derive_steps.py WHO MODEL WHAT STEPS BATCH LENGTH RECOMPUTE [DEVICE]`

WHO is safepatch or trainer, WHAT all or linear. Both train the same weights in float32 on the same random rows with
the same AdamW, unclipped. Prints JSON: the losses, the tokens and seconds of the steps after the first, and the peak
of resident memory over all steps, less what the process held once it had trained a tiny model, libraries and all. So
weights, optimiser state, gradients, activations, and what allocators keep, count; the program doesn't. On a GPU the
peak is that of its memory.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

PROMPT = 16  # tokens
RATE = 1e-5


def memory(key: str, device: str) -> int:
    """Bytes of VmRSS or VmHWM, its highest value so far; or what stands for them on a GPU."""
    if device != "cpu":
        return {"VmRSS": torch.cuda.memory_allocated, "VmHWM": torch.cuda.max_memory_allocated}[key](device)
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise LookupError(key)


class Now(NamedTuple):
    wall_s: float
    cpu_s: float


def now() -> Now:
    return Now(time.perf_counter(), time.process_time())


def rows(vocabulary: int, count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, vocabulary, (count, length), generator=generator).tolist()


def with_safepatch(model: Any, ids: list[list[int]], steps: int, batch: int, recompute: bool) -> tuple[Any, Any]:
    from io import StringIO

    from safepatch_core.deriving import DeriveConfig
    from safepatch_core.deriving.loop import train
    from safepatch_core.deriving.objective import Likelihood
    from safepatch_core.language.chat import Example
    from safepatch_core.progress import Progress

    config = DeriveConfig(
        model="-",
        data="-",
        out="-",
        learning_rate=RATE,
        batch_size=batch,
        optim="adamw_in_backward",
        max_grad_norm=None,
        gradient_checkpointing=recompute,
    )
    patch = config.over_safety.model_copy(update={"max_steps": steps})
    times, trace = [], StringIO()
    with Progress("steps", steps, quiet=True, report=lambda _: times.append(now())) as progress:
        train(
            model,
            [Example(tuple(row), PROMPT) for row in ids],
            config,
            patch,
            objective=Likelihood(1.0),
            bound=None,
            trace=trace,
            progress=progress,
        )
    return [json.loads(line)["nll"] for line in trace.getvalue().splitlines()], times


def with_trainer(model: Any, ids: list[list[int]], steps: int, batch: int, recompute: bool) -> tuple[Any, Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    times: list[Now] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(now())

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        given = torch.tensor([row["ids"] for row in batch])
        labels = given.clone()
        labels[:, :PROMPT] = -100
        return {"input_ids": given, "attention_mask": torch.ones_like(given), "labels": labels}

    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=0.0,
        gradient_checkpointing=recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_steps=1,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        use_cpu=model.device.type == "cpu",
    )
    data: Any = [{"ids": row} for row in ids]
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[Clock()])
    # What it prints of each step goes beside the result.
    out, sys.stdout = sys.stdout, sys.stderr
    trainer.train()
    sys.stdout = out
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], times


def main() -> None:
    who, folder, what = sys.argv[1:4]
    steps, batch, length, recompute = map(int, sys.argv[4:8])
    device = sys.argv[8] if len(sys.argv) > 8 else "cpu"
    import transformers
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    work = with_safepatch if who == "safepatch" else with_trainer
    logging: Any = transformers.logging
    logging.set_verbosity_error()
    small = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99
    )
    tiny: Any = LlamaForCausalLM(small)
    work(tiny.to(device), rows(99, batch, length), 2, batch, bool(recompute))
    before = memory("VmRSS", device)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(what == "all" or name.endswith("_proj.weight"))
    ids = rows(model.config.vocab_size, batch, length)  # one batch, again and again: the order doesn't matter
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # VmHWM starts anew
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    losses, times = work(model, ids, steps, batch, bool(recompute))
    print(
        json.dumps(
            {
                "losses": losses,
                "wall_s": times[-1].wall_s - times[0].wall_s,
                "cpu_s": times[-1].cpu_s - times[0].cpu_s,
                "tokens": batch * length * (steps - 1),
                "peak_bytes": memory("VmHWM", device) - before,
                "weight_bytes": sum(p.nbytes for p in model.parameters()),
                "state_bytes": sum(2 * p.nbytes for p in model.parameters() if p.requires_grad),
            }
        )
    )


if __name__ == "__main__":
    main()
