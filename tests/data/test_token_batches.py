"""Batches by tokens: full, of similar lengths, as many in every epoch, the same for the same seed."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard

from ptuning.data.token_batches import TokenBatchSampler


def some_lengths(count: int, longest: int = 300, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [min(int(draw.expovariate(1 / 80)) + 4, longest) for _ in range(count)]


def epoch(sampler: TokenBatchSampler, number: int = 0) -> list[list[int]]:
    sampler.set_epoch(number)
    return list(sampler)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 100, 1000, 10**6])
@pytest.mark.parametrize("count", [1, 7, 64, 1003])
def test_each_row_once_within_the_limit_and_as_many_batches_every_epoch(count, tokens, processes):
    lengths = some_lengths(count)
    sampler = TokenBatchSampler(lengths, tokens, seed=1, processes=processes)
    for number in (0, 1, 5):
        batches = epoch(sampler, number)
        assert sorted(row for batch in batches for row in batch) == list(range(count))
        assert len(batches) == len(sampler)
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= tokens
    assert len(sampler) % processes == 0 or len(sampler) == count  # single rows can't be divided


def test_batches_are_full_and_little_is_padded():
    lengths = some_lengths(3000)
    sampler = TokenBatchSampler(lengths, 4096, seed=1)
    least = sum(lengths) / 4096
    assert least <= len(sampler) < 1.12 * least
    batches = epoch(sampler)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert sampler.padding == pytest.approx(1 - sum(lengths) / padded) and sampler.padding < 0.04
    rows = [len(batch) for batch in batches]
    assert min(rows) < 16 and max(rows) > 200
    rising = sum(a <= b for a, b in pairwise(rows)) / (len(rows) - 1)
    assert 0.3 < rising < 0.7, "batches should not come in order of length"


def test_each_epoch_has_other_batches():
    sampler = TokenBatchSampler(some_lengths(2000), 2048, seed=1)
    first, second = ({frozenset(batch) for batch in epoch(sampler, number)} for number in (0, 1))
    assert len(first & second) < 0.1 * len(first)


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = some_lengths(300)

    def order(seed, number):
        torch.manual_seed(random.randrange(2**31))  # the global generator must not matter
        before = torch.get_rng_state()
        found = epoch(TokenBatchSampler(lengths, 500, seed), number)
        assert torch.equal(torch.get_rng_state(), before)
        return found

    orders = {(seed, number): order(seed, number) for seed in (0, 42) for number in (0, 1, 2)}
    assert all(order(*key) == found for key, found in orders.items())
    assert len({str(found) for found in orders.values()}) == 6


def test_processes_take_the_same_number_of_batches_of_similar_length():
    lengths = some_lengths(500)
    sampler = TokenBatchSampler(lengths, 700, seed=3, processes=2)
    shards = [list(BatchSamplerShard(sampler, 2, rank)) for rank in range(2)]
    assert len(shards[0]) == len(shards[1]) == len(sampler) // 2
    assert sorted(row for shard in shards for batch in shard for row in batch) == list(range(500))
    longest = np.array([[max(lengths[row] for row in batch) for batch in shard] for shard in shards])
    assert np.median(abs(longest[0] - longest[1])) <= 12


def test_where_rows_cant_be_divided_processes_still_take_as_many_steps():
    sampler = TokenBatchSampler([50, 60, 70], 10, seed=3, processes=2)
    shards = [list(BatchSamplerShard(sampler, 2, rank)) for rank in range(2)]
    assert len(shards[0]) == len(shards[1]) == 2
    assert {row for shard in shards for batch in shard for row in batch} == {0, 1, 2}


def test_sizes_that_decide_about_memory_hold_for_every_epoch():
    lengths = some_lengths(400)
    labels = [length // 2 for length in lengths]
    sampler = TokenBatchSampler(lengths, 1000, seed=1)
    sizes = {rows: length for rows, length, _ in sampler.shapes(labels)}
    for number in range(4):
        for batch in epoch(sampler, number):
            assert max(lengths[row] for row in batch) <= sizes[len(batch)]
    assert all(rows * length <= 1000 or rows == 1 for rows, length in sizes.items())
    assert all(0 < share <= length for _, length, share in sampler.shapes(labels))
