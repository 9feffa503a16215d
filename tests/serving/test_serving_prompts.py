"""Prompts that fit: the oldest turns go first; what is too long by itself is refused with value, limit and fix."""

import pytest

from ptuning.families import Dialogue
from ptuning.families.chatglm2.template import ChatGLM2Template, build_prompt
from ptuning.serving.errors import ApiError
from ptuning.serving.prompts import PromptBuilder


@pytest.fixture
def prompts(tiny_tokenizer) -> PromptBuilder:
    return PromptBuilder(ChatGLM2Template(tiny_tokenizer), context=256)


def encode(tokenizer, text):
    return tokenizer.prefix_ids() + tokenizer.encode_text(text)


def test_a_prompt_that_fits_is_the_template(prompts, tiny_tokenizer):
    history = [("你好", "很高兴"), ("世界", "好")]
    prompt = prompts.chat(Dialogue("白色", tuple(history), "系统", "前缀"))
    assert prompt.ids == encode(tiny_tokenizer, "前缀" + build_prompt("白色", history, "系统"))
    assert prompt.dropped == 0
    assert prompt.max_new_tokens == 256 - len(prompt.ids)


def test_the_oldest_turns_go_and_as_few_as_possible(prompts, tiny_tokenizer):
    history = [(f"问题 {i} " * 5, f"答案 {i} " * 5) for i in range(12)]
    prompt = prompts.chat(Dialogue("白色", tuple(history)), max_new_tokens=20)
    assert 0 < prompt.dropped < 12
    assert prompt.ids == encode(tiny_tokenizer, build_prompt("白色", history[prompt.dropped :]))
    assert len(prompt.ids) + 20 <= 256
    one_more = encode(tiny_tokenizer, build_prompt("白色", history[prompt.dropped - 1 :]))
    assert len(one_more) + 20 > 256


def test_a_large_max_tokens_does_not_cost_the_history(prompts):
    prompt = prompts.chat(Dialogue("白色", (("你好", "好"),)), max_new_tokens=100_000)
    assert prompt.dropped == 0
    assert prompt.max_new_tokens == 256 - len(prompt.ids)


def test_max_length_counts_prompt_and_answer(prompts):
    prompt = prompts.chat(Dialogue("你好"), max_length=60)
    assert len(prompt.ids) + prompt.max_new_tokens == 60
    with pytest.raises(ApiError, match="max_length is 4") as caught:
        prompts.chat(Dialogue("你好"), max_length=4)
    assert caught.value.status == 400 and caught.value.param == "max_length"


@pytest.mark.parametrize("question", ["白色 " * 200, "好" * 1_000_000])
def test_a_question_too_long_by_itself(prompts, question):
    with pytest.raises(ApiError, match=r"the model's context is 256.*shorten") as caught:
        prompts.chat(Dialogue(question, (("a", "b"),)))
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    with pytest.raises(ApiError):
        prompts.plain(question, 5)


def test_a_megabyte_of_turns_is_quick(prompts):
    assert prompts.chat(Dialogue("你好", (("a", "b"),) * 100_000)).dropped > 99_000


def test_a_history_that_fits_is_encoded_once(prompts, monkeypatch):
    encodings, encode = [], prompts.template.encode
    monkeypatch.setattr(prompts.template, "encode", lambda rows: encodings.append(len(rows)) or encode(rows))
    assert prompts.chat(Dialogue("你好", (("a", "b"),) * 8), max_new_tokens=20).dropped == 0
    assert encodings == [1]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_every_turn_may_have_to_go(prompts, tiny_tokenizer, turns):
    prompt = prompts.chat(Dialogue("白色", (("白色 " * 200, "好"),) * turns))
    assert prompt.dropped == turns and prompt.ids == encode(tiny_tokenizer, build_prompt("白色"))
