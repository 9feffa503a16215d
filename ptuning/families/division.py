"""How an official checkpoint divides tensors among the processes of tensor parallelism, and how they are put together again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

# copied to every process; divided by rows; by columns; the rows of each of two stacked halves divided by themselves;
# copied, and not a tensor of a model folder
How = Literal["copied", "rows", "columns", "halves", "left out"]
_COPIED = ("copied", "left out")


@dataclass(frozen=True)
class Division:
    """Of one family.

    Args:
        how: of a tensor, by its name in files.
    """

    how: Callable[[str], How]

    def shape(self, name: str, parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Of the whole tensor, by those of its parts.

        Raises:
            ValueError: the parts don't fit together.
        """
        how, first = self.how(name), parts[0]
        axis = {"rows": 0, "halves": 0, "columns": 1}.get(how)
        if axis is None:
            if len(set(parts)) > 1:
                raise ValueError(
                    f"{name} is {' and '.join(map(str, sorted(set(parts))))}, and each must have the same copy"
                )
            return first
        if len({part[:axis] + part[axis + 1 :] for part in parts}) > 1:
            raise ValueError(f"{name} is {', '.join(map(str, parts))}, which can't be put together")
        return (*first[:axis], sum(part[axis] for part in parts), *first[axis + 1 :])

    def join(self, name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole tensor of its parts, in the processes' order; a single part or a copy is returned as it is."""
        how = self.how(name)
        if how in _COPIED or len(parts) == 1:
            return parts[0]
        if how == "halves":
            first, second = zip(*(part.chunk(2) for part in parts), strict=True)
            return torch.cat([*first, *second])
        return torch.cat(list(parts), 1 if how == "columns" else 0)

    def part(self, name: str, whole: torch.Tensor, index: int, count: int) -> torch.Tensor:
        """One of so many parts: a view of the whole, or of halves a new tensor.

        Raises:
            ValueError: it can't be divided so.
        """
        how = self.how(name)
        if how in _COPIED:
            return whole
        axis = 1 if how == "columns" else 0
        size = whole.shape[axis] // 2 if how == "halves" else whole.shape[axis]
        if size % count:
            raise ValueError(f"{name} has {size} {'columns' if axis else 'rows'}, which {count} processes can't share")
        if how == "halves":
            return torch.cat([half.chunk(count)[index] for half in whole.chunk(2)])
        return whole.chunk(count, axis)[index]
