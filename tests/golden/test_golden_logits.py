"""Logits and greedy tokens equal the official implementation's."""

import pytest
import torch

PREFIX_OF = {"base": None, "prefix_embedding": "embedding", "prefix_projection": "projection"}
# sdpa is what the figures' own code used; the others sum in another order.
TOLERANCE = {"sdpa": 1e-6, "eager": 2e-5}

pytestmark = pytest.mark.parametrize("name", PREFIX_OF)


@pytest.mark.works("chatglm2", "load")
@pytest.mark.parametrize("attention", TOLERANCE)
@torch.no_grad()
def test_full_rows(golden, load_tiny, name, attention):
    logits = load_tiny(PREFIX_OF[name], attention)(golden["full.input_ids"]).logits
    assert (logits - golden[f"{name}.full.logits"]).abs().max() <= TOLERANCE[attention]


@pytest.mark.parametrize("attention", TOLERANCE)
@pytest.mark.parametrize("positions", ["given", "derived"])
@torch.no_grad()
def test_left_padded_rows(golden, load_tiny, name, attention, positions):
    mask = golden["padded.attention_mask"]
    position_ids = golden["padded.position_ids"] if positions == "given" else None
    model = load_tiny(PREFIX_OF[name], attention)
    logits = model(golden["padded.input_ids"], attention_mask=mask, position_ids=position_ids).logits
    difference = (logits - golden[f"{name}.padded.logits"]) * mask[:, :, None]
    assert difference.abs().max() <= TOLERANCE[attention]


@pytest.mark.parametrize("attention", TOLERANCE)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_tokens(golden, load_tiny, name, attention, cache):
    expected = golden[f"{name}.padded.greedy"]
    out = load_tiny(PREFIX_OF[name], attention).generate(
        golden["padded.input_ids"],
        attention_mask=golden["padded.attention_mask"],
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
        **({} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}),
    )
    new = out[:, golden["padded.input_ids"].shape[1] :]
    assert new.tolist() == expected[:, -24:][:, : new.shape[1]].tolist()
    assert new.shape[1] == 24 or bool((new == 2).any(1).all())
