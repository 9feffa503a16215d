"""Baichuan-13B and Baichuan2-13B: logits, greedy tokens, gradients and losses equal the official implementation's.

The official attention is matmul and softmax, as transformers' eager one; sdpa sums in another order. Left-padded rows have their
positions counted without padding, the official ones with it, which is the same function with other roundings.
"""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ptuning.families.logits import loss_of

TOLERANCE = {"eager": 0.0, "sdpa": 5e-6}
PADDED = 5e-6


@pytest.fixture(params=["baichuan-13b", "baichuan2-13b"])
def folder(request, golden_dir):
    return golden_dir / "baichuan" / request.param


@pytest.fixture
def expected(folder):
    return load_file(folder / "expected.safetensors")


@pytest.fixture(params=TOLERANCE)
def attention(request):
    return request.param


@pytest.fixture
def model(folder, attention):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()


@pytest.mark.works("baichuan", "load")
@torch.no_grad()
def test_full_rows(model, expected, attention):
    logits = model(expected["full.input_ids"]).logits
    assert (logits - expected["full.logits"]).abs().max() <= TOLERANCE[attention]


@torch.no_grad()
def test_left_padded_rows(model, expected):
    mask = expected["padded.attention_mask"]
    logits = model(expected["padded.input_ids"], attention_mask=mask).logits
    assert ((logits - expected["padded.logits"]) * mask[:, :, None]).abs().max() <= PADDED


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_tokens(model, expected, cache):
    """Rows padded beside each other, as the official code answers each alone."""
    options = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    ids, mask = expected["padded.input_ids"], expected["padded.attention_mask"]
    rule = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    new = model.generate(ids, attention_mask=mask, **rule, **options)[:, ids.shape[1] :]
    assert new.tolist() == expected["single.greedy"][:, : new.shape[1]].tolist()
    assert new.shape[1] == 24 or bool((new == 2).any(1).all())


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradient_of_step_0(model, expected, checkpointing):
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model(expected["train.input_ids"], labels=expected["train.labels"]).loss.backward()
    attention = model.model.layers[0].self_attn
    gradient = torch.cat([getattr(attention, f"{part}_proj").weight.grad for part in "qkv"])
    official = expected["train.full.grad0.W_pack_layer0"]
    assert official.abs().max() > 1e-4
    assert (gradient - official).abs().max() <= 1e-6


@pytest.mark.parametrize("on_labels_only", [True, False])
def test_twenty_losses(model, expected, on_labels_only):
    """Evaluated before: that must not change the weights, as it does in the official Baichuan2."""
    with torch.no_grad():
        model(expected["full.input_ids"])
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    ids, labels, losses = expected["train.input_ids"], expected["train.labels"], []
    for _ in range(20):
        loss = loss_of(model, ids, labels) if on_labels_only else model(ids, labels=labels).loss
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (torch.stack(losses) - expected["train.full.losses"]).abs().max() <= 1e-5
