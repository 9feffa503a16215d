"""Two files of benchmarks/all.py side by side: each figure that both have, and new divided by old.

    python benchmarks/compare.py OLD NEW [--above 0.05]

Rates are better when they grow, seconds and memory when they shrink. Changes below --above aren't judged; on two runs of the same
version small figures differ by 5 to 10 % on an idle machine, so look at what moves together. The last line is JSON.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_COST = re.compile(r"kb_per_|(?:seconds|_s|_ms|_mb|_gb|_ms_p\d+)$")
_RATE = re.compile(r"per_s|speedup|ratio|share|gflops|_rate$|scaling")
_NEITHER = re.compile(r"estimate")  # best at 1
# What was asked for, not what was found.
_SETTINGS = (
    *(
        "layers",
        "hidden",
        "heads",
        "groups",
        "ffn",
        "vocab",
        "max_tokens",
        "micro_batch_tokens",
        "think_s",
        "threads",
        "samples",
        "answers",
        "prefix",
    ),
    *("rows", "prompts", "single_rows", "batch", "pre_seq_len", "steps", "parameters"),
)


def figures(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """Name, joined by dots, and value of every number; the median of a list of numbers."""
    if isinstance(value, dict):
        for key, each in value.items():
            if key not in _SETTINGS or isinstance(each, dict):
                yield from figures(each, (*path, str(key)))
    elif isinstance(value, list) and value and all(_is_number(each) for each in value):
        yield ".".join(path), sorted(value)[len(value) // 2]
    elif _is_number(value):
        yield ".".join(path), value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def direction(name: str) -> int:
    """1: larger is better, -1: smaller is better, 0: not known. The last word of a path that says so decides."""
    for word in reversed(name.split(".")):
        if _NEITHER.search(word):
            return 0
        if _RATE.search(word) and not _COST.match(word):
            return 1
        if _COST.search(word):
            return -1
    return 0


def compare(old: dict, new: dict, above: float) -> list[tuple[str, float, float, float, str]]:
    """Name, old, new, new / old, and a word: better, worse, or nothing."""
    before, after = dict(figures(old.get("results", old))), dict(figures(new.get("results", new)))
    lines = []
    for name, was in before.items():
        if name not in after or not was or "took_seconds" in name:
            continue
        ratio = after[name] / was
        judged = direction(name) if abs(ratio - 1) > above else 0
        word = "" if not judged else "better" if (ratio > 1) == (judged > 0) else "worse"
        lines.append((name, was, after[name], ratio, word))
    return lines


def read(path: Path) -> dict:
    """One run's figures, or exits with what is wrong with the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: can't be read as the output of benchmarks/all.py ({error})") from error
    if not isinstance(found, dict):
        raise SystemExit(f"{path}: expected the output of benchmarks/all.py, found {type(found).__name__}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--above", type=float, default=0.05, help="share of change that is judged")
    args = parser.parse_args(argv)
    old, new = read(args.old), read(args.new)
    for name in ("machine", "cores"):
        if old.get(name) != new.get(name):
            print(f"different {name}: {old.get(name)} and {new.get(name)}; the ratios say little")
    for name, found in (("old", old), ("new", new)):
        if found.get("load", 0) > found.get("cores", 1):
            print(f"{name}: the machine was busy (load {found['load']} on {found['cores']} cores)")
    lines = compare(old, new, args.above)
    if not lines:
        raise SystemExit(f"{args.old} and {args.new} have no figure in common")
    width = max(len(name) for name, *_ in lines)
    for name, was, now, ratio, word in lines:
        print(f"{name:<{width}}  {was:>12,.5g} {now:>12,.5g}  {ratio:6.3f}  {word}".rstrip())
    missing = sorted(
        {name for name, _ in figures(old.get("results", old))} ^ {name for name, _ in figures(new.get("results", new))}
    )
    if missing:
        print(f"only in one of them: {', '.join(missing[:10])}{' …' if len(missing) > 10 else ''}")
    print(json.dumps({name: round(ratio, 3) for name, _, _, ratio, _ in lines}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
