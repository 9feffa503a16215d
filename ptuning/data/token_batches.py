"""Batches by tokens instead of rows: as many rows of similar length as fit, padding included.

Shapes: R rows in all, K batches of an epoch.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

_STEPS = 16  # lengths that are told apart between a power of two and the next


class TokenBatchSampler(Sampler[list[int]]):
    """Batches whose rows × longest row are at most `tokens`; a longer row stands alone.

    All rows are sorted by length and cut, and the batches shuffled. Lengths that differ by less than a sixteenth count as the
    same, and rows of the same length are shuffled among the batches, so that each epoch has other batches, but always
    the same number of them, which the trainer plans with. The order depends on seed and epoch alone, as
    LengthGroupedSampler's.

    Args:
        lengths: of every row, in tokens.
        tokens: of a batch at most.
        seed: of the order.
        processes: that take a batch each at the same time. The number of batches is a multiple of it, for which large batches are
            halved, and batches that are neighbours in length go to the processes of one step, so that none waits long.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, tokens: int, seed: int, processes: int = 1):
        self.lengths = np.asarray(lengths)
        self.seed, self.processes, self.epoch = seed, processes, 0
        self._rounded = _rounded(self.lengths)
        self._bounds = _cut(np.sort(self._rounded), tokens, processes)  # (K + 1,)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __iter__(self) -> Iterator[list[int]]:
        generator, batches = self._batches()
        # Where single rows can't be divided among the processes, the last group is short: it stays last, and is filled up.
        whole = len(batches) // self.processes
        for group in torch.randperm(whole, generator=generator).tolist():
            for batch in batches[group * self.processes : (group + 1) * self.processes]:
                yield batch.tolist()
        for batch in batches[whole * self.processes :]:
            yield batch.tolist()

    def _batches(self) -> tuple[torch.Generator, list[np.ndarray]]:
        """This epoch's batches, shortest rows first."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).numpy()
        order = order[np.argsort(self._rounded[order], kind="stable")]
        return generator, np.split(order, self._bounds[1:-1])

    @property
    def padding(self) -> float:
        """The share of this epoch's tokens that is padding."""
        batches = [self.lengths[batch] for batch in self._batches()[1]]
        return 1 - float(self.lengths.sum()) / max(sum(len(batch) * int(batch.max(initial=0)) for batch in batches), 1)

    def shapes(self, label_counts: Sequence[int] | np.ndarray) -> list[tuple[int, int, int]]:
        """Sizes of batches that decide about memory: rows, tokens of the longest, labels a row, for each number of rows that
        occurs the largest of each. Labels are this epoch's, lengths hold for every epoch.

        Args:
            label_counts: of every row.
        """
        counts, longest = np.asarray(label_counts), self.lengths.max(initial=0)
        largest: dict[int, tuple[int, int]] = {}
        for batch in self._batches()[1]:
            length = int(min(self._rounded[batch].max(), longest))
            labels = -(-int(counts[batch].sum()) // len(batch))
            known = largest.get(len(batch), (0, 0))
            largest[len(batch)] = (max(known[0], length), max(known[1], labels))
        return [(rows, *sizes) for rows, sizes in sorted(largest.items())]


def _rounded(lengths: np.ndarray) -> np.ndarray:
    """Up to the next of the lengths that are told apart."""
    _, exponents = np.frexp(lengths)
    steps = 1 << np.maximum(exponents - 1 - int(np.log2(_STEPS)), 0)
    return -(-lengths // steps) * steps


def _cut(lengths: np.ndarray, tokens: int, multiple: int) -> np.ndarray:
    """Where sorted lengths (R,) are cut: (K + 1,), from 0 to R."""
    bounds, start = [0], 0
    while start < len(lengths):
        some = lengths[start : start + max(tokens // int(lengths[start]), 1)]
        start += max(int((some * np.arange(1, len(some) + 1) <= tokens).sum()), 1)
        bounds.append(start)
    while (len(bounds) - 1) % multiple:
        rows = np.diff(bounds)
        largest = int(rows.argmax())
        if rows[largest] == 1:
            break
        bounds.insert(largest + 1, bounds[largest] + int(rows[largest]) // 2)
    return np.array(bounds)
