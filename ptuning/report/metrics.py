"""Names, order and direction of the scores: what evaluation says of its figures, and of the log's."""

from collections.abc import Iterable

from ptuning.evaluation.metrics import METRICS

QUALITY = ("bleu-4", "rouge-1", "rouge-2", "rouge-l", "corpus_bleu", "chrf", "exact_match", "token_f1")
# What evaluation logs besides scores.
BOOKKEEPING = ("rows", "seconds", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")

_NAMES = {name: figure.label for name, figure in METRICS.items()} | {
    "tokens": "tokens an answer",
    "rows": "rows",
    "seconds": "seconds",
    "eval_loss": "eval loss",
    "eval_perplexity": "eval perplexity",
    "unfinished": "unfinished",  # until evaluation counted them as "cut %"
}
_DIRECTIONS = {"higher": 1, "lower": -1}
_LOGGED_LOWER = ("eval_loss", "eval_perplexity")


def metric_name(key: str) -> str:
    """How the page calls a metric; one it doesn't know keeps its key."""
    short = key.removeprefix("eval_")
    return _NAMES.get(key) or _NAMES.get(short, short)


def better(key: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither."""
    if key in _LOGGED_LOWER:
        return -1
    figure = METRICS.get(key.removeprefix("eval_"))
    return _DIRECTIONS.get(figure.better, 0) if figure else 0


def decimals(key: str) -> int | None:
    """How many decimals a column of it is shown with; None: as many as the figure needs."""
    short = key.removeprefix("eval_")
    return 2 if short in METRICS and not short.startswith("answer_") else None


def in_order(keys: Iterable[str]) -> list[str]:
    """Known metrics in evaluation's order, others after them."""
    order = {key: i for i, key in enumerate(_NAMES)}
    return sorted(dict.fromkeys(keys), key=lambda key: order.get(key, len(order)))
