"""The prefix under mixed precision, gradient checkpointing and torch.compile."""

import pytest
import torch

from ptuning.families.chatglm2.config import ChatGLMConfig
from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
from ptuning.families.logits import loss_of
from ptuning.methods.prefix.attach import attach_prefix, detach_prefix, prefix_of


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_bf16_base_keeps_an_fp32_prefix(golden, load_tiny, attention):
    model = load_tiny("embedding", attention, dtype=torch.bfloat16)
    assert prefix_of(model).embedding.weight.dtype == torch.float32
    logits = model(golden["full.input_ids"]).logits
    assert logits.dtype == torch.bfloat16
    exact = golden["prefix_embedding.full.logits"]
    assert (logits.float() - exact).abs().max() <= 0.05 * exact.abs().max()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_an_fp32_prefix_given_to_a_bf16_base_is_cast(golden, load_tiny, attention):
    model = load_tiny("embedding", attention, dtype=torch.bfloat16)
    expected = model(golden["full.input_ids"]).logits
    given = prefix_of(model)(1, torch.float32)
    assert torch.equal(model(golden["full.input_ids"], prefix=given).logits, expected)


def test_autocast_casts_the_prefix_to_the_keys_dtype(golden, load_tiny):
    model = load_tiny("embedding")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, golden["train.input_ids"], golden["train.labels"])
    loss.backward()
    assert loss.item() == pytest.approx(golden["train.prefix_embedding.losses"][0].item(), rel=0.01)
    gradient, exact = prefix_of(model).embedding.weight.grad, golden["train.prefix_embedding.grad0"]
    assert gradient.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0) > 0.99


def prefix_gradient(model, golden):
    model.zero_grad()
    loss_of(model, golden["train.input_ids"], golden["train.labels"]).backward()
    return prefix_of(model).embedding.weight.grad.clone()


@pytest.mark.parametrize("how", [None, {"use_reentrant": False}])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_attention_2"])
def test_gradient_checkpointing_changes_no_gradient(golden, load, implementation, how):
    model = load(implementation).train()
    prefix_of(model).eval()
    plain = prefix_gradient(model, golden)
    assert (plain - golden["train.prefix_embedding.grad0"]).abs().max() <= 1e-6
    model.activation_checkpointing_enable(how)  # None is what the Trainer gives when its user says nothing
    assert torch.equal(prefix_gradient(model, golden), plain)


def test_gradient_checkpointing_repeats_the_same_dropout(golden, load):
    model, gradients = load("sdpa").train(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(7)
        gradients.append(prefix_gradient(model, golden))
    assert torch.equal(*gradients)
    assert (gradients[0] - golden["train.prefix_embedding.grad0"]).abs().max() > 1e-4, "dropout is on"


def test_reentrant_checkpointing_fails_aloud(golden, load):
    model = load("sdpa").train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        prefix_gradient(model, golden)


def test_compiled_forward(golden):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "ffn_hidden_size": 24,
        "kv_channels": 8,
        "num_attention_heads": 4,
        "padded_vocab_size": 320,
    }
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(num_layers=1, **sizes)).eval()
    attach_prefix(model, 8)
    inputs, mask = golden["padded.input_ids"], golden["padded.attention_mask"]
    with torch.no_grad():
        expected = model(inputs, attention_mask=mask, use_cache=False).logits
        # What is ours is that the graph can be captured; making code of it is torch's, and takes half a minute.
        compiled = torch.compile(model, backend="aot_eager")
        logits = compiled(inputs, attention_mask=mask, use_cache=False).logits
        prefix = detach_prefix(model)
        assert (model(inputs, attention_mask=mask).logits - expected).abs().max() > 1e-3, f"{prefix} has an effect"
    assert ((logits - expected) * mask[:, :, None]).abs().max() <= 2e-5
