"""The engine on a Baichuan: a prefix is so many tokens in front of a row, for ALiBi too; rows of different ones share a batch."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from ptuning.generation import BeamSearch, Engine, GenerationRequest, Prefix, SamplingParams
from ptuning.generation.sampling import Chooser
from ptuning.loading import load_base
from ptuning.methods.prefix.attach import attach_encoder, attach_prefix, detach_prefix
from ptuning.methods.prefix.encoder import PrefixEncoder, PrefixShape
from tests.conftest import REPO
from tests.generation.conftest import answers

BASE = REPO / "models" / "baichuan-tiny"
PROMPTS = ([195, 640, 679, 196], [195, *range(500, 523), 196], [195, 700, 196], list(range(400, 440)))


@pytest.fixture(scope="module")
def model(golden_dir):
    return load_base(BASE, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def encoders(model) -> dict[int, PrefixEncoder]:
    found = {}
    for length in (3, 17):
        torch.manual_seed(length)
        found[length] = PrefixEncoder(PrefixShape.of(model.config), length)
    return found


def alone(model, encoder, ids, new_tokens=12) -> list[int]:
    """transformers' own greedy answer, one row at a time."""
    if encoder is not None:
        attach_encoder(model, encoder)
    rule = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": 2, "pad_token_id": 0}
    try:
        found = model.generate(torch.tensor([ids]), max_new_tokens=new_tokens, **rule)[0, len(ids) :].tolist()
    finally:
        detach_prefix(model)
    return found[: found.index(2)] if 2 in found else found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_real_tokens_as_a_prefix_are_those_tokens_in_front(model, attention):
    """Whatever padding stands between; on the left it isn't part of a distance."""
    ids, length = torch.tensor([PROMPTS[3][:16]]), 6
    model.config._attn_implementation = attention
    whole = model(ids, use_cache=True)
    shape = PrefixShape.of(model.config)
    encoder = attach_prefix(model, length)
    layers = whole.past_key_values.layers
    both = torch.stack([torch.stack((each.keys, each.values)) for each in layers])[
        :, :, 0, :, :length
    ]  # (L, 2, G, T, D)
    encoder.embedding.weight.copy_(both.permute(3, 0, 1, 2, 4).reshape(length, shape.width))
    try:
        assert model.config._attn_implementation == f"prefix_alibi_{attention}"
        for padding in (0, 5):
            rest = torch.nn.functional.pad(ids[:, length:], (padding, 0))
            mask = torch.nn.functional.pad(torch.ones_like(ids[:, length:]), (padding, 0))
            logits = model.eval()(rest, attention_mask=mask).logits[:, padding:]
            assert (logits - whole.logits[:, length:]).abs().max() < 1e-5
    finally:
        detach_prefix(model)
        model.config._attn_implementation = "sdpa"


@pytest.mark.works("baichuan", "engine")
def test_rows_of_several_prefixes_and_of_none_share_a_batch(model, encoders):
    prefixes = {None: None} | {length: Prefix.of(f"p{length}", each, model.dtype) for length, each in encoders.items()}
    pairs = [(ids, length) for ids in PROMPTS for length in prefixes]
    requests = [GenerationRequest(i, ids, 12, prefix=prefixes[length]) for i, (ids, length) in enumerate(pairs)]
    expected = [alone(model, encoders.get(length), ids) for ids, length in pairs]
    assert len({tuple(ids) for ids in expected}) > 6
    with Engine(model, [2], max_rows=5, prefix_cache_tokens=4096) as engine:
        found = answers(engine, requests)
        assert [found[i] for i in range(len(pairs))] == expected
        more = [
            GenerationRequest(i, [*ids, *expected[i], 300, 301], 4, prefix=prefixes[length])
            for i, (ids, length) in enumerate(pairs)
        ]
        again = answers(engine, more)  # with the kept keys and values of the first turn
    assert [again[i] for i in range(len(pairs))] == [
        alone(model, encoders.get(n), more[i].ids, 4) for i, (_, n) in enumerate(pairs)
    ]
    assert model.config._attn_implementation == "alibi_sdpa"


def test_beams_beside_each_other_are_as_alone(model, encoders):
    """Rows padded on the left, behind an attached prefix."""
    attach_encoder(model, encoders[3])
    prefix = Prefix.of("p", encoders[3], model.dtype)
    try:
        requests = [GenerationRequest(i, ids, 6, prefix=prefix) for i, ids in enumerate(PROMPTS)]
        with (
            BeamSearch(model, [2], 0, num_beams=2) as together,
            BeamSearch(model, [2], 0, num_beams=2, batch_tokens=1) as single,
        ):
            assert answers(together, requests) == answers(single, requests)
    finally:
        detach_prefix(model)


def test_the_repetition_penalty_is_transformers_own():
    torch.manual_seed(0)
    logits, prompt = torch.randn(1, 50), [3, 7, 7, 20]
    chooser = Chooser(SamplingParams(temperature=1.0, repetition_penalty=1.3), prompt)
    chooser.seen.add(9)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[*prompt, 9]]), logits.clone())
    chooser.penalise(logits[0])
    assert torch.equal(logits, expected)
