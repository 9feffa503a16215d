"""The data files of a run, read and checked before any model is loaded."""

from dataclasses import dataclass

from ptuning.data.records import Columns, Record, data_fingerprint, read_records


@dataclass(frozen=True)
class Split:
    """Records of one file, and what to call it in the run's record.

    Args:
        name: train, validation or test.
        sha256: of the file.
        skipped: rows left out because they had problems.
    """

    name: str
    file: str
    records: list[Record]
    sha256: str
    skipped: int

    def __str__(self) -> str:
        skipped = f", {self.skipped} invalid rows skipped" if self.skipped else ""
        return f"{self.name}: {len(self.records)} rows of {self.file}{skipped}"


def read_split(name: str, file: str, columns: Columns, max_samples: int | None, skip_invalid: bool) -> Split:
    """Reads one file.

    Raises:
        DataError: the file or its rows are unusable; the message names file, line, field and fix.
    """
    records, problems = read_records(file, columns, max_samples=max_samples, skip_invalid=skip_invalid)
    skipped = len({(problem.file, problem.line) for problem in problems})
    return Split(name, file, records, data_fingerprint(file), skipped)
