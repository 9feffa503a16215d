"""`loss_only` equals the ordinary loss without computing what carries no label."""

import pytest
import torch


def loss_and_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("items", [None, 7, "tensor"])
@pytest.mark.parametrize("prefix", [None, "embedding"])
def test_loss_only_equals_the_ordinary_loss(golden, load_tiny, prefix, items):
    model, inputs = load_tiny(prefix), golden["train.input_ids"]
    items = torch.tensor(31) if items == "tensor" else items
    outputs = [
        model(inputs, labels=golden["train.labels"], loss_only=flag, num_items_in_batch=items) for flag in (True, False)
    ]
    assert outputs[0].logits is None and outputs[1].logits is not None
    assert torch.allclose(outputs[0].loss, outputs[1].loss, rtol=1e-6, atol=0)
    short, ordinary = (loss_and_gradients(model, output.loss) for output in outputs)
    assert set(short) == set(ordinary) and short
    for name, gradient in ordinary.items():
        assert (short[name] - gradient).abs().max() <= 1e-6, name


def test_the_loss_is_the_mean_of_the_labels_log_probabilities(golden, load_tiny):
    model, labels = load_tiny("embedding"), golden["train.labels"]
    with torch.no_grad():
        logits = model(golden["train.input_ids"]).logits.log_softmax(-1)
        loss = model(golden["train.input_ids"], labels=labels, loss_only=True).loss
    terms = [
        -logits[row, at - 1, labels[row, at]].item()
        for row in range(labels.shape[0])
        for at in range(1, labels.shape[1])
        if labels[row, at] != -100
    ]
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-6)


def test_micro_batches_add_up_to_the_whole_batch(golden, load_tiny):
    model, labels = load_tiny("embedding"), golden["train.labels"]
    whole = loss_and_gradients(model, model(golden["train.input_ids"], labels=labels, loss_only=True).loss)
    items = (labels[:, 1:] != -100).sum()
    model.zero_grad()
    for row in range(4):
        one = slice(row, row + 1)
        model(
            golden["train.input_ids"][one], labels=labels[one], loss_only=True, num_items_in_batch=items
        ).loss.backward()
    (name,) = whole
    assert (model.prefix_encoder.embedding.weight.grad - whole[name]).abs().max() <= 1e-6


@pytest.mark.parametrize("items", [None, 12])
def test_a_batch_without_labels_has_loss_0_and_no_gradient(golden, load_tiny, items):
    model = load_tiny("embedding")
    nothing = torch.full_like(golden["train.labels"], -100)
    loss = model(golden["train.input_ids"], labels=nothing, loss_only=True, num_items_in_batch=items).loss
    assert loss.item() == 0.0
    (gradient,) = loss_and_gradients(model, loss).values()
    assert gradient.abs().max() == 0.0


def test_only_labelled_positions_reach_the_output_layer(golden, load_tiny):
    model, seen = load_tiny(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[0]))
    model(golden["train.input_ids"], labels=golden["train.labels"], loss_only=True)
    assert seen == [(golden["train.labels"][:, 1:] != -100).sum().item()]


@pytest.mark.parametrize("prefix", [None, "embedding"])
def test_the_loss_of_each_row_is_its_sum(golden, load_tiny, prefix):
    model, inputs, labels = load_tiny(prefix), golden["train.input_ids"], golden["train.labels"].clone()
    labels[1] = -100
    with torch.no_grad():
        losses = model(inputs, labels=labels, loss_only="rows", num_items_in_batch=3).loss
        assert losses.shape == (4,) and losses[1] == 0
        for row in (0, 2, 3):
            one = slice(row, row + 1)
            count = (labels[one, 1:] != -100).sum()
            expected = count * model(inputs[one], labels=labels[one]).loss
            assert losses[row].item() == pytest.approx(expected.item(), rel=1e-5)
        nothing = model(inputs, labels=torch.full_like(labels, -100), loss_only="rows").loss
    assert nothing.tolist() == [0.0] * 4
