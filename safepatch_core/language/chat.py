"""Questions and answers as the model sees them: its own chat template, token by token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safepatch_core.errors import InputError
from safepatch_core.language.model import first_line
from safepatch_core.language.rows import Row, place
from safepatch_core.settings import Thinking

# Some templates print today's date unless they are given one, and a run must not depend on the day.
TEMPLATE_DATE = "26 Jul 2024"
_MARK = "safepatch-answer"
_QUESTION = "question"
# What templates of reasoning models ask for by one name or the other: an answer without thoughts.
_NO_THOUGHTS = {"enable_thinking": False, "thinking": False}
# <think>, <|begin_of_thought|>, [THINK] and their like, with what is around the name.
_BLOCK = re.compile(
    r"([<\[◁]\|?)((?:begin|start)?[^\s<>\[\]◁▷|/]*(?:think|thought|reason)[^\s<>\[\]◁▷|]*)(\|?[>\]▷])", re.IGNORECASE
)
_BEGINS = re.compile(r"begin|start", re.IGNORECASE)


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

    Without a chat template the text is "Question: …\\nAnswer: …".

    Args:
        tokenizer: The model's, as transformers opens it.
        system_prompt: A system message before each question; None for the template's own, if it has one.
        thinking: Some templates end the prompt inside a block for the model's thoughts. close: the template is asked
            for an answer without thoughts, and a block that is still open is closed; leave: all is as the template
            has it, and the answer may stand where thoughts belong.
        vocabulary: How many token ids the model knows; None if they are not to be checked.

    Attributes:
        closed: Whether a block for thoughts is closed here, which the template leaves open.

    Raises:
        InputError: The template refuses the conversation (some know no system message), or the tokenizer has neither
            a template's end of turn nor an end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: Any,
        system_prompt: str | None = None,
        *,
        thinking: Thinking = "close",
        vocabulary: int | None = None,
    ) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._system = [] if system_prompt is None else [("system", system_prompt)]
        self._variables = _NO_THOUGHTS if thinking == "close" else {}
        self._chat = bool(getattr(tokenizer, "chat_template", None))
        self._typed = False
        self._lead: list[int] = []
        opening, closing = " ", ""
        self.closed = False
        if self._chat:
            opening, closing = self._around_the_answer()
            end = _end_of_thoughts(self._user(_QUESTION).rpartition(_QUESTION)[2] + opening)
            if thinking == "close" and end:
                self.closed, opening = True, opening + end
        elif tokenizer.bos_token_id is not None and self._ids("a", special=True)[:1] == [tokenizer.bos_token_id]:
            self._lead = [tokenizer.bos_token_id]
        # What a template puts before the answer (an empty thinking block) belongs to the prompt; a mere space
        # belongs to the answer's first token.
        answer_lead = opening[len(opening.rstrip(" ")) :]
        self._opening, self._answer_lead = opening[: len(opening) - len(answer_lead)], answer_lead
        self._end = self._end_of_turn(closing)

    @property
    def end(self) -> int:
        """How many tokens end an answer."""
        return len(self._end)

    def prompt(self, question: str) -> str:
        """The text up to the answer, as it stands at generation."""
        if self._chat:
            text = self._user(question)
        else:
            text = "".join(f"{content}\n\n" for _, content in self._system) + f"Question: {question}\nAnswer:"
        return text + self._opening

    def encode(self, question: str, answer: str, max_length: int) -> Example:
        """The row's tokens, at most `max_length` of them (the answer is cut at its end).

        The prompt's tokens are always those of the prompt alone, as at generation: where tokenising prompt and answer
        together would merge across the boundary, they are tokenised apart.

        Raises:
            InputError: No answer token fits, or there is a token that the model doesn't know.
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
        self.check(ids[:max_length])
        return Example(tuple(ids[:max_length]), start, len(ids) > max_length)

    def check(self, ids: Sequence[int]) -> None:
        """Raises InputError if the model doesn't know one of the ids: the tokenizer is another's, or has grown."""
        if self._vocabulary is not None and max(ids, default=0) >= self._vocabulary:
            token = self._tokenizer.convert_ids_to_tokens(max(ids))
            raise InputError(
                "a token that the model doesn't know",
                found=f"{max(ids)} '{token}'",
                expected=f"less than {self._vocabulary}, as many as it has",
            )

    def _around_the_answer(self) -> tuple[str, str]:
        """What the template puts before an answer beside the prompt, and after it."""
        for self._typed in (False, True):
            text = self._render([*self._system, ("user", _QUESTION), ("assistant", _MARK)], False)
            head, found, closing = text.rpartition(_MARK)
            if found:
                prompt = self._user(_QUESTION)
                return (head.removeprefix(prompt) if head.startswith(prompt) else ""), closing
        raise InputError("chat template does not show the assistant's answer")

    def _user(self, question: str) -> str:
        return self._render([*self._system, ("user", question)], True)

    def _render(self, messages: Sequence[tuple[str, str]], generate: bool) -> str:
        """The text of (role, content) messages; of typed ones for templates of models that read pictures too."""
        contents = [[{"type": "text", "text": text}] if self._typed else text for _, text in messages]
        chat = [{"role": role, "content": content} for (role, _), content in zip(messages, contents, strict=True)]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    chat,
                    tokenize=False,
                    add_generation_prompt=generate,
                    date_string=TEMPLATE_DATE,
                    **self._variables,
                )
            )
        except Exception as error:  # whatever a template makes jinja and transformers raise
            hint = "another --system-prompt, or none" if messages[0][0] == "system" else None
            raise InputError(f"chat template failed: {first_line(error)}", expected=hint) from error

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


def _end_of_thoughts(text: str) -> str:
    """What closes the block for thoughts that a prompt's last part leaves open; empty if there is none."""
    blocks = list(_BLOCK.finditer(text))
    if not blocks:
        return ""
    before, name, after = blocks[-1].groups()
    end = _BEGINS.sub(lambda word: "END" if word[0].isupper() else "end", name, count=1)
    closing = before + (f"/{name}" if end == name else end) + after
    rest = text[blocks[-1].end() :]
    space = text[len(text.rstrip()) :]
    return "" if closing in rest else f"{space}{closing}{space * 2}"


def encode_rows(chat: Format, path: str | Path, rows: Iterable[Row], max_length: int) -> list[Example]:
    """Rows with `question`, and `answer` or a stand-in where only the prompt matters, as the model sees them.

    Raises InputError, naming file and row, for one that it can't see.
    """
    examples = []
    for row in rows:
        try:
            examples.append(chat.encode(row.values["question"], row.values.get("answer", "-"), max_length))
        except InputError as error:
            raise InputError(f"{place(path, row.line)}: {error}", file=path) from error
    return examples
