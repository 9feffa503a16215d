"""Keys and values of answered requests, kept so that the next turn of a dialogue need not compute them again."""

from collections import OrderedDict
from dataclasses import dataclass

import torch

from ptuning.methods import Companion

LEAST = 16  # tokens in common that are worth a copy


@dataclass(frozen=True, eq=False)
class _Entry:
    prefix: Companion | None
    ids: list[int]
    key_values: torch.Tensor  # (L, 2, G, len(ids), D)


class PrefixCache:
    """The latest rows, at most `capacity` tokens of them; the ones unused for longest go first.

    Args:
        capacity: in tokens; 0 keeps nothing.
    """

    def __init__(self, capacity: int):
        self.capacity, self.tokens = capacity, 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()

    def add(self, prefix: Companion | None, ids: list[int], key_values: torch.Tensor) -> None:
        """Keeps a row. One that this row continues is replaced by it.

        Args:
            ids: the tokens whose keys and values these are.
            key_values: (L, 2, G, len(ids), D).
        """
        for key, entry in list(self._entries.items()):
            if entry.prefix is prefix and entry.ids == ids[: len(entry.ids)]:
                self._remove(key)
        entry = _Entry(prefix, ids, key_values)
        self._entries[id(entry)] = entry
        self.tokens += len(ids)
        while self.tokens > self.capacity and self._entries:
            self._remove(next(iter(self._entries)))

    def longest(self, prefix: Companion | None, ids: list[int]) -> torch.Tensor | None:
        """Keys and values (L, 2, G, n, D) of the first n of these tokens, n as large as can be; None if it isn't worth it.

        At least one token is left over, because the next token's logits must be computed from something.
        """
        best, best_key = 0, None
        for key, entry in self._entries.items():
            if entry.prefix is prefix and (common := in_common(entry.ids, ids[:-1])) > best:
                best, best_key = common, key
        if best_key is None or best < LEAST:
            return None
        self._entries.move_to_end(best_key)
        return self._entries[best_key].key_values[:, :, :, :best]

    def drop(self, prefix: Companion | None) -> None:
        """Forgets the rows of a prefix that is no longer served."""
        for key, entry in list(self._entries.items()):
            if entry.prefix is prefix:
                self._remove(key)

    def clear(self) -> None:
        self._entries.clear()
        self.tokens = 0

    def _remove(self, key: int) -> None:
        self.tokens -= len(self._entries.pop(key).ids)


def in_common(left: list[int], right: list[int]) -> int:
    """How many tokens two texts begin with alike."""
    limit = min(len(left), len(right))
    if left[:limit] == right[:limit]:
        return limit
    return next(i for i in range(limit) if left[i] != right[i])
