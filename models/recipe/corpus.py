"""Write the pretraining text of the demo's base model: JSON lines of prompt, response and history.

Row i depends on the seed and on i alone, so a longer corpus starts with the same rows as a shorter one.

    python models/recipe/corpus.py --out corpus.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import fields
import talk

SEED = 2023
ROWS = 80_000
TASKS = [*fields.TASKS, *talk.TASKS]


def generate(count: int, seed: int = SEED) -> Iterator[fields.Row]:
    """`count` rows, each of a task drawn by the tasks' weights."""
    makers, weights = zip(*TASKS, strict=True)
    for i in range(count):
        rng = random.Random(f"{seed}:{i}")
        yield rng.choices(makers, weights)[0](rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with args.out.open("w", encoding="utf-8", newline="\n") as out:
        for one in generate(args.rows, args.seed):
            out.write(json.dumps(one, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
