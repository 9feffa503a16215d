"""Losses of given answers, row by row."""

import math

import pytest
import torch

from ptuning.data.encode import IGNORE, EncodedRow
from ptuning.evaluation.losses import answer_losses, number_of_batches
from ptuning.methods.prefix.attach import prefix_of

PAD = 0


def row(length: int, prompt: int, seed: int = 0) -> EncodedRow:
    generator = torch.Generator().manual_seed(seed * 1000 + length)
    ids = torch.randint(3, 200, (length,), generator=generator).tolist()
    return EncodedRow(ids, [IGNORE] * prompt + ids[prompt:], f"row of {length}")


ROWS = [row(9, 4), row(30, 12), row(2, 1), row(17, 16), row(30, 3, seed=1), row(8, 8), row(12, 5)]


@pytest.fixture
def calls(monkeypatch):
    """Counts forward passes and keeps the shape of each."""
    from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration

    shapes, forward = [], ChatGLMForConditionalGeneration.forward

    def counting(self, input_ids=None, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(ChatGLMForConditionalGeneration, "forward", counting)
    return shapes


@pytest.mark.parametrize("prefix", [None, "embedding", "projection"])
def test_equal_to_the_models_loss_of_each_row(load_tiny, prefix):
    model = load_tiny(prefix)
    found = answer_losses(model, ROWS, PAD, batch_tokens=64)
    assert [tokens for _, tokens in found] == [5, 18, 1, 1, 27, 0, 7]
    for (loss, tokens), one in zip(found, ROWS, strict=True):
        if tokens == 0:
            assert loss == 0.0
            continue
        with torch.no_grad():
            expected = model(torch.tensor([one.input_ids]), labels=torch.tensor([one.labels])).loss
        assert loss / tokens == pytest.approx(float(expected), abs=1e-5)
        assert math.isfinite(loss) and loss > 0


def test_a_prefix_changes_the_losses(load_tiny):
    bare, tuned = (answer_losses(load_tiny(prefix), ROWS, PAD, 64) for prefix in (None, "embedding"))
    assert all(abs(a - b) > 1e-3 for (a, tokens), (b, _) in zip(bare, tuned, strict=True) if tokens)


@pytest.mark.parametrize("batch_tokens", [1, 31, 60, 100, 10_000])
def test_the_batch_size_changes_nothing(load_tiny, calls, batch_tokens):
    model = load_tiny("embedding")
    alone = answer_losses(model, ROWS, PAD, 1)
    calls.clear()
    found = answer_losses(model, ROWS, PAD, batch_tokens)
    assert [tokens for _, tokens in found] == [tokens for _, tokens in alone]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in alone], abs=1e-5)
    assert len(calls) == number_of_batches(ROWS, batch_tokens)
    assert all(rows * width <= batch_tokens or rows == 1 for rows, width in calls)
    assert calls[0][1] == 30  # the longest first


def test_only_what_the_labels_need_is_computed(load_tiny):
    model, seen = load_tiny(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[0]))
    answer_losses(model, ROWS, PAD, 10_000)
    assert seen == [5 + 18 + 1 + 1 + 27 + 0 + 7]


def test_further_calls_keep_processes_together(load_tiny, calls):
    model = load_tiny("embedding")
    expected = answer_losses(model, ROWS, PAD, 60)
    batches = number_of_batches(ROWS, 60)
    calls.clear()
    prompt = EncodedRow([64, 65, 66], [], "a prompt without labels")
    for filler in (ROWS[0], prompt):
        calls.clear()
        assert answer_losses(model, ROWS, PAD, 60, calls=batches + 2, filler=filler) == expected
        assert len(calls) == batches + 2
    calls.clear()
    assert answer_losses(model, [], PAD, 60, calls=2, filler=prompt) == []
    assert len(calls) == 2
    with pytest.raises(ValueError, match=f"{batches + 1} calls for {batches} batches need a filler row"):
        answer_losses(model, ROWS, PAD, 60, calls=batches + 1)


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_put_back(load_tiny, training):
    model = load_tiny("embedding").train(training)
    prefix_of(model).dropout.p = 0.5
    first, second = (answer_losses(model, ROWS, PAD, 64) for _ in range(2))
    assert first == second  # no dropout
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_logarithm_is_taken_in_fp32(load_tiny):
    exact = answer_losses(load_tiny("embedding"), ROWS, PAD, 64)
    rough = answer_losses(load_tiny("embedding", dtype=torch.bfloat16), ROWS, PAD, 64)
    assert [loss for loss, _ in rough] == pytest.approx([loss for loss, _ in exact], rel=0.02)
    assert any(loss != float(torch.tensor(loss, dtype=torch.bfloat16)) for loss, tokens in rough if tokens == 1)
