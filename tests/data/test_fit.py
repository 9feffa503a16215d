"""A dialogue that is too long loses its oldest turns first, by the same rules everywhere, and isn't encoded again and again."""

import random
import time
from dataclasses import replace

import pytest

from ptuning.data.fit import CUT, FitPolicy, PromptTooLong, fit, fit_all
from ptuning.families import Dialogue, Encoded
from ptuning.families.chatglm2.template import ChatGLM2Template

WORDS = [
    "衣服",
    "你",
    "好",
    "，",
    "：",
    " ",
    "  ",
    "\n",
    "abc",
    "Z",
    "7",
    "😀",
    "𠮷",
    "é",
    "答：",
    "[Round 1]",
    "sop",
    "▁",
]


class Counting(ChatGLM2Template):
    """Remembers how many texts and characters each call of the tokenizer had."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.calls: list[tuple[int, int]] = []

    def encode_text(self, texts):
        self.calls.append((len(texts), sum(map(len, texts))))
        return super().encode_text(texts)


@pytest.fixture
def template(tiny_tokenizer) -> Counting:
    return Counting(tiny_tokenizer)


def text(rng: random.Random, most: int) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randrange(1, most)))


def random_dialogue(rng: random.Random) -> Dialogue:
    history = tuple((text(rng, 12), text(rng, 15)) for _ in range(rng.choice((0, 1, 3, 8, 25))))
    return Dialogue(
        text(rng, rng.choice((10, 150))),
        history,
        text(rng, 25) if rng.random() < 0.4 else None,
        "请回答：" if rng.random() < 0.3 else "",
    )


def by_trying(template, dialogue: Dialogue, limit: int, policy: FitPolicy) -> tuple[list[int], bool, int, bool] | None:
    """The rules word by word: one encoding for each turn that is dropped. None: too long."""

    def ids(**changes) -> list[int]:
        return template.encode([template.render(replace(dialogue, **changes))])[0].ids

    turns, most = len(dialogue.history), limit - (policy.room > 0)
    if len(ids()) <= (limit - policy.room if turns else most):
        return ids(), False, 0, False
    shortest = len(ids(prompt="", history=(), system=None))
    without_system = False
    if policy.drop_system and dialogue.system:
        taken = len(ids(prompt="", history=())) - shortest
        if 2 * taken > limit - shortest:
            dialogue, without_system = replace(dialogue, system=None), True
    dropped = 0
    while dropped < turns and len(ids(history=dialogue.history[dropped:])) > limit - policy.room:
        dropped += 1
    dialogue = replace(dialogue, history=dialogue.history[dropped:])
    if len(ids()) <= most:
        return ids(), without_system, dropped, False
    if not policy.cut_question:
        return None
    question, low, high = dialogue.prompt, 0, len(dialogue.prompt)

    def kept(n: int) -> str:
        return question[: (n + 1) // 2] + question[len(question) - n // 2 :]

    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(ids(prompt=kept(middle))) <= most else (low, middle - 1)
    return ids(prompt=kept(low)), without_system, dropped, True


@pytest.mark.parametrize("policy", [CUT, FitPolicy(room=20), FitPolicy(cut_question=True)])
@pytest.mark.parametrize("limit", [40, 90, 200, 500])
def test_the_result_is_that_of_trying_one_turn_after_the_other(template, policy, limit):
    rng, seen = random.Random(limit), set()
    dialogues = [random_dialogue(rng) for _ in range(60)]
    for dialogue in dialogues:
        expected = by_trying(template, dialogue, limit, policy)
        try:
            found = fit(template, dialogue, limit, policy)
        except PromptTooLong as error:
            assert expected is None and (error.tokens is None or error.tokens > error.limit == limit - 1)
            seen.add("refused")
        else:
            assert (found.ids, found.dropped_system, found.dropped_turns, found.cut_question) == expected
            seen |= {name for name, value in zip(("system", "turns", "question"), expected[1:], strict=True) if value}
    assert "turns" in seen and ("system" in seen or not policy.drop_system or limit > 90)
    if limit < 200:
        assert ("question" if policy.cut_question else "refused") in seen
    if policy.cut_question:
        assert fit_all(template, dialogues, limit, policy) == [fit(template, each, limit, policy) for each in dialogues]


def test_what_fits_is_encoded_once(template):
    dialogue = Dialogue("你好", (("早", "早！"),) * 5, "你是店员。", response="不在提示里")
    for policy in (CUT, FitPolicy(room=50)):
        template.calls.clear()
        found = fit(template, dialogue, 1000, policy)
        assert len(template.calls) == 1 and template.calls[0][0] == 1
        assert isinstance(found.encoded, Encoded) and "不" not in template.decode(found.ids)
    template.calls.clear()
    fit_all(template, [dialogue] * 30, 1000)
    assert [count for count, _ in template.calls] == [30]


@pytest.mark.parametrize("policy", [CUT, FitPolicy(room=100)])
@pytest.mark.parametrize("turns", [10, 80, 400, 2000])
def test_the_calls_do_not_grow_with_the_turns(template, turns, policy):
    rng = random.Random(turns)
    history = tuple((f"问题 {i} {text(rng, 9)}", f"答案 {text(rng, 30)}") for i in range(turns))
    dialogue = Dialogue("最后的问题", history, "短答")
    template.calls.clear()
    started = time.perf_counter()
    found = fit(template, dialogue, 400, policy)
    seconds = time.perf_counter() - started
    assert 0 < found.dropped_turns < turns and len(found.ids) <= 400 - policy.room
    assert len(template.calls) <= 6, template.calls
    assert sum(characters for _, characters in template.calls) < 8 * 400 * template.longest_token
    assert seconds < 0.5


def test_what_can_not_fit_is_not_tokenised(template):
    dialogue = Dialogue("好" * 3_000_000, (("a" * 3_000_000, "b"), ("c", "d")), "系" * 3_000_000)
    template.calls.clear()
    found = fit(template, dialogue, 60)
    assert (found.dropped_system, found.dropped_turns, found.cut_question) == (True, 2, True)
    assert 56 <= len(found.ids) <= 60
    assert sum(characters for _, characters in template.calls) < 30 * 60 * template.longest_token
    with pytest.raises(PromptTooLong, match="the prompt has more than 59 tokens without any history") as caught:
        fit(template, dialogue, 60, FitPolicy(room=10))
    assert caught.value.tokens is None


def test_the_answers_room_is_given_up_where_no_turn_is_left_to_drop(template):
    question = Dialogue("你好，" * 10)
    tokens = len(fit(template, question, 1000).ids)
    for history in ((), (("早", "早！" * 20),)):
        found = fit(template, replace(question, history=history), tokens + 1, FitPolicy(room=30))
        assert (len(found.ids), found.dropped_turns) == (tokens, len(history))
        with pytest.raises(PromptTooLong) as caught:
            fit(template, replace(question, history=history), tokens, FitPolicy(room=30))
        assert (caught.value.tokens, caught.value.limit) == (tokens, tokens - 1)
