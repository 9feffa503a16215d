"""Resampling of rows."""

import math

import numpy as np
import pytest

from ptuning.evaluation import corpus
from ptuning.evaluation.corpus import percentile_interval, ratio, resampled_sums


def mean_interval(values):
    table = np.stack([values, np.ones(len(values))], axis=1)
    return percentile_interval(ratio(resampled_sums(table)))


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(10, 3, size=900)
    low, high = mean_interval(values)
    error = 1.96 * values.std() / math.sqrt(900)
    assert low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_the_same_every_time_and_whatever_the_block(monkeypatch):
    table = np.random.default_rng(0).normal(size=(37, 3))
    first = resampled_sums(table)
    assert first.shape == (1000, 3)
    assert (resampled_sums(table) == first).all()
    monkeypatch.setattr(corpus, "_BLOCK", 100)
    assert np.allclose(resampled_sums(table), first, atol=1e-12)
    assert not np.allclose(resampled_sums(table, seed=1), first)


def test_equally_many_rows_are_drawn_alike():
    """What makes the difference of two models a paired one."""
    ones = np.eye(20)
    assert (resampled_sums(ones) == resampled_sums(np.eye(20))).all()
    assert (resampled_sums(ones).sum(1) == 20).all()


@pytest.mark.parametrize("rows", [1, 5])
def test_equal_rows_have_an_interval_of_no_width(rows):
    assert mean_interval(np.full(rows, 12.34567)) == [12.3457, 12.3457]


def test_resamples_in_which_nothing_was_counted_are_left_out():
    values = ratio(np.array([[1.0, 2.0], [0.0, 0.0], [3.0, 2.0]]))
    assert np.isnan(values).tolist() == [False, True, False]
    assert percentile_interval(values) == [0.525, 1.475]
