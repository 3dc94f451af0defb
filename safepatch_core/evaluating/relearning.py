"""How few steps of fine-tuning on harmful rows undo a patch? Ordinary training, by the loop that `derive` has.

What hides an answer and what removes it look the same until somebody trains: the first comes back in a few steps.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import torch

from safepatch_core.deriving.config import DeriveConfig, OverSafetyPatch
from safepatch_core.deriving.loop import train
from safepatch_core.deriving.objective import Likelihood
from safepatch_core.errors import InputError, UsageError
from safepatch_core.evaluating.config import EvalConfig
from safepatch_core.evaluating.data import Prompts
from safepatch_core.evaluating.subject import Subject
from safepatch_core.language.chat import encode_rows
from safepatch_core.merging.recipe import of_language
from safepatch_core.progress import Progress

TRAINED = ("float32", "bfloat16")


def require_trainable(subject: Subject) -> None:
    """Raises UsageError if the model was loaded in a dtype that isn't trained in."""
    dtype = str(subject.model.dtype).removeprefix("torch.")
    if dtype not in TRAINED:
        raise UsageError("relearn trains in other dtypes", found=f"{dtype} weights", expected=" or ".join(TRAINED))


def relearn(
    subject: Subject, rows: Prompts, config: EvalConfig, look: Callable[[int], None], title: str, *, quiet: bool
) -> None:
    """Fine-tune the model in memory on `rows`: every weight of the language model, in an order that the seed tells.

    `look` is told of each step in `config.relearn_looks`, with the model in eval mode. The files stay as they are.
    Raises InputError for a row that can't be used, UsageError where training diverges.
    """
    model, looks = subject.model, set(config.relearn_looks)
    examples = encode_rows(subject.chat, rows.path, rows.rows, config.window.length)
    settings = DeriveConfig(
        model=str(subject.folder),
        data=str(rows.path),
        out=config.out,
        learning_rate=config.relearn_learning_rate,
        batch_size=config.relearn_batch_size,
        seed=config.seed,
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(of_language(name))

    def after(step: int) -> None:
        if step in looks:
            model.eval()
            try:
                look(step)
            except InputError as error:  # it was asked the same before
                rate = config.relearn_learning_rate
                raise UsageError(
                    f"after step {step} of relearning {error.what}: lower relearn_learning_rate", found=f"{rate:g}"
                ) from error

    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), Progress(title, config.relearn_steps, quiet=quiet, report=None) as progress:
        torch.manual_seed(config.seed)  # of dropout
        train(
            model,
            examples,
            settings,
            OverSafetyPatch(max_steps=config.relearn_steps),
            objective=Likelihood(1.0),
            bound=None,
            trace=io.StringIO(),
            progress=progress,
            after=after,
        )
