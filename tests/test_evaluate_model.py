"""What a model is asked and read for: the same numbers as a plain computation, whatever the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from safepatch_core.errors import InputError, UsageError
from safepatch_core.evaluating import EvalConfig, subject
from safepatch_core.evaluating.spans import Span, windows
from safepatch_core.evaluating.subject import Subject, locate, opened
from safepatch_core.language.model import load_model
from safepatch_core.progress import Progress
from tests.tiny_lm import tiny_llama, tiny_tokenizer, write_lm

PROMPTS = ["How do I kill a process?", "Hi", "Tell me about the sea, and please take your time. " * 2, "a b c"]


def settings(**changes: Any) -> EvalConfig:
    return EvalConfig.model_validate({"model": "m", "out": "o", "max_length": 128, "stride": 64, **changes})


def silent() -> Progress:
    return Progress("test", 1, quiet=True, report=None)


def write_gpt2(folder: Path) -> Path:
    """Learned positions and no chat template: what left padding gets wrong first."""
    torch.manual_seed(1)
    GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=264, n_positions=256, initializer_range=0.3)
    ).save_pretrained(folder)
    tiny_tokenizer(None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def tested(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    folder = tmp_path_factory.mktemp(request.param) / "lm"
    (write_lm if request.param == "llama" else write_gpt2)(folder)
    torch.set_num_threads(1)
    with opened(folder, settings()) as found:
        yield found


def prompts_of(tested: Subject) -> list[tuple[int, ...]]:
    examples = [tested.chat.encode(p, "-", 256) for p in PROMPTS]
    return [e.ids[: e.answer] for e in examples]


def greedy_tokens(tested: Subject, prompt: tuple[int, ...], ends: set[int], count: int) -> list[int]:
    """One prompt, no cache, no padding."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            token = int(tested.model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


def greedy(tested: Subject, prompt: tuple[int, ...], ends: set[int], count: int) -> str:
    tokens = greedy_tokens(tested, prompt, ends, count)
    return str(tested.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def plain_nll(tested: Subject, ids: list[int], start: int) -> float:
    """Sum of -log p(ids[start:]), in float64 from one unbatched pass."""
    with torch.no_grad():
        logits = tested.model(torch.tensor([ids])).logits[0].double()
    table = logits.log_softmax(-1)
    return -sum(float(table[at - 1, ids[at]]) for at in range(start, len(ids)))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_answers_are_those_of_plain_greedy_decoding(tested: Subject, batch_size: int) -> None:
    prompts = prompts_of(tested)
    config = settings(batch_size=batch_size, max_new_tokens=12)
    ends = {tested.tokenizer.eos_token_id}
    answers = tested.ask(prompts, ends, config, silent())
    assert answers == [greedy(tested, p, ends, 12) for p in prompts]
    assert len(set(answers)) > 1


def test_an_answer_ends_at_any_of_the_end_tokens(tested: Subject) -> None:
    prompts = prompts_of(tested)
    with torch.no_grad():
        first = int(tested.model(torch.tensor([prompts[0]])).logits[0, -1].argmax())
    ends = {first, tested.tokenizer.eos_token_id}
    answers = tested.ask(prompts, {first}, settings(max_new_tokens=12), silent())
    assert answers[0] == ""
    assert answers == [greedy(tested, p, ends, 12) for p in prompts]


@pytest.mark.parametrize("cached", [True, False])
def test_rows_that_have_ended_are_let_go(tested: Subject, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight prompts whose answers end at different tokens: the others' go on as if they had been asked alone."""
    if not cached:
        monkeypatch.setattr("transformers.DynamicCache", type("Other", (), {}))
    examples = [tested.chat.encode(f"{p} {i}", "-", 256) for i, p in enumerate(PROMPTS * 2)]
    prompts = [e.ids[: e.answer] for e in examples]
    said = [greedy_tokens(tested, p, {tested.tokenizer.eos_token_id}, 12) for p in prompts]
    early = next(t for t in sorted({*sum(said, [])}) if 4 <= sum(t in tokens[:10] for tokens in said) < 8)
    ends = {early, tested.tokenizer.eos_token_id}
    sizes, generate = [], tested.model.generate

    def counted(**given: Any) -> Any:
        sizes.append(len(given["input_ids"]))
        assert cached or given["past_key_values"] is None
        return generate(**given)

    monkeypatch.setattr(tested.model, "generate", counted)
    answers = tested.ask(prompts, ends, settings(max_new_tokens=12), silent())
    assert answers == [greedy(tested, p, ends, 12) for p in prompts]
    assert sizes[0] == 8 and sizes == sorted(set(sizes), reverse=True) and len(sizes) > 1


def test_the_models_own_generation_settings_do_not_apply(tested: Subject) -> None:
    prompts, config = prompts_of(tested), settings(max_new_tokens=12)
    before = tested.ask(prompts, set(), config, silent())
    shipped = tested.model.generation_config
    changes = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "num_beams": 3, "top_k": 3}
    for name, value in changes.items():
        setattr(shipped, name, value)
    assert tested.ask(prompts, set(), config, silent()) == before
    assert tested.model.generation_config is shipped
    for name in changes:
        setattr(shipped, name, None)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("room", [1 << 27, 1])  # with room for one row of logits, each row goes alone
def test_nll_is_that_of_a_plain_pass(
    tested: Subject, batch_size: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "LOGITS", room)
    examples = [tested.chat.encode(p, f"Sure, here is {p}", 256) for p in PROMPTS]
    spans = [Span(e.ids, e.answer) for e in examples] + [Span([5, 6, 7], 1)]
    found = tested.nll(spans, batch_size, silent())
    assert found == pytest.approx([plain_nll(tested, list(s.ids), s.start) for s in spans], rel=1e-5)


def test_perplexity_of_a_text_in_one_window_is_direct(tested: Subject) -> None:
    ids = tested.tokenizer("The river is the reason for the town. " * 2)["input_ids"]
    (span,) = windows(ids, [], 128, 64)
    (found,) = tested.nll([span], 4, silent())
    with torch.no_grad():
        loss = float(tested.model(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    assert span.scored == len(ids) - 1
    assert math.exp(found / span.scored) == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("stride", [1, 7, 16, 31])
def test_perplexity_with_stride_counts_each_token_once(tested: Subject, stride: int) -> None:
    ids = tested.tokenizer("The wheel is five metres across and turns slowly.")["input_ids"]
    found = tested.nll(windows(ids, [], 32, stride), 3, silent())
    expected, done = 0.0, 1
    for begin in range(0, len(ids), stride):
        end = min(begin + 32, len(ids))
        if end > done:
            expected += plain_nll(tested, ids[begin:end], done - begin)
            done = end
    assert sum(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("lead", [[], [9]])
def test_windows_score_every_token_once_with_all_the_context_there_is(lead: list[int]) -> None:
    for count in (0, 1, 2, 3, 10, 11, 64):
        for length in (3, 4, 10):
            for stride in range(1, length):
                ids = list(range(100, 100 + count))
                found = windows(ids, lead, length, stride)
                scored = [token for span in found for token in span.ids[span.start :]]
                assert scored == ids[0 if lead else 1 :]
                for span in found:
                    assert 1 <= span.start < len(span.ids) <= length
                    assert list(span.ids[: len(lead)]) == lead
                    context = list(span.ids[len(lead) :])
                    assert context == ids[context[0] - 100 : context[0] - 100 + len(context)]
                for span in found[1:]:
                    assert span.start >= length - min(stride, length - len(lead))


def test_lead_is_the_beginning_of_sequence_that_the_tokenizer_adds(tested: Subject) -> None:
    assert tested.lead() == []
    from tokenizers.processors import TemplateProcessing

    start = tested.tokenizer.bos_token_id
    core = tested.tokenizer.backend_tokenizer
    core.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)])
    try:
        assert tested.lead() == [start]
    finally:
        core.post_processor = TemplateProcessing(single="$A", special_tokens=[])


def test_output_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    folder = write_lm(tmp_path / "lm")
    with opened(folder, settings()) as found:
        found.model.model.norm.weight.data[3] = float("nan")
        with pytest.raises(InputError, match="not finite"):
            found.nll([Span([1, 2, 3], 1)], 1, silent())


def test_windows_longer_than_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_length is more than the model takes: found 512, expected at most 256"):
        with opened(write_lm(tmp_path / "lm"), settings(max_length=512)):
            pass


def test_an_adapter_beside_the_weights_is_not_added_to_them(tmp_path: Path) -> None:
    """transformers would add it, or load the base that it names; a merge reads the weights alone."""
    peft = pytest.importorskip("peft")
    folder = write_lm(tmp_path / "lm")
    plain = load_model(folder, "float32", "cpu").state_dict()
    adapter = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    adapter.save_pretrained(folder)
    assert (folder / "adapter_config.json").is_file()
    with opened(folder, settings()) as found:
        state = found.model.state_dict()
        assert state.keys() == plain.keys() and all(torch.equal(state[name], plain[name]) for name in plain)


def test_weights_are_float32_on_the_cpu_unless_asked_otherwise(tmp_path: Path) -> None:
    folder = write_lm(tmp_path / "lm", torch.bfloat16)
    for dtype, expected in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        with opened(folder, settings(dtype=dtype, device="cpu")) as found:
            assert found.model.dtype == expected


def test_models_that_would_run_code_or_hold_pickles_are_refused(tmp_path: Path) -> None:
    folder = write_lm(tmp_path / "lm")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (pickled / name).write_bytes((folder / name).read_bytes())
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(InputError):
        locate(str(pickled))
    with pytest.raises(InputError, match="evaluation needs a directory"):
        locate(str(folder / "model.safetensors"))
    with pytest.raises(InputError):
        locate(str(tmp_path / "nothing"))
    (folder / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}'
    )
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError):
        with opened(folder, settings()):
            pass
    assert not (tmp_path / "ran").exists()


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="device 'cuda:99' can't be used"):
        with opened(write_lm(tmp_path / "lm"), settings(device="cuda:99")):
            pass
