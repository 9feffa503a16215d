"""JSON lines: read strictly or leniently, written in one step, or appended so that a stopped run goes on where it was."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ptuning.errors import DataError
from ptuning.runs.files import BAD_JSON, write_text

# A line longer than this is not one of ours; reading it whole would let one bad file take the memory.
MAX_LINE_BYTES = 4_000_000


def read_lines(path: Path, fix: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number, from 1, and object of each line of a file that must be right. Blank lines are skipped.

    Args:
        fix: what to do where a line isn't right, for the message.

    Raises:
        DataError: the file or a line can't be read, or a line is no JSON object.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if not text.strip():
                    continue
                try:
                    value = json.loads(text)
                except BAD_JSON as cause:
                    raise DataError(f"{path}:{number}: JSON: {cause}: {fix}") from cause
                if not isinstance(value, dict):
                    raise DataError(f"{path}:{number}: row: is a {type(value).__name__}, an object is needed: {fix}")
                yield number, value
    except (OSError, UnicodeDecodeError) as cause:
        raise DataError(f"{path}: can't be read ({cause}): {fix}") from cause


def write_lines(path: Path, lines: Iterable[dict]) -> Path:
    """Writes the whole file in one step."""
    return write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


class Lines:
    """The JSON objects of a file that may be missing, damaged or still growing: what can be read, never an error.

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
    except BAD_JSON:
        return None
    return value if isinstance(value, dict) else None


class ResumableLines:
    """Lines of a result file that are kept the moment they are known.

    Each process appends to its own `NAME.part0.jsonl`, `NAME.part1.jsonl`, … beside the file to be. The first line says what
    the lines belong to: model, rows and options. Lines of anything else are thrown away.

    Args:
        path: the result file.
        key: changes with everything that the lines depend on.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key

    def read(self) -> dict[int, dict]:
        """What is there with the same key: index → line. Damaged lines are left out, and so made again."""
        found: dict[int, dict] = {}
        for part in part_files(self.path):
            lines = (line for _, line in Lines(part))
            if next(lines, {}).get("key") == self.key:
                found |= {line["index"]: line for line in lines if "index" in line}
        return found

    def discard_others(self) -> None:
        """Deletes part files that belong to something else."""
        for part in part_files(self.path):
            if next((line for _, line in Lines(part)), {}).get("key") != self.key:
                part.unlink()

    def open(self, process: int) -> TextIO:
        """The file of this process, to `append` lines to.

        Args:
            process: its rank.
        """
        part = self.path.with_name(f"{self.path.stem}.part{process}.jsonl")
        part.parent.mkdir(parents=True, exist_ok=True)
        if part.exists():  # a line cut off by a kill would spoil the next one
            text = part.read_bytes()
            part.write_bytes(text[: text.rfind(b"\n") + 1])
        file = part.open("a", encoding="utf-8")
        if file.tell() == 0:
            append(file, {"key": self.key})
        return file


def part_files(path: Path) -> list[Path]:
    """The part files of a result file."""
    return sorted(path.parent.glob(f"{path.stem}.part*.jsonl"))


def delete_parts(path: Path) -> None:
    """Deletes the part files of a result file, when nothing can be lost any more."""
    for part in part_files(path):
        part.unlink()


def append(file: TextIO, line: dict) -> None:
    """Writes one line that a kill of this process can't take back."""
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()
