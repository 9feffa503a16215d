"""The order of rows: another in each epoch, and in a resumed run the one that the whole run would have had."""

import pytest

from ptuning.data.batch import LengthGroupedSampler
from ptuning.training.trainer import TuningTrainer
from tests.training.test_trainer import build, some_rows  # noqa: F401

STEPS_AN_EPOCH = 4


def test_each_epoch_has_its_own_order():
    sampler = LengthGroupedSampler(list(range(40)), batch_size=4, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] != orders[1] and orders[0] == orders[2]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))


@pytest.fixture
def rows_of_steps(build, monkeypatch):  # noqa: F811
    """Trains two epochs, from a checkpoint where one is given. Returns the rows of each step."""

    def train(strategy: str, resume_from: str | None = None) -> list[list[int]]:
        seen, compute_loss = [], TuningTrainer.compute_loss

        def watched(self, model, inputs, *args, **kwargs):
            seen.append(inputs["row"].tolist())
            return compute_loss(self, model, inputs, *args, **kwargs)

        options = {"max_steps": 2 * STEPS_AN_EPOCH, "save_steps": 2, "train_sampling_strategy": strategy}
        with monkeypatch.context() as patch:
            patch.setattr(TuningTrainer, "compute_loss", watched)
            build(some_rows(4 * STEPS_AN_EPOCH), **options).train(resume_from_checkpoint=resume_from)
        return seen

    return train


@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
def test_a_resumed_second_epoch_has_the_second_epochs_order(rows_of_steps, strategy, tmp_path):
    whole = rows_of_steps(strategy)
    first, second = whole[:STEPS_AN_EPOCH], whole[STEPS_AN_EPOCH:]
    for epoch in (first, second):
        assert sorted(row for step in epoch for row in step) == list(range(4 * STEPS_AN_EPOCH))
    assert first != second
    # At the end of the first epoch, and in the middle of the second.
    for step in (STEPS_AN_EPOCH, STEPS_AN_EPOCH + 2):
        assert rows_of_steps(strategy, str(tmp_path / "run" / f"checkpoint-{step}")) == whole[step:]
