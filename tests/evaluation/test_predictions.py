"""Predictions survive a stop, and belong to what they were made with."""

import json
from dataclasses import replace

import pytest
import torch

from ptuning.data.encode import Encoder, Lengths
from ptuning.data.encoded import encode_split
from ptuning.data.formats import Columns
from ptuning.data.splits import load_split
from ptuning.evaluation.answers import GenerationOptions
from ptuning.evaluation.metrics import METRICS, Metric, scores_table
from ptuning.evaluation.model import LocalModel
from ptuning.evaluation.predictions import Questions, predict
from ptuning.families import family_of
from ptuning.generation import Engine
from ptuning.loading import load_model
from ptuning.methods.prefix.attach import attach_prefix, prefix_of
from ptuning.runs.lines import ResumableLines, delete_parts
from tests.end_to_end.conftest import MODEL, ROOT

OPTIONS = GenerationOptions(16)
FEW_AT_ONCE = GenerationOptions(16, batch_tokens=300)  # so that some rows end before others begin


def questions(template, count: int) -> Questions:
    file = str(ROOT / "data" / "advertise" / "dev.json")
    split = load_split("test", file, Columns("content", "summary"), max_samples=count)
    return Questions(split.records, encode_split(split, Encoder(template, Lengths(64, 16))).rows)


@pytest.fixture(scope="module")
def tools():
    model, tokenizer = load_model(MODEL)
    torch.manual_seed(0)
    attach_prefix(model, 16)
    template = family_of(model.config).template(tokenizer)
    return LocalModel(model), template, questions(template, 8)


@pytest.fixture(scope="module")
def whole(tools, tmp_path_factory):
    """The file and the scores of a run that was not stopped."""
    path = tmp_path_factory.mktemp("whole") / "predictions.jsonl"
    return path, predict(*tools, OPTIONS, 16, path)


def stop_after(monkeypatch, rows: int) -> None:
    """Ctrl-C when so many rows have ended."""
    step, ended = Engine.step, []

    def interrupted(self):
        if len(ended) >= rows:
            raise KeyboardInterrupt
        events = step(self)
        ended.extend(event for event in events if event.finish)
        return events

    monkeypatch.setattr(Engine, "step", interrupted)


def asked(monkeypatch) -> list:
    """The requests that reach the engine from now on."""
    add, requests = Engine.add, []

    def watched(self, request):
        requests.append(request)
        add(self, request)

    monkeypatch.setattr(Engine, "add", watched)
    return requests


def interrupt(run, path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            predict(*run, FEW_AT_ONCE, 16, path)
    assert not path.exists()
    return len(path.with_name("predictions.part0.jsonl").read_text(encoding="utf-8").splitlines()) - 1


def test_lines_have_what_scores_and_report_need(whole):
    path, scores = whole
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["index"] for line in lines] == list(range(8))
    assert {"prompt", "history", "labels", "predict", "scores", "tokens", "finished", "loss", "loss_tokens"} < set(
        lines[0]
    )
    assert scores["rows"] == 8 and scores["intervals"]["bleu-4"][0] <= scores["bleu-4"]
    delete_parts(path)
    assert [file.name for file in path.parent.iterdir()] == ["predictions.jsonl"]


def test_a_second_run_goes_on_where_the_first_stopped(tools, whole, tmp_path, monkeypatch):
    path = tmp_path / "predictions.jsonl"
    done = interrupt(tools, path)
    requests, said = asked(monkeypatch), []
    scores = predict(*tools, OPTIONS, 16, path, said.append)
    assert 0 < done < 8 and len(requests) == 8 - done
    assert said == [f"predictions.jsonl: {done} of 8 rows were answered before; going on with the others"]
    assert path.read_bytes() == whole[0].read_bytes() and scores == whole[1]


def test_a_stop_after_the_last_row_repeats_nothing(tools, whole, tmp_path, monkeypatch):
    """As when the base's rows are done and the tuned model's answers are stopped."""
    path = tmp_path / "predictions.jsonl"
    predict(*tools, OPTIONS, 16, path)
    requests = asked(monkeypatch)
    assert predict(*tools, OPTIONS, 16, path) == whole[1]
    assert requests == [] and path.read_bytes() == whole[0].read_bytes()


def test_losses_can_be_left_out(tools, whole, tmp_path):
    scores = predict(*tools, OPTIONS, 16, tmp_path / "predictions.jsonl", losses=False)
    losses = {"answer_loss", "answer_perplexity"}
    assert scores.keys() == whole[1].keys() - losses
    assert all(scores[name] == whole[1][name] for name in scores.keys() - {"intervals"})


def test_a_line_that_was_cut_off_is_answered_again(tools, whole, tmp_path):
    path = tmp_path / "predictions.jsonl"
    interrupt(tools, path)
    part = path.with_name("predictions.part0.jsonl")
    part.write_bytes(part.read_bytes()[:-30])
    predict(*tools, OPTIONS, 16, path)
    assert path.read_bytes() == whole[0].read_bytes()


@pytest.mark.parametrize("change", ["weights", "options", "rows", "reference", "metrics"])
def test_answers_of_something_else_are_thrown_away(tools, tmp_path, monkeypatch, change):
    model, template, asked_for = tools
    path = tmp_path / "predictions.jsonl"
    interrupt(tools, path)
    options = OPTIONS
    weight = prefix_of(model.model).embedding.weight
    before = weight.detach().clone()
    if change == "weights":
        with torch.no_grad():
            weight[0, 0] += 1
    elif change == "options":
        options = GenerationOptions(15)
    elif change == "rows":
        asked_for = questions(template, 7)
    elif change == "reference":  # behind what the rows' ids have of it
        records = list(asked_for.records)
        records[7] = replace(records[7], response=records[7].response + "。")
        asked_for = Questions(records, asked_for.rows)
    else:
        monkeypatch.setitem(METRICS, "new", Metric("new", "new", row=lambda prediction, reference: 1.0))
    requests = asked(monkeypatch)
    predict(model, template, asked_for, options, 16, path)
    assert len(requests) == len(asked_for.records)
    with torch.no_grad():
        weight.copy_(before)


def test_lines_of_several_processes_are_read_together(tmp_path):
    kept = ResumableLines(tmp_path / "predictions.jsonl", "key")
    for process in range(2):
        with kept.open(process) as file:
            file.write(json.dumps({"index": process}) + "\n")
    ResumableLines(tmp_path / "predictions.jsonl", "other").open(2).close()
    assert sorted(kept.read()) == [0, 1]
    kept.discard_others()
    assert len(list(tmp_path.glob("*.part*"))) == 2


def test_the_table_has_a_row_a_model(whole):
    text = scores_table({"base": whole[1], "tuned": whole[1]})
    head, base, tuned = text.splitlines()
    assert head.split()[:2] == ["BLEU-4", "ROUGE-1"] and base.startswith("base ") and tuned.startswith("tuned")
    assert len(head) == len(base) == len(tuned)
