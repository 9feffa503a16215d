"""The official scores: ROUGE-1/2/L on jieba words and BLEU-4 on characters, in points from 0 to 100.

Source: `compute_metrics` in the official ChatGLM2-6B `ptuning/main.py`. Two differences, neither of which changes a
figure that the official script can compute: an empty prediction scores 0 (there it crashes), and the longest common
subsequence of ROUGE-L is counted in bits (there, in a table of n * m entries: 2,000 words take 7.5 s and 600 MB).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from ptuning.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

METRICS = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")


class _Libraries(NamedTuple):
    cut: Callable[[str], Iterator[str]]
    rouge: Any
    bleu: Callable[..., float]
    smoothing: Callable[..., Any]


@lru_cache(maxsize=1)
def _libraries() -> _Libraries:
    """jieba, rouge_chinese and nltk, imported on first use: together they take about a second."""
    with warnings.catch_warnings():
        # jieba and rouge_chinese have invalid escapes in their regular expressions, which newer Pythons complain about.
        warnings.simplefilter("ignore")
        import jieba
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        from rouge_chinese import Rouge
    jieba.setLogLevel(logging.CRITICAL)  # it reports on stderr that it builds its dictionary
    return _Libraries(jieba.cut, Rouge(metrics=["rouge-1", "rouge-2"]), sentence_bleu, SmoothingFunction().method3)


def score(prediction: str, reference: str) -> dict[str, float]:
    """Score one answer against its reference.

    Returns:
        The keys of METRICS, each from 0 to 100 and rounded to 4 places. All are 0 where either text is empty or
        whitespace only, which has no words to compare.
    """
    if not prediction.strip() or not reference.strip():
        return dict.fromkeys(METRICS, 0.0)
    libraries = _libraries()
    predicted_words = " ".join(libraries.cut(prediction))
    reference_words = " ".join(libraries.cut(reference))
    ngrams = libraries.rouge.get_scores(predicted_words, reference_words)[0]
    bleu = libraries.bleu([list(reference)], list(prediction), smoothing_function=libraries.smoothing)
    fractions = {
        "bleu-4": float(bleu),
        "rouge-1": ngrams["rouge-1"]["f"],
        "rouge-2": ngrams["rouge-2"]["f"],
        "rouge-l": _rouge_l(_rouge_tokens(predicted_words), _rouge_tokens(reference_words)),
    }
    return {name: round(fraction * 100, 4) for name, fraction in fractions.items()}


def mean_scores(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The corpus figure: for each of METRICS the mean of the rows' rounded scores, itself not rounded.

    numpy's mean as in the official script, so that the last digit agrees too.

    Raises:
        DataError: there are no rows.
    """
    import numpy as np

    scored = list(rows)
    if not scored:
        raise DataError("0 rows were scored, and a mean needs at least 1: check that the evaluation file has rows")
    return {name: float(np.mean([row[name] for row in scored])) for name in METRICS}


def _rouge_tokens(words: str) -> list[str]:
    """rouge_chinese's own tokens: it cuts the text into sentences and each sentence at single spaces."""
    sentences = (" ".join(sentence.split()) for sentence in _libraries().rouge.cut_sent(words) if sentence)
    return [token for sentence in sentences for token in sentence.split(" ")]


def _rouge_l(predicted: list[str], reference: list[str]) -> float:
    """F1 of the longest common subsequence, from 0 to 1, with rouge_chinese's 1e-8 in the denominator."""
    common = _common_subsequence(predicted, reference)
    precision, recall = common / len(predicted), common / len(reference)
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _common_subsequence(left: list[str], right: list[str]) -> int:
    """Length of the longest common subsequence, one row of the usual table at a time as the bits of one integer.

    Source: Hyyrö, "Bit-parallel LCS-length computation revisited" (2004).
    """
    positions: dict[str, int] = {}
    for index, token in enumerate(left):
        positions[token] = positions.get(token, 0) | 1 << index
    full = (1 << len(left)) - 1
    row = full  # a 0 bit is a place where the subsequence grows by one
    for token in right:
        matches = row & positions.get(token, 0)
        row = (row + matches | row - matches) & full
    return len(left) - row.bit_count()
