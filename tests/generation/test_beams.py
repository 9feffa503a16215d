"""transformers' beam search behind the same protocol as the engine."""

import pytest
import torch

from ptuning.errors import GenerationError
from ptuning.generation import BeamSearch, GenerationRequest
from ptuning.methods.prefix.attach import attach_encoder, detach_prefix
from tests.generation.conftest import answers

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15], [16]]


def requests(prefix=None, new=8):
    return [GenerationRequest(i, ids, new, prefix=prefix) for i, ids in enumerate(PROMPTS)]


def alone(model, new=8) -> dict[int, list[int]]:
    found = {}
    for index, ids in enumerate(PROMPTS):
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=new, num_beams=3, do_sample=False, eos_token_id=2, pad_token_id=0
        )[0, len(ids) :].tolist()
        found[index] = out[: out.index(2)] if 2 in out else out
    return found


def beams(model, **options):
    return BeamSearch(model, [2], 0, num_beams=3, **options)


def test_batches_answer_as_generate_does_one_by_one(model, prefixes, encoders):
    base = alone(model)
    attach_encoder(model, encoders[8])
    try:
        tuned = alone(model)
        with beams(model) as search:
            assert answers(search, requests(prefixes[8])) == tuned
            assert answers(search, requests()) == base != tuned  # no prefix: the bare base, whatever is attached
    finally:
        detach_prefix(model)
    with beams(model) as search, pytest.raises(ValueError, match="none is attached"):
        answers(search, requests(prefixes[8]))


def test_the_last_token_says_why_it_ended(model):
    with BeamSearch(model, [], 0, num_beams=2) as search:
        events = list(search.submit([GenerationRequest("a", [5, 6, 7], 3)]))
    assert [event.finish for event in events] == [None, None, "length"]
    stops = list(range(0, 320, 3))  # a third of the vocabulary
    with BeamSearch(model, stops, 0, num_beams=2) as search:
        events = list(search.submit([GenerationRequest("a", [5, 6, 7], 24)]))
    assert (events[-1].token, events[-1].finish) == (None, "stop")
    assert not {event.token for event in events} & set(stops)


def test_batches_are_bounded_and_halved_when_memory_runs_out(model, monkeypatch):
    sizes, generate, said = [], model.generate, []

    def limited(input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "generate", limited)
    most = 4
    with beams(model) as search:
        expected = answers(search, requests())
    assert sizes == [4]
    sizes.clear()
    with beams(model, batch_tokens=3 * 14 * 2) as search:  # three beams of the longest request, twice
        assert answers(search, requests()) == expected
    assert sizes == [2, 2]
    most = 2
    with beams(model, notify=said.append) as search:
        assert answers(search, requests()) == expected
    assert said and "memory ran out with 4 rows" in said[0]
    most = 0
    with beams(model) as search, pytest.raises(GenerationError, match="3 beams doesn't fit into memory even alone"):
        answers(search, requests())


def test_idle_steps_while_others_have_work(model, monkeypatch):
    calls, others, generate = [], iter([True] * 2), model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: calls.append(1) or generate(**kwargs))
    with beams(model) as search:
        list(search.submit(requests(new=2), lambda here: here or next(others, False)))
    assert len(calls) == 1 + 2
