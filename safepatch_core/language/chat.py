"""Questions and answers as the model sees them: its own chat template, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safepatch_core.errors import InputError

# Some templates print today's date unless they are given one, and a run must not depend on the day.
TEMPLATE_DATE = "26 Jul 2024"
_MARK = "safepatch-answer"


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised row: `ids[answer:]` are the answer's tokens and the end of the turn."""

    ids: tuple[int, ...]
    answer: int
    truncated: bool = False

    @property
    def answer_tokens(self) -> int:
        return len(self.ids) - self.answer


class Format:
    """Turns (question, answer) into token ids the way the model sees them in a chat.

    Without a chat template the text is "Question: …\\nAnswer: …". Raises InputError if the template refuses the
    conversation (some know no system message) or the tokenizer has neither a template's end of turn nor an
    end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, system_prompt: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        self._chat = bool(getattr(tokenizer, "chat_template", None))
        self._lead: list[int] = []
        opening, closing = " ", ""
        if self._chat:
            user = {"role": "user", "content": "question"}
            text = self._render([*self._system, user, {"role": "assistant", "content": _MARK}], False)
            head, found, closing = text.rpartition(_MARK)
            if not found:
                raise InputError("chat template does not show the assistant's answer")
            prompt = self._render([*self._system, user], True)
            opening = head.removeprefix(prompt) if head.startswith(prompt) else ""
        elif tokenizer.bos_token_id is not None and self._ids("a", special=True)[:1] == [tokenizer.bos_token_id]:
            self._lead = [tokenizer.bos_token_id]
        # What a template puts before the answer (an empty thinking block) belongs to the prompt; a mere space
        # belongs to the answer's first token.
        answer_lead = opening[len(opening.rstrip(" ")) :]
        self._opening, self._answer_lead = opening[: len(opening) - len(answer_lead)], answer_lead
        self._end = self._end_of_turn(closing)

    def prompt(self, question: str) -> str:
        """The text up to the answer, as it stands at generation."""
        if self._chat:
            text = self._render([*self._system, {"role": "user", "content": question}], True)
        else:
            text = "".join(f"{m['content']}\n\n" for m in self._system) + f"Question: {question}\nAnswer:"
        return text + self._opening

    def encode(self, question: str, answer: str, max_length: int) -> Example:
        """The row's tokens, at most `max_length` of them (the answer is cut at its end).

        The prompt's tokens are always those of the prompt alone, as at generation: where tokenising prompt and answer
        together would merge across the boundary, they are tokenised apart. Raises InputError if no answer token fits.
        """
        text, reply = self.prompt(question), self._answer_lead + answer.strip()
        prompt = self._ids(text)
        ids = self._ids(text + reply)
        if ids[: len(prompt)] != prompt:
            ids = prompt + self._ids(reply)
        ids = [*self._lead, *ids, *self._end]
        start = len(self._lead) + len(prompt)
        if start >= max_length:
            raise InputError(
                "question leaves no room for an answer", found=f"{start} tokens", expected=f"max_length > {start}"
            )
        return Example(tuple(ids[:max_length]), start, len(ids) > max_length)

    def _render(self, messages: list[dict[str, str]], generate: bool) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generate, date_string=TEMPLATE_DATE
                )
            )
        except TemplateError as error:
            raise InputError(f"chat template failed: {error}") from error

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def _end_of_turn(self, closing: str) -> list[int]:
        """Ids from the answer's end up to the first special token of the template's closing, or end of sequence."""
        special = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        ids = self._ids(closing.strip())
        for position, token in enumerate(ids):
            if token in special:
                return ids[: position + 1]
        if self._tokenizer.eos_token_id is None:
            raise InputError("tokenizer has no end-of-sequence token")
        return [self._tokenizer.eos_token_id]
