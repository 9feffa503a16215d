"""The data files of a run, read and checked before any model is loaded."""

from dataclasses import dataclass

from ptuning.data.columns import Columns
from ptuning.data.files import data_fingerprint
from ptuning.data.formats import Layout, find_format
from ptuning.data.record import Record
from ptuning.data.records import read_records


@dataclass(frozen=True)
class Split:
    """Records of one file, maybe with others mixed in, and what to call it in the run's record.

    Args:
        name: train, validation or test.
        sha256: of the file; with rows mixed in, of all files and shares.
        skipped: rows left out because they had problems.
        guessed: the format, where the flags left it open.
        mixed_in: counts of the rows from other files, one text for each.
    """

    name: str
    file: str
    records: list[Record]
    sha256: str
    skipped: int
    guessed: str | None = None
    mixed_in: tuple[tuple[int, str], ...] = ()

    def __str__(self) -> str:
        own = len(self.records) - sum(count for count, _ in self.mixed_in)
        skipped = f", {self.skipped} invalid rows skipped" if self.skipped else ""
        guessed = f" ({self.guessed})" if self.guessed else ""
        mixed_in = "".join(f" + {text}" for _, text in self.mixed_in)
        return f"{self.name}: {own} rows of {self.file}{guessed}{skipped}{mixed_in}"


def read_split(
    name: str, file: str, columns: Columns | Layout, max_samples: int | None = None, skip_invalid: bool = False
) -> Split:
    """Reads one file.

    Raises:
        DataError: the file or its rows are unusable; the message names file, line, field and fix.
    """
    found = find_format(file, columns)
    records, problems = read_records(file, found, max_samples=max_samples, skip_invalid=skip_invalid)
    skipped = len({(problem.file, problem.line) for problem in problems})
    return Split(name, file, records, data_fingerprint(file), skipped, str(found) if found.guessed else None)
