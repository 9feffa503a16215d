"""Rows take the room that they use; one that finds none goes back into the queue with its text, and comes back."""

import pytest
import torch

from ptuning.generation import Engine, GenerationRequest, SamplingParams, row
from ptuning.generation.budget import Budget
from tests.generation.conftest import answers
from tests.generation.test_engine import some_requests


def test_what_may_be_said_takes_no_room(model):
    """12 chats on a base of 32k, without max_tokens, in the server's batch: two of them took it all."""
    with Engine(model, [], batch_tokens=65536) as engine:
        for number in range(12):
            ids = list(range(5, 25 + 10 * number))
            engine.add(GenerationRequest(number, ids, 32768 - len(ids)))
        engine.step()
        assert len(engine.rows) == 12
        rows, columns = engine.cache.store.shape[2], engine.cache.store.shape[4]
        assert rows * columns <= 65536 // 6  # spare rows and columns included


@pytest.fixture
def small_steps(monkeypatch):
    """Rows are taken in although they will soon have no room."""
    monkeypatch.setattr(row, "STEP", 8)


def test_what_was_drawn_stays_drawn(model, small_steps):
    """A row that was set back goes on with its own random numbers and penalties; nothing is told twice."""
    rule = SamplingParams(temperature=1.5, top_p=0.95, seed=7, frequency_penalty=0.5, repetition_penalty=1.2)
    requests = [GenerationRequest(number, [5 + number] * 9, 40, rule, logprobs=0) for number in range(5)]
    with Engine(model, []) as engine:
        expected = answers(engine, requests)
    with Engine(model, [], batch_tokens=130) as engine:
        events = list(engine.submit(requests))
        assert engine.set_back
    found = {request.id: [event for event in events if event.id == request.id] for request in requests}
    for number, told in found.items():
        assert [event.token for event in told] == expected[number]
        assert [event.finish for event in told] == [None] * 39 + ["length"]


def test_the_first_to_come_is_the_last_to_go(model, small_steps):
    with Engine(model, [], batch_tokens=200) as engine:
        for number in range(3):
            engine.add(GenerationRequest(number, [5] * 20, 120))
        seen = set()
        while engine.has_work:
            engine.step()
            running = [row.request.id for row in engine.rows]
            waiting = [row.request.id for row in engine.waiting]
            assert waiting == sorted(waiting) and (not waiting or not running or max(running) < waiting[0])
            seen.add(tuple(running))
    assert {(0, 1, 2), (0, 1), (0,)} <= seen and engine.set_back >= 2


def test_after_lack_of_memory_the_batch_grows_again(model, prefixes, monkeypatch):
    requests = some_requests(prefixes, 12)
    with Engine(model, [2]) as engine:
        expected = answers(engine, requests)
    forward, failing, said = model.forward, [1], []

    def fails_once(input_ids, **kwargs):
        if len(input_ids) > 4 and failing:
            failing.pop()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", fails_once)
    with Engine(model, [2], batch_tokens=2000, notify=said.append) as engine:
        assert answers(engine, requests) == expected
        assert engine.budget.tokens < 500
        engine.budget._calm = 16
        answers(engine, [GenerationRequest("calm", [5, 6], 16 * 12)])
        engine.add(GenerationRequest("a", [5] * 900, 10))
        engine.add(GenerationRequest("b", [6] * 900, 10))
        engine.step()
        assert len(engine.rows) == 2
    assert [text.split(" ")[0:2] for text in said] == [["memory", "ran"], ["memory", "suffices"]]


def test_room_that_the_machine_does_not_have_is_lack_of_memory(model):
    """And neither another error nor the end of the process."""
    with Engine(model, [], batch_tokens=1 << 40) as engine:
        answers(engine, [GenerationRequest(0, [5] * 20, 3)])
        with pytest.raises(MemoryError, match="out of memory"):
            engine.cache.reserve(1 << 24, 1 << 24, keep=(), budget=0)
        assert len(answers(engine, [GenerationRequest(1, [5] * 20, 3)])[1]) == 3


def test_a_batch_that_is_too_large_every_time_grows_ever_later():
    budget = Budget(1000, lambda text: None)
    tries = []
    for _ in range(4):
        budget.ran_out(10, 100)
        steps = 0
        while budget.tokens < 1000:
            budget.went_well()
            steps += 1
        tries.append(steps)
    assert tries == [4 * 256, 4 * 512, 4 * 1024, 4 * 2048]
    assert not budget.fits(2, 501) and budget.fits(2, 500) and budget.fits(1, 10_000)
