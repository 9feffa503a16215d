"""Reading files that may be missing, damaged, cut in the last line or still growing: what can be read, never an error."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

# A line longer than this is not one of ours; reading it whole would let one bad file take the memory.
MAX_LINE_BYTES = 4_000_000
_BAD_JSON = (ValueError, RecursionError)


def number(value) -> float | int | None:
    """`value` where it is a finite number, else None. true and false are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer beyond every float
        return None


def read_object(path: Path) -> dict:
    """The JSON object in `path`; empty where there is none."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8", errors="replace"))
    except (OSError, *_BAD_JSON):
        return {}
    return value if isinstance(value, dict) else {}


class Lines:
    """The JSON objects of a .jsonl file, one after the other.

    Attributes:
        bad: lines that could not be read so far. An unfinished last line isn't one: the file may still be growing.
    """

    def __init__(self, path: Path):
        self.path = path
        self.bad = 0

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        """Byte offset and object of each line."""
        self.bad = 0
        try:
            with self.path.open("rb") as file:
                offset = 0
                while raw := file.readline(MAX_LINE_BYTES):
                    start, offset = offset, offset + len(raw)
                    value = _object(raw)
                    if value is not None:
                        yield start, value
                    elif raw.strip() and raw.endswith(b"\n"):
                        self.bad += 1
        except OSError:
            return

    def at(self, offset: int) -> dict:
        """The object at a byte offset that iterating gave; empty where the file has changed since."""
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                return _object(file.readline(MAX_LINE_BYTES)) or {}
        except OSError:
            return {}


def _object(raw: bytes) -> dict | None:
    try:
        value = json.loads(raw.decode("utf-8", errors="replace"))
    except _BAD_JSON:
        return None
    return value if isinstance(value, dict) else None
