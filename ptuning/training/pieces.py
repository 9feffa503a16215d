"""A step's batch in pieces that fit a token budget: the same gradient, in the memory of one piece.

Shapes: B rows, S the longest row of the batch.
"""

from collections.abc import Iterator, Sequence

import torch


def pieces(
    batch: dict[str, torch.Tensor], lengths: Sequence[int], budget: int, trims: bool = True
) -> Iterator[dict[str, torch.Tensor]]:
    """Cuts a batch into parts of neighbours by length, the longest rows first, so that memory is largest at once.

    Args:
        batch: tensors of B rows; those of two dimensions (B, S) are padded on the right.
        lengths: of the B rows, in tokens.
        budget: tokens of a part at most, padding included; a longer row is a part by itself.
        trims: cut padding that a part doesn't need; else each part is as wide as the batch.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    start, width = 0, batch["input_ids"].shape[1]
    while start < len(order):
        longest = lengths[order[start]] if trims else width
        rows = order[start : start + max(budget // longest, 1)]
        yield {
            name: tensor[rows, :longest].contiguous() if tensor.ndim == 2 else tensor[rows]
            for name, tensor in batch.items()
        }
        start += len(rows)
