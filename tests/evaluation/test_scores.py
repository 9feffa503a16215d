"""The official scores, digit by digit, and the texts on which the official code crashes or crawls."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jieba
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

from ptuning.errors import DataError
from ptuning.evaluation.scores import OFFICIAL, mean_scores, official_scores

GOLDEN = Path(__file__).parent.parent / "golden"
ROWS = [json.loads(line) for line in (GOLDEN / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
ZERO = dict.fromkeys(OFFICIAL, 0.0)


def official(prediction: str, reference: str) -> dict[str, float]:
    """`compute_metrics` of the official main.py for one row."""
    words = [" ".join(jieba.cut(text)) for text in (prediction, reference)]
    result = {k: round(v["f"] * 100, 4) for k, v in Rouge().get_scores(*words)[0].items()}
    bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=SmoothingFunction().method3)
    return {**result, "bleu-4": round(bleu * 100, 4)}


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_golden_rows(row):
    assert official_scores(row["predict"], row["label"]) == {name: row[name] for name in OFFICIAL}


def test_golden_mean_of_the_rows_rounded_scores():
    expected = json.loads((GOLDEN / "metrics_mean.json").read_text(encoding="utf-8"))
    assert set(expected) == set(OFFICIAL)
    assert mean_scores(official_scores(row["predict"], row["label"]) for row in ROWS) == pytest.approx(
        expected, abs=1e-12
    )


def test_equal_to_the_official_code_on_texts_with_odd_spaces_and_sentence_ends():
    generator = random.Random(0)
    alphabet = "的好衣服我们。！？?….”’ \n\t\x1c\x85\u3000\u200b\ufeffab1,，\x00😀\r."
    texts = ("".join(generator.choices(alphabet, k=generator.randint(1, 25))) for _ in range(3000))
    pairs = [(a, b) for a, b in zip(texts, texts, strict=False) if a.strip() and b.strip()]
    assert len(pairs) > 1400
    assert [official_scores(a, b) for a, b in pairs] == [official(a, b) for a, b in pairs]


@pytest.mark.parametrize("blank", ["", " ", "\n\t", "\u3000\x85\x1c"])
def test_a_blank_text_scores_zero_where_the_official_code_crashes(blank):
    with pytest.raises(ValueError, match="Hypothesis is empty"):
        official(blank, "白色的衣服")
    assert official_scores(blank, "白色的衣服") == ZERO
    assert official_scores("白色的衣服", blank) == ZERO
    assert official_scores(blank, blank) == ZERO


def test_the_order_of_prediction_and_reference_matters():
    assert official_scores("白色", "白色的衣服")["bleu-4"] < official_scores("白色的衣服", "白色")["bleu-4"]


@pytest.mark.parametrize(
    ("prediction", "reference", "rouge_l"),
    [
        ("好" * 1500, "好" * 1500, 100.0),
        ("好" * 1500, "白色的衣服", 0.0),
        (" ".join(f"w{i}" for i in range(4000)), " ".join(f"w{i}" for i in range(0, 4000, 2)), None),
    ],
)
def test_long_texts_take_no_time(prediction, reference, rouge_l):
    official_scores("好", "好")  # loads the dictionary
    start = time.perf_counter()
    scores = official_scores(prediction, reference)
    assert time.perf_counter() - start < 5  # rouge_chinese alone: about a minute and 4 GB for the last one
    if rouge_l is None:
        # jieba makes of n words 2n - 1 tokens, the spaces, which rouge_chinese drops: 4,000 and 2,000 words in common.
        rouge_l = round(100 * 2 * 2000 / (4000 + 2000), 4)
    assert scores["rouge-l"] == pytest.approx(rouge_l, abs=2e-4)


def test_mean_takes_each_metric_by_its_name():
    rows = [dict(zip(OFFICIAL, (1.0, 2.0, 3.0, 4.0), strict=True)), {**ZERO, "seconds": 9.0}]
    assert mean_scores(rows) == {"bleu-4": 0.5, "rouge-1": 1.0, "rouge-2": 1.5, "rouge-l": 2.0}


def test_mean_of_no_rows():
    with pytest.raises(DataError, match=r"^0 rows were scored, and a mean needs at least 1: check that the evaluation"):
        mean_scores([])


def test_libraries_are_imported_on_first_use_and_print_nothing(tmp_path):
    program = """
import io, sys
from ptuning.evaluation.scores import official_scores
assert not {"jieba", "nltk", "rouge_chinese"} & set(sys.modules), "not lazy"
sys.stdout = sys.stderr = io.StringIO()
official_scores("a", "b"), official_scores("衣", "衣服")
printed, sys.stdout = sys.stdout.getvalue(), sys.__stdout__
assert "jieba" in sys.modules
print(repr(printed))
"""
    # An empty temporary folder has no jieba cache, so that the dictionary is built, which jieba likes to report.
    result = subprocess.run(
        [sys.executable, "-W", "always", "-c", program],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "''\n"), result.stderr
    assert (tmp_path / "jieba.cache").is_file()
