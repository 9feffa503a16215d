"""Corpus BLEU and chrF from sums over rows, so that a resample of the rows costs a sum and not a new count.

Both equal sacrebleu's own `corpus_score` with its default settings, BLEU with its Chinese tokenizer
(tests/evaluation/test_corpus.py).

Shapes: N rows, R resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

BLEU_COLUMNS = 10  # answer length, reference length, matches of 1 to 4 tokens, n-grams of 1 to 4 tokens
CHRF_ORDER = 6
CHRF_COLUMNS = 3 * CHRF_ORDER  # for 1 to 6 characters: n-grams of the answer, of the reference, matches
_BETA2 = 4  # chrF counts recall twice: beta 2, squared


@lru_cache(maxsize=1)
def _bleu():
    """sacrebleu, imported on first use. effective_order only keeps it from warning about single sentences."""
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize="zh", effective_order=True)


def bleu_statistics(pairs: Iterable[tuple[str, str]]) -> np.ndarray:
    """Counts that sacrebleu's BLEU is made of.

    Args:
        pairs: N (prediction, reference).

    Returns:
        (N, 10)
    """
    rows = (_bleu().sentence_score(prediction, [reference]) for prediction, reference in pairs)
    table = [[row.sys_len, row.ref_len, *row.counts, *row.totals] for row in rows]
    return np.array(table, dtype=np.float64).reshape(-1, BLEU_COLUMNS)


def bleu(sums: np.ndarray) -> np.ndarray:
    """Corpus BLEU from 0 to 100 with exponential smoothing: (R, 10) summed counts → (R,)."""
    scores = []
    for row in sums:
        answer, reference, *counts = (int(count) for count in row)
        score = _bleu().compute_bleu(counts[:4], counts[4:], answer, reference, smooth_method="exp")
        scores.append(score.score)
    return np.array(scores)


def chrf_statistics(pairs: Iterable[tuple[str, str]]) -> np.ndarray:
    """Counts that chrF is made of: character n-grams without spaces.

    Args:
        pairs: N (prediction, reference).

    Returns:
        (N, 18)

    Source: Popović, "chrF: character n-gram F-score" (2015), as in sacrebleu 2 (whose counts aren't public).
    """
    table = []
    for prediction, reference in pairs:
        predicted, expected = "".join(prediction.split()), "".join(reference.split())
        row = []
        for n in range(1, CHRF_ORDER + 1):
            left, right = _ngrams(predicted, n), _ngrams(expected, n)
            matches = sum(min(count, right[ngram]) for ngram, count in left.items() if ngram in right)
            # As sacrebleu: an answer's n-grams don't count against it where the reference is too short to have any.
            row += [left.total() if right else 0, right.total(), matches]
        table.append(row)
    return np.array(table, dtype=np.float64).reshape(-1, CHRF_COLUMNS)


def _ngrams(text: str, n: int) -> Counter:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def chrf(sums: np.ndarray) -> np.ndarray:
    """chrF2 from 0 to 100: (R, 18) summed counts → (R,). Orders that no text is long enough for are left out."""
    answer, reference, matches = np.moveaxis(sums.reshape(-1, CHRF_ORDER, 3), -1, 0)
    used = (answer > 0) & (reference > 0)
    orders = np.maximum(used.sum(1), 1)
    precision = np.where(used, matches / np.maximum(answer, 1), 0).sum(1) / orders
    recall = np.where(used, matches / np.maximum(reference, 1), 0).sum(1) / orders
    weighted = _BETA2 * precision + recall
    return 100 * (1 + _BETA2) * precision * recall / np.where(weighted > 0, weighted, 1)
