"""The order of rows: another in each epoch, and in a resumed run the one that the whole run would have had."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, RandomSampler

from ptuning.data.batch import LengthGroupedSampler
from ptuning.training.trainer import SamplerEpoch, TuningTrainer
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


@pytest.mark.parametrize("kind", ["group_by_length", "random"])
@pytest.mark.parametrize("processes", [1, 2])
def test_also_where_several_processes_skip_the_steps_that_were_taken(kind, processes):
    """accelerate's own `set_epoch` doesn't reach a sampler below a shard below skipped batches."""

    def loader() -> DataLoader:
        generator = torch.Generator().manual_seed(1)
        random = RandomSampler(range(16), generator=generator)
        sampler = random if kind == "random" else LengthGroupedSampler(list(range(16)), batch_size=2, seed=1)
        inner = DataLoader(range(16), batch_size=2, sampler=sampler)
        settings = {
            "num_processes": processes,
            "process_index": processes - 1,
            "use_seedable_sampler": True,
            "data_seed": 1,
        }
        return prepare_data_loader(inner, **settings)

    def batches(source) -> list[list[int]]:
        return [batch.tolist() for batch in source]

    whole, resumed = loader(), loader()
    first = batches(whole)
    whole.set_epoch(1)
    second = batches(whole)
    assert first != second
    SamplerEpoch().on_epoch_begin(None, SimpleNamespace(epoch=1.5), None, train_dataloader=resumed)
    rest = skip_first_batches(resumed, 2)
    rest.set_epoch(1)
    assert batches(rest) == second[2:]
