"""Corpus BLEU and chrF from summed counts equal sacrebleu's own corpus_score."""

import json
import random

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from ptuning.evaluation.corpus import bleu, bleu_statistics, chrf, chrf_statistics
from tests.conftest import REPO, SHARED


def ours(pairs):
    return tuple(
        float(figure(count(pairs).sum(0, keepdims=True))[0])
        for figure, count in ((bleu, bleu_statistics), (chrf, chrf_statistics))
    )


def sacrebleu(pairs):
    predictions, references = zip(*pairs, strict=True)
    metrics = (BLEU(tokenize="zh"), CHRF())
    return tuple(metric.corpus_score(list(predictions), [list(references)]).score for metric in metrics)


def golden():
    rows = [json.loads(line) for line in (REPO / "tests/golden/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["predict"], row["label"]) for row in rows]


def adgen():
    file = SHARED / "adgen" / "dev.json"
    if not file.is_file():
        pytest.skip(f"{file} is not here: it is not part of the project")
    texts = [json.loads(line)["summary"] for line in file.read_text(encoding="utf-8").splitlines()]
    return list(zip(random.Random(0).sample(texts, len(texts)), texts, strict=True))


def noise():
    generator = random.Random(0)
    alphabet = "白色的衣服。，abc AB 12.5-!？\n　😀"
    texts = ["".join(generator.choices(alphabet, k=generator.randint(0, 12))) for _ in range(400)]
    return list(zip(texts[:200], texts[200:], strict=True))


@pytest.mark.parametrize("pairs", [golden, adgen, noise])
def test_equal_to_sacrebleu(pairs):
    assert ours(pairs()) == pytest.approx(sacrebleu(pairs()), abs=1e-9)


@pytest.mark.parametrize(
    "pairs",
    [
        [("白色的衣服", "白色的衣服")],
        [("白", "白色的衣服")],
        [("白色", "红")],
        [("", "白色的衣服")],
        [("", "白色"), ("白色的衣服很好看", "白色的裙子很好看")],
    ],
)
def test_equal_to_sacrebleu_on_few_and_short_texts(pairs):
    assert ours(pairs) == pytest.approx(sacrebleu(pairs), abs=1e-9)


def test_a_resample_is_the_corpus_with_its_rows_drawn():
    pairs = noise()
    drawn = np.random.default_rng(0).integers(len(pairs), size=len(pairs))
    for figure, count in ((bleu, bleu_statistics), (chrf, chrf_statistics)):
        times = np.bincount(drawn, minlength=len(pairs))
        expected = figure(count([pairs[i] for i in drawn]).sum(0, keepdims=True))
        assert figure((times @ count(pairs))[None]) == pytest.approx(expected)


def test_both_take_many_resamples_at_once():
    tables = bleu_statistics(noise()), chrf_statistics(noise())
    assert [table.shape for table in tables] == [(200, 10), (200, 18)]
    for figure, table in zip((bleu, chrf), tables, strict=True):
        sums = np.stack([table[:50].sum(0), table.sum(0), np.zeros(table.shape[1])])
        assert figure(sums).tolist() == [*figure(sums[:1]).tolist(), *figure(sums[1:2]).tolist(), 0.0]
