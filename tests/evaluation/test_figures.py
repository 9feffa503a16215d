"""The figures of a whole predictions file."""

import json
import math
import random
import time

import numpy as np
import pytest

from ptuning.errors import DataError
from ptuning.evaluation.metrics import METRICS, row_scores, summarise
from ptuning.evaluation.scores import OFFICIAL, mean_scores
from tests.conftest import REPO, SHARED

LOSSES = {"answer_loss", "answer_perplexity"}


def line(prediction, reference, **more):
    values = {"labels": reference, "predict": prediction, "scores": row_scores(prediction, reference)}
    return values | {"tokens": len(prediction), "finished": True, "loss": None, "loss_tokens": 0} | more


@pytest.fixture(scope="module")
def golden_lines():
    rows = (REPO / "tests/golden/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line(row["predict"], row["label"]) for row in map(json.loads, rows)]


def test_the_official_four_are_the_golden_means(golden_lines):
    summary = summarise(golden_lines)
    expected = json.loads((REPO / "tests/golden/metrics_mean.json").read_text(encoding="utf-8"))
    assert {name: summary[name] for name in OFFICIAL} == pytest.approx(expected, abs=1e-12)
    assert {name: summary[name] for name in OFFICIAL} == mean_scores(row["scores"] for row in golden_lines)


def test_every_figure_has_an_interval_around_it(golden_lines):
    summary = summarise(golden_lines)
    assert list(summary) == [*(name for name in METRICS if name not in LOSSES), "rows", "tokens", "intervals"]
    assert list(summary["intervals"]) == [name for name in METRICS if name not in LOSSES]
    for name, (low, high) in summary["intervals"].items():
        assert low <= summary[name] + 1e-4 and summary[name] - 1e-4 <= high, name
    assert summary["intervals"]["bleu-4"][0] < summary["bleu-4"] < summary["intervals"]["bleu-4"][1]
    assert summary == summarise(golden_lines)
    json.dumps(summary, allow_nan=False)


def test_shares_lengths_and_losses():
    lines = [
        line("白色的衣服", "白色的衣服", loss=6.0, loss_tokens=6),
        line(" ", "白色的衣服", tokens=0, loss=4.0, loss_tokens=2),
        line("好看好看好看好看好看", "白色的衣服", finished=False),
        line("白色", "白色的裙子", loss=0.0, loss_tokens=2),
    ]
    summary = summarise(lines)
    assert (summary["exact_match"], summary["empty"], summary["cut"], summary["repeating"]) == (25.0, 25.0, 25.0, 25.0)
    assert summary["length_ratio"] == pytest.approx((1 + 0 + 2 + 0.4) / 4)
    assert (summary["rows"], summary["tokens"]) == (4, 4.25)
    assert summary["answer_loss"] == 1.0  # 10 over 10 tokens, and not the mean of 1, 2 and 0
    assert summary["answer_perplexity"] == pytest.approx(math.e, abs=1e-4)
    low, high = summary["intervals"]["answer_loss"]
    assert 0 <= low < 1 < high <= 2
    assert summary["intervals"]["answer_perplexity"] == pytest.approx([math.exp(low), math.exp(high)], abs=1e-2)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("prediction", ["白色的衣服", "", "好"])
def test_one_row_and_equal_rows(prediction, count):
    summary = summarise([line(prediction, "白色的衣服", loss=3.0, loss_tokens=6)] * count)
    for name, (low, high) in summary["intervals"].items():
        assert low == pytest.approx(high) == pytest.approx(summary[name], abs=1e-4), name
    json.dumps(summary, allow_nan=False)


def test_a_hopeless_loss_has_a_perplexity_that_json_can_hold():
    summary = summarise([line("白", "白", loss=5000.0, loss_tokens=5)])
    assert summary["answer_loss"] == 1000 and math.isfinite(summary["answer_perplexity"])


def test_no_rows():
    with pytest.raises(DataError, match=r"^0 rows were scored"):
        summarise([])


def test_adgens_size_takes_seconds():
    file = SHARED / "adgen" / "dev.json"
    if not file.is_file():
        pytest.skip(f"{file} is not here: it is not part of the project")
    texts = [json.loads(row)["summary"] for row in file.read_text(encoding="utf-8").splitlines()]
    shuffled = random.Random(0).sample(texts, len(texts))
    lines = [line(a, b) for a, b in zip(shuffled, texts, strict=True)]
    started = time.perf_counter()
    summary = summarise(lines)
    assert time.perf_counter() - started < 15  # 1.3 s on an idle core
    assert summary["rows"] == 1070
    error = 1.96 * np.std([row["scores"]["rouge-l"] for row in lines]) / math.sqrt(1070)
    middle = summary["rouge-l"]
    assert summary["intervals"]["rouge-l"] == pytest.approx([middle - error, middle + error], abs=0.15 * error)
