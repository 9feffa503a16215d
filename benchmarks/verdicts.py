"""How often `ptuning compare` finds a winner between two equal models. Prints one JSON line last.

    python benchmarks/verdicts.py output/demo/predictions_base.jsonl output/demo/predictions.jsonl

The two models' answers to each row are dealt to A and B by chance, so that neither is better; a metric's interval
that leaves 0 out is a false alarm.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from ptuning.evaluation.compare import compare
from ptuning.evaluation.predictions import read_predictions

LEFT_OUT = ("corpus_bleu", "answer_loss", "answer_perplexity")  # not a mean over rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path, help="predictions of one model")
    parser.add_argument("second", type=Path, help="of another, on the same rows")
    parser.add_argument("--rows", type=int, nargs="+", default=[5, 10, 20, 50, 100, 320])
    parser.add_argument("--times", type=int, default=300)
    args = parser.parse_args()
    pairs = list(zip(read_predictions(args.first), read_predictions(args.second), strict=True))
    draw, results = random.Random(0), {}
    for rows in tqdm(args.rows, unit="size"):
        alarms, any_metric = Counter(), 0
        for _ in range(args.times):
            dealt = [draw.sample(pair, 2) for pair in draw.sample(pairs, rows)]
            found = compare([first for first, _ in dealt], [second for _, second in dealt])
            false = [
                n for n, one in found.items() if n not in LEFT_OUT and not one["interval"][0] <= 0 <= one["interval"][1]
            ]
            alarms.update(false)
            any_metric += bool(false)
        counted = {name: round(100 * alarms[name] / args.times, 1) for name in found if name not in LEFT_OUT}
        results[rows] = {"any": round(100 * any_metric / args.times, 1), **counted}
    print(json.dumps({"benchmark": "verdicts", "times": args.times, "percent": results}))


if __name__ == "__main__":
    main()
