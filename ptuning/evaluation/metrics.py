"""Scores of one answer beside the official four: exact match, token F1, length ratio, and whether the answer loops."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

import numpy as np

from ptuning.evaluation.scores import METRICS, score

ROW_METRICS = (*METRICS, "exact_match", "token_f1", "length_ratio", "repeating")

# Characters that are words by themselves: CJK with its radicals and extensions, kana, bopomofo.
_CJK = "\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"(?=\w)[{_CJK}]|[^\W{_CJK}]+")

TAIL = 24  # characters at the end of an answer that a loop must cover at least half of


def row_scores(prediction: str, reference: str) -> dict[str, float]:
    """All scores of one answer.

    Returns:
        The keys of ROW_METRICS: the official four as `score` gives them; exact_match and repeating 0 or 100; token_f1
        from 0 to 100 and length_ratio from 0 (1 = as long as the reference), rounded to 4 places.
    """
    ratio = len(prediction.strip()) / max(len(reference.strip()), 1)
    return score(prediction, reference) | {
        "exact_match": 100.0 if prediction.strip() == reference.strip() else 0.0,
        "token_f1": round(100 * token_f1(prediction, reference), 4),
        "length_ratio": round(ratio, 4),
        "repeating": 100.0 if is_repeating(prediction) else 0.0,
    }


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
