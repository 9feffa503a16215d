"""Lengths, counted instead of listed: what a million rows need to give their percentiles."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

_STEP = 16  # suggested lengths are multiples of this


@dataclass
class Histogram:
    """How often each length occurs. Distinct lengths are few, whatever the number of rows."""

    counts: Counter[int] = field(default_factory=Counter)
    longest: int = 0
    longest_line: int = 0

    def add(self, length: int, line: int) -> None:
        self.counts[length] += 1
        if length > self.longest:
            self.longest, self.longest_line = length, line

    def merge(self, other: Histogram) -> None:
        """Adds the other's counts; the line of the longest loses its meaning."""
        self.counts.update(other.counts)
        self.longest = max(self.longest, other.longest)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def percentile(self, percent: float) -> int:
        """The least length that at least so many percent of the rows don't exceed."""
        wanted, seen = len(self) * percent / 100, 0
        for length in sorted(self.counts):
            seen += self.counts[length]
            if seen >= wanted:
                return length
        return 0

    def above(self, limit: int) -> int:
        """Rows longer than the limit."""
        return sum(count for length, count in self.counts.items() if length > limit)

    def suggested(self) -> int:
        """A limit that 99 % of the rows keep, or all of them where that costs at most a quarter more."""
        most, every = (-(-length // _STEP) * _STEP for length in (self.percentile(99), self.longest))
        return max(every if every <= 1.25 * most else most, _STEP)

    def to_dict(self, limit: int) -> dict[str, int]:
        """Percentiles, and the rows that `limit` cuts."""
        named = {f"p{percent}": self.percentile(percent) for percent in (50, 90, 95, 99)}
        return named | {
            "longest": self.longest,
            "longest_line": self.longest_line,
            "limit": limit,
            "cut": self.above(limit),
        }
