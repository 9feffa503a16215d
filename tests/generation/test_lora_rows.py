"""LoRAs, prefixes and the base side by side in one running batch: each row as if it were alone."""

import random

import pytest
import torch

from ptuning.config.options import ModelArguments
from ptuning.generation import BeamSearch, Engine, GenerationRequest, row
from ptuning.methods import attached, bare, detach, method_of
from tests.generation.conftest import added_at_random, answers
from tests.methods.test_lora import randomise

KINDS = {
    "plain": {"method": "lora", "lora_target": ["attention"]},
    "dora": {"method": "lora", "use_dora": True, "lora_rank": 4},
    "both": {"method": "lora+prefix", "pre_seq_len": 5},
}


@pytest.fixture(scope="module")
def attach(model, golden_dir):
    """`attach(kind)`: puts that random LoRA on the model."""

    def put(kind: str) -> None:
        options = ModelArguments(str(golden_dir / "chatglm2-tiny"), **KINDS[kind])
        torch.manual_seed(len(kind))
        method_of(options, trains=True).start(model)
        randomise(model, seed=len(kind))
        model.eval()

    yield put
    detach(model)


@pytest.fixture(scope="module")
def companions(model, attach, prefixes):
    """Name → what a request brings along; None is the base."""
    found = {"base": None, "p3": prefixes[3], "p17": prefixes[17]}
    for kind in KINDS:
        attach(kind)
        found[kind] = attached(model).served(model, kind)
        detach(model)
    return found


def alone(model, attach, one_by_one, kind: str, request: GenerationRequest) -> list[int]:
    """transformers' own generate, with the LoRA attached by peft."""
    if kind not in KINDS:
        return one_by_one(request)
    attach(kind)
    try:
        return one_by_one(GenerationRequest(request.id, request.ids, request.max_new_tokens))
    finally:
        detach(model)


@pytest.mark.parametrize(
    ("max_rows", "cached", "more"),
    [(64, 0, {}), (5, 4000, {}), (1, 0, {}), (64, 0, {"prefill_tokens": 7, "pause": 1.0})],
)
def test_any_mixture_equals_one_by_one(model, attach, companions, one_by_one, max_rows, cached, more):
    draw, names = random.Random(0), list(companions)
    requests = [
        GenerationRequest(
            id=index,
            ids=[draw.randrange(3, 320) for _ in range(draw.randrange(1, 30))],
            max_new_tokens=draw.randrange(5, 25),
            prefix=companions[names[index % len(names)]],
        )
        for index in range(24)
    ]
    found = {request.id: [] for request in requests}
    together = set()
    with Engine(model, [2], max_rows=max_rows, prefix_cache_tokens=cached, **more) as engine:
        for _ in added_at_random(engine, requests, draw, found):
            together.add(len({row.request.prefix for row in engine.rows}))
    expected = {r.id: alone(model, attach, one_by_one, names[r.id % len(names)], r) for r in requests}
    assert found == expected
    assert max(together) == min(max_rows, len(names))
    first = requests[0]
    assert len(
        {
            tuple(alone(model, attach, one_by_one, name, GenerationRequest(0, first.ids, 20, prefix=companions[name])))
            for name in names
        }
    ) == len(names)


@pytest.mark.parametrize(("pause", "past"), [(None, 0), (2.0, 0), (None, 100)])
def test_rows_that_are_set_back_go_on_where_they_were(model, attach, companions, one_by_one, monkeypatch, pause, past):
    """In room for two or three of them when they have grown."""
    monkeypatch.setattr(row, "STEP", 8)
    draw, names = random.Random(3), list(companions)
    requests = [
        GenerationRequest(
            number,
            [draw.randrange(3, 320) for _ in range(draw.randrange(1, 30))],
            draw.randrange(30, 60),
            prefix=companions[names[number % len(names)]],
        )
        for number in range(14)
    ]
    found = {request.id: [] for request in requests}
    with Engine(model, [2], batch_tokens=140, pause=pause, prefill_tokens=20, prefix_cache_tokens=past) as engine:
        for _ in added_at_random(engine, requests, draw, found):
            used = max((one.start for one in engine.rows), default=0)
            assert len(engine.rows) <= 1 or len(engine.rows) * used <= 140
        assert engine.set_back > 3
    assert found == {r.id: alone(model, attach, one_by_one, names[r.id % len(names)], r) for r in requests}


def test_a_dialogue_goes_on_with_its_own_lora(model, companions):
    """Keys and values that are kept belong to one companion."""
    ids = list(range(5, 45))
    with Engine(model, [], prefix_cache_tokens=10_000) as engine:
        first = {
            name: answers(engine, [GenerationRequest(0, ids, 6, prefix=each)])[0] for name, each in companions.items()
        }
        again = {
            name: answers(engine, [GenerationRequest(0, ids + first[name], 6, prefix=each)])[0]
            for name, each in companions.items()
        }
    with Engine(model, []) as engine:
        for name, each in companions.items():
            assert answers(engine, [GenerationRequest(0, ids, 12, prefix=each)])[0] == first[name] + again[name]
            engine.prefix_cache.clear()


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_the_logits_are_pefts(model, attach, companions, kind):
    ids = torch.arange(3, 33).view(3, 10)
    attach(kind)
    with torch.no_grad():
        tuned = model(input_ids=ids, use_cache=False).logits
        with bare(model):
            base = model(input_ids=ids, use_cache=False).logits
            with companions[kind].on(model, [0, 2]):
                mixed = model(input_ids=ids, use_cache=False).logits
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, base)
    detach(model)
    torch.testing.assert_close(mixed[[0, 2]], tuned[[0, 2]], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(mixed[1], base[1], atol=1e-5, rtol=1e-5)
    assert (tuned - base).abs().max() > 0.1


def test_beams_answer_with_what_is_attached(model, attach, companions):
    requests = [GenerationRequest(index, [5 + index, 6, 7], 8, prefix=companions["plain"]) for index in range(3)]
    attach("plain")
    try:
        with BeamSearch(model, [2], 0, num_beams=1) as beams:
            found = answers(beams, requests)
    finally:
        detach(model)
    with Engine(model, [2]) as engine:
        assert answers(engine, requests) == found
