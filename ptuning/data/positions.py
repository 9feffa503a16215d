"""Batches of rows whose positions are divided among processes (--sequence_parallel).

Shapes: B rows, S the longest row of the batch, P processes, s = ⌈S/P⌉ positions of one process.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.utils.data import Sampler

from ptuning.data.batch import PadRight
from ptuning.data.encode import IGNORE


class SharedBatches(Sampler[list[int]]):
    """Each batch once for every process: accelerate gives neighbours in this order to the processes of one step.

    Args:
        batches: of row numbers; finite.
        processes: P.
    """

    def __init__(self, batches: Sampler[list[int]], processes: int):
        self.batch_sampler, self.processes = batches, processes

    def __len__(self) -> int:
        return self.processes * len(self.batch_sampler)  # type: ignore[arg-type]  # each of ours has a length

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batch_sampler:
            for _ in range(self.processes):
                yield batch


class OwnPositions:
    """Collates rows and keeps one process's positions of each.

    Args:
        collate: pads rows to the batch's longest.
        place: of the process, from 0.
        processes: P.
    """

    def __init__(self, collate: PadRight, place: int, processes: int):
        self.collate, self.place, self.processes = collate, place, processes

    def __call__(self, items: Sequence[dict]) -> dict[str, torch.Tensor]:
        """→ input_ids and position_ids (B, s), row (B,); and labels (B, s + 1), because this part's last token predicts the next
        part's first. The longest row is padded to P·s."""
        batch = self.collate(items)
        share = -(-batch["input_ids"].shape[1] // self.processes)
        start = self.place * share
        ids = _cut(batch["input_ids"], start, share, self.collate.pad_token_id)
        return {
            "input_ids": ids,
            "labels": _cut(batch["labels"], start, share + 1, IGNORE),
            "position_ids": torch.arange(start, start + share).repeat(len(ids), 1),
            "row": batch["row"],
        }


def _cut(whole: torch.Tensor, start: int, length: int, fill: int) -> torch.Tensor:
    part = whole[:, start : start + length]
    return nn.functional.pad(part, (0, length - part.shape[1]), value=fill).contiguous()
