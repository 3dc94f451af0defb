"""The loss is on the answer's tokens alone, under the chat template, and means what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safepatch_core.derive.objective import Example, Format, answer_nll, mean_nll
from safepatch_core.derive.progress import Progress
from safepatch_core.errors import InputError
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
    with pytest.raises(InputError, match="no system role"):
        encode(NO_SYSTEM, system="Be brief.")


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
