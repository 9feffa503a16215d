"""Gradients, twenty losses and final values of training equal the official implementation's, dropout off."""

import pytest
import torch

from ptuning.families.logits import loss_of
from ptuning.methods.prefix.attach import prefix_of

STEPS = 20
LEARNING_RATE = {"prefix_embedding": 2e-2, "prefix_projection": 1e-3, "full": 1e-3}


def setup(load_tiny, name, checkpointing=False):
    model = load_tiny(name.removeprefix("prefix_") if name != "full" else None)
    model.train()
    if prefix_of(model) is not None:
        prefix_of(model).eval()  # dropout off
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def step_loss(model, golden, on_labels_only):
    if on_labels_only:
        return loss_of(model, golden["train.input_ids"], golden["train.labels"])
    return model(golden["train.input_ids"], labels=golden["train.labels"]).loss


def fused_qkv_gradient(model):
    attention = model.model.layers[0].self_attn
    return torch.cat([getattr(attention, f"{part}_proj").weight.grad for part in "qkv"])


@pytest.mark.parametrize("on_labels_only", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", LEARNING_RATE)
def test_gradient_of_step_0(golden, load_tiny, name, checkpointing, on_labels_only):
    model = setup(load_tiny, name, checkpointing)
    step_loss(model, golden, on_labels_only).backward()
    if name == "full":
        gradient, expected = fused_qkv_gradient(model), golden["train.full.grad0.qkv_weight_layer0"]
    else:
        gradient = prefix_of(model).embedding.weight.grad
        expected = golden[f"train.{name}.grad0" + (".embedding" if name == "prefix_projection" else "")]
    assert expected.abs().max() > 1e-4
    assert (gradient - expected).abs().max() <= 1e-6


@pytest.mark.works("chatglm2", "prefix")
@pytest.mark.parametrize("on_labels_only", [True, False])
@pytest.mark.parametrize("name", LEARNING_RATE)
def test_twenty_losses(golden, load_tiny, name, on_labels_only):
    model = setup(load_tiny, name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if "prefix_encoder" not in key}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE[name], weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        loss = step_loss(model, golden, on_labels_only)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (torch.stack(losses) - golden[f"train.{name}.losses"]).abs().max() <= 1e-5
    if name == "full":
        assert (model.lm_head.weight - golden["train.full.final.output_layer"]).abs().max() <= 1e-4
        return
    if name == "prefix_embedding":
        assert (prefix_of(model).embedding.weight - golden["train.prefix_embedding.final"]).abs().max() <= 1e-4
    after = model.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items()), "prefix training changed the base"
