"""The loss on labels equals the model's ordinary loss without computing what carries no label."""

import pytest
import torch

from ptuning.families.logits import label_positions, logits_at, loss_of, row_losses
from ptuning.methods.prefix.attach import prefix_of


def loss_and_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def each_row(model, inputs, labels):
    with logits_at(model, label_positions(labels)):
        return row_losses(model(inputs).logits, labels)


@pytest.mark.parametrize("items", [None, 7, "tensor"])
@pytest.mark.parametrize("prefix", [None, "embedding"])
def test_the_loss_on_labels_equals_the_ordinary_loss(golden, load_tiny, prefix, items):
    model, inputs = load_tiny(prefix), golden["train.input_ids"]
    items = torch.tensor(31) if items == "tensor" else items
    labels = golden["train.labels"]
    losses = [
        loss_of(model, inputs, labels, items),
        model(inputs, labels=labels, num_items_in_batch=items).loss,
    ]
    assert torch.allclose(*losses, rtol=1e-6, atol=0)
    short, ordinary = (loss_and_gradients(model, loss) for loss in losses)
    assert set(short) == set(ordinary) and short
    for name, gradient in ordinary.items():
        assert (short[name] - gradient).abs().max() <= 1e-6, name


def test_the_loss_is_the_mean_of_the_labels_log_probabilities(golden, load_tiny):
    model, labels = load_tiny("embedding"), golden["train.labels"]
    with torch.no_grad():
        logits = model(golden["train.input_ids"]).logits.log_softmax(-1)
        loss = loss_of(model, golden["train.input_ids"], labels)
    terms = [
        -logits[row, at - 1, labels[row, at]].item()
        for row in range(labels.shape[0])
        for at in range(1, labels.shape[1])
        if labels[row, at] != -100
    ]
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-6)


def test_micro_batches_add_up_to_the_whole_batch(golden, load_tiny):
    model, labels = load_tiny("embedding"), golden["train.labels"]
    whole = loss_and_gradients(model, loss_of(model, golden["train.input_ids"], labels))
    items = (labels[:, 1:] != -100).sum()
    model.zero_grad()
    for row in range(4):
        one = slice(row, row + 1)
        loss_of(model, golden["train.input_ids"][one], labels[one], items).backward()
    (name,) = whole
    assert (prefix_of(model).embedding.weight.grad - whole[name]).abs().max() <= 1e-6


@pytest.mark.parametrize("items", [None, 12])
def test_a_batch_without_labels_has_loss_0_and_no_gradient(golden, load_tiny, items):
    model = load_tiny("embedding")
    nothing = torch.full_like(golden["train.labels"], -100)
    loss = loss_of(model, golden["train.input_ids"], nothing, items)
    assert loss.item() == 0.0
    (gradient,) = loss_and_gradients(model, loss).values()
    assert gradient.abs().max() == 0.0


def test_only_labelled_positions_reach_the_output_layer(golden, load_tiny):
    model, seen = load_tiny(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[0]))
    loss_of(model, golden["train.input_ids"], golden["train.labels"])
    assert seen == [(golden["train.labels"][:, 1:] != -100).sum().item()]


@pytest.mark.parametrize("prefix", [None, "embedding"])
def test_the_loss_of_each_row_is_its_sum(golden, load_tiny, prefix):
    model, inputs, labels = load_tiny(prefix), golden["train.input_ids"], golden["train.labels"].clone()
    labels[1] = -100
    with torch.no_grad():
        losses = each_row(model, inputs, labels)
        assert losses.shape == (4,) and losses[1] == 0
        for row in (0, 2, 3):
            one = slice(row, row + 1)
            count = (labels[one, 1:] != -100).sum()
            expected = count * model(inputs[one], labels=labels[one]).loss
            assert losses[row].item() == pytest.approx(expected.item(), rel=1e-5)
        nothing = each_row(model, inputs, torch.full_like(labels, -100))
    assert nothing.tolist() == [0.0] * 4
