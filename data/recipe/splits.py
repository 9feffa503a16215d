"""What both generators end with: cut the rows into train and dev, and write them as JSON lines."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def render(part: Sequence[dict[str, Any]]) -> str:
    """The text of a JSON-lines file, as ADGEN writes it (non-ASCII characters kept)."""
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in part)


def main(description: str, name: str, rows: Sequence[dict[str, Any]], train_rows: int) -> None:
    """Writes train.json (the first `train_rows`) and dev.json (the rest) into data/`name`, or into --out."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / name)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for file, part in (("train.json", rows[:train_rows]), ("dev.json", rows[train_rows:])):
        (out / file).write_text(render(part), encoding="utf-8", newline="\n")
