"""A metric is entered in one list and appears everywhere."""

import json

import pytest

from ptuning.evaluation.compare import compare, compare_command
from ptuning.evaluation.metrics import (
    METRICS,
    Metric,
    add_metric,
    ranking,
    row_metrics,
    row_scores,
    scores_table,
    shown_in,
    summarise,
)
from ptuning.evaluation.predictions import read_predictions
from ptuning.report.page import render_run
from ptuning.report.read import read_run

NEW = Metric(
    "full_stops",
    "full stops",
    better="lower",
    row=lambda prediction, reference: float(prediction.count("。")),
    decimals=3,
    shown=("console", "quality", "headline", "answer"),
    rank=9,
)


@pytest.fixture
def new():
    add_metric(NEW)
    yield NEW.name
    del METRICS[NEW.name]


def lines(answers, scored=True):
    found = []
    for index, answer in enumerate(answers):
        line = {"index": index, "prompt": "问", "labels": "白色。", "predict": answer, "tokens": 3, "finished": True}
        found.append(line | ({"scores": row_scores(answer, "白色。")} if scored else {"scores": {"bleu-4": 1.0}}))
    return found


def test_it_appears_everywhere(new, tmp_path, capsys):
    assert row_scores("白。色。", "白色。")[new] == 2.0
    summary = summarise(lines(["白。色。", "白色", "白色。", "好。"]))
    assert summary[new] == 1.0 and summary["intervals"][new][0] < 1 < summary["intervals"][new][1]

    head, row = scores_table({"tuned": summary}).splitlines()
    at = head.index("full stops")
    assert row[at : at + len("full stops")].strip() == "1.000"

    assert compare(lines(["白。色。"] * 30), lines(["白色"] * 30))[new]["better"] == "b"
    for name, answer in (("a", "白。色。"), ("b", "白色")):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines([answer] * 30))
        (tmp_path / name).write_text(text, encoding="utf-8")
    compare_command([str(tmp_path / "a"), str(tmp_path / "b")])
    (shown,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("full stops"))
    assert "-2.000" in shown and shown.endswith("B is better")


def test_a_file_that_was_written_before_it_is_scored_again(new, tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines(["好。"], scored=False)), encoding="utf-8")
    assert read_predictions(path)[0]["scores"][new] == 1.0


def test_the_report_finds_it_by_its_attributes(new):
    for place in ("console", "quality", "headline", "answer"):
        assert shown_in(place)[-1] is NEW
    assert ranking()[0] is NEW and row_metrics()[-1] is NEW


def test_the_report_shows_it(new, tmp_path):
    scored = lines(["白。色。", "白色", "白色。"])
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in scored)
    (tmp_path / "predictions.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "metrics.json").write_text(json.dumps({"tuned": summarise(scored)}), encoding="utf-8")
    run = read_run(tmp_path)
    assert run.predictions.metric == new
    page = render_run(run)
    assert page.count("full stops") >= 5  # in tables, figures and beside answers
    assert 'class="chip">full stops' in page and "1.000" in page


def test_what_the_report_shows_now():
    def names(metrics):
        return [metric.name for metric in metrics]

    four = ["bleu-4", "rouge-1", "rouge-2", "rouge-l"]
    assert names(shown_in("answer")) == four
    assert names(shown_in("quality")) == [*four, "corpus_bleu", "chrf", "exact_match", "token_f1"]
    assert names(shown_in("headline")) == ["bleu-4", "rouge-l"]
    assert names(ranking()) == ["rouge-l", "bleu-4", "rouge-1", "token_f1"]
    losses = [name for name, metric in METRICS.items() if metric.from_losses]
    assert losses == ["answer_loss", "answer_perplexity"]
    assert all((metric.decimals is None) == metric.from_losses for metric in METRICS.values())
    assert not {name for metric in METRICS.values() for name in metric.shown} - {
        "console",
        "quality",
        "headline",
        "answer",
    }
