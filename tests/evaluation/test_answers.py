"""Answers don't depend on how rows are batched."""

import pytest
import torch

from ptuning.data.encode import Encoder, Lengths
from ptuning.data.formats import Columns
from ptuning.data.records import read_records
from ptuning.evaluation.answers import GenerationOptions, generate_answers
from ptuning.evaluation.model import LocalModel
from ptuning.families import family_of
from ptuning.generation import Engine, Token
from ptuning.loading import load_model
from ptuning.methods.prefix.attach import attach_prefix, prefix_of
from tests.end_to_end.conftest import MODEL, ROOT


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load_model(MODEL)
    torch.manual_seed(0)
    attach_prefix(model, 16)
    return LocalModel(model), family_of(model.config).template(tokenizer)


@pytest.fixture(scope="module")
def records():
    columns = Columns("content", "summary")
    return read_records(ROOT / "data" / "advertise" / "dev.json", columns, max_samples=9)[0]


@pytest.fixture(scope="module")
def rows(loaded, records):
    return Encoder(loaded[1], Lengths(64, 24)).prompt_rows(records)[0]


def texts(loaded, rows, said=print, **options) -> list[str]:
    found = generate_answers(*loaded, rows, GenerationOptions(24, **options), say=said)
    return [answer.text for answer in sorted(found, key=lambda answer: answer.index)]


@pytest.mark.parametrize("options", [{}, {"sample": True}, {"num_beams": 2}])
def test_the_token_budget_changes_nothing_but_the_batch(loaded, rows, options):
    whole = texts(loaded, rows, **options)
    assert whole == texts(loaded, rows, batch_tokens=1, **options) == texts(loaded, rows, batch_tokens=300, **options)
    assert len(set(whole)) > 1


def test_sampling_follows_the_seed(loaded, rows):
    assert texts(loaded, rows, sample=True) != texts(loaded, rows, sample=True, seed=7)


def test_a_share_of_the_rows_is_sampled_as_in_the_whole(loaded, rows):
    whole = texts(loaded, rows, sample=True)
    options = GenerationOptions(24, sample=True)
    share = generate_answers(*loaded, rows[1::2], options, numbers=range(1, len(rows), 2))
    assert {answer.index: answer.text for answer in share} == dict(enumerate(whole[1::2]))


def test_an_answer_that_runs_on_into_the_next_turn_is_scored_as_it_is(loaded, rows, monkeypatch):
    """Serving ends it before the next turn; the official evaluation doesn't."""
    said = "好。\n\n[Round 2]\n\n问：再见\n\n答：再见。"
    script = loaded[1].encode_text([said])[0]

    def submit(self, requests, anywhere=bool):
        for request in requests:
            yield from (Token(request.id, token) for token in script)
            yield Token(request.id, None, "stop")

    monkeypatch.setattr(Engine, "submit", submit)
    assert texts(loaded, rows[:2]) == [said, said]


def test_beams_halve_the_batch_when_memory_runs_out(loaded, rows, monkeypatch):
    model = loaded[0].model
    expected, generate = texts(loaded, rows, num_beams=2), model.generate

    def limited(input_ids, **kwargs):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "generate", limited)
    said = []
    assert texts(loaded, rows, said.append, num_beams=2) == expected
    assert "memory ran out with 9 rows" in said[0]


def test_the_official_limit_is_on_prompt_and_answer_together(loaded, rows):
    longest = max(len(row.input_ids) for row in rows)
    found = generate_answers(*loaded, rows, GenerationOptions(24, max_length=longest + 2))
    for answer in found:
        room = longest + 2 - len(rows[answer.index].input_ids)
        assert answer.tokens <= room
        assert answer.finished or answer.tokens == room


def test_the_mode_is_put_back(loaded, rows):
    model = loaded[0].model.train()
    texts(loaded, rows[:1])
    assert model.training and prefix_of(model).training
    model.eval()
