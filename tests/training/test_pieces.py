"""A step's batch in pieces: which rows, which widths, and that errors say the same."""

import pytest
import torch

from ptuning.data.batch import PadRight
from ptuning.errors import TrainingError
from ptuning.methods.prefix.attach import prefix_of
from ptuning.training.pieces import pieces
from tests.training.test_trainer import build, some_rows  # noqa: F401  the fixture


def batch_of(*lengths, width=None):
    items = [{"input_ids": [9] * n, "labels": [9] * n, "row": row} for row, n in enumerate(lengths)]
    return PadRight(0, width)(items)


@pytest.mark.parametrize(
    ("lengths", "budget", "rows"),
    [
        ((5, 3, 4, 2), 8, [[0], [2, 1], [3]]),
        ((5, 3, 4, 2), 10, [[0, 2], [1, 3]]),
        ((5, 3, 4, 2), 1, [[0], [2], [1], [3]]),
        ((5, 3, 4, 2), 1000, [[0, 2, 1, 3]]),
        ((3, 3, 3), 6, [[0, 1], [2]]),
    ],
)
def test_rows_and_widths(lengths, budget, rows):
    found = list(pieces(batch_of(*lengths), lengths, budget))
    assert [part["row"].tolist() for part in found] == rows
    for part in found:
        longest = max(lengths[row] for row in part["row"])
        assert part["input_ids"].shape == part["labels"].shape == (len(part["row"]), longest)
        assert (part["input_ids"] == 9).sum(1).tolist() == [lengths[row] for row in part["row"]]


def test_padding_that_was_asked_for_stays():
    found = list(pieces(batch_of(5, 3, 4, width=8), (5, 3, 4), 16, trims=False))
    assert [part["input_ids"].shape for part in found] == [(2, 8), (1, 8)]


def test_a_nan_in_a_piece_stops_before_the_step(build):  # noqa: F811
    trainer = build(some_rows(16), train_sampling_strategy="sequential", micro_batch_tokens=20)
    before, inner, calls = prefix_of(trainer.model).embedding.weight.detach().clone(), trainer.model.forward, []

    def poisoned(*args, **kwargs):
        outputs, _ = inner(*args, **kwargs), calls.append(len(kwargs["input_ids"]))
        if len(calls) == 2:
            outputs["logits"] = outputs["logits"] * float("nan")
        return outputs

    trainer.model.forward = poisoned
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan on rows\.json:\d"):
        trainer.train()
    assert sum(calls) == 4 and len(calls) > 2
    assert torch.equal(prefix_of(trainer.model).embedding.weight, before)


def test_throughput_counts_each_row_once(build):  # noqa: F811
    rows, counted = some_rows(16), []
    for tokens in (0, 20):
        trainer = build(rows, micro_batch_tokens=tokens)
        original = trainer._throughput.count
        trainer._throughput.count = lambda ids, pad, original=original: (counted.append(len(ids)), original(ids, pad))
        trainer.train()
    assert counted == [4] * 8
