"""A model with prefixes of several lengths, and what `generate` answers one by one."""

from collections.abc import Callable

import pytest
import torch

from ptuning.generation import GenerationRequest, Generator, Prefix
from ptuning.methods.prefix.attach import attach_encoder, detach_prefix
from ptuning.methods.prefix.encoder import PrefixEncoder, PrefixShape


@pytest.fixture(scope="module")
def model(load_tiny):
    """The golden base, without a prefix."""
    return load_tiny()


@pytest.fixture(scope="module")
def encoders(model) -> dict[int, PrefixEncoder]:
    """Length → random prefix, strong enough to change every answer."""
    found = {}
    for length in (3, 8, 17):
        torch.manual_seed(length)
        found[length] = PrefixEncoder(PrefixShape.of(model.config), length)
    return found


@pytest.fixture(scope="module")
def prefixes(model, encoders) -> dict[int, Prefix]:
    return {length: Prefix.of(f"p{length}", encoder, model.dtype) for length, encoder in encoders.items()}


@pytest.fixture(scope="module")
def one_by_one(model, encoders) -> Callable[[GenerationRequest], list[int]]:
    """The greedy answer of transformers' own generate."""

    def answer(request: GenerationRequest) -> list[int]:
        if request.prefix is not None:
            attach_encoder(model, encoders[request.prefix.length])
        try:
            out = model.generate(
                torch.tensor([request.ids]),
                max_new_tokens=request.max_new_tokens,
                do_sample=False,
                eos_token_id=2,
                pad_token_id=0,
            )
        finally:
            if request.prefix is not None:
                detach_prefix(model)
        ids = out[0, len(request.ids) :].tolist()
        return ids[: ids.index(2)] if 2 in ids else ids

    return answer


def answers(generator: Generator, requests: list[GenerationRequest]) -> dict[object, list[int]]:
    """Runs them to the end. GenerationRequest id → tokens."""
    found = {request.id: [] for request in requests}
    for token in generator.submit(requests):
        if token.token is not None:
            found[token.id].append(token.token)
    return found


def added_at_random(engine, requests, draw, found):
    """Adds the requests at random steps until all are answered; yields after each step.

    Args:
        found: id → tokens, filled as they come.
    """
    waiting = list(requests)
    while waiting or engine.has_work:
        while waiting and draw.random() < 0.5:
            engine.add(waiting.pop(0))
        for event in engine.step():
            if event.token is not None:
                found[event.id].append(event.token)
        yield
