"""Figures of many rows from sums over them, so that a resample of the rows costs a sum and not a new count.

95 % intervals come from resamples: a resample is a vector of how often each row was drawn, and all resamples together are
one matrix product. Corpus BLEU and chrF equal sacrebleu's own `corpus_score` with its default settings, BLEU with its
Chinese tokenizer (tests/evaluation/test_corpus.py).

Shapes: N rows, K statistics a row, R resamples.

Source: Efron and Tibshirani, "An introduction to the bootstrap" (1993), percentile interval; Koehn, "Statistical
significance tests for machine translation evaluation" (2004), the paired form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np

RESAMPLES = 1000
SEED = 42
_BLOCK = 4_000_000  # draws held in memory at a time

BLEU_COLUMNS = 10  # answer length, reference length, matches of 1 to 4 tokens, n-grams of 1 to 4 tokens
CHRF_ORDER = 6
CHRF_COLUMNS = 3 * CHRF_ORDER  # for 1 to 6 characters: n-grams of the answer, of the reference, matches
_BETA2 = 4  # chrF counts recall twice: beta 2, squared

Figure = Callable[[np.ndarray], np.ndarray]
"""(R, K) sums over the drawn rows → (R,) values; NaN where a resample has none."""


def resampled_sums(statistics: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Sums over rows drawn with replacement. The same seed and N draw the same rows, which is what makes two models'
    resamples a pair.

    Args:
        statistics: (N, K)

    Returns:
        (R, K)
    """
    rows = len(statistics)
    generator = np.random.default_rng(seed)
    step = max(_BLOCK // max(rows, 1), 1)
    blocks = []
    for start in range(0, resamples, step):
        drawn = (generator.integers(rows, size=rows) for _ in range(min(step, resamples - start)))
        times = np.array([np.bincount(draw, minlength=rows) for draw in drawn], dtype=np.float64)
        blocks.append(times @ statistics)
    return np.concatenate(blocks)


def percentile_interval(values: np.ndarray) -> list[float]:
    """[low, high], between which 95 % of the (R,) values lie, rounded to 4 places; NaNs don't count."""
    values = values[~np.isnan(values)]
    if not len(values):
        return [float("nan")] * 2
    low, high = np.percentile(values, [2.5, 97.5])
    return [round(float(low), 4), round(float(high), 4)]


def ratio(sums: np.ndarray) -> np.ndarray:
    """The Figure of a mean, column 0 a sum and column 1 a count: (R, 2) → (R,), NaN where nothing was counted."""
    return np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] != 0)


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
