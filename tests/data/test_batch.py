"""Batches are padded to their own longest row, and the sampler puts rows of similar length together."""

import random
from itertools import pairwise

import pytest
import torch
from torch.utils.data import DataLoader

from ptuning.data.batch import LengthGroupedSampler, PadRight, RowDataset
from ptuning.data.encode import IGNORE, EncodedRow
from ptuning.families.logits import loss_of


def random_rows(count: int, longest: int = 60, vocabulary: int = 300) -> list[EncodedRow]:
    rng = random.Random(0)
    rows = []
    for index in range(count):
        ids = [rng.randrange(3, vocabulary) for _ in range(rng.randrange(4, longest + 1))]
        prompt = rng.randrange(1, len(ids) - 1)
        rows.append(EncodedRow(ids, [IGNORE] * prompt + ids[prompt:], f"a.json:{index}"))
    return rows


def padding_share(order: list[int], lengths: list[int], batch_size: int) -> float:
    batches = [[lengths[i] for i in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def test_rows_are_padded_to_their_own_longest():
    rows = RowDataset(random_rows(10))
    for batch in DataLoader(rows, batch_size=4, collate_fn=PadRight(0)):
        chosen = [rows.rows[index] for index in batch["row"].tolist()]
        width = max(len(row.input_ids) for row in chosen)
        assert batch["input_ids"].shape == batch["labels"].shape == (len(chosen), width)
        for ids, labels, row in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), chosen, strict=True):
            pad = width - len(row.input_ids)
            assert ids == row.input_ids + [0] * pad
            assert labels == row.labels + [IGNORE] * pad
    assert batch["row"].tolist() == [8, 9]


@pytest.mark.parametrize("prefix", [None, "embedding"])
@torch.no_grad()
def test_a_padded_batchs_loss_is_its_rows_one_by_one(load_tiny, prefix):
    model, rows, collate = load_tiny(prefix), RowDataset(random_rows(6)), PadRight(0)

    def loss(indices, items):
        batch = collate([rows[index] for index in indices])
        return loss_of(model, batch["input_ids"], batch["labels"], items).item()

    items = sum(label != IGNORE for row in rows.rows for label in row.labels)
    assert loss(range(6), items) == pytest.approx(sum(loss([index], items) for index in range(6)), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 64, 257])
def test_the_order_is_a_permutation_with_the_short_batch_last(count, batch_size):
    lengths = [len(row.input_ids) for row in random_rows(count)]
    sampler = LengthGroupedSampler(lengths, batch_size, seed=1, pool=4)
    order = list(sampler)
    assert sorted(order) == list(range(count)) and len(sampler) == count
    # Each full batch of the loader lies within one pool's sorted order: no other row of the pool fits in between.
    pools = torch.randperm(count, generator=torch.Generator().manual_seed(1_000_003)).tolist()
    pool_of = {row: at // (4 * batch_size) for at, row in enumerate(pools)}
    for start in range(0, count, batch_size):
        assert len({pool_of[row] for row in order[start : start + batch_size]}) == 1
    if count % batch_size:
        assert {pool_of[row] for row in order[-(count % batch_size) :]} == {(count - 1) // (4 * batch_size)}


def order_in_lists(lengths: list[int], batch_size: int, seed: int, epoch: int, pool: int) -> list[int]:
    """The same order, written with lists: what earlier runs had, and a resumed one must have."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), pool * batch_size):
        chosen = sorted(order[start : start + pool * batch_size], key=lengths.__getitem__)
        batches += [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    short = [batch for batch in batches if len(batch) < batch_size]
    full = [batch for batch in batches if len(batch) == batch_size]
    shuffled = [full[index] for index in torch.randperm(len(full), generator=generator).tolist()]
    return [row for batch in shuffled + short for row in batch]


@pytest.mark.parametrize(("batch_size", "pool"), [(1, 4), (3, 2), (8, 32), (16, 1)])
@pytest.mark.parametrize("count", [0, 1, 7, 64, 1003])
def test_the_order_is_what_it_always_was(count, batch_size, pool):
    lengths = [len(row.input_ids) for row in random_rows(count, longest=12)]  # many of the same length
    for seed, epoch in ((0, 0), (42, 1), (42, 2)):
        sampler = LengthGroupedSampler(lengths, batch_size, seed, pool)
        sampler.set_epoch(epoch)
        assert list(sampler) == order_in_lists(lengths, batch_size, seed, epoch, pool)


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = [len(row.input_ids) for row in random_rows(200)]

    def order(seed, epoch):
        torch.manual_seed(random.randrange(2**31))  # the global generator must not matter
        sampler = LengthGroupedSampler(lengths, 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = {(seed, epoch): order(seed, epoch) for seed in (0, 1, 42) for epoch in (0, 1, 2)}
    assert all(order(*key) == found for key, found in orders.items())
    assert len({tuple(found) for found in orders.values()}) == 9


def test_iterating_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(LengthGroupedSampler([3, 1, 2] * 20, 4, seed=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_lengths_are_grouped_but_batches_are_shuffled():
    lengths = [len(row.input_ids) for row in random_rows(1000, longest=190)]
    order = list(LengthGroupedSampler(lengths, 8, seed=3))
    shuffled = random.Random(0).sample(range(1000), 1000)
    grouped, at_random = padding_share(order, lengths, 8), padding_share(shuffled, lengths, 8)
    assert at_random > 0.3 and grouped < 0.1, (grouped, at_random)
    longest = [max(lengths[i] for i in order[at : at + 8]) for at in range(0, 1000, 8)]
    rising = sum(a <= b for a, b in pairwise(longest)) / (len(longest) - 1)
    assert 0.35 < rising < 0.65, "batches should not come in order of length"
