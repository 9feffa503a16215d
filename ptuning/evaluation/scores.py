"""Scores of one answer: the official four, token F1, and whether the answer loops.

The official ones are ROUGE-1/2/L on jieba words and BLEU-4 on characters, in points from 0 to 100.

Source: `compute_metrics` in the official ChatGLM2-6B `ptuning/main.py`. Two differences, neither of which changes a
figure that the official script can compute: an empty prediction scores 0 (there it crashes), and the longest common
subsequence of ROUGE-L is counted in bits (there, in a table of n * m entries: 2,000 words take 7.5 s and 600 MB).
"""

from __future__ import annotations

import logging
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ptuning.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

OFFICIAL = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")
TAIL = 24  # characters at the end of an answer that a loop must cover at least half of

# Characters that are words by themselves: CJK with its radicals and extensions, kana, bopomofo.
_CJK = "\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"(?=\w)[{_CJK}]|[^\W{_CJK}]+")


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


@lru_cache(maxsize=1)  # the four metrics ask one after the other
def official_scores(prediction: str, reference: str) -> Mapping[str, float]:
    """Scores one answer against its reference.

    Returns:
        The keys of OFFICIAL, each from 0 to 100 and rounded to 4 places. All are 0 where either text is empty or
        whitespace only, which has no words to compare.
    """
    if not prediction.strip() or not reference.strip():
        return MappingProxyType(dict.fromkeys(OFFICIAL, 0.0))
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
    return MappingProxyType({name: round(fraction * 100, 4) for name, fraction in fractions.items()})


def mean_scores(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The corpus figure: for each of OFFICIAL the mean of the rows' rounded scores, itself not rounded.

    numpy's mean as in the official script, so that the last digit agrees too.

    Raises:
        DataError: there are no rows.
    """
    scored = list(rows)
    if not scored:
        raise DataError("0 rows were scored, and a mean needs at least 1: check that the evaluation file has rows")
    return {name: float(np.mean([row[name] for row in scored])) for name in OFFICIAL}


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


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the two bags of tokens, from 0 to 1. Two texts without tokens agree, one without disagrees with any other.

    Tokens are single Chinese characters and kana, and whole words and numbers of other scripts, in lower case;
    full-width letters count as ordinary ones, punctuation doesn't count. Characters and not jieba's words, so that no
    dictionary decides whether two answers agree.

    Source: SQuAD's F1 (Rajpurkar et al. 2016), over characters as in CMRC 2018 (Cui et al. 2019).
    """
    predicted, expected = Counter(_tokens(prediction)), Counter(_tokens(reference))
    if not predicted or not expected:
        return float(predicted == expected)
    return 2 * (predicted & expected).total() / (predicted.total() + expected.total())


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


def is_repeating(text: str) -> bool:
    """Whether the answer has ended in a loop: the same unit of characters over and over.

    A run is a stretch of the text in which a unit stands several times in a row; the last one may be incomplete. It
    is a loop if the unit stands there at least 12 times (a unit of 1 character), 4 times (2 to 7 characters) or 3 times
    (8 or more), if the stretch has at least 8 characters, and if it covers at least half of the last 24 characters of
    the answer (of the whole answer where that is shorter). Spaces around the answer don't count.

    So 好看好看好看好看 is a loop, and 哈哈哈, 一天一天 and a repetition in the middle of an answer are none. Loops that
    change a little each time, such as counting, aren't found.
    """
    codes = np.frombuffer(text.strip().encode("utf-32-le"), dtype=np.uint32)
    length = len(codes)
    tail = min(TAIL, length)
    for period in range(1, length // 3 + 1):
        times = 12 if period == 1 else 4 if period < 8 else 3
        if times * period > length:
            continue
        # Between two places that differ from the one a period before, the text repeats itself.
        breaks = np.flatnonzero(codes[period:] != codes[:-period]) + period
        ends = np.append(breaks, length)
        starts = np.append(0, breaks - period + 1)
        covered = ends - np.maximum(starts, length - tail)
        loops = (ends - starts >= max(times * period, 8)) & (2 * covered >= tail)
        for start, end in zip(starts[loops], ends[loops], strict=True):
            # 好好好好好好好好 is 8 times one character and not 4 times two.
            if period == 1 or np.any(codes[start:end] != codes[start]):
                return True
    return False
