"""Rows → batches: padded to their own longest row, rows of similar length together.

Shapes: B rows, S the longest row of the batch.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ptuning.data.encode import IGNORE, EncodedRow


class RowDataset(Dataset):
    """Encoded rows as a torch dataset; each item also knows its number, so that an error can name the sample.

    Args:
        rows: EncodedRows, which stay on disk, or a list.
    """

    def __init__(self, rows: Sequence[EncodedRow]):
        self.rows = rows
        known = getattr(rows, "lengths", None)
        self.lengths = np.array([len(row.input_ids) for row in rows]) if known is None else known  # (rows,), tokens

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        return {"input_ids": row.input_ids, "labels": row.labels, "row": index}


class PadRight:
    """Collates training rows. Padding stands on the right, where causal attention never looks, so no mask is needed and
    positions count from 0 by themselves.

    Args:
        pad_token_id: fills input_ids.
        length: pad every row to this many tokens, as the official script does; default: the batch's longest row.
    """

    def __init__(self, pad_token_id: int, length: int | None = None):
        self.pad_token_id = pad_token_id
        self.length = length

    def __call__(self, items: Sequence[dict]) -> dict[str, torch.Tensor]:
        """→ input_ids and labels (B, S), row (B,)."""
        longest = self.length or max(len(item["input_ids"]) for item in items)

        def pad(key: str, fill: int) -> torch.Tensor:
            padded = np.full((len(items), longest), fill, dtype=np.int64)
            for line, item in zip(padded, items, strict=True):
                line[: len(item[key])] = item[key]
            return torch.from_numpy(padded)

        return {
            "input_ids": pad("input_ids", self.pad_token_id),
            "labels": pad("labels", IGNORE),
            "row": torch.tensor([item["row"] for item in items]),
        }


class LengthGroupedSampler(Sampler[int]):
    """A random order in which neighbours have similar lengths: shuffle, cut into pools, sort each pool by length, shuffle
    the batches. The order depends on seed and epoch alone, so a resumed run sees exactly what the killed one would have
    (transformers' own grouped sampler draws from the global generator, which differs after a resume).

    Args:
        lengths: of every row, in tokens.
        batch_size: rows of one step on one device.
        seed: of the order.
        pool: batches that are sorted together.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int, pool: int = 32):
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.pool_size = pool * batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).numpy()
        pools = np.arange(len(order)) // self.pool_size
        order = order[np.lexsort((self.lengths[order], pools))]  # stable: equal lengths stay shuffled
        # Only the last pool may end in a short batch, which has to stay last: the loader cuts the order into full batches.
        whole = len(order) // self.batch_size * self.batch_size
        full = order[:whole].reshape(-1, self.batch_size)
        for index in torch.randperm(len(full), generator=generator).numpy():
            yield from full[index].tolist()
        yield from order[whole:].tolist()
