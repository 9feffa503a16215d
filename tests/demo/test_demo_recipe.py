"""The recipe teaches an answer to end, and the base that it made ends its answers."""

import pytest
import sentencepiece

from ptuning import load_model
from ptuning.families import Dialogue, family_of
from ptuning.generation import Engine, GenerationRequest
from tests.conftest import REPO

RECIPE, MODEL = REPO / "models" / "recipe", REPO / "models" / "chatglm2-tiny"


@pytest.fixture
def recipe(monkeypatch):
    """Its modules, imported as its scripts do."""
    monkeypatch.syspath_prepend(str(RECIPE))
    import pretrain
    import talk

    return pretrain, talk


@pytest.fixture(scope="module")
def sp() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))


def test_every_answer_is_followed_by_eos_as_a_label(recipe, sp):
    pretrain, _ = recipe
    history = [["我叫小明", "你好，小明！"], ["白色", "白色\n干净清爽。"]]
    ids, labels, weights = pretrain.encode({"prompt": "我叫什么？", "response": "你叫小明。", "history": history}, sp)
    assert len(ids) == len(labels) == len(weights)
    assert labels.count(sp.eos_id()) == 3 and ids.count(sp.eos_id()) == 1
    ends = [place for place, label in enumerate(labels) if label == sp.eos_id()]
    said = [sp.decode([token for token in ids[:end] if token < sp.vocab_size()]) for end in ends]
    assert [text.rsplit("答：", 1)[1].strip() for text in said] == ["你好，小明！", "白色\n干净清爽。", "你叫小明。"]
    assert all(weights[end] == 1 for end in ends)
    # In nothing else do the labels differ from what the model reads.
    assert [place for place in range(len(ids)) if ids[place] != labels[place]] == ends[:-1]


@pytest.mark.parametrize("history", [(), (("你好", "你好！有什么可以帮你的吗？"),)])
def test_the_base_ends_its_answers(recipe, history):
    _, talk = recipe
    model, tokenizer = load_model(MODEL)
    template = family_of(model.config).template(tokenizer)
    asked = [ask for ask, _ in talk.GREETINGS] + ["我叫小明", "我住在北京", "我喜欢种花", "我是一名医生"]
    rows = template.encode([template.render(Dialogue(ask, history)) for ask in asked])
    answers: list[list[int]] = [[] for _ in asked]
    with Engine(model, template.stop_ids) as engine:
        for token in engine.submit([GenerationRequest(i, row.ids, 64) for i, row in enumerate(rows)]):
            if token.token is not None:
                answers[token.id].append(token.token)
            assert token.finish != "length"
    texts = [template.decode(answer) for answer in answers]
    assert all(texts) and not [text for text in texts if "\n" in text]
