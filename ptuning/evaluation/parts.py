"""Lines that are appended the moment they are known, so that a run that was stopped goes on where it was.

Each process writes `NAME.part0.jsonl`, `NAME.part1.jsonl`, … beside the file to be. The first line says what the lines
belong to: model, rows and options. Lines of anything else are thrown away.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch

_SAMPLED = 16  # numbers of each tensor that go into the digest


class Parts:
    """The part files of one result file.

    Args:
        path: the result file.
        key: from `key_of`.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key

    def read(self) -> dict[int, dict]:
        """What is there with the same key: index → line."""
        found = {}
        for part in self._files():
            lines = _whole_lines(part)
            if next(lines, {}).get("key") == self.key:
                found |= {line["index"]: line for line in lines}
        return found

    def discard_others(self) -> None:
        """Deletes part files that belong to something else."""
        for part in self._files():
            if next(_whole_lines(part), {}).get("key") != self.key:
                part.unlink()

    def open(self, process: int) -> TextIO:
        """The file of this process, to append lines to."""
        part = self.path.with_name(f"{self.path.stem}.part{process}.jsonl")
        part.parent.mkdir(parents=True, exist_ok=True)
        if part.exists():  # a line cut off by a kill would spoil the next one
            text = part.read_bytes()
            part.write_bytes(text[: text.rfind(b"\n") + 1])
        file = part.open("a", encoding="utf-8")
        if file.tell() == 0:
            append(file, {"key": self.key})
        return file

    def _files(self) -> list[Path]:
        return _part_files(self.path)


def delete_parts(path: Path) -> None:
    """Deletes the part files of a result file, when nothing can be lost any more."""
    for part in _part_files(path):
        part.unlink()


def _part_files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.part*.jsonl"))


def append(file: TextIO, line: dict) -> None:
    """Writes one line that a kill can't take back."""
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()


def write_lines(path: Path, lines: list[dict]) -> None:
    """Writes the result file in one step."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    temporary.replace(path)


def key_of(model: torch.nn.Module, *settings: object) -> str:
    """16 hex digits that change with the weights (some of each tensor, all of a prefix) and the settings.

    Args:
        settings: what `repr` shows of them counts.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for name, parameter in model.named_parameters():
        numbers = getattr(parameter, "ds_tensor", parameter).detach().flatten()  # under ZeRO-3: this process's share
        if "prefix_encoder" not in name:
            numbers = numbers[:: max(len(numbers) // _SAMPLED, 1)]
        digest.update(numbers.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _whole_lines(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            if text.endswith("\n"):
                yield json.loads(text)
