"""Where rows come from: what a kind of source has to say of itself. rows.py has the table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ptuning.data.problems import Problem

Row = dict[str, object]
Rows = Iterator[tuple[int, Row | Problem]]  # each with its line or row, from 1
Progress = Callable[[int], object]  # is told how many of the source's bytes have been read


def _itself(name: str) -> list[Path]:
    return [Path(name)]


@dataclass(frozen=True)
class Source:
    """A kind of source.

    Args:
        read: (name, columns whose cells hold JSON where cells are text, progress) → the rows, with a Problem in the place
            of one that can't be read. It reads as it goes, and raises DataError where it can't go on.
        files: name → the files whose bytes decide which rows there are.
        unit: what the numbers of rows count.
    """

    read: Callable[[str, Mapping[str, str], Progress], Rows]
    files: Callable[[str], list[Path]] = _itself
    unit: str = "line"
