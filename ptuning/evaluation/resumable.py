"""Lines that are appended the moment they are known, so that a run that was stopped goes on where it was."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from ptuning.runs.files import write_atomically


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
        found = {}
        for file in part_files(self.path):
            lines = _objects(file)
            if next(lines, {}).get("key") == self.key:
                found |= {line["index"]: line for line in lines if "index" in line}
        return found

    def discard_others(self) -> None:
        """Deletes part files that belong to something else."""
        for file in part_files(self.path):
            if next(_objects(file), {}).get("key") != self.key:
                file.unlink()

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
    for file in part_files(path):
        file.unlink()


def append(file: TextIO, line: dict) -> None:
    """Writes one line that a kill of this process can't take back."""
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()


def write_lines(path: Path, lines: Iterable[dict]) -> None:
    """Writes the whole file in one step."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _objects(path: Path) -> Iterator[dict]:
    """The whole lines that hold an object."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                value = json.loads(text)
            except ValueError:
                continue
            if text.endswith("\n") and isinstance(value, dict):
                yield value
