"""Names, order and direction of the scores."""

from collections.abc import Iterable

NAMES = {
    "bleu-4": "BLEU-4",
    "rouge-1": "ROUGE-1",
    "rouge-2": "ROUGE-2",
    "rouge-l": "ROUGE-L",
    "corpus_bleu": "corpus BLEU",
    "chrf": "chrF",
    "exact_match": "exact match",
    "token_f1": "token F1",
    "answer_loss": "loss of the reference",
    "answer_perplexity": "perplexity of the reference",
    "length_ratio": "length, answer / reference",
    "empty": "empty answers",
    "cut": "answers cut at the limit",
    "unfinished": "answers cut at the limit",
    "repeating": "answers that repeat themselves",
    "tokens": "tokens an answer",
    "rows": "rows",
    "seconds": "seconds",
    "eval_loss": "eval loss",
    "eval_perplexity": "eval perplexity",
}
QUALITY = ("bleu-4", "rouge-1", "rouge-2", "rouge-l", "corpus_bleu", "chrf", "exact_match", "token_f1")
_LOWER = {"answer_loss", "answer_perplexity", "eval_loss", "eval_perplexity", "empty", "cut", "unfinished", "repeating"}
# What evaluation logs besides scores.
BOOKKEEPING = ("rows", "seconds", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def metric_name(key: str) -> str:
    """How the page calls a metric; one it doesn't know keeps its key."""
    if key in NAMES:
        return NAMES[key]
    short = key.removeprefix("eval_")
    return NAMES.get(short, short)


def better(key: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither."""
    key = key if key in _LOWER else key.removeprefix("eval_")
    return 1 if key in QUALITY else -1 if key in _LOWER else 0


def in_order(keys: Iterable[str]) -> list[str]:
    """Known metrics in the order of NAMES, others after them."""
    order = {key: i for i, key in enumerate(NAMES)}
    return sorted(dict.fromkeys(keys), key=lambda key: order.get(key, len(order)))
