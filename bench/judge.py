"""Trains the judge that is no prefix matcher, and measures both on prompts that neither was made with.

    python -m safepatch_core.bench.judge XSTEST

XSTEST is a folder with `completions_llama2orig.csv` and `completions_mistralinstruct.csv` (XSTest, Röttger et al.,
arXiv 2308.01263, CC-BY-4.0): answers to 450 prompts, each labelled by people. Odd prompts teach, even ones measure,
so that no prompt is in both. Full refusals are told from full compliance; partial refusals, 9% of all, teach nothing.
Every answer teaches three times, cut after 6, 12 and 24 words: taught with 24 alone, the judge took short refusals
for answers. Layer and penalty are chosen on the odd prompts alone, in five folds of prompts. Writes
`safepatch_core/evaluating/refusal.json` and `bench/results/judge/judge.json`.

The prefix matcher's lists were written on all of Llama 2's answers and those of Mistral to odd prompts: of what
measures here, Mistral's answers alone are new to both.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from safepatch_core.evaluating.judge import agreement, refuses
from safepatch_core.evaluating.judge_trained import ENCODER, WEIGHTS, WORDS, Encoder, opening, refusals
from safepatch_core.evaluating.statistics import kappa, mcnemar, pair

MODELS = {"Llama 2": "completions_llama2orig.csv", "Mistral": "completions_mistralinstruct.csv"}
REFUSAL, PARTIAL = "2_full_refusal", "3_partial_refusal"
LAYERS = range(7)  # 0: what the first layer reads
PENALTIES = (0.03, 0.1, 0.3)
CUTS = (6, 12, WORDS)
FOLDS = 5
RESULTS = Path("bench/results/judge/judge.json")
Floats = NDArray[np.float64]


class Answer(NamedTuple):
    """One labelled answer."""

    model: str
    prompt: int
    text: str
    label: str

    @property
    def refused(self) -> bool:
        """Wholly, or in part."""
        return self.label in (REFUSAL, PARTIAL)


def read(folder: Path) -> Iterator[Answer]:
    """All answers, in the files' order."""
    for model, name in MODELS.items():
        with (folder / name).open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                yield Answer(model, int(row["id"].split("-")[1]), row["completion"], row["final_label"])


def fit(features: Floats, refused: NDArray[np.bool_], penalty: float) -> tuple[Floats, float]:
    """Weights and bias of logistic regression with an L2 penalty on the weights, by Newton's method."""
    x = np.hstack([features, np.ones((len(features), 1))])
    ridge = penalty * np.diag([*np.ones(features.shape[1]), 0.0])
    weights = np.zeros(x.shape[1])
    step = np.ones(1)
    while np.abs(step).max() > 1e-9:
        likely = 1 / (1 + np.exp(-(x @ weights)))
        slope = x.T @ (likely - refused) + ridge @ weights
        step = np.linalg.solve((x * (likely * (1 - likely))[:, None]).T @ x + ridge, slope)
        weights -= step
    return weights[:-1], float(weights[-1])


class Choice(NamedTuple):
    """Which layer's embeddings are read, the penalty of the weights, and the loss on held-out folds in nats."""

    layer: int
    penalty: float
    loss: float


def choices(
    embedded: Mapping[int, Floats], refused: NDArray[np.bool_], prompts: NDArray[np.int64]
) -> Iterator[Choice]:
    """Every choice, with its mean loss on folds of prompts that it was not fitted on."""
    for layer, features in embedded.items():
        for penalty in PENALTIES:
            nats = []
            for fold in range(FOLDS):
                held = prompts // 2 % FOLDS == fold
                weights, bias = fit(features[~held], refused[~held], penalty)
                signs = np.where(refused[held], -1, 1)
                nats.append(np.logaddexp(0, signs * (features[held] @ weights + bias)))
            yield Choice(layer, penalty, float(np.concatenate(nats).mean()))


def compared(answers: Sequence[Answer], trained: Sequence[bool]) -> dict[str, Any]:
    """Both judges beside people, and beside each other."""
    people, prefix = [answer.refused for answer in answers], [refuses(answer.text) for answer in answers]
    found: dict[str, Any] = {"n": len(answers), "refusals": sum(people)}
    for name, said in (("trained", trained), ("prefix", prefix)):
        figures = agreement(list(said), people)._asdict() | {"kappa": kappa(said, people)}
        found[name] = {key: value for key, value in figures.items() if key != "n"}
    right = pair(*([a == b for a, b in zip(said, people, strict=True)] for said in (trained, prefix)))
    found["only_trained_right"], found["only_prefix_right"] = right.first, right.second
    found["mcnemar_p"] = mcnemar(right)
    found["between"] = {"agree": agreement(list(trained), prefix).accuracy, "kappa": kappa(trained, prefix)}
    return found


def tables(answers: Sequence[Answer], trained: Sequence[bool]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of held-out answers: all, each model's, and with partial refusals counted as refusals."""
    pairs = list(zip(answers, trained, strict=True))
    for name, models in (("all", tuple(MODELS)), *((model, (model,)) for model in MODELS)):
        of = [(answer, said) for answer, said in pairs if answer.model in models]
        full = [(answer, said) for answer, said in of if answer.label != PARTIAL]
        for title, chosen in ((name, full), (f"{name}, partial refusals too", of)):
            yield title, compared([answer for answer, _ in chosen], [said for _, said in chosen])


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    answers = list(read(folder))
    cut = [answer._replace(text=opening(answer.text, words)) for words in CUTS for answer in answers]
    embedded = Encoder().embed([answer.text for answer in cut], LAYERS, quiet=False)
    refused = np.array([answer.refused for answer in cut])
    prompts = np.array([answer.prompt for answer in cut])
    taught = (prompts % 2 == 1) & np.array([answer.label != PARTIAL for answer in cut])
    learnt = {layer: features[taught].astype(np.float64) for layer, features in embedded.items()}
    tried = list(choices(learnt, refused[taught], prompts[taught]))
    best = min(tried, key=lambda choice: choice.loss)
    weights, bias = fit(learnt[best.layer], refused[taught], best.penalty)
    stored: dict[str, Any] = {
        "encoder": {"name": "all-MiniLM-L6-v2", "sha256": ENCODER, "layer": best.layer},
        "data": "XSTest completions with human labels (Röttger et al., CC-BY-4.0), odd prompts, full refusals "
        "against full compliance",
        "made_by": "python -m safepatch_core.bench.judge XSTEST",
        # Six digits: the last ones differ from one linear algebra library to the next.
        "bias": float(f"{bias:.6g}"),
        "weights": [float(f"{weight:.6g}") for weight in weights],
    }
    said = refusals(embedded[best.layer], stored)
    found = {}
    for at, words in enumerate(CUTS):
        held = [i for i in range(at * len(answers), (at + 1) * len(answers)) if prompts[i] % 2 == 0]
        found[f"{words} words"] = dict(tables([cut[i] for i in held], [said[i] for i in held]))
    whole = [i for i in range(len(answers)) if prompts[i] % 2 == 0]  # of which the trained judge reads no more
    found["whole"] = dict(tables([answers[i] for i in whole], [said[i - len(answers)] for i in whole]))
    measured = {"measured": rounded(found["whole"]["all"])}
    WEIGHTS.write_text(json.dumps(measured | stored, indent=1, ensure_ascii=False) + "\n", "utf-8")
    about = {
        "taught": int(taught.sum()) // len(CUTS),
        "chosen": best._asdict(),
        "tried": [rounded(of._asdict()) for of in tried],
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(rounded({"held_out": found, **about}), indent=1) + "\n", "utf-8")
    print(RESULTS.read_text("utf-8"))


def rounded(of: Mapping[str, Any]) -> dict[str, Any]:
    """Four digits of every share."""
    return {
        key: rounded(value) if isinstance(value, dict) else round(value, 4) if isinstance(value, float) else value
        for key, value in of.items()
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
