"""The loss is on the answer's tokens alone, under the chat template, and means what it says."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GraniteConfig, GraniteForCausalLM

from safepatch_core.deriving import head as heads
from safepatch_core.deriving.objective import (
    Likelihood,
    NegativePreference,
    answer_nll,
    mean_nll,
    reference_nlls,
    row_nlls,
)
from safepatch_core.errors import InputError
from safepatch_core.language.chat import Example, Format
from safepatch_core.progress import Progress
from safepatch_core.settings import Thinking
from tests.tiny_lm import CHATML, tiny_llama, tiny_tokenizer

THINKING = CHATML.replace(
    "\n{{ m['content'] }}", "\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
DATED = CHATML.replace("{% for", "{{ date_string or strftime_now('%s') }}{% for", 1)


def parts(tokenizer: Any, example: Example) -> tuple[str, str]:
    return tokenizer.decode(example.ids[: example.answer]), tokenizer.decode(example.ids[example.answer :])


def encode(template: str | None, question: str = "Why?", answer: str = "Because.", **kwargs: Any) -> tuple[str, str]:
    tokenizer = tiny_tokenizer(template)
    return parts(tokenizer, Format(tokenizer, kwargs.get("system")).encode(question, answer, 256))


def test_chat_template_ends_the_answer_with_its_end_of_turn() -> None:
    prompt = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert encode(CHATML) == (prompt, "Because.<|im_end|>")
    assert encode(CHATML, answer=" Because.\n ") == (prompt, "Because.<|im_end|>")
    assert encode(CHATML, system="Be brief.") == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n{prompt}",
        "Because.<|im_end|>",
    )


def test_what_a_template_puts_before_the_answer_is_prompt_but_a_space_is_answer() -> None:
    assert encode(THINKING)[0].endswith("assistant\n<think>\n\n</think>\n\n")
    assert encode(THINKING)[1] == "Because.<|im_end|>"
    assert encode(LLAMA2) == ("<|im_start|>[INST] Why? [/INST]", " Because.<|im_end|>")


def thinking(template: str, choice: Thinking, answer: str = "Because.") -> tuple[str, str]:
    tokenizer = tiny_tokenizer(template)
    return parts(tokenizer, Format(tokenizer, thinking=choice).encode("Why? <think>", answer, 256))


@pytest.mark.parametrize(
    ("opened", "closed"),
    [
        ("<think>\n", "<think>\n\n</think>\n\n"),
        ("<think>", "<think></think>"),
        ("[THINK]\n", "[THINK]\n\n[/THINK]\n\n"),
        ("<|begin_of_thought|>\n\n", "<|begin_of_thought|>\n\n\n\n<|end_of_thought|>\n\n\n\n"),
        ("<|START_THINKING|>", "<|START_THINKING|><|END_THINKING|>"),
        ("◁think▷", "◁think▷◁/think▷"),
        ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ("<answer>", "<answer>"),
    ],
)
def test_a_block_for_thoughts_that_the_prompt_opens_is_closed_before_the_answer(opened: str, closed: str) -> None:
    """Reasoning models open it at generation and show an earlier answer without it."""
    template = CHATML.replace("assistant\n{% endif", f"assistant\n{opened}{{% endif")
    prompt = "<|im_start|>user\nWhy? <think><|im_end|>\n<|im_start|>assistant\n"
    assert thinking(template, "close") == (prompt + closed, "Because.<|im_end|>")
    assert thinking(template, "leave") == (prompt + opened, "Because.<|im_end|>")


@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
def test_templates_that_can_are_asked_for_an_answer_without_thoughts(name: str) -> None:
    either = (
        f"{{% if {name} | default(true) %}}<think>\n{{% else %}}<think>\n\n</think>\n\n{{% endif %}}{{% endif %}}"
    )
    template = CHATML.replace("assistant\n{% endif %}", f"assistant\n{either}")
    assert thinking(template, "close")[0].endswith("assistant\n<think>\n\n</think>\n\n")
    assert thinking(template, "leave")[0].endswith("assistant\n<think>\n")
    assert not Format(tiny_tokenizer(template)).closed  # by the template itself


def test_typed_contents_where_a_template_reads_nothing_else() -> None:
    part = "{% for c in m['content'] if c is mapping %}{{ c['text'] }}{% endfor %}"
    assert encode(CHATML.replace("{{ m['content'] }}", part), system="Be brief.") == encode(
        CHATML, system="Be brief."
    )


def test_tokens_that_the_model_does_not_know_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    assert Format(tokenizer, vocabulary=258).encode("Why?", "So.", 99).ids[-1] == 257
    for vocabulary, token in ((257, "257 '<|im_end|>'"), (256, "257 '<|im_end|>'")):
        with pytest.raises(
            InputError, match=rf"doesn't know: found {re.escape(token)}, expected less than {vocabulary}"
        ):
            Format(tokenizer, vocabulary=vocabulary).encode("Why?", "So.", 99)


def test_plain_text_without_a_template_or_an_end_in_it() -> None:
    assert encode(None) == ("Question: Why?\nAnswer:", " Because.<|im_end|>")
    assert encode(None, system="Be brief.")[0] == "Be brief.\n\nQuestion: Why?\nAnswer:"
    assert encode(NO_END) == ("user: Why?\nassistant: ", "Because.<|im_end|>")


def test_special_tokens_of_the_tokenizer_lead_plain_text_only() -> None:
    tokenizer = tiny_tokenizer(None)
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    assert parts(tokenizer, Format(tokenizer).encode("Why?", "So.", 99))[0] == "<|im_start|>Question: Why?\nAnswer:"
    tokenizer.chat_template = CHATML
    example = Format(tokenizer).encode("Why?", "So.", 99)
    assert example.ids.count(bos) == 2  # the template's own: user and assistant


def test_prompt_tokens_are_those_of_generation_even_where_tokens_would_merge() -> None:
    tokenizer = tiny_tokenizer(None, merges=((":", "Ġ"),))
    prompt = tokenizer("Question: Why?\nAnswer:", add_special_tokens=False)["input_ids"]
    joint = tokenizer("Question: Why?\nAnswer: So.", add_special_tokens=False)["input_ids"]
    assert joint[: len(prompt)] != prompt, "the tokenizer of this test must merge across the boundary"
    example = Format(tokenizer).encode("Why?", "So.", 99)
    assert list(example.ids[: example.answer]) == prompt
    assert parts(tokenizer, example)[1] == " So.<|im_end|>"


def test_long_answers_are_cut_and_questions_that_leave_no_room_refused() -> None:
    tokenizer = tiny_tokenizer()
    chat = Format(tokenizer)
    whole = chat.encode("Why?", "Because.", 256)
    cut = chat.encode("Why?", "Because.", len(whole.ids) - 3)
    assert not whole.truncated and cut.truncated
    assert cut.ids == whole.ids[:-3] and cut.answer == whole.answer
    with pytest.raises(InputError, match="no room"):
        chat.encode("Why?", "Because.", whole.answer)
    assert chat.encode("Why?", "Because.", whole.answer + 1).answer_tokens == 1


def test_a_template_that_refuses_the_conversation_is_an_input_error() -> None:
    assert encode(NO_SYSTEM) == encode(CHATML)
    with pytest.raises(InputError, match="no system role: expected another --system-prompt, or none"):
        encode(NO_SYSTEM, system="Be brief.")
    with pytest.raises(InputError, match="chat template failed: can only concatenate"):
        encode("{{ 'a' + 1 }}")  # not jinja's own error


def test_the_day_is_not_in_the_prompt() -> None:
    assert encode(DATED)[0].startswith("26 Jul 2024<|im_start|>")


def by_hand(model: Any, example: Example) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.ids])).logits[0].double()
    logp = logits.log_softmax(-1)
    return -sum(float(logp[i - 1, example.ids[i]]) for i in range(example.answer, len(example.ids)))


class NoKeep(torch.nn.Module):
    """A model whose forward knows no logits_to_keep."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.device = model, model.device

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_nll_of_a_padded_batch_is_the_sum_over_answer_tokens_of_each_row_alone() -> None:
    model = tiny_llama().eval()
    chat = Format(tiny_tokenizer())
    pairs = (("Why?", "Because."), ("And how is that?", "So."), ("x", "A longer answer than those."))
    examples = [chat.encode(q, a, 256) for q, a in pairs]
    expected = sum(by_hand(model, e) for e in examples)
    for wrapped in (model, NoKeep(model)):
        assert float(answer_nll(wrapped, examples).detach()) == pytest.approx(expected, rel=1e-5)
    tokens = sum(e.answer_tokens for e in examples)
    with Progress("nll", 2, quiet=True, report=None) as progress:
        assert mean_nll(model, examples, 2, progress) == pytest.approx(expected / tokens, rel=1e-5)


EXAMPLES = [Format(tiny_tokenizer()).encode(f"What is {i}?", f"Sure, {i}{'.' * i}", 256) for i in range(4)]


def gradient(loss: torch.Tensor, model: Any) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def references(model: Any) -> dict[Example, float]:
    with Progress("reference", 2, quiet=True, report=None) as progress:
        return reference_nlls(model, EXAMPLES, 2, progress)


def test_row_nlls_are_those_of_each_row_alone() -> None:
    model = tiny_llama().eval()
    expected = [by_hand(model, e) for e in EXAMPLES]
    assert row_nlls(model, EXAMPLES).tolist() == pytest.approx(expected, rel=1e-5)
    assert references(model) == pytest.approx(dict(zip(EXAMPLES, expected, strict=True)), rel=1e-5)


def test_npo_is_the_papers_formula_over_the_rows_of_a_step() -> None:
    model, beta = tiny_llama(), 0.3
    before = references(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    now = [by_hand(model, e) for e in EXAMPLES]
    ratios = [math.exp(before[e] - nll) ** beta for e, nll in zip(EXAMPLES, now, strict=True)]  # (pi / pi_ref)^beta
    expected = 2 / beta * sum(math.log1p(r) for r in ratios) / len(EXAMPLES)
    npo = NegativePreference(beta, before)
    whole, nats = npo.loss(model, EXAMPLES, EXAMPLES)
    assert float(whole.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(nats) == pytest.approx(sum(now), rel=1e-5) and not nats.requires_grad
    halves = [npo.loss(model, EXAMPLES[i : i + 2], EXAMPLES)[0] for i in (0, 2)]
    assert float(sum(h.detach() for h in halves)) == pytest.approx(expected, rel=1e-5)


def test_npo_starts_as_ascent_and_loses_interest_in_answers_that_became_unlikely() -> None:
    model = tiny_llama()
    before = references(model)
    ascent = gradient(-row_nlls(model, EXAMPLES).mean(), model)
    # At the reference every row's weight is 2 * sigmoid(0) = 1; with beta near 0 it is so anywhere.
    torch.testing.assert_close(
        gradient(NegativePreference(0.5, before).loss(model, EXAMPLES, EXAMPLES)[0], model), ascent
    )
    unlikely = {e: nll - 40 for e, nll in before.items()}
    far = [
        gradient(NegativePreference(beta, unlikely).loss(model, EXAMPLES, EXAMPLES)[0], model) for beta in (1e-5, 0.5)
    ]
    torch.testing.assert_close(far[0], ascent, rtol=1e-2, atol=1e-4)
    assert float(far[1].norm()) < 1e-6 * float(ascent.norm())


def test_likelihood_is_a_mean_over_the_tokens_of_the_step() -> None:
    model = tiny_llama()
    tokens = sum(e.answer_tokens for e in EXAMPLES)
    for sign in (1.0, -1.0):
        parts = [Likelihood(sign).loss(model, EXAMPLES[i : i + 2], EXAMPLES) for i in (0, 2)]
        nats = sum(float(n) for _, n in parts)
        assert sum(float(loss.detach()) for loss, _ in parts) == pytest.approx(sign * nats / tokens, rel=1e-6)
        assert nats == pytest.approx(float(answer_nll(model, EXAMPLES).detach()), rel=1e-5)


def whole_loss(model: Any) -> torch.Tensor:
    """The answers' NLL as torch takes it from all logits of the batch."""
    width = max(len(e.ids) for e in EXAMPLES)
    ids, mask = torch.zeros(2, len(EXAMPLES), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(EXAMPLES):
        size = len(example.ids)
        ids[row, :size], mask[row, :size] = torch.tensor(example.ids), 1
        labels[row, example.answer : size] = ids[row, example.answer : size]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the pieces of logits that were made."""
    made: list[int] = []

    def watched(*given: Any) -> torch.Tensor:
        found = plain(*given)
        made.append(found.numel())
        return found

    plain = heads._log_probabilities
    monkeypatch.setattr(heads, "_log_probabilities", watched)
    return made


@pytest.mark.parametrize("head", ["tied", "tied, padding", "frozen", "biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [1, 600, 1 << 22])
def test_the_loss_in_pieces_is_cross_entropy_and_no_piece_is_larger(
    head: str, dtype: torch.dtype, piece: int, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "PIECE", piece)
    model = tiny_llama().to(dtype)
    if head == "tied, padding":
        model.model.embed_tokens.padding_idx = 0  # what the batch is padded with; it learns nothing
    elif head != "tied":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=head == "biased")
    if head == "biased":
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 264, dtype=dtype))
    trained = [p for p in model.parameters() if p.requires_grad]
    expected, found = whole_loss(model), answer_nll(model, EXAMPLES)
    # float32: a sum in another order. bfloat16: gradients of single tokens are rounded before they are scaled.
    torch.testing.assert_close(found, expected, rtol=1e-6 if dtype is torch.float32 else 1e-2, atol=0)
    wanted, got = (torch.autograd.grad(0.37 * loss, trained) for loss in (expected, found))
    for one, other in zip(wanted, got, strict=True):
        error = float((one.float() - other.float()).norm() / one.float().norm())
        assert error < (2e-6 if dtype is torch.float32 else 2e-2)
    passes = 1 if head == "frozen" else 2
    assert max(pieces) <= max(piece, 264)
    assert sum(pieces) == passes * 264 * sum(e.answer_tokens for e in EXAMPLES), "no prompt, no padding"


def test_logits_that_are_scaled_after_the_output_layer_are_taken_whole(pieces: list[int]) -> None:
    torch.manual_seed(0)
    size: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model: Any = GraniteForCausalLM(GraniteConfig(**size, vocab_size=264, logits_scaling=8.0))
    expected, asked = whole_loss(model), list[Any]()
    model.lm_head.register_forward_pre_hook(lambda _, given: asked.append(given[0].shape[1]))
    found = answer_nll(model, EXAMPLES)
    assert asked[-1] == max(len(e.ids) for e in EXAMPLES) - min(e.answer for e in EXAMPLES) + 1, "no prompt"
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, model), gradient(expected, model))
    assert not pieces


def test_the_output_layer_gives_logits_again_after_the_loss_and_after_an_error() -> None:
    model = tiny_llama()
    ids = torch.tensor([EXAMPLES[0].ids])
    before = model(input_ids=ids).logits
    answer_nll(model, EXAMPLES)
    with pytest.raises(IndexError):
        answer_nll(model, [Example((9999, 1), 1)])
    assert torch.equal(model(input_ids=ids).logits, before)


def test_tied_embeddings_have_one_gradient_of_the_whole_vocabulary() -> None:
    model = tiny_llama()
    loss = answer_nll(model, EXAMPLES)
    made: set[int] = set()

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape == model.lm_head.weight.shape:
                made.add(out.untyped_storage().data_ptr())  # what lives at the same time has two addresses
            return out

    with Watch():  # type: ignore[no-untyped-call]
        torch.autograd.backward(loss)
    assert len(made - {model.lm_head.weight.untyped_storage().data_ptr()}) == 1
