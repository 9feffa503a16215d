"""How many batches a run has, of which rows, and on which process."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from ptuning.config import TuningArguments
from ptuning.data.token_batches import TokenBatchSampler


def order_seed(training: TuningArguments) -> int:
    """Of the order of training rows."""
    return training.seed if training.data_seed is None else training.data_seed


def token_batches(training: TuningArguments, lengths: Sequence[int] | np.ndarray) -> TokenBatchSampler | None:
    """The batches of --tokens_per_batch; None where a batch is a number of rows.

    Args:
        lengths: of the training rows, in tokens.
    """
    if training.tokens_per_batch is None:
        return None
    return TokenBatchSampler(lengths, training.tokens_per_batch, order_seed(training), training.row_takers)


def steps_an_epoch(training: TuningArguments, lengths: Sequence[int] | np.ndarray) -> int:
    """Optimizer steps of an epoch, as the trainer counts them.

    Args:
        lengths: of the training rows, in tokens.
    """
    sampler = token_batches(training, lengths)
    if sampler is not None:
        batches = math.ceil(len(sampler) / training.row_takers)
    else:
        batch = training.per_device_train_batch_size * training.row_takers
        batches = len(lengths) // batch if training.dataloader_drop_last else math.ceil(len(lengths) / batch)
    return max(math.ceil(batches / training.gradient_accumulation_steps), 1)


def planned_steps(training: TuningArguments, lengths: Sequence[int] | np.ndarray) -> int:
    """Optimizer steps of the whole run; arguments as `steps_an_epoch`."""
    if training.max_steps > 0:
        return training.max_steps
    return math.ceil(training.num_train_epochs * steps_an_epoch(training, lengths))


def evaluation_batches(training: TuningArguments, lengths: np.ndarray) -> Iterator[tuple[list[int], float]]:
    """This process's batches for the eval loss: rows of similar length, no more of them than the options allow, and no more
    tokens than a training batch has, where those are bounded.

    Args:
        lengths: of all rows.

    Yields:
        Rows, and 1; a process without rows takes one with 0, because sharded weights are gathered by all of them together.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    size, world, rank = training.per_device_eval_batch_size, training.world_size, training.process_index
    start = 0
    while start < len(order):
        rows = _rows_that_fit(training, lengths[order[start : start + size * world]])
        mine = order[start : start + rows * world][rank * rows : (rank + 1) * rows]
        yield mine or order[:1], float(bool(mine))
        start += rows * world


def _rows_that_fit(training: TuningArguments, lengths: np.ndarray) -> int:
    """Rows a process, of the next ones by length."""
    size, tokens = training.per_device_eval_batch_size, training.tokens_per_batch
    if tokens is None:
        return size
    # All processes take as many; the last of them has the longest row.
    fits = (n for n in range(size, 0, -1) if n * lengths[: n * training.world_size].max() <= tokens)
    return next(fits, 1)
