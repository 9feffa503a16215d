"""Rows that join and leave one batch are answered as if each were alone."""

import random
from dataclasses import replace

import pytest
import torch

from ptuning.errors import GenerationError
from ptuning.generation import Engine, GenerationRequest, Prefix
from ptuning.methods.prefix.attach import prefix_of
from tests.generation.conftest import added_at_random, answers


def some_requests(prefixes, count: int = 24, seed: int = 0) -> list[GenerationRequest]:
    draw = random.Random(seed)
    kinds = [None, *prefixes.values()]
    return [
        GenerationRequest(
            id=index,
            ids=[draw.randrange(3, 320) for _ in range(draw.randrange(1, 30))],
            max_new_tokens=draw.randrange(1, 25),
            prefix=kinds[index % len(kinds)],
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("name", ["base", "prefix_embedding", "prefix_projection"])
def test_golden_greedy_tokens(golden, load_tiny, name):
    model = load_tiny(name.removeprefix("prefix_") if name != "base" else None)
    prefix = None if name == "base" else Prefix.of(name, prefix_of(model), model.dtype)
    rows = zip(golden["padded.input_ids"], golden["padded.attention_mask"], strict=True)
    requests = [
        GenerationRequest(i, ids[mask.bool()].tolist(), 24, prefix=prefix) for i, (ids, mask) in enumerate(rows)
    ]
    with Engine(model, [2]) as engine:
        found = answers(engine, requests)
    for index, ids in enumerate(golden[f"{name}.padded.greedy"][:, -24:].tolist()):
        assert found[index] == (ids[: ids.index(2)] if 2 in ids else ids)


@pytest.mark.works("chatglm2", "engine")
@pytest.mark.parametrize(("max_rows", "batch_tokens"), [(64, 16384), (4, 16384), (64, 200), (1, 16384)])
def test_any_mixture_equals_one_by_one(model, prefixes, one_by_one, max_rows, batch_tokens):
    requests = some_requests(prefixes)
    draw, found = random.Random(1), {request.id: [] for request in requests}
    widest = 0
    with Engine(model, [2], max_rows=max_rows, batch_tokens=batch_tokens) as engine:
        for _ in added_at_random(engine, requests, draw, found):
            widest = max(widest, len(engine.rows))
            assert len(engine.rows) <= max_rows
            used = len(engine.rows) * max((row.start for row in engine.rows), default=0)
            assert used <= batch_tokens
    assert found == {request.id: one_by_one(request) for request in requests}
    assert widest == 1 if max_rows == 1 else widest > 1


def test_the_last_token_says_why_it_ended(model, one_by_one):
    request = GenerationRequest(0, [5, 6, 7], 4)
    with Engine(model, []) as engine:
        engine.add(request)
        events = [event for _ in range(4) for event in engine.step()]
    assert [event.finish for event in events] == [None, None, None, "length"]
    eos = events[1].token
    with Engine(model, [eos]) as engine:
        engine.add(request)
        events = [event for _ in range(2) for event in engine.step()]
        assert not engine.has_work
    assert (events[1].token, events[1].finish) == (None, "stop")


def test_each_stop_token_ends_an_answer(model):
    request = GenerationRequest(0, [5, 6, 7], 12)
    with Engine(model, []) as engine:
        free = answers(engine, [request])[0]
    assert len(free) == 12
    first = free[4]
    second = next(token for token in free[:4] if free.index(token) < free.index(first))
    for stops in ([first, second], [second, first], (319, second)):
        with Engine(model, stops) as engine:
            *before, last = engine.submit([request])
        assert (last.token, last.finish) == (None, "stop")
        assert [token.token for token in before] == free[: free.index(second)]


def test_submit_computes_idle_steps_while_others_have_work(model, monkeypatch):
    """Under ZeRO-3 every process takes part in each forward call."""
    calls, others = [], iter([True] * 3)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **kwargs: calls.append(1) or forward(**kwargs))

    def anywhere(here: bool) -> bool:
        return here or next(others, False)

    with Engine(model, []) as engine:
        tokens = list(engine.submit([GenerationRequest(0, [5, 6], 2)], anywhere))
    assert len(tokens) == 2 and len(calls) == 2 + 3


def test_cancelled_rows_leave_at_once_and_the_others_go_on(model, prefixes, one_by_one):
    requests = some_requests(prefixes, 5)
    requests = [replace(request, max_new_tokens=12) for request in requests]
    with Engine(model, [], max_rows=4) as engine:
        for request in requests:
            engine.add(request)
        found = {request.id: [] for request in requests}
        for step in range(40):
            if step == 3:
                assert engine.cancel(1) and engine.cancel(4)  # one runs, one waits
                assert [row.request.id for row in engine.rows] == [0, 3, 2] and not engine.waiting
            for event in engine.step():
                found[event.id].append(event.token)
        assert not engine.cancel(1)
    assert len(found[1]) < 12 and found[4] == []
    with Engine(model, []) as engine:
        alone = answers(engine, [requests[i] for i in (0, 2, 3)])
    assert {i: found[i] for i in (0, 2, 3)} == alone


def test_a_second_turn_computes_only_what_is_new(model, prefixes, monkeypatch):
    prefix, first = prefixes[8], list(range(10, 60))
    widths = []
    forward = model.forward

    def watched(input_ids, **kwargs):
        widths.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    with Engine(model, [], prefix_cache_tokens=1000) as engine:
        answer = answers(engine, [GenerationRequest("one", first, 6, prefix=prefix)])["one"]
        second = first + answer + [7, 8, 9]
        widths.clear()
        reused = answers(engine, [GenerationRequest("two", second, 6, prefix=prefix)])["two"]
        assert widths[0] == len(answer) + 3 - 5  # the last token of the answer was never computed
        widths.clear()
        assert answers(engine, [GenerationRequest("base", second, 6)])["base"] != reused
        assert widths[0] == len(second)  # another prefix has other keys and values
    with Engine(model, []) as engine:
        assert answers(engine, [GenerationRequest("two", second, 6, prefix=prefix)])["two"] == reused


def test_what_begins_like_a_running_row_is_computed_once(model, prefixes, one_by_one):
    text, kinds = list(range(10, 60)), [prefixes[8], prefixes[8], prefixes[3], None]
    requests = [GenerationRequest(n, text + [70 + n] * 5, 20, prefix=prefix) for n, prefix in enumerate(kinds)]
    found, reused = {request.id: [] for request in requests}, {}
    with Engine(model, [2], prefix_cache_tokens=1000) as engine:
        for request in requests:
            engine.add(request)
            for token in [*engine.step(), *engine.step()]:
                reused.setdefault(token.id, token.reused)
                found[token.id] += [] if token.token is None else [token.token]
        for token in engine.submit([]):
            found[token.id] += [] if token.token is None else [token.token]
    assert reused == {0: 0, 1: 50, 2: 0, 3: 0}  # keys and values of another prefix are others
    assert found == {request.id: one_by_one(request) for request in requests}


def test_what_is_kept_of_the_past_is_bounded(model):
    with Engine(model, [], prefix_cache_tokens=100) as engine:
        for start in range(5):
            answers(engine, [GenerationRequest(start, [start + 3] * 40, 3)])
            assert engine.prefix_cache.tokens <= 100
        assert engine.prefix_cache.longest(None, [7] * 40) is not None
        assert engine.prefix_cache.longest(None, [3] * 40) is None


def out_of_memory_above(rows: int, forward):
    def limited(input_ids, **kwargs):
        if len(input_ids) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(input_ids=input_ids, **kwargs)

    return limited


def test_when_memory_runs_out_the_batch_is_halved_and_nothing_is_lost(model, prefixes, monkeypatch):
    requests = some_requests(prefixes, 12)
    with Engine(model, [2]) as engine:
        expected = answers(engine, requests)
    monkeypatch.setattr(model, "forward", out_of_memory_above(4, model.forward))
    said = []
    with Engine(model, [2], notify=said.append) as engine:
        assert answers(engine, requests) == expected
    assert said and "memory ran out with 12 rows; the batch is now at most" in said[0]


def test_a_request_that_never_fits_is_named_and_the_engine_goes_on(model, monkeypatch):
    forward = model.forward

    def small(input_ids, **kwargs):
        if input_ids.shape[1] > 20:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", small)
    with Engine(model, []) as engine:
        engine.add(GenerationRequest("long", [5] * 30, 3))
        with pytest.raises(
            GenerationError, match=r"30 tokens with 3 new ones doesn't fit into memory even alone"
        ) as error:
            engine.step()
        assert error.value.request == "long"
        assert len(answers(engine, [GenerationRequest("short", [5] * 10, 3)])["short"]) == 3


def test_other_errors_are_not_taken_for_lack_of_memory(model, monkeypatch):
    def broken(**kwargs):
        raise RuntimeError("shapes don't match")

    monkeypatch.setattr(model, "forward", broken)
    with Engine(model, []) as engine:
        engine.add(GenerationRequest(0, [5], 1))
        with pytest.raises(RuntimeError, match="shapes don't match"):
            engine.step()


@pytest.mark.parametrize(
    ("ids", "new", "message"),
    [
        ([], 1, "at least one"),
        ([320], 1, "tokens must be from 0 to 319"),
        ([-1], 1, "from 0 to 319"),
        ([5], 0, "max_new_tokens is 0, the least is 1"),
    ],
)
def test_bad_requests_are_refused_before_they_reach_the_batch(model, ids, new, message):
    with Engine(model, []) as engine:
        with pytest.raises(ValueError, match=message):
            engine.add(GenerationRequest("bad", ids, new))
        assert not engine.has_work


def test_log_probabilities_are_the_models_own(model):
    with Engine(model, []) as engine:
        engine.add(GenerationRequest(0, [5, 6, 7], 1, logprobs=3))
        engine.add(GenerationRequest(1, [5, 6], 1))
        asked, other = engine.step()
    expected = model(torch.tensor([[5, 6, 7]])).logits[0, -1].log_softmax(-1)
    assert asked.logprob == pytest.approx(float(expected[asked.token].detach()), abs=1e-5)
    assert [token for token, _ in asked.top] == expected.topk(3).indices.tolist()
    assert other.logprob is None and other.top == ()


def test_the_model_is_left_as_it_was(load_tiny):
    model = load_tiny("embedding")
    before = model(torch.tensor([[5, 6, 7]])).logits
    with Engine(model, []) as engine:
        answers(engine, [GenerationRequest(0, [5, 6, 7], 3)])
        engine.idle_step()
    assert model.config._attn_implementation == "prefix_sdpa"
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before)
